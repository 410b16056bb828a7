"""From measurements to the whole ladder: what follows from sensitivities, and what takes a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import AdapterError
from spectral_surgery.live import Live
from spectral_surgery.measurement import Measurement
from spectral_surgery.policies import Gates
from spectral_surgery.refining.bench import Progress
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.candidates import (
    Candidate,
    between,
    controls,
    cooled,
    few_steps,
    of_paper,
    single_steps,
)
from spectral_surgery.refining.descent import Steps, Term, carry_on, descend
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.scoring import Rows, answer_loss_of, per_example
from spectral_surgery.refining.steps import Pull

LEAST_SCALE = 1e-3
"""Nats per token; so little learned or forgotten counts as this much."""
RATES = (1e-3, 3e-4, 3e-3)
"""Learning rates of continued training, the first of them alone where time is short."""
WEIGHTS = (2.5, 0.75, 5.0)
"""Keep weights, as multiples of the share of the task that may be lost; the first alone where time is short."""
LEAST_MARGIN = 0.01
"""Where nothing may be lost, weights are multiples of this."""


@dataclass(frozen=True)
class Evidence:
    """What was measured at the unedited adapter."""

    task: Measurement
    keep: Measurement
    task_term: Term
    """The task's loss, as few-step tuning minimises it."""
    keep_term: Term
    """What is to be kept, as few-step tuning minimises it."""
    signed: bool
    """Whether the task rows' signs count."""

    def pull(self, weight: float) -> Pull:
        """Returns what the rows say with this keep weight."""
        return Pull(self.task, self.keep, self.task_term.scale, self.keep_term.scale, weight, self.signed)

    def terms(self, weight: float) -> list[Term]:
        """Returns what is minimised with this keep weight."""
        return [self.task_term, replace(self.keep_term, scale=self.keep_term.scale / weight)]


@dataclass(frozen=True)
class Extent:
    """How much is tried."""

    weights: int = 3
    """Keep weights of few-step tuning; 0 leaves it out."""
    rates: int = 3
    """Learning rates of continued training; 0 leaves it out."""
    reshaped: bool = True
    """More even spectra, and module strengths like them."""
    permutations: int = 199
    """Random orders of the winner's gates."""


def extent(options: RefineOptions, row_seconds: float, part_rows: int, step_seconds: float) -> Extent:
    """Returns the largest extent that is expected to fit into the budget.

    It shrinks in this order, until it fits: random orders to 99 and to 19; continued training to one learning rate;
    few-step tuning to one weight; no more even spectra; no continued training; no few-step tuning; no random orders.

    Args:
        options: With the budget.
        row_seconds: What scoring one row takes.
        part_rows: Rows that a surviving candidate is scored on.
        step_seconds: What one step of tuning takes.
    """
    steps = bool(options.steps) and options.ladder != "controls"
    found = Extent(3 * steps, 3 * steps, True, options.permutations)
    if options.seconds is None:
        return found
    shrinking: list[dict[str, int | bool]] = [
        {},
        {"permutations": 99},
        {"permutations": 19},
        {"rates": 1},
        {"weights": 1},
        {"reshaped": False},
        {"rates": 0},
        {"weights": 0},
        {"permutations": 0},
    ]
    for change in shrinking:
        least = {name: min(getattr(found, name), value) for name, value in change.items()}
        found = replace(found, **least)
        tried = 17 + 23 * found.reshaped + 5 * found.weights + found.rates
        descents = (found.weights + found.rates) * options.steps * step_seconds
        scoring = row_seconds * (tried * part_rows * 0.6 + found.permutations * 96)
        if descents + scoring < options.seconds:
            break
    return found


