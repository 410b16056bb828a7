"""The command ``inspect``: what an adapter holds, as text, JSON, an HTML page and figures."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command
from spectral_surgery.errors import InputError
from spectral_surgery.selection import Selection

if TYPE_CHECKING:
    from spectral_surgery.inspection import Inspection


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Looks into adapters: what they hold, where they act, whether they are healthy. Needs no base model.

    Spectra of every module; directions shared by layers, kinds and adapters, each beside chance; findings in words.
    """

    adapters: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="ADAPTER...")]
    """Adapter folders, Hub ids, or kohya or diffusers .safetensors files."""
    subfolder: str | None = None
    """Where inside the folder or repository the adapter lies."""
    adapter_revision: str | None = None
    """Branch, tag or commit of the adapter's Hub repository."""
    selection: Selection = field(default_factory=lambda: Selection(modules=("all",)))
    k: int = 4
    """Dimension of the compared subspaces."""
    geometry: Literal["yes", "no"] = "yes"
    """Compare directions between layers, kinds and adapters."""
    sensitivity: tuple[Path, ...] = ()
    """Sensitivity files, matched to the adapters by hash."""
    base_weights: Path | None = None
    """Local folder with the base model's safetensors, one file or sharded: hold the updates against its weights."""
    html: Path | None = None
    """Write one self-contained interactive page to this file."""
    figures: Path | None = None
    """Write static figures into this folder, over earlier ones of the same names."""
    figure_format: Literal["pdf", "png", "svg"] = "pdf"
    """Format of the figures."""
    overwrite: bool = False
    """Replace a page that an earlier inspection wrote."""
    json: bool = False
    """Print everything as JSON."""
    per_module: bool = False
    """Give every module a row of its own, however many there are."""
    fail_on: Literal["never", "error", "warning", "note"] = "never"
    """End with exit status 3 when there is a finding of this severity or a worse one."""

    def run(self) -> None:
        """Prints what was found.

        Raises:
            Unhealthy: With --fail-on, if something was found.
        """
        from spectral_surgery.findings import check, findings

        views = self._views()
        self._write(views)
        if self.json:
            from spectral_surgery.inspecting import to_json

            print(json.dumps(to_json(views), indent=1))
        else:
            from spectral_surgery.terminal import render

            print(printable(render(views, modules=self.per_module or None)))
        if self.fail_on != "never":
            check([finding for view in views for finding in findings(view)], self.fail_on)

    def _write(self, views: list[Inspection]) -> None:
        if self.html:
            from spectral_surgery import page

            page.write(self.html, page.render(views))
            print(f"Wrote {self.html}.", file=sys.stderr)
        if self.figures:
            from spectral_surgery import plots

            for path in plots.save(views, self.figures, self.figure_format):
                print(f"Wrote {path}.", file=sys.stderr)

    def _views(self) -> list[Inspection]:
        from spectral_surgery.inspecting import inspect, one_thread, read
        from spectral_surgery.sensitivity_file import load_measurement
        from spectral_surgery.weight_files import open_folder

        if not self.adapters:
            raise InputError("No adapter is named. Pass at least one folder or Hub id.")
        if self.k < 1:
            raise InputError(f"--k is {self.k}, expected 1 or more.")
        if self.html:
            from spectral_surgery.page import check_path

            check_path(self.html, overwrite=self.overwrite)
        with one_thread():
            adapters = [read(name, revision=self.adapter_revision, subfolder=self.subfolder) for name in self.adapters]
        measured = [load_measurement(path) for path in self.sensitivity]
        base = open_folder(self.base_weights) if self.base_weights else None
        with console.progress("comparing", "modules") if base else nullcontext(_silent) as progress:
            return inspect(
                adapters,
                selection=self.selection,
                k=self.k,
                geometry=self.geometry == "yes",
                sensitivities=measured,
                base=base,
                progress=progress,
            )


def _silent(done: int, total: int) -> None:
    """Shows nothing."""


def printable(text: str) -> str:
    """Returns the text with what the terminal cannot show replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
