"""What a change does to a weight's own singular directions, without a dense SVD of either.

Two questions have one answer. *Intruders* (Shuttleworth et al., arXiv 2410.21228): which leading singular directions
of ``W + delta`` are near to none of W? And SpecLoRA's study (arXiv 2505.23099) of fine-tuned against pre-trained
weights: how do singular values and directions move, by index? Both compare the leading singular triples of two
matrices.

What is exact: Frobenius norms, and everything for matrices of up to :data:`DENSE` rows or columns, which are
decomposed densely. For larger ones the leading triples come from a block Krylov iteration that only multiplies by the
matrix; how far they are from exact is returned as ``residual``. Partners are sought among the leading directions of W,
so a direction from deep in its spectrum that was raised to the top counts as an intruder: the count is an upper bound.

Deviation from PEFT's ``intruders.py`` and from the study as published: partners are also sought, not only taken by
index, because neighbouring singular values swap places; both sides are looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_surgery import geometry
from spectral_surgery.geometry import Baseline
from spectral_surgery.spectrum import LowRank, update_norm

DENSE = 512
"""Matrices with no more rows or columns than this are decomposed densely."""
OVERSAMPLED = 8
DEPTH = 3
"""Products with W W^T in one Krylov space."""
MOST_ROUNDS = 4
TOLERANCE = 1e-3
"""Residual, relative to the largest singular value, at which the iteration ends."""
INTRUDER = 0.5
"""|cos| under which a direction has no partner in W."""


@dataclass(frozen=True)
class Changed:
    """The matrix ``W + scale B A`` without forming it; ``B`` and ``A`` may have no columns."""

    W: Float[Tensor, "out in"]
    """In float32 or float64."""
    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]

    def times(self, X: Float[Tensor, "in m"]) -> Float[Tensor, "out m"]:
        """Returns ``(W + B A) X``."""
        return self.W @ X + self.B @ (self.A @ X)

    def transposed_times(self, Y: Float[Tensor, "out m"]) -> Float[Tensor, "in m"]:
        """Returns ``(W + B A)^T Y``."""
        return self.W.T @ Y + self.A.T @ (self.B.T @ Y)


@dataclass(frozen=True)
class Triples:
    """The leading n singular triples of a matrix."""

    U: Float[Tensor, "out n"]
    S: Float[Tensor, " n"]
    Vh: Float[Tensor, "n in"]
    residual: float
    """Largest ``||M v - s u||`` and ``||M^T u - s v||`` over the triples, relative to the largest singular value."""


@dataclass(frozen=True)
class WeightStudy:
    """The leading n singular directions of a matrix after a change, against those before it."""

    before: Float[np.ndarray, " n"]
    """Singular values."""
    after: Float[np.ndarray, " n"]
    ratio: Float[np.ndarray, " n"]
    """After over before, by index."""
    output_by_index: Float[np.ndarray, " n"]
    """|cos| of output directions of the same index."""
    input_by_index: Float[np.ndarray, " n"]
    output_best: Float[np.ndarray, " n"]
    """|cos| of each output direction after the change with its best partner among the known ones before."""
    input_best: Float[np.ndarray, " n"]
    output_angles: Float[np.ndarray, " n"]
    """Principal angles between the two leading subspaces, degrees, ascending."""
    input_angles: Float[np.ndarray, " n"]
    output_by_chance: Baseline
    """|cos| of random directions."""
    input_by_chance: Baseline
    residual: float
    """Of the worst triple that was used."""

    @property
    def intruders(self) -> int:
        """Number of directions after the change with no partner before on either side."""
        return int((np.maximum(self.output_best, self.input_best) < INTRUDER).sum())


def unchanged(W: Float[Tensor, "out in"]) -> Changed:
    """Returns W itself in the form that :func:`study` takes, in float32 or better."""
    W = W if W.dtype == torch.float64 else W.float()
    return Changed(W, W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1]))


def changed(before: Changed, update: LowRank) -> Changed:
    """Returns ``W + scale B A``."""
    return Changed(before.W, update.scale * update.B.to(before.W), update.A.to(before.W))


def study(before: Changed, after: Changed, n: int = 16) -> WeightStudy:
    """Returns how the leading n singular triples of ``after`` lie to those of ``before``.

    Partners are sought among the leading 2 n of ``before``.

    Args:
        before: The base weight, see :func:`unchanged`.
        after: The changed or fine-tuned weight of the same shape.
        n: Number of triples; at most the smaller dimension is taken.
    """
    limit = min(before.W.shape)
    return compare(leading_triples(before, min(2 * n, limit)), leading_triples(after, min(n, limit)))


def compare(old: Triples, new: Triples) -> WeightStudy:
    """Returns the study of already known triples; ``old`` has at least as many as ``new``."""
    n = len(new.S)
    output, inside = (old.U.T @ new.U).abs().cpu().double().numpy(), (old.Vh @ new.Vh.T).abs().cpu().double().numpy()
    S, S_new = old.S[:n].cpu().double().numpy(), new.S.cpu().double().numpy()
    return WeightStudy(
        before=S,
        after=S_new,
        ratio=np.divide(S_new, S, out=np.full(n, np.nan), where=S > 0),
        output_by_index=np.diagonal(output[:n]).copy(),
        input_by_index=np.diagonal(inside[:n]).copy(),
        output_best=output.max(0),
        input_best=inside.max(0),
        output_angles=geometry.angles((old.U[:, :n].T @ new.U).cpu().double().numpy()),
        input_angles=geometry.angles((old.Vh[:n] @ new.Vh.T).cpu().double().numpy()),
        output_by_chance=geometry.cosine_baseline(len(old.U)),
        input_by_chance=geometry.cosine_baseline(old.Vh.shape[1]),
        residual=max(old.residual, new.residual),
    )


def leading_triples(matrix: Changed, n: int, seed: int = 0) -> Triples:
    """Returns the leading n singular triples, dense where small, else by block Krylov iteration with restarts."""
    if min(matrix.W.shape) <= DENSE:
        U, S, Vh = torch.linalg.svd((matrix.W + matrix.B @ matrix.A).double(), full_matrices=False)
        return Triples(U[:, :n].to(matrix.W), S[:n].to(matrix.W), Vh[:n].to(matrix.W), torch.finfo(matrix.W.dtype).eps)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.W.shape[1], n + OVERSAMPLED, generator=generator).to(matrix.W)
    found = _krylov(matrix, start, n)
    for _ in range(MOST_ROUNDS - 1):
        if found[1].residual < TOLERANCE:
            break
        found = _krylov(matrix, found[0], n)
    return found[1]


def _krylov(matrix: Changed, start: Float[Tensor, "in m"], n: int) -> tuple[Float[Tensor, "in m"], Triples]:
    """One round: Rayleigh-Ritz in the Krylov space of ``start``; also returns where the next round starts."""
    columns = [matrix.times(start)]
    for _ in range(DEPTH):
        columns.append(matrix.times(matrix.transposed_times(torch.linalg.qr(columns[-1])[0])))
    Q = torch.linalg.qr(torch.cat([column / column.norm() for column in columns], 1))[0]
    small = matrix.transposed_times(Q)
    V, S, Wh = torch.linalg.svd(small, full_matrices=False)
    U = Q @ Wh.T
    residual = matrix.times(V[:, :n]) - U[:, :n] * S[:n]
    error = float(residual.norm(dim=0).max() / S[0]) if S[0] > 0 else 0.0
    return V[:, : start.shape[1]], Triples(U[:, :n], S[:n], V[:, :n].T, error)


def top_overlap(directions: Float[np.ndarray, "d k"], top: Float[np.ndarray, "d n"]) -> float:
    """Returns the share of a k-dimensional subspace inside the span of n directions, in [0, 1]; by chance n / d."""
    k = directions.shape[1]
    if not k:
        return math.nan
    return float(((top.T.astype(np.float64) @ directions.astype(np.float64)) ** 2).sum() / k)


@dataclass(frozen=True)
class BaseView:
    """One module's update against the base weight W that it is added to."""

    relative_norm: float
    """||delta|| / ||W|| in Frobenius norms, exact."""
    weight_norm: float
    """||W||, Frobenius."""
    top_overlap_output: float
    """Share of the update's leading output directions inside the span of W's leading ones, in [0, 1]."""
    top_overlap_input: float
    """The same for input directions."""
    top_by_chance: tuple[float, float]
    """What chance gives for both."""
    intruders: int
    """Leading directions of W + delta that are near to none of W's known ones; an upper bound."""
    study: WeightStudy


def view(
    W: Float[Tensor, "out in"],
    update: LowRank,
    U: Float[np.ndarray, "out k"],
    V: Float[np.ndarray, "in k"],
    n: int = 16,
) -> BaseView:
    """Returns an update against its base weight.

    Args:
        W: The base weight, in the orientation of the update.
        update: What is added to it.
        U: The update's leading output directions.
        V: Its leading input directions.
        n: Leading directions of W + delta that are looked at.
    """
    before = unchanged(W)
    limit = min(W.shape)
    old = leading_triples(before, min(2 * n, limit))
    found = compare(old, leading_triples(changed(before, update), min(n, limit)))
    weight_norm = float(before.W.norm())
    delta_norm = abs(update.scale) * update_norm(update.B, update.A)
    known = len(old.S)
    return BaseView(
        relative_norm=delta_norm / weight_norm if weight_norm else math.nan,
        weight_norm=weight_norm,
        top_overlap_output=top_overlap(U, old.U.cpu().numpy()),
        top_overlap_input=top_overlap(V, old.Vh.T.cpu().numpy()),
        top_by_chance=(known / W.shape[0], known / W.shape[1]),
        intruders=found.intruders,
        study=found,
    )
