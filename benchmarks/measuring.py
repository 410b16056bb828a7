"""What a measurement costs beside its floor and beside the published way: ``python benchmarks/measuring.py``.

On a Llama of random weights, in one process and in turns, on the same rows:

``floor``      the same batches through the same model: a forward and a backward of activations from the first edited
               module on, and nothing else
``ours``       ``measure_live`` on them
``published``  the way of arXiv 2603.03995, stated anew: a forward and a full backward hook on every edited LoRA layer,
               gradients of all LoRA weights, logits at every position, the batch's mean loss, rows two at a time in
               the order of the file. The paper's four policies each measure on their own.

Medians over rounds. The sensitivities of both ways are held against each other: a published batch is a mean over its
tokens, so ours are weighted so for the comparison. On a CPU the time is the process's own, which a busy machine
stretches less; ``--wall`` takes the clock's.

``--profile`` says instead where the time of ``ours`` goes. The profiler stretches it, Python above all.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_surgery import policies
from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import Batch, Tokenized, TokenizedExample, batches
from spectral_surgery.live import Live, Probe
from spectral_surgery.measurement import Measurement
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import answer_loss
from spectral_surgery.selection import Selection, select
from spectral_surgery.tables import table

FOUR = ("abs_select", "smooth_abs", "grad_direction", "random_index")
"""The paper's policies."""
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {
    "gates": ("gates", "_GateBackward"),
    "loss": ("_TokenLosses", "_TokenLossesBackward"),
    "attention": ("aten::scaled_dot_product_attention", "ScaledDotProduct"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
}
"""Beginnings of the names under which the profiler counts an operation, or one that it is part of."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest difference of the two ways' sensitivities, relative to a module's largest."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    output: Path = Path("build/benchmark-measure.json")
    """File for all figures."""
    hidden: int = 768
    """Width of the model; its feed-forward part is 2.75 times as wide."""
    layers: int = 12
    """Transformer layers."""
    vocabulary: int = 32000
    """Tokens."""
    rank: int = 16
    """LoRA rank, of all seven kinds of modules."""
    modules: tuple[str, ...] = ("auto",)
    """Modules that are measured."""
    examples: int = 32
    """Rows."""
    length: int = 256
    """Tokens of the longest row; lengths are spread evenly between an eighth of it and this."""
    answer: float = 0.5
    """Share of a row that is its answer."""
    token_budget: int = 512
    """Tokens in a batch of ours and of the floor."""
    rounds: int = 3
    """How often each way is timed, after once to warm up."""
    dtype: str = "float32"
    """Of the base model."""
    device: str = "cpu"
    """Where it runs."""
    threads: int = 1
    """Threads on a CPU."""
    wall: bool = False
    """Take the clock's time, not the process's own. Always so on an accelerator."""
    profile: bool = False
    """Say where the time of ours goes, and nothing else."""


def adapted(sizes: Sizes, folder: Path | None = None) -> Live:
    """Returns a random Llama with a random adapter; the base is also saved in the folder, where there is one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(sizes.hidden // 64, 1),
        num_key_value_heads=max(sizes.hidden // 192, 1) if sizes.hidden % 192 == 0 else max(sizes.hidden // 64, 1),
        vocab_size=sizes.vocabulary,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config).to(getattr(torch, sizes.dtype)).eval()
    if folder:
        base.save_pretrained(folder / "base")
    lora = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=KINDS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval().to(sizes.device)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    adapter = Adapter.from_model(model)
    return Live(model, adapter, paths=select(adapter.updates, Selection(modules=sizes.modules)))


def rows(sizes: Sizes) -> Tokenized:
    """Returns random rows of different lengths in random order."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(max(sizes.length // 8, 4), sizes.length, sizes.examples).astype(int)
    found = []
    for number, length in enumerate(rng.permutation(lengths)):
        ids = tuple(int(token) for token in rng.integers(0, sizes.vocabulary, length))
        found.append(TokenizedExample(ids, max(int(length * (1 - sizes.answer)), 1), str(number)))
    return Tokenized(found, 0)


def floor(live: Live, made: list[Batch]) -> None:
    """Runs every batch forward, and backward as far as the first edited module."""

    def start(module: Any, inputs: Any, out: Tensor) -> Tensor:
        return out if out.requires_grad else out.requires_grad_()

    layers = [live.model.get_base_model().get_submodule(path) for path in live.paths]
    handles = [layer.register_forward_hook(start) for layer in layers]
    try:
        with live.still():
            for batch in made:
                answer_loss(live.model, batch.to(live.device)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()


def published(live: Live, tokenized: Tokenized, size: int = 2) -> dict[str, np.ndarray]:
    """Returns the sum over batches of each module's g, as the paper's program measures it."""
    spectra = {path: (s.U.float().to(live.device), s.Vh.float().to(live.device)) for path, s in live.spectra.items()}
    sums = {path: torch.zeros(len(live.spectra[path].S)) for path in live.paths}
    seen: dict[str, Tensor] = {}
    state: dict[str, Any] = {}

    def forward(path: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            seen[path] = (inputs[0] * state["mask"][..., None].to(inputs[0].dtype)).detach()

        return hook

    def backward(path: str, scale: float) -> Callable[..., None]:
        def hook(module: Any, by_inputs: Any, by_outputs: Any) -> None:
            u, vh = spectra[path]
            along = by_outputs[0].float().flatten(0, 1) @ u
            sums[path] += (scale * (along * (seen.pop(path).float().flatten(0, 1) @ vh.T)).sum(0)).cpu()

        return hook

    handles, updates = [], live.adapter.updates
    for path in live.paths:
        layer = live.model.get_base_model().get_submodule(path)
        handles.append(layer.register_forward_hook(forward(path)))
        handles.append(layer.register_full_backward_hook(backward(path, updates[path].scale)))
    weights = [weight for name, weight in live.model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in in_order(tokenized, size):
            batch = batch.to(live.device)
            state["mask"] = batch.attention_mask
            live.model.zero_grad(set_to_none=True)
            live.model(**batch.inputs, labels=batch.labels, use_cache=False).loss.backward()
    finally:
        live.model.zero_grad(set_to_none=True)
        for weight in weights:
            weight.requires_grad_(False)
        for handle in handles:
            handle.remove()
    return {path: value.double().numpy() for path, value in sums.items()}


def in_order(tokenized: Tokenized, size: int) -> list[Batch]:
    """Returns batches of so many rows in the order of the file."""
    found = []
    for start in range(0, len(tokenized.examples), size):
        piece = tokenized.examples[start : start + size]
        (batch,) = batches(Tokenized(piece, 0), batch_size=size)
        found.append(
            Batch(batch.input_ids, batch.attention_mask, batch.labels, tuple(start + i for i in batch.indices))
        )
    return found


def difference(ours: Measurement, theirs: dict[str, np.ndarray], tokenized: Tokenized) -> float:
    """Returns the largest difference of both ways' sums, relative to a module's largest."""
    weight = np.zeros(len(tokenized.examples))
    for batch in in_order(tokenized, 2):
        tokens = (batch.labels[:, 1:] != -100).sum(1).double().numpy()
        weight[list(batch.indices)] = tokens / tokens.sum()
    worst = 0.0
    for path, module in ours.modules.items():
        summed = (weight[:, None] * module.gate_gradient).sum(0) / module.S
        worst = max(worst, float(np.abs(summed - theirs[path]).max() / np.abs(theirs[path]).max()))
    return worst


def timed(function: Callable[[], Any], sizes: Sizes) -> tuple[float, Any]:
    """Returns seconds and the result."""
    clock = time.perf_counter if sizes.wall or sizes.device != "cpu" else time.process_time
    synchronize(sizes)
    start = clock()
    result = function()
    synchronize(sizes)
    return clock() - start, result


def synchronize(sizes: Sizes) -> None:
    """Waits for the accelerator."""
    if sizes.device != "cpu":
        torch.accelerator.synchronize()


def in_turns(ways: dict[str, Callable[[], Any]], sizes: Sizes) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Returns every way's seconds, a round after another, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(sizes.rounds + 1):
        for name, way in ways.items():
            spent, results[name] = timed(way, sizes)
            if number:
                seconds[name].append(spent)
    return seconds, results


def measuring(live: Live, tokenized: Tokenized, sizes: Sizes) -> dict[str, Any]:
    """Returns times of the three ways, and how far the sensitivities differ."""
    made = batches(tokenized, token_budget=sizes.token_budget)
    spectra, _ = timed(lambda: live.spectra, sizes)
    seconds, results = in_turns(
        {
            "floor": lambda: floor(live, made),
            "ours": lambda: measure_live(live, made),
            "published": lambda: published(live, tokenized),
        },
        sizes,
    )
    worst = difference(results["ours"], results["published"], tokenized)
    four, _ = timed(lambda: [policies.gates(policies.parse(name), results["ours"]) for name in FOUR], sizes)
    return {"seconds": seconds, "spectra": spectra, "policies": four, "difference": worst, "batches": len(made)}


def printed(found: dict[str, Any]) -> str:
    """Returns the tables."""
    middle = {name: statistics.median(times) for name, times in found["measuring"]["seconds"].items()}
    ours = middle["ours"]
    lines = [
        [name, f"{value:.2f}", f"{value / middle['floor']:.3f}", f"{value / ours:.2f}"]
        for name, value in middle.items()
    ]
    four = 4 * middle["published"]
    whole = ours + found["measuring"]["spectra"] + found["measuring"]["policies"]
    lines.append(["ours, four policies", f"{whole:.2f}", f"{whole / middle['floor']:.3f}", f"{whole / ours:.2f}"])
    lines.append(["published, four (4 x)", f"{four:.2f}", f"{four / middle['floor']:.3f}", f"{four / ours:.2f}"])
    text = table(["measuring", "s", "/ floor", "/ ours"], lines)
    text += f"\nLargest difference of the sensitivities, of a module's largest: {found['measuring']['difference']:.1e}"
    text += f"\nFour policies: {four / whole:.2f} times faster than the published way; spectra, once: "
    text += (
        f"{found['measuring']['spectra']:.2f} s; gates of four policies: {1e3 * found['measuring']['policies']:.1f} ms"
    )
    return text


def profiled(live: Live, tokenized: Tokenized, sizes: Sizes) -> dict[str, float]:
    """Returns the seconds of every part of one measurement, on a CPU."""
    made, outputs = batches(tokenized, token_budget=sizes.token_budget), Probe.outputs

    def marked(*args: Any) -> Tensor:
        with record_function("gates"):
            return outputs(*args)

    measure_live(live, made)
    with patch.object(Probe, "outputs", marked), profile(activities=[ProfilerActivity.CPU]) as found:
        whole, _ = timed(lambda: measure_live(live, made), replace(sizes, wall=True))
    seconds = dict.fromkeys([*PARTS, "other operations"], 0.0)
    for event in found.events():
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6
    return {**seconds, "Python and the rest": whole - sum(seconds.values())}


def part_of(event: Any) -> str:
    """Returns the first part that an operation or what it is within belongs to."""
    names = []
    while event is not None:
        names.append(event.name.removeprefix("autograd::engine::evaluate_function: "))
        event = event.cpu_parent
    belongs = (part for part, starts in PARTS.items() if any(name.startswith(starts) for name in names))
    return next(belongs, "other operations")


def shares(seconds: dict[str, float]) -> str:
    """Returns the table of a profile."""
    whole = sum(seconds.values())
    lines = [[name, f"{value:.2f}", f"{100 * value / whole:.1f} %"] for name, value in seconds.items()]
    return table(["where ours goes", "s", "share"], lines)


def described(live: Live, tokenized: Tokenized, sizes: Sizes) -> dict[str, Any]:
    """Returns what was measured, and on what."""
    return {
        "sizes": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(sizes).items()},
        "machine": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
        },
        "parameters": sum(weight.numel() for weight in live.model.parameters()),
        "tokens": sum(len(example.input_ids) for example in tokenized.examples),
    }


def told(found: dict[str, Any], text: str, sizes: Sizes) -> None:
    """Prints the tables and keeps the figures."""
    print(f"{found['parameters'] / 1e6:.0f}M parameters, {found['tokens']} tokens in {sizes.examples} rows\n\n{text}")
    sizes.output.parent.mkdir(parents=True, exist_ok=True)
    sizes.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Times everything, prints tables and keeps the figures."""
    sizes = tyro.cli(Sizes, description=__doc__)
    torch.set_num_threads(sizes.threads)
    live, tokenized = adapted(sizes), rows(sizes)
    found = described(live, tokenized, sizes)
    if sizes.profile:
        found["profile"] = profiled(live, tokenized, sizes)
        told(found, shares(found["profile"]), sizes)
        return
    found["measuring"] = measuring(live, tokenized, sizes)
    told(found, printed(found), sizes)
    if not found["measuring"]["difference"] <= TOLERANCE[getattr(torch, sizes.dtype)]:
        raise SystemExit("error: the two ways' sensitivities differ by more than rounding.")


if __name__ == "__main__":
    main()
