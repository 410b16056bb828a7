"""The whole miniature in one call: runs, findings, and the files that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectral_surgery import inspecting
from spectral_surgery.inspection import Inspection
from spectral_surgery.miniature import drawing, findings, page
from spectral_surgery.miniature.effects import Scores, collect
from spectral_surgery.miniature.experiment import OWN, MiniatureOptions, Part, Progress, run
from spectral_surgery.miniature.families import FAMILIES
from spectral_surgery.miniature.findings import Judged

PAGE, IMAGES = "miniature.md", "images"


@dataclass(frozen=True)
class Miniature:
    """What came out."""

    scores: Scores
    judged: Sequence[Judged]
    options: MiniatureOptions


def miniature(options: MiniatureOptions, *, progress: Progress | None = None) -> Miniature:
    """Returns the miniature, after running what is left of it and writing page and figures.

    Raises:
        InputError: If the options do not fit, or matplotlib is not installed.
        OutputError: If the folder holds something else.
        RunError: If something fails midway; what was done is kept.
    """
    runs = run(options, progress=progress)
    studies = {(part.family, part.seed): (part.folder(options) / "study", found) for part, found in runs.items()}
    in_order = {(name, seed): studies[name, seed] for name in FAMILIES for seed in options.seeds}
    scores, cells = collect(in_order, OWN), page.cells_of(options)
    adapters = {name: [_directions(options, Part(name, seed)) for seed in options.seeds] for name in FAMILIES}
    judged = findings.judge(scores, cells)
    judged += findings.judge_directions([one for views in adapters.values() for one in views])
    (options.output / PAGE).write_text(page.page(scores, judged, options), encoding="utf-8")
    drawing.save(scores, cells, adapters, options.output / IMAGES)
    return Miniature(scores, judged, options)


def _directions(options: MiniatureOptions, part: Part) -> Inspection:
    return inspecting.inspect([inspecting.read(str(part.folder(options) / "adapter"))])[0]
