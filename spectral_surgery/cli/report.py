"""The command that shows what experiments found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from spectral_surgery.cli.commands import Command
from spectral_surgery.errors import InputError
from spectral_surgery.results.runs import RISK


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Tables and figures of a sweep's runs, or of the paper's published ones. Loads no model."""

    runs: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUNS")] = None
    """Folder of a sweep, or its runs.jsonl."""
    published: bool = False
    """The paper's own runs, which are shipped: its Tables 2 to 5, Figures 3 and 4, and the noise in its own file."""
    format: Literal["text", "markdown", "latex", "csv"] = "text"
    """How tables are written."""
    output: Path | None = None
    """New file for the tables; by default they are printed."""
    figures: Path | None = None
    """Folder for figures; those of the same names are replaced."""
    figure_format: Literal["pdf", "png", "svg"] = "pdf"
    """How figures are written."""
    guided: str = "grad_direction"
    """Policy that is held against its random control."""
    control: str = "random_index"
    """The random control."""
    risk: str = RISK
    """Task in which a loss counts as a risk; the mean of the others is the reward."""
    overwrite: bool = False
    """Replace the output file."""

    def run(self) -> None:
        """Prints or writes the tables, and writes the figures."""
        from spectral_surgery.results.comparisons import usual
        from spectral_surgery.results.published import published_runs
        from spectral_surgery.results.runs import distinct, read_runs
        from spectral_surgery.results.summary import View, paper_tables, tables
        from spectral_surgery.results.writing import write

        if (self.runs is None) != self.published:
            raise InputError("Give the folder of a sweep, or --published for the paper's own runs: one of the two.")
        if self.output and self.output.exists() and not self.overwrite:
            raise InputError(f"{self.output} exists. Pass --overwrite to replace it, or choose another name.")
        runs = published_runs() if self.runs is None else distinct(read_runs(self.runs))
        if not runs:
            raise InputError(f"{self.runs} holds no runs yet. Continue its sweep with: spectral-surgery sweep")
        view = View(usual(runs), self.guided, self.control, self.risk)
        text = write(paper_tables() if self.published else tables(runs, view), self.format)
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(text, encoding="utf-8")
            print(f"Wrote {self.output}.")
        else:
            print(text, end="")
        if self.figures:
            from spectral_surgery.results.drawing import save

            for path in save(runs, self.figures, self.figure_format, view):
                print(f"Wrote {path}.")