def ladder(
    live: Live,
    evidence: Evidence,
    options: RefineOptions,
    size: Extent,
    cache: Cache,
    seed: int,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Returns everything that is tried, the cheap explanations first."""
    found = controls(live.adapter, evidence.task, stronger=options.share == 0)
    if not size.reshaped:
        found = [candidate for candidate in found if candidate.family == "strength"]
    found += others(live.adapter, options.also)
    if options.ladder == "controls":
        return found
    if options.ladder == "paper":
        found += of_paper(evidence.task, seed)
    margin = max(options.share, LEAST_MARGIN)
    weights = [round(margin * weight, 6) for weight in WEIGHTS]
    found += single_steps([evidence.pull(weights[0])])
    steps = Steps(count=options.steps, seed=seed)
    key = (steps, evidence.task.digests, evidence.keep.digests, evidence.task_term.scale, evidence.keep_term.scale)
    runs = size.weights + size.rates
    tuned: dict[float, Gates] = {}
    for i, weight in enumerate(weights[: size.weights]):
        told = _told(progress, "few-step tuning", i, runs, steps)
        tuned[weight] = _tuned(live, evidence, weight, steps, cache, key, told)
        found += few_steps(tuned[weight], weight)
    found += between(tuned)
    for i, rate in enumerate(RATES[: size.rates]):
        told = _told(progress, "continued training", i + size.weights, runs, steps)
        found.append(_continued(live, evidence, weights[0], rate, steps, cache, key, told))
    return found


def _told(
    progress: Progress | None, what: str, before: int, runs: int, steps: Steps
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, before * steps.count + done, runs * steps.count)


def _tuned(
    live: Live,
    evidence: Evidence,
    weight: float,
    steps: Steps,
    cache: Cache,
    key: tuple[object, ...],
    progress: Callable[[int, int], None] | None,
) -> Gates:
    return cache.arrays(
        ("descend", weight, *key), lambda: descend(live, evidence.terms(weight), steps, progress=progress)
    )


def _continued(
    live: Live,
    evidence: Evidence,
    weight: float,
    rate: float,
    steps: Steps,
    cache: Cache,
    key: tuple[object, ...],
    progress: Callable[[int, int], None] | None,
) -> Candidate:
    """Returns the rival: ordinary training carried on for as many steps with the same rows."""
    from safetensors.torch import load_file, save_file

    def train() -> dict[str, Tensor]:
        trained = carry_on(live, evidence.terms(weight), steps, learning_rate=rate, progress=progress)
        return dict(trained.tensors)

    save = partial(save_file, metadata={"format": "pt"})
    tensors = cache.file(("continue", weight, rate, *key), ".safetensors", train, save, load_file)
    return Candidate(
        f"continue lr {rate:g}",
        "continue",
        f"{steps.count} more steps of ordinary training on the same rows",
        adapter=replace(live.adapter, tensors=tensors),
        command=f"{steps.count} steps of AdamW at {rate:g} on A and B, {steps.rows} measuring rows and {steps.rows} "
        f"rows of other skills a step",
    )


def others(adapter: Adapter, names: Sequence[str]) -> list[Candidate]:
    """Returns further adapters of the same layout, such as earlier checkpoints.

    Raises:
        AdapterError: If one has other tensors, or multiplies them by another scale.
    """
    found: list[Candidate] = []
    for name in dict.fromkeys(names):
        other = Adapter.load(name)
        layouts = [
            {path: (update.A.shape, update.B.shape, update.scale) for path, update in one.updates.items()}
            for one in (other, adapter)
        ]
        if layouts[0] != layouts[1] or other.tensors.keys() != adapter.tensors.keys():
            raise AdapterError(
                f"{name} has other modules, ranks or scales than {adapter.name}, so it cannot be tried in its "
                f"place. Leave it out of --also."
            )
        found.append(Candidate(f"adapter {name}", "checkpoint", f"the adapter {name}", adapter=other))
    return found


def temperature(live: Live, rows: Rows, cache: Cache) -> Candidate:
    """Returns the one softmax temperature that is best on the measuring rows: it changes no answer, only losses."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        with cooled(live.model, float(np.exp(log_temperature))):
            return float(per_example(live, rows.tokenized, answer_loss_of).mean())

    def fit() -> float:
        best = minimize_scalar(loss, bounds=(-1.5, 1.5), method="bounded", options={"xatol": 0.02})
        return round(float(np.exp(best.x)), 3)

    found = cache.json(("temperature", [row.digest for row in rows.tokenized.examples]), fit)
    what = "the same answers with other confidence: one temperature for all logits"
    return Candidate(f"temperature {found:g}", "temperature", what, temperature=found)
