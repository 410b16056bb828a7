"""How directions and subspaces lie to each other, each figure beside what chance gives (Eq. 3, arXiv 2603.03995).

Between two k-dimensional subspaces of a d-dimensional space with orthonormal bases X and Y everything follows from the
k x k block ``X^T Y``, whose singular values are the cosines of the principal angles:

- subspace overlap ``||X^T Y||_F^2 / k`` (Eq. 3): the mean squared cosine, in [0, 1], by chance ``k / d``;
- principal direction similarity ``|x_1^T y_1|``, by chance ``sqrt(2 / (pi d))``;
- principal angles, in [0, pi / 2].

Deviation from the paper: it compares direction similarity (its Fig. 1c) with ``k / d``, the chance level of overlap.
In 4096 dimensions ``|cos|`` is 0.0125 by chance and overlap at k = 4 is 0.00098, so the two must not be mixed up.

Intervals of chance are sampled: :func:`random_blocks` draws ``X^T Y`` of independent uniform subspaces without ever
making a d-dimensional vector, so it costs the same in any dimension. Where many comparisons are made at once,
:func:`chance_limit` says what the largest of them stays under.

All functions are pure and compute in float64, on NumPy arrays; directions may be stored in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

DRAWS = 4000
"""Random subspace pairs behind every sampled interval."""
MEANS = 1000
"""Means over several pairs behind the interval of such a mean."""
INTERVAL = 0.99
"""Share of draws inside an interval of chance."""
SLICE = 2048
"""Dimensions that are converted to float64 at once."""
ERROR_RATE = 0.01
"""Probability that any of a family of random comparisons passes its chance limit."""


@dataclass(frozen=True)
class Baseline:
    """What chance gives for one figure."""

    mean: float
    """Expected value, exact for a large dimension."""
    low: float
    """Lower end of the interval that holds 99 % of random draws."""
    high: float
    """Upper end of it."""


def overlap(X: Float[np.ndarray, "d k"], Y: Float[np.ndarray, "d k"]) -> float:
    """Returns the subspace overlap ``||X^T Y||_F^2 / k`` (Eq. 3), in [0, 1].

    Args:
        X: Orthonormal columns, such as the leading output directions ``U[:, :k]`` of one module.
        Y: Orthonormal columns in the same space.
    """
    return float(overlaps(blocks(X[None], Y[None]))[0, 0])


def principal_angles(X: Float[np.ndarray, "d k"], Y: Float[np.ndarray, "d m"]) -> Float[np.ndarray, " n"]:
    """Returns the n = min(k, m) principal angles in radians, ascending; accurate near zero too.

    Cosines are singular values of ``X^T Y``. Under 45 degrees the arc cosine loses digits, so there the sines are
    taken, which are singular values of ``Y - X X^T Y`` (Björck and Golub, 1973).
    """
    X, Y = X.astype(np.float64), Y.astype(np.float64)
    if X.shape[1] < Y.shape[1]:
        X, Y = Y, X
    cosines = np.clip(np.linalg.svd(X.T @ Y, compute_uv=False), 0, 1)
    sines = np.clip(np.linalg.svd(Y - X @ (X.T @ Y), compute_uv=False)[::-1], 0, 1)
    return np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines))


def blocks(X: Float[np.ndarray, "n d k"], Y: Float[np.ndarray, "m d k"]) -> Float[np.ndarray, "n m k k"]:
    """Returns ``X_i^T Y_j`` for every pair, by one matrix product in slices of d that bound the memory."""
    # NumPy's BLAS would keep a second pool of threads and buffers beside torch's.
    import torch

    n, d, k = X.shape
    m = len(Y)
    left, right = (torch.from_numpy(stack).permute(1, 0, 2) for stack in (X, Y))
    products = torch.zeros(n * k, m * k, dtype=torch.float64)
    for start in range(0, d, SLICE):
        part = slice(start, start + SLICE)
        products += left[part].reshape(-1, n * k).double().T @ right[part].reshape(-1, m * k).double()
    return products.numpy().reshape(n, k, m, k).transpose(0, 2, 1, 3)


def overlaps(between: Float[np.ndarray, "*pairs k k"]) -> Float[np.ndarray, "*pairs"]:
    """Returns the subspace overlap of every pair from its block ``X^T Y``."""
    return np.clip((between**2).sum((-1, -2)) / between.shape[-1], 0, 1)


def cosines(between: Float[np.ndarray, "*pairs k k"]) -> Float[np.ndarray, "*pairs"]:
    """Returns ``|cos|`` of every pair's leading directions from its block ``X^T Y``."""
    return np.clip(np.abs(between[..., 0, 0]), 0, 1)


def angles(between: Float[np.ndarray, "*pairs k k"]) -> Float[np.ndarray, "*pairs k"]:
    """Returns the principal angles of every pair, ascending, in degrees.

    From cosines alone, so angles under about 0.03 degrees are rounding where directions are stored in float32; see
    :func:`principal_angles` for one accurate pair.
    """
    finite = np.nan_to_num(between)
    found = np.degrees(np.arccos(np.clip(np.linalg.svd(finite, compute_uv=False), 0, 1)))
    found[np.isnan(between).any((-1, -2))] = np.nan
    return found


