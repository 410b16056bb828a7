"""Which directions of a changed weight are near to none of the weight's own, without decomposing the weight.

An *intruder* (Shuttleworth et al., arXiv 2410.21228, and PEFT's ``intruders.py``) is one of the leading 10 output
directions u of ``W + delta`` whose ``|cos|`` with every output direction ``u_j`` of W is under 0.5. Taken literally
that needs all of W's singular vectors. What is asked, though, is only how large one of the numbers
``c_j^2 = (u_j^T u)^2`` can be, and these are the masses of u's spectral measure by ``W W^T``, an atom of mass
``c_j^2`` at every ``sigma_j^2``. The Lanczos process from u gives that measure's orthonormal polynomials ``p_0``,
``p_1``, ..., and no measure with the same first moments has more mass than the Christoffel function

    1 / (p_0(x)^2 + ... + p_m(x)^2)

in one point x (Golub and Meurant, Matrices, Moments and Quadrature, 2010).
So after m products with ``W W^T`` the largest value of this function bounds every ``c_j^2`` from above, and a Ritz
vector that has converged bounds the largest from below. Directions that neither bound decides are counted apart.

Directions of W whose singular value is under :data:`NEGLIGIBLE` of its largest are not taken for its own, unlike in
PEFT: one of those that stands at the top of ``W + delta`` is the update's doing, and a tall W has a null space that is
no direction of its own either.

What is not covered: rounding of W's products in float32, and the maximum over x, which is taken over a fine grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

COUNT = 10
"""Leading directions that are looked at, as in PEFT."""
NEAR = 0.5
"""|cos| from which a direction has a partner in W, as in PEFT."""
NEGLIGIBLE = 0.01
"""Singular value of W, relative to the largest, under which a direction is not taken for one of W's own."""
STEPS = 40
"""Most products with W W^T; those that are still undecided then are counted apart."""
CHECKED = 4
"""Products between two looks at the bounds."""
CONVERGED = 1e-3
"""Residual of a Ritz pair of W W^T, relative to its value, from which it counts as one of W's own."""
GRID = 65
"""Points around every Ritz value at which the Christoffel function is taken."""


@dataclass(frozen=True)
class Nearness:
    """How near each of n directions lies to the nearest of W's own, as |cos|."""

    low: Float[np.ndarray, " n"]
    """Some direction of W is at least this near."""
    high: Float[np.ndarray, " n"]
    """No direction of W is nearer than this."""

    @property
    def intruders(self) -> int:
        """Number of directions that are near to none of W's."""
        return int((self.high < NEAR).sum())

    @property
    def undecided(self) -> int:
        """Number of directions that the bounds leave open."""
        return int(((self.high >= NEAR) & (self.low < NEAR)).sum())


def nearness(
    gram: Callable[[Float[Tensor, "out m"]], Float[Tensor, "out m"]],
    U: Float[Tensor, "out n"],
    known: Float[np.ndarray, " n"],
    largest: float,
) -> Nearness:
    """Returns how near directions lie to those of a weight.

    Args:
        gram: Returns ``W W^T X``.
        U: The directions, unit columns.
        known: |cos| of each with its best partner among the directions of W that are known already.
        largest: Largest singular value of W.
    """
    low, high = known.astype(np.float64), np.ones(U.shape[1])
    floor = (NEGLIGIBLE * largest) ** 2
    open_ = np.flatnonzero(low < NEAR)
    process = Lanczos(gram, U[:, torch.from_numpy(open_)])
    while len(open_) and len(process.alpha) < min(STEPS, len(U)):
        process.step()
        if len(process.alpha) % CHECKED and len(process.alpha) < len(U):
            continue
        for column, one in enumerate(open_):
            below, above = _bounds(*process.coefficients(column), floor)
            low[one], high[one] = max(low[one], below), min(high[one], above)
        if ((high[open_] < NEAR) | (low[open_] >= NEAR)).all():
            break
    return Nearness(low, np.maximum(high, low))


class Lanczos:
    """The Lanczos process of ``W W^T`` from several directions at once, each with a basis of its own."""

    def __init__(self, gram: Callable[[Tensor], Tensor], start: Float[Tensor, "out n"]) -> None:
        self.gram = gram
        self.basis = start[:, :, None]
        self.alpha: list[Tensor] = []
        self.beta: list[Tensor] = []

    def step(self) -> None:
        """One product for every direction, orthogonal to all before (twice, against rounding)."""
        last = self.basis[:, :, -1]
        new = self.gram(last)
        self.alpha.append((new * last).sum(0).double())
        for _ in range(2):
            new = new - torch.einsum("onm,nm->on", self.basis, torch.einsum("onm,on->nm", self.basis, new))
        norm = new.norm(dim=0)
        self.beta.append(norm.double())
        self.basis = torch.cat([self.basis, (new / norm.clamp_min(torch.finfo(new.dtype).tiny))[:, :, None]], 2)

    def coefficients(self, column: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """Returns diagonal and off-diagonal of a direction's tridiagonal matrix, up to where its space is whole."""
        alpha, beta = (np.array([float(one[column]) for one in values]) for values in (self.alpha, self.beta))
        whole = np.flatnonzero(_whole(alpha, beta))
        end = whole[0] + 1 if len(whole) else len(alpha)
        return alpha[:end], beta[:end]


def _bounds(alpha: Float[np.ndarray, " m"], beta: Float[np.ndarray, " m"], floor: float) -> tuple[float, float]:
    """Returns a lower and an upper bound of the largest |cos| with a direction of W above the floor."""
    ritz, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    masses = vectors[0] ** 2
    settled = (beta[-1] * np.abs(vectors[-1]) <= CONVERGED * np.abs(ritz)) & (ritz >= floor)
    low = masses[settled].max(initial=0.0)
    if _whole(alpha, beta)[-1]:
        return float(np.sqrt(low)), float(np.sqrt(low))
    x = np.concatenate([np.maximum(_grid(ritz), floor), ritz[ritz >= floor]])
    return float(np.sqrt(low)), float(np.sqrt(min(1.0, _christoffel(alpha, beta, x).max())))


def _whole(alpha: Float[np.ndarray, " m"], beta: Float[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    """Where the space holds all that the direction is made of, so that the measure is known."""
    return beta <= np.finfo(np.float32).eps * np.abs(alpha).max()


def _grid(ritz: Float[np.ndarray, " m"]) -> Float[np.ndarray, " points"]:
    """Points around every Ritz value, up to half the way to the next one."""
    middles = (ritz[1:] + ritz[:-1]) / 2
    edges = np.concatenate([ritz[:1], middles, ritz[-1:]])
    return np.concatenate([np.linspace(low, high, GRID) for low, high in pairwise(edges)])


def _christoffel(
    alpha: Float[np.ndarray, " m"], beta: Float[np.ndarray, " m"], x: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """Returns the most mass that a measure with these moments can have in each point."""
    before, now = np.zeros_like(x), np.ones_like(x)
    total = now.copy()
    for k, (a, b) in enumerate(zip(alpha, beta, strict=True)):
        before, now = now, ((x - a) * now - (beta[k - 1] if k else 0.0) * before) / b
        total += now**2
    return 1 / total
