"""What a change does to a weight's own singular directions, without a dense SVD of either.

Two questions have one answer. Which leading singular directions of ``W + delta`` are near to none of W
(:mod:`~spectral_surgery.intruders`)? And SpecLoRA's study (arXiv 2505.23099) of fine-tuned against pre-trained
weights: how do singular values and directions move, by index? Both compare the leading singular triples of two
matrices.

What is exact: Frobenius norms, and everything for matrices of up to :data:`DENSE` rows or columns, which are
decomposed densely. For larger ones the leading triples come from a block Krylov iteration that only multiplies by the
matrix; how far they are from exact is returned as ``residual``. Those of ``W + delta`` start from W's own and from
what delta reads, whose span holds nearly all of them, since delta is of low rank.

Deviation from the study as published: partners are also sought, not only taken by index, because neighbouring
singular values swap places; both sides are looked at.
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
from spectral_surgery.intruders import COUNT, NEGLIGIBLE, Nearness, nearness
from spectral_surgery.spectrum import LowRank, update_norm

DENSE = 512
"""Matrices with no more rows or columns than this are decomposed densely."""
OVERSAMPLED = 8
DEPTH = 3
"""Products with W W^T in one Krylov space."""
MOST_ROUNDS = 4
TOLERANCE = 1e-3
"""Residual, relative to the largest singular value, at which the iteration ends."""


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

    def leading(self, n: int) -> Triples:
        """Returns the first n of them."""
        return Triples(self.U[:, :n], self.S[:n], self.Vh[:n], self.residual)


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
    output_best_by_chance: Baseline
    """|cos| of a random direction with the best of as many random partners."""
    input_best_by_chance: Baseline
    residual: float
    """Of the worst triple that was used."""
    nearness: Nearness
    """How near the first 10 output directions after the change are to any before it."""


def unchanged(W: Float[Tensor, "out in"]) -> Changed:
    """Returns W itself in the form that :func:`study` takes, in float32 or better."""
    W = W if W.dtype == torch.float64 else W.float()
    return Changed(W, W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1]))


def changed(before: Changed, update: LowRank) -> Changed:
    """Returns ``W + scale B A``."""
    return Changed(before.W, update.scale * update.B.to(before.W), update.A.to(before.W))


@dataclass(frozen=True)
class Known:
    """A weight before the change, with its leading singular triples: all of them where it is small."""

    matrix: Changed
    triples: Triples


def known(W: Float[Tensor, "out in"], n: int = COUNT) -> Known:
    """Returns a weight with as many of its leading triples as a study of n needs, which is twice as many."""
    matrix = unchanged(W)
    small = min(W.shape)
    return Known(matrix, leading_triples(matrix, small if small <= DENSE else min(2 * n, small)))


def study(before: Known, after: Changed, n: int = COUNT) -> WeightStudy:
    """Returns how the leading n singular triples of ``after`` lie to those of ``before``.

    Partners are sought among the leading 2 n of ``before``.

    Args:
        before: The base weight, see :func:`known`.
        after: The changed or fine-tuned weight of the same shape.
        n: Number of triples; at most the smaller dimension is taken.
    """
    n = min(n, *before.matrix.W.shape)
    new = leading_triples(after, n, start=torch.cat([before.triples.Vh.T, after.A.T], 1))
    return compare(before.triples.leading(2 * n), new, _near(before, new.U[:, :COUNT]))


def _near(before: Known, U: Float[Tensor, "out n"]) -> Nearness:
    """Returns how near directions are to any of a weight's own: exactly where all of these are known."""
    W, old = before.matrix.W, before.triples
    largest = float(old.S[0]) if len(old.S) else 0.0
    own = old.U[:, (old.S > 0) & (NEGLIGIBLE * largest <= old.S)]
    best = (own.T @ U).abs().cpu().double().numpy().max(0, initial=0.0)
    if len(old.S) == min(W.shape) or not largest:
        return Nearness(best, best)
    return nearness(lambda X: W @ (W.T @ X), U, best, largest)


