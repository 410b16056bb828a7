"""The command that compares two runs or two adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.errors import InputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions

if TYPE_CHECKING:
    from spectral_surgery.evaluating.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Says what differs between two runs, or two adapters, on the very same examples, and how surely.

    Two runs: folders that lm_eval --log_samples wrote, or that spectral-surgery evaluate wrote; no model is loaded.
    Two adapters of one base: with --data, the loss on every answer and exact greedy answers, the base model beside.
    """

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
    """A run, or an adapter: folder or Hub id."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B")]
    """Another; differences are B minus A."""
    data: str | None = None
    """Rows to score two adapters on: a JSONL, JSON, CSV or Parquet file, a folder of them, or a data set's Hub id."""
    variant_a: str | None = None
    """Whose records are meant, where A holds those of several variants."""
    variant_b: str | None = None
    """The same for B."""
    rows: DataOptions = field(default_factory=lambda: DataOptions(examples=1000))
    model: ModelOptions = field(default_factory=ModelOptions)
    batching: BatchOptions = field(default_factory=BatchOptions)
    output: Path | None = None
    """Also write records, table and manifest to this folder."""
    overwrite: bool = False
    """Replace an output folder that spectral-surgery wrote."""

    def run(self) -> None:
        """Prints the table."""
        from spectral_surgery.adapter.saving import check_output

        if self.data and (self.variant_a or self.variant_b):
            raise InputError("--variant-a and --variant-b choose among records; with --data two adapters are scored.")
        if self.output:
            check_output(self.output, overwrite=self.overwrite, sources=(Path(self.a), Path(self.b)))
        if self.data:
            self._adapters(self.data)
            return
        from spectral_surgery.evaluating.comparing import compare_runs

        self._show(compare_runs(self.a, self.b, variant_a=self.variant_a, variant_b=self.variant_b))

    def _adapters(self, data: str) -> None:
        from spectral_surgery.evaluating.comparing import LONGEST_ANSWER, compare_adapters, prepare_pair

        pair = prepare_pair(self.a, self.b, data, rows=self.rows, model=self.model)
        print(f"Base model: {pair.candidates.base_model}")
        print(f"Rows: {len(pair.examples)} of {pair.available} different ones")
        if pair.longest_answer > LONGEST_ANSWER:
            print(f"Exact answers are left out: the longest answer has {pair.longest_answer} tokens.")
        with console.progress("scoring", "variants") as progress:
            self._show(compare_adapters(pair, self.batching, progress=progress))

    def _show(self, found: Evaluation) -> None:
        print(found.text())
        if self.output:
            found.save(self.output, overwrite=self.overwrite)
            print(f"\nWrote {self.output}.")
