"""Whether rows were seen in training, guessed from the losses of adapter and base on them.

Training starts at the base and lowers the loss of the rows that it sees, so what an adapter was trained on it seldom
does worse than its base, and then by little beside what it gained. On other rows, what was learned by heart turns into
confident mistakes: some become clearly worse than they were. With each row's harm and benefit, the loss that the
adapter added or took away, rows are guessed to be unseen where harm is surely more than :data:`HARM` of the benefit:

    mean(harm - HARM benefit) > 0, one-sided, at the level 0.01 by the studentised bootstrap.

Everything else counts as seen, because a wrong "unseen" does more damage than a wrong "seen": gains would be claimed
on rows that were learned by heart. Rows of an easy task, or of one of which the base had no idea, are never clearly
worse than with the base, so they are guessed to be seen whatever they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from spectral_surgery.statistics import bootstrap_p

HARM = 0.25
"""Harm, as a share of the benefit, that rows of the training do not show."""
LEVEL = 0.01
"""At which it must be sure."""
BY_HEART, SHARE, UNKNOWN = 0.05, 0.95, 0.5
"""Rows look learned by heart where the adapter's loss is at most so many nats per token on this share of them, and the
base's mean loss is at least so many."""


@dataclass(frozen=True)
class Guess:
    """What losses say about whether rows were seen in training."""

    seen: bool
    memorised: bool
    """Whether they look learned by heart; an easy task looks the same."""
    rows: int
    base_loss: float
    """Mean, nats per token."""
    own_loss: float
    worse: float
    """Share of the rows that the adapter does worse than its base."""
    harm: float
    """Loss that the adapter added to these, as a share of what it took away from the others."""
    source: str

    @property
    def sentence(self) -> str:
        """What was guessed, and how to say it where it is wrong."""
        figures = (
            f"on {self.rows} of them the loss is {self.own_loss:.3f} nats per token with the adapter and "
            f"{self.base_loss:.3f} with the base, {100 * self.worse:.0f} % of the rows are worse than with the base"
        )
        if self.seen:
            return (
                f"A guess, because you did not say: the adapter may have been trained on these rows ({figures}; doubt "
                f"counts as trained on), so nothing is said about how well the task is done. If it was not, say so: "
                f"--data {self.source}"
            )
        lost = "more than" if self.harm > 1 else f"{100 * self.harm:.0f} % of what"
        return (
            f"A guess, because you did not say: the adapter was not trained on these rows ({figures}, and these lose "
            f"{lost} the others gain). If it was, this verdict shows no gain; say so: --train-data {self.source}"
        )

    @property
    def warning(self) -> str:
        """What is said where rows that were called unseen look learned by heart."""
        return (
            f"The rows of {self.source} look as if the adapter knew them by heart: on {100 * SHARE:.0f} % of them "
            f"its loss is under {BY_HEART} nats per token (base {self.base_loss:.2f} on average). Either the task is "
            f"easy, or it was trained on them; then pass them as --train-data, because nothing that is said here "
            f"about the task would hold."
        )


def guess(base: Float[np.ndarray, " rows"], own: Float[np.ndarray, " rows"], source: str) -> Guess:
    """Returns whether rows look as if the adapter was trained on them.

    Args:
        base: The base model's loss on every row, nats per token.
        own: The adapter's.
        source: What the rows are called, for the sentence.
    """
    harm, benefit = np.maximum(own - base, 0.0), np.maximum(base - own, 0.0)
    gained = float(benefit.sum())
    return Guess(
        seen=bootstrap_p(harm - HARM * benefit) > LEVEL,
        memorised=bool(np.quantile(own, SHARE) <= BY_HEART and base.mean() >= UNKNOWN),
        rows=len(own),
        base_loss=float(base.mean()),
        own_loss=float(own.mean()),
        worse=float((own > base).mean()),
        harm=float(harm.sum()) / gained if gained else float(harm.any()),
        source=source,
    )