def compare(old: Triples, new: Triples, near: Nearness) -> WeightStudy:
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
        output_best_by_chance=geometry.best_cosine_baseline(len(old.U), len(old.S)),
        input_best_by_chance=geometry.best_cosine_baseline(old.Vh.shape[1], len(old.S)),
        residual=max(old.residual, new.residual),
        nearness=near,
    )


def leading_triples(matrix: Changed, n: int, *, start: Float[Tensor, "in m"] | None = None, seed: int = 0) -> Triples:
    """Returns the leading n singular triples, dense where small, else by block Krylov iteration with restarts.

    Args:
        matrix: Whose.
        n: How many, at most as many as there are.
        start: Input directions near to the wanted ones; n or more of them.
        seed: Of a random start.
    """
    if min(matrix.W.shape) <= DENSE:
        U, S, Vh = torch.linalg.svd((matrix.W + matrix.B @ matrix.A).double(), full_matrices=False)
        return Triples(U[:, :n].to(matrix.W), S[:n].to(matrix.W), Vh[:n].to(matrix.W), torch.finfo(matrix.W.dtype).eps)
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(matrix.W.shape[1], n + OVERSAMPLED, generator=generator).to(matrix.W)
    found = _krylov(matrix, torch.linalg.qr(start)[0], n)
    for _ in range(MOST_ROUNDS - 1):
        if found[1].residual < TOLERANCE:
            break
        found = _krylov(matrix, found[0], n)
    return found[1]


def _krylov(matrix: Changed, start: Float[Tensor, "in m"], n: int) -> tuple[Float[Tensor, "in next"], Triples]:
    """One round: Rayleigh-Ritz in the Krylov space of ``start``; also returns where the next round starts."""
    columns = [matrix.times(start)]
    for _ in range(DEPTH):
        columns.append(matrix.times(matrix.transposed_times(torch.linalg.qr(columns[-1])[0])))
    tiny = torch.finfo(start.dtype).tiny
    Q = torch.linalg.qr(torch.cat([column / column.norm().clamp_min(tiny) for column in columns], 1))[0]
    small = matrix.transposed_times(Q)
    V, S, Wh = torch.linalg.svd(small, full_matrices=False)
    U = Q @ Wh.T
    residual = matrix.times(V[:, :n]) - U[:, :n] * S[:n]
    error = float(residual.norm(dim=0).max() / S[0]) if S[0] > 0 else 0.0
    return V[:, : n + OVERSAMPLED], Triples(U[:, :n], S[:n], V[:, :n].T, error)


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
    """Leading output directions of W + delta that are near to none of W's own."""
    undecided: int
    """Those of which it is not known; mostly 0."""
    study: WeightStudy


def view(
    before: Known,
    update: LowRank,
    U: Float[np.ndarray, "out k"],
    V: Float[np.ndarray, "in k"],
    n: int = COUNT,
) -> BaseView:
    """Returns an update against its base weight.

    Args:
        before: The base weight, in the orientation of the update.
        update: What is added to it.
        U: The update's leading output directions.
        V: Its leading input directions.
        n: Leading directions of W + delta that are looked at.
    """
    found = study(before, changed(before.matrix, update), n)
    weight_norm = float(before.matrix.W.norm())
    delta_norm = abs(update.scale) * update_norm(update.B, update.A)
    top = before.triples.leading(2 * n)
    return BaseView(
        relative_norm=delta_norm / weight_norm if weight_norm else math.nan,
        weight_norm=weight_norm,
        top_overlap_output=top_overlap(U, top.U.cpu().numpy()),
        top_overlap_input=top_overlap(V, top.Vh.T.cpu().numpy()),
        top_by_chance=(len(top.S) / before.matrix.W.shape[0], len(top.S) / before.matrix.W.shape[1]),
        intruders=found.nearness.intruders,
        undecided=found.nearness.undecided,
        study=found,
    )
