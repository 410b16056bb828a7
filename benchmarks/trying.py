"""What trying an edit costs, by gates and by files: ``python benchmarks/trying.py``.

On a Llama of random weights K candidates are scored by switching gates in the loaded model, and some also by writing
the edited adapter, merging it into the base, saving and loading the whole model; beside them stands the same scoring
without any gates. Then switching alone is timed, also with an adapter of Llama-3.1-8B's size on a base that is only
shapes. Scoring takes the same forward passes either way, so the difference is what a candidate costs besides.

Medians over rounds. On a CPU the time is the process's own; ``--wall`` takes the clock's, which also counts the disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from measuring import KINDS, Sizes, adapted, described, rows, timed, told
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from spectral_surgery.calibration import Batch, batches
from spectral_surgery.live import Live
from spectral_surgery.objective import answer_loss
from spectral_surgery.surgery import operate
from spectral_surgery.tables import table

LARGE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
"""Llama-3.1-8B's shapes."""


@dataclass(frozen=True)
class TrySizes(Sizes):
    """What is tried, and on what."""

    output: Path = Path("build/benchmark-try.json")
    """File for all figures."""
    candidates: int = 8
    """Edits that are scored by gates."""
    merged: int = 3
    """How many of them are also scored by merging and loading."""


def switched(live: Live, several: list[dict[str, np.ndarray]]) -> float:
    """Returns the median seconds of switching all gates, of fifty times, the process's own."""

    def switch(one: dict[str, np.ndarray]) -> float:
        start = time.process_time()
        with live.gated(one):
            return time.process_time() - start

    return statistics.median(switch(several[i % len(several)]) for i in range(50))


def large(rank: int = 16) -> dict[str, Any]:
    """Returns what switching costs with an adapter of Llama-3.1-8B's size on a base that is only shapes."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LARGE)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=KINDS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for factor in [*getattr(module, "lora_A", {}).values(), *getattr(module, "lora_B", {}).values()]:
            factor.weight = nn.Parameter(0.02 * torch.randn(factor.weight.shape, generator=generator))
    live = Live(model)
    several = random_gates(live, 2)
    switched(live, several)  # so that spectra and directions are there
    return {"modules": len(live.paths), "rank": rank, "switching": switched(live, several)}


def random_gates(live: Live, count: int) -> list[dict[str, np.ndarray]]:
    """Returns so many candidates."""
    rng = np.random.default_rng(1)
    return [{path: rng.uniform(0.5, 1.5, len(live.spectra[path].S)) for path in live.paths} for _ in range(count)]


def by_gates(live: Live, gates: dict[str, np.ndarray], made: list[Batch]) -> float:
    """Returns a candidate's mean loss, with gates switched in the loaded model."""
    with live.gated(gates), torch.no_grad():
        return float(torch.cat([answer_loss(live.model, batch.to(live.device)) for batch in made]).mean())


def by_merging(live: Live, gates: dict[str, np.ndarray], made: list[Batch], sizes: Sizes, folder: Path) -> float:
    """Returns a candidate's mean loss from files: adapter written, merged into the base, saved, loaded."""
    dtype = getattr(torch, sizes.dtype)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        updates, report = operate({path: live.adapter.updates[path] for path in live.paths}, gates)
        live.adapter.with_updates(updates, report).save(Path(name) / "edited")
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        PeftModel.from_pretrained(base, f"{name}/edited").merge_and_unload().save_pretrained(f"{name}/merged")
        model = LlamaForCausalLM.from_pretrained(f"{name}/merged", dtype=dtype).to(sizes.device)
        with torch.no_grad():
            return float(torch.cat([answer_loss(model, batch.to(sizes.device)) for batch in made]).mean())


def trying(live: Live, made: list[Batch], sizes: TrySizes, folder: Path) -> dict[str, Any]:
    """Returns what scoring costs without gates, by gates and by merging, with the losses of the last two."""
    several = random_gates(live, sizes.candidates)
    by_gates(live, several[0], made)  # to warm up
    plain, gates, merged = [], [], []
    for number, one in enumerate(several):
        plain.append(timed(lambda: by_gates(live, {}, made), sizes)[0])
        gates.append(timed(lambda one=one: by_gates(live, one, made), sizes))
        if number < sizes.merged:
            merged.append(timed(lambda one=one: by_merging(live, one, made, sizes, folder), sizes))
    pairs = zip(gates, merged, strict=False)
    return {
        "seconds": {"forward": plain, "by gates": [s for s, _ in gates], "by merging": [s for s, _ in merged]},
        "difference": max((abs(one - other) for (_, one), (_, other) in pairs), default=0.0),
        "switching": switched(live, several),
        "modules": len(live.paths),
        "large": large(),
    }


def printed(found: dict[str, Any]) -> str:
    """Returns the table of what one candidate costs."""
    middle = {name: statistics.median(times) for name, times in found["seconds"].items() if times}
    lines = [
        [name, f"{value:.2f}", f"{value / middle['forward']:.3f}", f"{value - middle['forward']:+.2f}"]
        for name, value in middle.items()
    ]
    much = found["large"]
    return "\n".join(
        [
            table(["one candidate", "s", "/ forward", "besides, s"], lines),
            f"Largest difference of the losses by gates and by merging: {found['difference']:.1e}",
            f"Switching the gates of {found['modules']} modules: {1e3 * found['switching']:.2f} ms; of the "
            f"{much['modules']} modules of rank {much['rank']} of an adapter for Llama-3.1-8B: "
            f"{1e3 * much['switching']:.2f} ms",
        ]
    )


def main() -> None:
    """Times everything, prints the table and keeps the figures."""
    sizes = tyro.cli(TrySizes, description=__doc__)
    torch.set_num_threads(sizes.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        live, tokenized = adapted(sizes, Path(name)), rows(sizes)
        made = batches(tokenized, token_budget=sizes.token_budget)
        found = described(live, tokenized, sizes) | {"trying": trying(live, made, sizes, Path(name))}
    told(found, printed(found["trying"]), sizes)


if __name__ == "__main__":
    main()
