"""The command that makes the paper in miniature."""

from __future__ import annotations

import os
from dataclasses import dataclass

from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.miniature.experiment import MiniatureOptions


@dataclass(frozen=True, kw_only=True)
class Miniature(Command, MiniatureOptions):
    """The paper's Tables 2 to 5 and Figures 1, 3 and 4 on the embedded model, with intervals, and which findings hold.

    Trains, edits and scores an adapter of each of four tasks for every seed; an interrupted run goes on where it
    stopped.
    """

    def run(self) -> None:
        """Prints tables and findings."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report what is trained
        from spectral_surgery.miniature.entry import PAGE, miniature
        from spectral_surgery.miniature.page import VERDICTS, cells_of, counted, findings_table, tables, took
        from spectral_surgery.results.writing import write

        with console.progress("miniature", "adapters") as progress:
            found = miniature(self, progress=progress)
        print(write(tables(found.scores, cells_of(self), self), "text"))
        for verdict, title in VERDICTS.items():
            if own := [one for one in found.judged if one.verdict == verdict]:
                print(write([findings_table(own, title)], "text"))
        print(counted(found.judged))
        if found.seconds is not None:
            print(took(self, found.seconds))
        print(f"Wrote {self.output / PAGE} and its figures.")
