"""The demo: one adapter that works and forgot the rest, and what each edit makes of it.

The embedded base model does ten short text tasks. Its adapter learnt an eleventh, ``compare``, and lost the ten. The
demo measures the adapter's components once, tries policies and controls live in one loaded model, chooses on
validation rows, shows test rows that neither the base nor the choice has seen, and writes the chosen edit. It prints
what comes out.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spectral_surgery import policies
from spectral_surgery.adapter import Adapter
from spectral_surgery.adapter.saving import check_output
from spectral_surgery.demo import world
from spectral_surgery.demo.tasks import Row
from spectral_surgery.editing import edit, gates_for
from spectral_surgery.formats import DataOptions
from spectral_surgery.live import Live
from spectral_surgery.manifest import sensitivity_record
from spectral_surgery.measurement import Measurement
from spectral_surgery.measuring import Prepared, load_prepared, measure_prepared, prepare
from spectral_surgery.objective import greedy_answers
from spectral_surgery.options import ModelOptions
from spectral_surgery.selection import Selection
from spectral_surgery.statistics import paired_proportions
from spectral_surgery.tables import table

CONTROLS = (
    "identity",
    "scale:strength=0.9",
    "scale:strength=0.8",
    "scale:strength=0.7",
    "scale:strength=0.5",
    "flat",
    "newton_schulz:mix=0.5",
    "random:like=grad_direction",
)
PAPER = ("abs_select", "smooth_abs", "grad_direction", "random_index")
MAY_LOSE = 0.02
"""How much of the task's validation score the chosen edit may lose."""


@dataclass(frozen=True)
class Scores:
    """Exact matches of greedy answers, one per row."""

    task: np.ndarray
    skills: np.ndarray

    def cells(self) -> list[str]:
        """Both means in percent with their standard errors."""
        return [
            f"{100 * x.mean():5.1f} ± {100 * x.std(ddof=1) / np.sqrt(len(x)):.1f}" for x in (self.task, self.skills)
        ]


@dataclass(frozen=True)
class Trial:
    """One candidate's scores on validation and on test rows."""

    name: str
    validation: Scores
    test: Scores


def run(output: Path, *, overwrite: bool, progress: Callable[[int, int], None]) -> str:
    """Runs the demo, writes the chosen edit to ``output`` and returns what to print.

    Raises:
        OutputError: If the output folder may not be written.
        RunError: If something fails midway.
    """
    start = time.perf_counter()
    check_output(output, overwrite=overwrite, sources=(world() / "adapter",))
    torch.set_num_threads(1)  # so small a model loses more by sharing its work than it gains
    prepared = _prepared()
    live = load_prepared(prepared)
    loaded = time.perf_counter()
    measured = measure_prepared(prepared, live)
    measuring = time.perf_counter()
    trials = _trials(live, measured, progress)
    tried = time.perf_counter()
    chosen = _choice(trials[2:], trials[1]) or trials[2]
    _write(chosen, prepared, measured, output, overwrite)
    times = (loaded - start, measuring - loaded, tried - measuring)
    return "\n\n".join(
        [_introduction(prepared), _table(trials), _learnt(trials, chosen, output), _times(times, trials)]
    )


def _prepared() -> Prepared:
    return prepare(
        Adapter.load(world() / "adapter"),
        world() / "data" / "calibration.jsonl",
        selection=Selection(("all",)),
        data_options=DataOptions(examples=128),
        model=ModelOptions(base_model=str(world() / "base"), dtype="float32", device="cpu"),
    )


