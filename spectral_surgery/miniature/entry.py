"""The whole miniature in one call: runs, findings, and the files that show them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from spectral_surgery import inspecting
from spectral_surgery.inspection import Inspection
from spectral_surgery.miniature import drawing, findings, page
from spectral_surgery.miniature.effects import Scores, collect
from spectral_surgery.miniature.experiment import OWN, MiniatureOptions, Part, Progress, run
from spectral_surgery.miniature.families import FAMILIES
from spectral_surgery.miniature.findings import Judged
from spectral_surgery.results.runs import Run

PAGE, IMAGES, TOOK = "miniature.md", "images", "took.json"


@dataclass(frozen=True)
class Miniature:
    """What came out."""

    scores: Scores
    judged: Sequence[Judged]
    options: MiniatureOptions
    seconds: float | None
    """Time of all training and editing; None where it was not done in one go."""


def miniature(options: MiniatureOptions, *, progress: Progress | None = None) -> Miniature:
    """Returns the miniature, after running what is left of it and writing page and figures.

    Raises:
        InputError: If the options do not fit, or matplotlib is not installed.
        OutputError: If the folder holds something else.
        RunError: If something fails midway; what was done is kept.
    """
    seconds, runs = _timed(options, progress)
    studies = {(part.family, part.seed): (part.folder(options) / "study", found) for part, found in runs.items()}
    in_order = {(name, seed): studies[name, seed] for name in FAMILIES for seed in options.seeds}
    scores, cells = collect(in_order, OWN), page.cells_of(options)
    adapters = {name: [_directions(options, Part(name, seed)) for seed in options.seeds] for name in FAMILIES}
    judged = findings.judge(scores, cells)
    judged += findings.judge_directions([one for views in adapters.values() for one in views])
    (options.output / PAGE).write_text(page.page(scores, judged, options, seconds), encoding="utf-8")
    drawing.save(scores, cells, adapters, options.output / IMAGES)
    return Miniature(scores, judged, options, seconds)


def _timed(options: MiniatureOptions, progress: Progress | None) -> tuple[float | None, dict[Part, list[Run]]]:
    """Returns how long everything took, where nothing of it was there before, and the runs."""
    note, new, start = options.output / TOOK, not options.output.exists(), time.perf_counter()
    runs = run(options, progress=progress)
    if new:
        note.write_text(json.dumps(time.perf_counter() - start) + "\n", encoding="utf-8")
    return json.loads(note.read_text(encoding="utf-8")) if note.exists() else None, runs


def _directions(options: MiniatureOptions, part: Part) -> Inspection:
    return inspecting.inspect([inspecting.read(str(part.folder(options) / "adapter"))])[0]
