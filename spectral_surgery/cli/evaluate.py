"""The command that benchmarks adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.options import ModelOptions

if TYPE_CHECKING:
    from spectral_surgery.evaluating.evaluation import Prepared


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Benchmarks the base model, an adapter and others of the same base, paired document by document.

    lm-evaluation-harness scores all of them in one loaded model. The defaults are the paper's: gsm8k with 5 examples,
    humaneval, ifeval (strict, by prompt and by instruction) and commonsense_qa without.
    """

    adapter: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER")]
    """Adapter folder or Hub id."""
    against: tuple[str, ...] = ()
    """Other adapters of the same base, such as the unedited one."""
    suite: SuiteOptions = field(default_factory=SuiteOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    backend: Literal["hf", "vllm"] = "hf"
    """Transformers in this process, or vLLM with a LoRA request for each adapter, once it has shown that it computes
    the same."""
    vllm_args: str = ""
    """What vLLM's engine takes, such as tensor_parallel_size=2,gpu_memory_utilization=0.9."""
    noise_floor: int = 0
    """Score the unedited adapter this many times more, and print the spread that a gain must beat."""
    output: Path | None = None
    """Folder for records, table and manifest; by default ADAPTER-evaluation in this folder."""
    overwrite: bool = False
    """Replace an output folder that spectral-surgery wrote."""
    dry_run: bool = False
    """Check everything and say what would be scored, without loading the base model's weights."""

    def run(self) -> None:
        """Prints the table and writes the folder."""
        from spectral_surgery.evaluating.evaluation import evaluate_to, prepare, there

        names = [self.adapter, *self.against]
        output = self.output or Path(f"{Path(self.adapter).name}-evaluation")
        prepared = prepare(
            names,
            self.suite,
            self.model,
            noise_floor=self.noise_floor,
            vllm=self.vllm_args if self.backend == "vllm" else None,
            output=output,
            overwrite=self.overwrite,
        )
        self._say(prepared)
        if finished := there(prepared, output):
            print(f"{finished} of these scorings are there from an interrupted run.")
        if self.dry_run:
            print(f"Would score these and write {output}.")
            return
        with console.progress("scoring", "requests") as progress:
            found = evaluate_to(prepared, output, overwrite=self.overwrite, progress=progress)
        print(found.text())
        print(f"\nWrote {output}: a record for every document in records.jsonl, and this table in table.md.")

    def _say(self, prepared: Prepared) -> None:
        candidates, suite = prepared.candidates, prepared.suite
        tasks = ", ".join(f"{name} ({count} requests)" for name, count in suite.requests.items())
        print(f"Base model: {candidates.base_model}")
        print(f"Adapters: {', '.join(candidates.adapters)}; differences are from {candidates.unedited}.")
        print(f"Tasks: {tasks}; {len(prepared.scorings)} scorings of each.")
