"""How near the states between a model's layers are to those of its base: more than its answers tell.

A label says one token at each place, and a distribution over tokens is what is left of a state at the very end. The
states themselves say at every token of a row, of its prompt too, how far every layer has moved; that is so many more
numbers a row that gates found by them keep skills that no row shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_surgery.calibration import Batch
from spectral_surgery.live import Live
from spectral_surgery.live.live import blocks
from spectral_surgery.objective import Loss
from spectral_surgery.refining.scoring import LossOf


@dataclass(frozen=True)
class Distance:
    """A loss and, added to it, the distance of all states from the base's.

    The distance of one example is the mean, over layers l and tokens t, of ``||h_lt - b_lt||^2 / ||b_lt||^2``, with
    h what layer l gives out and b the same without the adapter. A model whose layers cannot be told has distance zero.
    """

    live: Live
    loss: Loss
    weight: float
    """What one unit of distance counts beside the loss."""

    def __call__(self, model: Any, batch: Batch) -> Float[Tensor, " examples"]:
        """Returns the sum for each example; differentiable."""
        with _states(model) as ours:
            loss = self.loss(model, batch)
        with torch.no_grad(), self.live.base(), _states(model) as theirs:
            self.loss(model, batch)
        apart = [_apart(*pair, batch.attention_mask).to(loss) for pair in zip(ours, theirs, strict=True)]
        distance = torch.stack(apart).mean(0) if apart else loss.new_zeros(loss.shape)
        return loss + self.weight * distance


def with_distance(live: Live, loss_of: LossOf, weight: float) -> LossOf:
    """Returns the loss with the distance added, for any rows."""
    return lambda rows: Distance(live, loss_of(rows), weight)


@contextmanager
def _states(model: Any) -> Iterator[list[Tensor]]:
    """Collects what every layer gives out while open."""
    found: list[Tensor] = []

    def hear(module: Any, inputs: Any, out: Any) -> None:
        found.append(out if isinstance(out, Tensor) else out[0])

    handles = [block.register_forward_hook(hear) for block in blocks(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _apart(
    ours: Float[Tensor, "examples length width"],
    theirs: Float[Tensor, "examples length width"],
    mask: Tensor,
) -> Float[Tensor, " examples"]:
    """Returns the mean squared relative distance over each example's own tokens.

    Every token is divided by its own size: in large models the first token's is a thousand times that of the others.
    """
    theirs = theirs.float()
    size = theirs.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    relative = (ours.float() - theirs).square().sum(-1) / size
    own = mask.to(relative)
    return (relative * own).sum(1) / own.sum(1)
