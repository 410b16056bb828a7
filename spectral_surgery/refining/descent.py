"""Gates, or the factors themselves, found by a few steps in the loaded model.

:func:`descend` moves bounded gates and nothing else: r numbers per module. :func:`carry_on` is its rival, the
same number of steps with the same rows on the factors A and B: ordinary training carried on. Both minimise

    (task loss) / (what the adapter learned) + keep_weight (keep loss) / (what it forgot)

with steps that shrink to nothing along a cosine, and both keep the state that was best on a quarter of the rows, which
their steps never see. What is to be kept is a loss and the distance of the model's states from the base's, see
:mod:`.closeness`. Several processes share the rows of a step and add up their gradients, so all take the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_surgery import processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import Tokenized, TokenizedExample, batches
from spectral_surgery.errors import RunError
from spectral_surgery.live import Live
from spectral_surgery.policies import Gates
from spectral_surgery.refining.scoring import LossOf, per_example
from spectral_surgery.refining.steps import HIGHEST, LOWEST


@dataclass(frozen=True)
class Term:
    """One loss on its rows, with the scale that makes it comparable."""

    loss_of: LossOf
    rows: Tokenized
    scale: float
    """The term counts as ``mean loss / scale``."""

    def parts(self, seed: int) -> tuple[Tokenized, Tokenized]:
        """Returns three quarters of the rows for the steps and one quarter to stop by."""
        order = np.random.default_rng(seed).permutation(len(self.rows.examples))
        cut = max(1, len(order) // 4)
        held, used = order[:cut], order[cut:]
        return self._at(used if len(used) else held), self._at(held)

    def _at(self, positions: Sequence[int] | np.ndarray) -> Tokenized:
        return Tokenized([self.rows.examples[int(i)] for i in positions], self.rows.truncated)


@dataclass(frozen=True)
class Steps:
    """How many steps, of what size, with how many rows."""

    count: int = 100
    """Steps at most."""
    rows: int = 8
    """Rows of each term in a step."""
    gate_rate: float = 0.2
    """Learning rate of gates (Adam) at the start."""
    check: int = 20
    """Steps between looks at the held-back rows."""
    seed: int = 0


@dataclass
class _Best:
    """The best state so far, by the held-back rows."""

    value: float
    state: Any
    history: list[float] = field(default_factory=list)

    def offer(self, value: float, state: Callable[[], Any]) -> None:
        self.history.append(value)
        if value < self.value:
            self.value, self.state = value, state()


def descend(
    live: Live,
    terms: Sequence[Term],
    steps: Steps,
    *,
    start: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Gates:
    """Returns gates found by a few steps of Adam, within bounds.

    Args:
        live: The loaded model.
        terms: What is minimised: their sum.
        steps: How far.
        start: Gates to begin with; by default one.
        progress: Called with (steps done, steps in all).
    """
    device, dtype = live.device, torch.float32
    spectra = live.spectra
    start = start or {path: np.ones(len(spectra[path].S)) for path in live.paths}
    gates = {path: torch.tensor(start[path], dtype=dtype, device=device, requires_grad=True) for path in start}
    optimiser = torch.optim.Adam(gates.values(), lr=steps.gate_rate)

    def state() -> Gates:
        return {path: _shared(live, path, gate.detach().cpu().double().numpy()) for path, gate in gates.items()}

    def opened() -> AbstractContextManager[None]:
        return live.tuned(gates)

    def bound() -> None:
        for gate in gates.values():
            gate.clamp_(LOWEST, HIGHEST)

    with live.still():
        return _minimise(live, terms, steps, optimiser, opened, state, bound, progress)


def carry_on(
    live: Live,
    terms: Sequence[Term],
    steps: Steps,
    *,
    learning_rate: float,
    progress: Callable[[int, int], None] | None = None,
) -> Adapter:
    """Returns the adapter after the same steps of ordinary training (AdamW) of all its factors.

    Args:
        live: The loaded model; afterwards its adapter is as it was.
        terms: What is minimised: their sum.
        steps: How far.
        learning_rate: Of A and B.
        progress: Called with (steps done, steps in all).
    """
    mark = f".{live.adapter_name}."
    factors = {n: p for n, p in live.model.named_parameters() if "lora_" in n and (mark in n or n.endswith(mark[:-1]))}

    def state() -> Adapter:
        return Adapter.from_model(live.model, live.adapter_name)

    with live.still(), live.holding(live.adapter):
        for parameter in factors.values():
            parameter.requires_grad_(True)
        try:
            optimiser = torch.optim.AdamW(factors.values(), lr=learning_rate, weight_decay=0.0)
            return _minimise(live, terms, steps, optimiser, nullcontext, state, lambda: None, progress)
        finally:
            for parameter in factors.values():
                parameter.requires_grad_(False)
                parameter.grad = None


def _minimise(
    live: Live,
    terms: Sequence[Term],
    steps: Steps,
    optimiser: torch.optim.Optimizer,
    opened: Callable[[], AbstractContextManager[None]],
    state: Callable[[], Any],
    bound: Callable[[], None],
    progress: Callable[[int, int], None] | None,
) -> Any:
    """Returns the state with the least objective on held-back rows; the starting state counts too.

    Args:
        live: The loaded model, in evaluation mode.
        terms: What is minimised.
        steps: How far.
        optimiser: Of what is moved.
        opened: Context in which the model computes with what is moved.
        state: What is moved, as it is now, as a value.
        bound: Called after each step, to bring what is moved within bounds.
        progress: Called with (steps done, steps in all).
    """
    parts = [(term, *term.parts(steps.seed)) for term in terms]
    streams = [(term, _stream(rows, steps)) for term, rows, _ in parts]
    moved = [value for group in optimiser.param_groups for value in group["params"]]

    @torch.no_grad()
    def held_back() -> float:
        with opened():
            return float(sum(per_example(live, rows, term.loss_of).mean() / term.scale for term, _, rows in parts))

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps.count, 1))
    best = _Best(held_back(), state())
    for step in range(1, steps.count + 1):
        optimiser.zero_grad()
        for term, stream in streams:
            rows = next(stream).examples
            processes.dealt(rows, partial(_add_gradient, live, term, total=len(rows), opened=opened, moved=moved))
        for value, gradient in zip(moved, processes.summed([_gradient(value) for value in moved]), strict=True):
            value.grad = gradient
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            bound()
        if step % steps.check == 0 or step == steps.count:
            best.offer(held_back(), state)
        if progress:
            progress(step, steps.count)
    return best.state


def _add_gradient(
    live: Live,
    term: Term,
    examples: list[TokenizedExample],
    *,
    total: int,
    opened: Callable[[], AbstractContextManager[None]],
    moved: Sequence[Tensor],
) -> None:
    """Adds the gradient of ``sum of losses / (total scale)``; rows that do not fit into memory are halved.

    It is added as a whole or not at all, so a backward pass that ran out of memory leaves nothing.

    Raises:
        RunError: If one row alone does not fit, or a loss is not finite.
    """
    try:
        with torch.enable_grad(), opened():
            rows = Tokenized(examples, 0)
            batch = batches(rows, batch_size=len(examples))[0].to(live.device)
            loss = term.loss_of(rows)(live.model, batch).sum() / (total * term.scale)
            if not loss.isfinite():
                raise RunError("The loss of a step is not finite. Use --dtype bfloat16 or float32.")
            gradients = torch.autograd.grad(loss, moved, allow_unused=True)
        for value, gradient in zip(moved, gradients, strict=True):
            if gradient is not None:
                value.grad = gradient if value.grad is None else value.grad + gradient
        return
    except torch.OutOfMemoryError as error:
        if len(examples) == 1:
            raise RunError(
                "One row alone needs more memory than there is. Use --gradient-checkpointing, --load-in-4bit or a "
                "smaller --max-length, or --steps 0."
            ) from error
    half = len(examples) // 2
    for piece in (examples[:half], examples[half:]):
        _add_gradient(live, term, piece, total=total, opened=opened, moved=moved)


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def _stream(rows: Tokenized, steps: Steps) -> Iterator[Tokenized]:
    """Yields handfuls of random rows without end, every row once before any comes again."""
    rng = np.random.default_rng(steps.seed)
    while True:
        order = rng.permutation(len(rows.examples))
        for begin in range(0, len(order), steps.rows):
            yield Tokenized([rows.examples[int(i)] for i in order[begin : begin + steps.rows]], 0)


def _shared(live: Live, path: str, gates: np.ndarray) -> np.ndarray:
    """Returns the gates with tied components sharing theirs."""
    ties = live.spectra[path].ties
    return np.array([gates[ties == tie].mean() for tie in ties]) if len(ties) else gates
