"""The spectrum of one low-rank update, and the edit of one of its factors.

A trained LoRA module adds ``delta = scale B A`` to a frozen weight. Everything here is about its unscaled update
``B A = U diag(S) Vh`` (Eq. 1 and 2 of Spectral Surgery, arXiv 2603.03995), which is never formed:

- the thin SVD comes from a QR decomposition of each factor and an SVD of an r x r core, exact on *all* singular values
  (a dense SVD in float32 loses the small ones);
- an edit ``S_k -> alpha_k S_k`` is a projector on one factor, ``B' = B - U diag(1 - alpha) U^T B`` with ``A``
  untouched (or its mirror on ``A``). Both give exactly ``U diag(alpha S) Vh``. Components whose gate is one take no
  part, so an identity edit returns the stored tensor itself.

Deviation from the paper and its code, which rebuild ``B' = U sqrt(S')`` and ``A' = sqrt(S') Vh``: that rounds both
factors again, even where nothing was edited, and in bfloat16 changes what the model generates.

All functions are pure, run on the CPU in float64, and know nothing of files or models.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update of one module as an adapter stores it: ``delta = scale B A`` in the orientation of nn.Linear."""

    B: Float[Tensor, "out r"]
    """Output factor, in the stored dtype."""
    A: Float[Tensor, "r in"]
    """Input factor."""
    scale: float
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
    side: Literal["B", "A"] = "B"
    """The factor that an edit changes; the other is left alone."""
    A_spacing: float | None = None
    """:func:`spacing` of the stored tensor, where A was computed from one; by default A's own."""

    @property
    def stored(self) -> Tensor:
        """The factor that an edit changes."""
        return self.B if self.side == "B" else self.A

    def with_stored(self, factor: Tensor) -> LowRank:
        """Returns the update with another edited factor."""
        return replace(self, B=factor) if self.side == "B" else replace(self, A=factor)


@dataclass(frozen=True)
class Spectrum:
    """Thin SVD of an unscaled update: ``B A = U diag(S) Vh``, k = min(out, r, in) components."""

    U: Float[Tensor, "out k"]
    """Output directions, orthonormal columns."""
    S: Float[Tensor, " k"]
    """Singular values, descending."""
    Vh: Float[Tensor, "k in"]
    """Input directions, orthonormal rows (V transposed)."""
    ties: Int[np.ndarray, " k"]
    """Group of each component, see :func:`tied`."""


def thin_svd(update: LowRank) -> Spectrum:
    """Returns the thin SVD of ``B A`` without forming it (Eq. 1 and 2, arXiv 2603.03995).

    The factors may have any floating dtype; the result is float64 on the CPU.
    """
    B, A = exact(update.B), exact(update.A)
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    U, Vh = Q_out @ U, Vh @ Q_in.T
    noise = rounding_noise(B, A, U, Vh, (spacing(update.B), update.A_spacing or spacing(update.A)))
    return Spectrum(U, S, Vh, tied(S.numpy(), noise))


def singular_values(update: LowRank) -> Float[Tensor, " k"]:
    """Returns the singular values of ``B A`` alone, as :func:`thin_svd` has them, to ten digits."""
    R_out, R_in = _triangle(SCRATCH.copy("B", update.B))[0], _triangle(SCRATCH.copy("A", update.A).T)[0]
    return torch.linalg.svdvals(R_out @ R_in.T)


def edited_factor(
    update: LowRank, gates: Float[np.ndarray, " k"]
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " k"], float]:
    """Returns the factor to store in place of an update's, the update's singular values, and what rounding does.

    ``B' = B - U diag(1 - gates) U^T B``: with the same A, the update becomes ``U diag(gates S) Vh``; or its mirror,
    ``A' = A - A Vh^T diag(1 - gates) Vh``. With ``B = Q R`` and ``U = Q u`` the change is
    ``Q u diag(1 - gates) u^T R``, and ``Q = B R^-1`` where R says so: one product of a long matrix. Where every gate
    is one the factor is the stored tensor itself.

    Returns:
        The factor, cast once to the stored dtype; the singular values; the Frobenius norm by which the cast moves the
        edited update, to six digits.
    """
    B, A = SCRATCH.copy("B", update.B), SCRATCH.copy("A", update.A)
    columns, others, spare = (B, A.T, "A") if update.side == "B" else (A.T, B, "B")
    (R, inverse), (R_other, _) = _triangle(columns), _triangle(others)
    u, S, _ = torch.linalg.svd(R @ R_other.T, full_matrices=False)
    edited = torch.from_numpy(gates != 1)
    if not edited.any():
        return update.stored, S, 0.0
    u, removed = u[:, edited], torch.from_numpy(1 - np.asarray(gates, dtype=np.float64))[edited]
    change = u @ (removed[:, None] * (u.T @ R))
    wanted = SCRATCH.like(spare, update.stored)
    rows = wanted if update.side == "B" else wanted.T
    if inverse is None:
        torch.sub(columns, torch.linalg.qr(columns).Q @ change, out=rows)
    else:
        torch.mm(columns, torch.eye(len(R), dtype=R.dtype) - inverse @ change, out=rows)
    factor = wanted.to(update.stored.dtype, copy=True)
    lost = columns.copy_(factor if update.side == "B" else factor.T).sub_(rows)
    return factor, S, _norm_with(lost, R_other)


