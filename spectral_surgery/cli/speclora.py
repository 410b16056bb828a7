"""The command that runs SpecLoRA's ablations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spectral_surgery.ablation import Ablation
from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.errors import InputError

if TYPE_CHECKING:
    from spectral_surgery.formats import Example


@dataclass(frozen=True, kw_only=True)
class SpecLora(Command):
    """Trains SpecLoRA's variants and controls side by side and prints paired intervals.

    Which rows or directions are scaled and how many, against LoRA at equal parameters and IA3 beside LoRA. By default
    the embedded model learns to compare two numbers.
    """

    base_model: str | None = None
    """Folder or Hub id of a base model; by default the embedded one."""
    train_data: str | None = None
    """Rows to learn from: a file or Hub id. Needed with --base-model."""
    test_data: str | None = None
    """Rows to score on. Needed with --base-model."""
    ablation: Ablation = field(default_factory=Ablation)
    weights_only: bool = False
    """Train nothing; print how much of each weight its first k rows and its top k directions hold."""

    def run(self) -> None:
        """Prints the tables."""
        from spectral_surgery.demo import world

        own = [self.base_model, self.train_data, self.test_data]
        if any(own) and not all(own) and not self.weights_only:
            raise InputError("--base-model, --train-data and --test-data go together. Pass all three or none.")
        base_model = self.base_model or str(world() / "base")
        if self.weights_only:
            from spectral_surgery.speclora.geometry import row_geometry

            print(row_geometry(base_model, self.ablation.target_modules, self.ablation.k))
            return
        self.ablation.check()
        from spectral_surgery.speclora.study import study

        train, test = self._rows(base_model)
        with console.progress("training", "runs") as progress:
            print(study(base_model, train, test, self.ablation, progress))

    def _rows(self, base_model: str) -> tuple[list[Example], list[Example]]:
        """Returns training and test rows: the user's, or the embedded task's with right answers."""
        from spectral_surgery.demo import tasks, world
        from spectral_surgery.formats import DataOptions, to_examples

        if self.train_data and self.test_data:
            from transformers import AutoTokenizer

            from spectral_surgery.calibration import load_examples

            tokenizer = AutoTokenizer.from_pretrained(base_model)
            train, test = (load_examples(name, DataOptions(), tokenizer) for name in (self.train_data, self.test_data))
            return train, test
        lines = (world() / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        return (
            to_examples(tasks.rows(tasks.COMPARE, 600, seed=0), DataOptions()),
            to_examples([json.loads(line) for line in lines], DataOptions()),
        )
