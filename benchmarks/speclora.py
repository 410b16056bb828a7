"""Step time and memory of SpecLoRA beside plain LoRA and the naive mask: ``python benchmarks/speclora.py``.

A Llama of random weights does whole training steps (forward, backward, AdamW) with four kinds of adapters. Times are
taken in turns within one process, so that what else the machine does meets all kinds alike, and are printed as ratios
to plain LoRA of the same rank, with the median over rounds; on a CPU it is the process's own time, which a busy
machine stretches less. "Saved" is what autograd keeps from the forward for the backward pass. "Peak" is how far one
step's memory rises above what the model takes: on an accelerator as torch counts it, on a Linux CPU the rise of the
resident set of a process of its own, in which every tensor of 64 KiB or more goes back to the system when it is freed.

Directions are random orthonormal ones here: which ones they are makes no difference to time or memory, and their SVD
would take longer than everything else.

``naive`` multiplies the weight by Gamma in every forward pass, as the formula reads.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_surgery.speclora import SpecLoraConfig
from spectral_surgery.tables import table

KINDS = ("lora", "first", "random", "svd", "naive")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    hidden: int = 1024
    """Width of the model; its feed-forward part is 2.75 times as wide."""
    layers: int = 2
    """Transformer layers."""
    rows: int = 4
    """Texts in a batch."""
    tokens: int = 128
    """Tokens in a text."""
    rank: int = 16
    """LoRA rank."""
    k: int = 200
    """Scaled rows or directions of a module."""
    rounds: int = 11
    """Steps of each kind that are timed."""
    dtype: str = "float32"
    """Of the base model."""
    device: str = "cpu"
    """Where it runs."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    kinds: tuple[str, ...] = KINDS
    """What is compared; with lora first."""
    peak_of: str | None = None
    """Print only the peak of this kind; the benchmark calls itself so."""


class Naive(nn.Module):
    """A linear layer that multiplies its weight by Gamma, beside its LoRA layer."""

    def __init__(self, base: nn.Linear, k: int) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros(k, 1, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(Gamma * W) x + b``."""
        gamma = torch.cat([1 + self.delta, self.delta.new_ones(len(self.base.weight) - len(self.delta), 1)])
        return nn.functional.linear(x, gamma.to(x.dtype) * self.base.weight, self.base.bias)


def build(kind: str, sizes: Sizes) -> PeftModel:
    """Returns a model with one kind of adapter, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=sizes.hidden,
        intermediate_size=11 * sizes.hidden // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        num_key_value_heads=sizes.hidden // 128,
    )
    base = LlamaForCausalLM(config).to(sizes.device, getattr(torch, sizes.dtype))
    lora: dict[str, Any] = dict(r=sizes.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    if kind in ("lora", "naive"):
        model = get_peft_model(base, LoraConfig(**lora))
    elif kind == "svd":
        model = get_peft_model(base, SpecLoraConfig(**lora, k=sizes.k, basis="svd", init_basis=False))
        for name, U in model.named_buffers():
            if name.endswith(".U"):
                U.copy_(torch.linalg.qr(torch.randn(U.shape, device=U.device))[0])
    else:
        model = get_peft_model(base, SpecLoraConfig(**lora, k=sizes.k, rows=kind))
    if kind == "naive":
        for module in list(model.modules()):
            if hasattr(module, "lora_A"):
                module.base_layer = Naive(module.base_layer, min(sizes.k, module.out_features))
    if sizes.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def stepper(model: PeftModel, sizes: Sizes) -> Callable[[], None]:
    """Returns a function that does one training step."""
    ids = torch.randint(0, 512, (sizes.rows, sizes.tokens), device=sizes.device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], sizes: Sizes) -> float:
    """Returns how long one step takes."""
    if sizes.device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    step()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def times(sizes: Sizes) -> dict[str, list[float]]:
    """Returns the seconds of every timed step of every kind, taken in turns."""
    steps = {kind: stepper(build(kind, sizes), sizes) for kind in sizes.kinds}
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {kind: [] for kind in sizes.kinds}
    for round_number in range(sizes.rounds):
        for shift in range(len(sizes.kinds)):
            kind = sizes.kinds[(round_number + shift) % len(sizes.kinds)]
            found[kind].append(seconds(steps[kind], sizes))
    return found


def saved(kind: str, sizes: Sizes) -> int:
    """Returns the bytes that one forward pass keeps for the backward pass, parameters not counted."""
    model = build(kind, sizes)
    ids = torch.randint(0, 512, (sizes.rows, sizes.tokens), device=sizes.device)
    known = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    total = sum(kept.values())
    loss.backward()
    return total


def rise(kind: str, sizes: Sizes) -> int:
    """Returns the bytes by which one training step's memory rises above what is there before it, in this process."""
    step = stepper(build(kind, sizes), sizes)
    step()
    if sizes.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def peak(kind: str, sizes: Sizes) -> int:
    """Returns the same from a process of its own; 0 where this system does not tell."""
    if sizes.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return 0
    arguments = [*sys.argv[1:], "--peak-of", kind]
    small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=os.environ | small, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def main(sizes: Sizes) -> None:
    """Prints the table."""
    if sizes.peak_of:
        print(rise(sizes.peak_of, sizes))
        return
    peaks = {kind: peak(kind, sizes) for kind in sizes.kinds}
    kept = {kind: saved(kind, sizes) for kind in sizes.kinds}
    found = times(sizes)
    rows = []
    for kind in sizes.kinds:
        ratios = [own / lora for own, lora in zip(found[kind], found["lora"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        cells = [f"{statistics.median(found[kind]):.3f}", f"{statistics.median(ratios):.2f}", spread]
        rows.append([kind, *cells, f"{kept[kind] / 2**20:.1f}", f"{peaks[kind] / 2**20:.1f}"])
    print(table(["adapter", "s a step", "x LoRA", "over rounds", "saved MiB", "peak MiB"], rows))
    print(f"{sizes}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(tyro.cli(Sizes))