def off_diagonal(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " pairs"]:
    """Returns the entries above the diagonal that are defined (not NaN)."""
    entries = matrix[np.triu_indices(len(matrix), 1)]
    return entries[~np.isnan(entries)]


def off_diagonal_mean(matrix: Float[np.ndarray, "n n"]) -> float:
    """Returns the mean of the defined entries above the diagonal, NaN where there are none."""
    entries = off_diagonal(matrix)
    return float(entries.mean()) if len(entries) else math.nan


@lru_cache(maxsize=64)
def random_blocks(k: int, d: int, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, "draws k k"]:
    """Returns ``X^T Y`` of independent uniform k-dimensional subspaces of a d-dimensional space.

    By symmetry X may be the first k axes, so a draw is the top block of Q in a QR decomposition of a Gaussian d x k
    matrix G: ``G_1 R^-1`` with ``R^T R = G_1^T G_1 + W``, where W is a Wishart matrix of d - k degrees of freedom,
    drawn by Bartlett's decomposition.
    """
    generator = np.random.default_rng([seed, k, d])
    top = generator.standard_normal((draws, k, k))
    rest = _bartlett(k, d - k, draws, generator) if d >= 2 * k else generator.standard_normal((draws, d - k, k))
    gram = top.transpose(0, 2, 1) @ top + rest.transpose(0, 2, 1) @ rest
    lower = np.linalg.cholesky(gram)
    return np.linalg.solve(lower, top.transpose(0, 2, 1)).transpose(0, 2, 1)


def _bartlett(k: int, freedom: int, draws: int, generator: np.random.Generator) -> Float[np.ndarray, "draws k k"]:
    """Upper triangular T with ``T^T T`` Wishart distributed."""
    upper = np.triu(generator.standard_normal((draws, k, k)), 1)
    diagonal = np.sqrt(generator.chisquare(freedom - np.arange(k), (draws, k)))
    return upper + diagonal[:, :, None] * np.eye(k)


@lru_cache(maxsize=256)
def overlap_baseline(k: int, d: int, pairs: int = 1) -> Baseline:
    """Returns what chance gives for a subspace overlap: ``k / d``, with a sampled interval.

    Args:
        k: Dimension of the subspaces.
        d: Dimension of the space they lie in.
        pairs: Number of independent pairs that the figure is a mean of, such as the off-diagonal entries of a matrix.
    """
    return _baseline(k / d, overlaps(random_blocks(k, d)), pairs)


@lru_cache(maxsize=256)
def cosine_baseline(d: int, pairs: int = 1) -> Baseline:
    """Returns what chance gives for ``|cos|`` of two directions: ``sqrt(2 / (pi d))``, with a sampled interval."""
    expected = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    return _baseline(expected, cosines(random_blocks(1, d)), pairs)


@lru_cache(maxsize=256)
def best_cosine_baseline(d: int, partners: int) -> Baseline:
    """Returns what chance gives for ``|cos|`` of a direction with the nearest of several orthonormal ones, sampled.

    By symmetry these are the first ``partners`` coordinates of a uniform unit vector.
    """
    generator = np.random.default_rng([1, partners, d])
    first = generator.standard_normal((DRAWS, partners)) ** 2
    rest = generator.chisquare(d - partners, DRAWS) if d > partners else np.zeros(DRAWS)
    nearest = np.sqrt(first.max(1) / (first.sum(1) + rest))
    return _baseline(float(nearest.mean()), nearest, 1)


@lru_cache(maxsize=256)
def angle_baseline(k: int, d: int) -> Baseline:
    """Returns what chance gives for the smallest principal angle, in degrees; mean and interval are sampled."""
    smallest = angles(random_blocks(k, d))[:, 0]
    return _baseline(float(smallest.mean()), smallest, 1)


def _baseline(mean: float, draws: Float[np.ndarray, " draws"], pairs: int) -> Baseline:
    if pairs > 1:
        generator = np.random.default_rng(pairs)
        draws = generator.choice(draws, (MEANS, pairs)).mean(1)
    low, high = np.quantile(draws, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return Baseline(mean, float(low), float(high))


def chance_limit(k: int, d: int, *, comparisons: int = 1, pairs: int = 1, rate: float = ERROR_RATE) -> float:
    """Returns an overlap that no random comparison of a family passes, with probability ``1 - rate``.

    Bonferroni's bound over the family, on a gamma distribution with the exact mean ``k / d`` and variance
    ``2 (d - k)^2 / (d^2 (d - 1) (d + 2))`` of a random overlap.
    For ``|cos|`` take k = 1 and the square root.

    Args:
        k: Dimension of the subspaces.
        d: Dimension of the space.
        comparisons: Size of the family.
        pairs: Number of independent overlaps that each figure is a mean of.
        rate: Probability that a random family passes the limit anywhere.
    """
    from scipy.special import gammaincinv

    if k >= d:
        return 1.0
    mean = k / d
    variance = 2 * (d - k) ** 2 / (d**2 * (d - 1) * (d + 2) * pairs)
    shape = mean**2 / variance
    return min(1.0, mean / shape * float(gammaincinv(shape, 1 - rate / comparisons)))