def _norm_with(factor: Float[Tensor, "rows r"], R: Float[Tensor, "m r"]) -> float:
    """Returns the Frobenius norm of ``factor R^T`` to six digits; the factor is overwritten."""
    largest = float(torch.stack(factor.aminmax()).abs().max()) if factor.numel() else 0.0
    if not largest:
        return 0.0
    part = SCRATCH.copy("part", factor.div_(largest), torch.float32)
    return largest * math.sqrt(max(float(((part.T @ part).double() * (R.T @ R)).sum()), 0.0))


class Scratch(threading.local):
    """Memory that each thread uses again and again: fresh memory costs as much as the work that is done in it.

    What is returned under a name is overwritten when the thread asks for that name again.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def like(self, name: str, tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns memory of a tensor's shape; a name always goes with one dtype."""
        if name not in self._flat or self._flat[name].numel() < tensor.numel():
            self._flat[name] = torch.empty(tensor.numel(), dtype=dtype)
        return self._flat[name][: tensor.numel()].view(tensor.shape)

    def copy(self, name: str, tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns a copy of a tensor."""
        return self.like(name, tensor, dtype).copy_(tensor.detach())


SCRATCH = Scratch()

CONDITION = 1e3
"""Condition number up to which a factor's Gram matrix tells its R to ten digits (2.2e-16 times its square)."""


def _triangle(columns: Float[Tensor, "rows r"]) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r r"] | None]:
    """Returns R of ``columns = Q R`` and its inverse.

    By Cholesky of the Gram matrix, which reads a long factor once; by Householder, and without an inverse, where its
    condition number is above :data:`CONDITION`.
    """
    R, failed = torch.linalg.cholesky_ex(columns.T @ columns, upper=True)
    if not failed:
        inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
        if R.norm() * inverse.norm() <= CONDITION:
            return R, inverse
    return torch.linalg.qr(columns, mode="r").R, None


def update_norm(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], dtype: torch.dtype = torch.float64) -> float:
    """Returns the Frobenius norm of ``B A`` from the two r x r Gram matrices, computed in ``dtype``."""
    B, A = (factor.detach().to("cpu", dtype) for factor in (B, A))
    return math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))


def rounding_noise(
    B: Float[Tensor, "out r"],
    A: Float[Tensor, "r in"],
    U: Float[Tensor, "out k"],
    Vh: Float[Tensor, "k in"],
    spacings: tuple[float, float],
) -> Float[np.ndarray, " k"]:
    """Returns the standard deviation that storing B and A gives each singular value.

    First-order perturbation: rounding adds independent errors of variance ``(spacing B_ij)^2 / 12`` and the same for
    A, so ``S_k`` moves by ``u_k^T (dB A + B dA) v_k``. It is at least a few roundings of float32, the arithmetic in
    which factors are made at best.

    Args:
        B: Output factor, float64.
        A: Input factor, float64.
        U: Output directions of ``B A``.
        Vh: Input directions.
        spacings: Of B and of A, see :func:`spacing`.
    """
    of_B, of_A = spacings
    left, right = U.T @ B, Vh @ A.T
    from_B = of_B**2 * (U.square().T @ B.square()) * right.square()
    from_A = of_A**2 * left.square() * (Vh.square() @ A.square().T)
    stored = torch.sqrt((from_B + from_A).sum(1) / 12)
    S = (left * right).sum(1).abs()
    return torch.maximum(stored, 8 * torch.finfo(torch.float32).eps * S).numpy()


def spacing(factor: Float[Tensor, "rows columns"]) -> float:
    """Returns the spacing at one of the coarsest format that holds every value of a factor exactly.

    The dtype alone does not tell how values were rounded: PEFT loads a bfloat16 adapter as float32, and saves it so.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(factor.to(dtype).to(factor.dtype), factor):
            return torch.finfo(dtype).eps
    return torch.finfo(factor.dtype).eps


def tied(S: Float[np.ndarray, " k"], noise: Float[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Returns a group number per component; components in one group cannot be told apart as stored.

    Where singular values agree within rounding, their directions are an arbitrary basis of a common subspace, and only
    an edit with one gate for all of them is well defined. A group of m starts at its largest value and grows while its
    spread is at most ``2 sqrt(2 m)`` times the noise, the width to which a symmetric random perturbation spreads m
    equal values (Wigner's semicircle). A value of exactly zero never joins a positive one.

    Args:
        S: Singular values, descending.
        noise: Their standard deviation from storage, see :func:`rounding_noise`.
    """
    groups = np.zeros(len(S), dtype=np.int64)
    first = 0
    for k in range(1, len(S)):
        width = 2 * math.sqrt(2 * (k - first + 1)) * noise[first]
        if S[first] - S[k] > width or (S[k] == 0) != (S[first] == 0):
            first = k
        groups[k] = groups[k - 1] + (first == k)
    return groups


def effective_rank(S: Float[np.ndarray, " k"]) -> float:
    """Returns ``exp(entropy(S / sum S))`` (Roy and Vetterli, 2007), in [1, k]; 0 for a zero update."""
    if not S.any():
        return 0.0
    p = S[S > 0] / S.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(S: Float[np.ndarray, " k"]) -> float:
    """Returns ``sum S^2 / max S^2``, in [1, k]; 0 for a zero update."""
    return float((S**2).sum() / S.max() ** 2) if S.any() else 0.0


def finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite. A NaN takes over the extremes, and looking at them is 20 times faster."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def exact(tensor: Tensor) -> Tensor:
    """Returns the tensor in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64)
