"""The command ``weights``: a fine-tuned model's weights against the pre-trained ones."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.cli.inspect import printable
from spectral_surgery.errors import InputError
from spectral_surgery.selection import Selection

if TYPE_CHECKING:
    from spectral_surgery.comparing_weights import WeightComparison


@dataclass(frozen=True, kw_only=True)
class Weights(Command):
    """Holds a fine-tuned model's weights against the pre-trained ones: how singular values and directions moved.

    Ratio of singular values by index, |cos| of singular directions by index and by best partner, and which leading
    directions are new; each beside chance. No model is built: one matrix is in memory at a time.
    """

    fine_tuned: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FINE_TUNED")]
    """Local folder with the fine-tuned model's safetensors, one file or sharded."""
    pretrained: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PRETRAINED")]
    """Local folder with the weights before."""
    selection: Selection = field(default_factory=lambda: Selection(modules=("all",)))
    directions: int = 16
    """Leading singular directions of each weight that are looked at."""
    html: Path | None = None
    """Write one self-contained interactive page to this file."""
    figures: Path | None = None
    """Write the figure into this folder, over an earlier one of the same name."""
    figure_format: Literal["pdf", "png", "svg"] = "pdf"
    """Format of the figure."""
    overwrite: bool = False
    """Replace a page that an earlier run wrote."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> None:
        """Prints what moved."""
        found = self._compare()
        if self.html:
            from spectral_surgery import page

            page.write(self.html, page.render_weights(found))
            print(f"Wrote {self.html}.", file=sys.stderr)
        if self.figures:
            from spectral_surgery import plots

            for path in plots.save_weights(found, self.figures, self.figure_format):
                print(f"Wrote {path}.", file=sys.stderr)
        if self.json:
            from spectral_surgery.comparing_weights import to_json

            print(json.dumps(to_json(found), indent=1))
        else:
            from spectral_surgery.terminal import render_weights

            print(printable(render_weights(found)))

    def _compare(self) -> WeightComparison:
        from spectral_surgery.comparing_weights import compare_weights
        from spectral_surgery.page import check_path
        from spectral_surgery.weight_files import open_folder

        if self.directions < 1:
            raise InputError(f"--directions is {self.directions}, expected 1 or more.")
        if self.html:
            check_path(self.html, overwrite=self.overwrite)
        after, before = open_folder(self.fine_tuned), open_folder(self.pretrained)
        with console.progress("comparing", "weights") as progress:
            return compare_weights(after, before, selection=self.selection, n=self.directions, progress=progress)