def _rows(name: str) -> list[Row]:
    text = (world() / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _trials(live: Live, measured: Measurement, progress: Callable[[int, int], None]) -> list[Trial]:
    sets = {name: _rows(name) for name in ("validation", "skills", "test", "skills_test")}
    sets["skills"] = sets["skills"][::2]
    names = ["base model, no adapter", "unedited adapter", *CONTROLS, *PAPER]
    trials = []
    for name, context in zip(names, _contexts(live, measured), strict=True):
        with context:
            scores = {key: _exact(live, rows) for key, rows in sets.items()}
        trials.append(
            Trial(name, Scores(scores["validation"], scores["skills"]), Scores(scores["test"], scores["skills_test"]))
        )
        progress(len(trials), len(names))
    return trials


def _contexts(live: Live, measured: Measurement) -> Iterator[ExitStack]:
    """Yields what to open for each candidate: no adapter, the adapter, then one gated model after the other."""
    for enter in (live.base, ExitStack):
        stack = ExitStack()
        stack.enter_context(enter())
        yield stack
    for spelled in (*CONTROLS, *PAPER):
        stack = ExitStack()
        stack.enter_context(live.gated(gates_for(live.adapter, policies.parse(spelled), measured)))
        yield stack


def _exact(live: Live, rows: list[Row]) -> np.ndarray:
    prompts = [row["prompt"] for row in rows]
    longest = max(len(row["answer"]) for row in rows) + 2  # characters are tokens; a space before, the end after
    answers = greedy_answers(live.model, live.tokenizer, prompts, max_new_tokens=longest, batch_size=200)
    return np.array([answer == row["answer"] for answer, row in zip(answers, rows, strict=True)], dtype=float)


def _choice(candidates: list[Trial], unedited: Trial) -> Trial | None:
    """Returns the one with the best skills among those that keep the task, on validation rows."""
    floor = unedited.validation.task.mean() - MAY_LOSE
    safe = [trial for trial in candidates if trial.validation.task.mean() >= floor]
    return max(safe, key=lambda trial: trial.validation.skills.mean(), default=None)


def _write(chosen: Trial, prepared: Prepared, measured: Measurement, output: Path, overwrite: bool) -> None:
    edited, _ = edit(prepared.adapter, policies.parse(chosen.name), measured)
    manifest = {
        "policy": chosen.name,
        "measurement": dict(measured.about),
        "sensitivities": sensitivity_record(measured),
    }
    edited.save(output, overwrite=overwrite, manifest=manifest)


def _introduction(prepared: Prepared) -> str:
    skills = sorted({row["task"] for row in _rows("skills_test")})
    return (
        f"A small base model knows {len(skills)} skills: {', '.join(skills)}.\n"
        f"A rank-16 adapter taught it one more task, compare. Here is what the adapter does to both, and\n"
        f"what each edit of its {len(prepared.paths)} modules does, measured on {len(prepared.examples)} rows.\n"
        f"Exact answers in percent on test rows ± standard error:"
    )


def _table(trials: list[Trial]) -> str:
    return table(["", "task", "other skills"], [[trial.name, *trial.test.cells()] for trial in trials])


def _learnt(trials: list[Trial], chosen: Trial, output: Path) -> str:
    base, unedited = trials[0], trials[1]
    task = _difference(chosen.test.task, unedited.test.task)
    skills = _difference(chosen.test.skills, unedited.test.skills)
    strengths = [trial for trial in trials if trial.name.startswith("scale")]
    strength = _choice(strengths, unedited)
    paper = max((trial for trial in trials if trial.name in PAPER), key=lambda trial: trial.test.skills.mean())
    gained = 100 * (unedited.test.task.mean() - base.test.task.mean())
    lost = 100 * (base.test.skills.mean() - unedited.test.skills.mean())
    lines = [
        f"The adapter gained {gained:.1f} points on its task and lost {lost:.1f} points of the other skills.",
        f"Chosen on validation rows (most other skills, task not more than {100 * MAY_LOSE:.0f} points lower): "
        f"{chosen.name}. On test rows: task {task}, other skills {skills} points against the unedited adapter, with "
        f"95 % intervals.",
        _compared(chosen, strength),
        f"Of the paper's four policies {paper.name} keeps most other skills, {100 * paper.test.skills.mean():.1f} %, "
        f"with the task at {100 * paper.test.task.mean():.1f} %.",
        f"Wrote {output}.",
    ]
    return "\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in lines)


def _compared(chosen: Trial, strength: Trial | None) -> str:
    if strength is None:
        return "No plain strength tried keeps the task by the same rule."
    best = f"The best plain strength by the same rule is {strength.name}"
    if chosen is strength:
        return f"{best}, the one chosen: nothing here beats simply weakening the adapter."
    task = _difference(chosen.test.task, strength.test.task)
    skills = _difference(chosen.test.skills, strength.test.skills)
    return f"{best}; against it {chosen.name} has task {task}, other skills {skills}."


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Returns the paired difference in points with its 95 % score interval."""
    found = paired_proportions(int((ours > theirs).sum()), int((ours < theirs).sum()), len(ours))
    return f"{100 * found.estimate:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _times(times: tuple[float, float, float], trials: list[Trial]) -> str:
    load, measure, tried = times
    return (
        f"Loading {load:.1f} s, measuring {measure:.1f} s, trying {len(trials)} adapters live {tried:.1f} s, "
        f"{tried / len(trials):.1f} s each."
    )
