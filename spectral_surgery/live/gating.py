"""Gates on a loaded LoRA layer: switched without touching a weight, and measurable per example in one backward pass.

PEFT computes a linear LoRA layer as ``base(x) + scale lora_B(lora_A(x))``. With ``B A = U diag(S) Vh`` the output of
lora_B is the sum of components ``u_k c_k``, ``c = C z``, ``z = lora_A(x)``, ``C = U^T B``. A gate turns it into
``sum_k alpha_k u_k c_k``, for gates per module or per example; with all gates at one the output is what it was, bit
for bit. Where a gate sits in a layer is its seat's matter, see :mod:`.seats`.

The derivative by a gate is ``dL/d alpha_k = sum_t (dL/dy_t . u_k) c_tk = S_k g_k``: two thin products per module in
the backward pass, and no gradient of any weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectral_surgery.packing import mean_of_segments
from spectral_surgery.spectrum import LowRank, Spectrum, exact


class NotPerExampleError(Exception):
    """A layer's input has another first dimension than the batch, so its examples cannot be told apart."""


@dataclass(frozen=True)
class RowNorm:
    """How a DoRA layer's row norms follow its gates (squared norms relative to those at gates of one)."""

    linear: Float[Tensor, "k out"]
    """``2 sigma_k U_jk (W + dW) v_k / n_j^2`` with ``sigma = scale S``."""
    square: Float[Tensor, "k out"]
    """``sigma_k^2 U_jk^2 / n_j^2``."""
    bias: Float[Tensor, " out"]
    """The layer's bias, which is not rescaled."""

    def rescale(self, alpha: Float[Tensor, "rows k"]) -> Float[Tensor, "rows out"]:
        """Returns ``n / n(alpha)``, one where all gates are one (V is orthonormal, so there are no cross terms)."""
        moved = alpha - 1
        return torch.rsqrt(1 + moved @ self.linear + moved.square() @ self.square)


@dataclass(frozen=True)
class Components:
    """What a gate needs of one module; float32, or float64 where the model is."""

    U: Float[Tensor, "out k"]
    """Output directions, as they reach the tensor that is gated."""
    C: Float[Tensor, "k r"]
    """``U^T B``: takes lora_A's output to component outputs."""
    scale: float
    """What PEFT multiplies the gated tensor by."""
    A: Float[Tensor, "r in"] | None = None
    """Input factor, for seats that compute ``z = A x`` themselves."""
    energy: Float[Tensor, " k"] | None = None
    """Output energy of unit white inputs, for seats that do not see the inputs."""
    norm: RowNorm | None = None
    """DoRA's row norms."""
    label: int = 0
    """Which of a module's places this is."""

    @classmethod
    def of(cls, update: LowRank, spectrum: Spectrum, *, transposed: bool = False, label: int = 0) -> Components:
        """Returns the components of an update, on the CPU."""
        if transposed:
            return cls(spectrum.Vh.T, spectrum.Vh @ exact(update.A).T, update.scale, label=label)
        return cls(spectrum.U, spectrum.U.T @ exact(update.B), update.scale, label=label)

    def folded(self, A: Tensor) -> Components:
        """Returns the components of a gate behind the scale, which reads the layer's own input through A."""
        return replace(self, C=self.scale * self.C, scale=1.0, A=exact(A))

    def unseen(self, S: Float[Tensor, " k"]) -> Components:
        """Returns the components of a gate on weights, which sees no inputs."""
        return replace(self, energy=(self.scale * S) ** 2)

    def like(self, out: Tensor) -> Components:
        """Returns the components on a tensor's device, in its dtype but at least float32."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        if self.U.device == out.device and self.U.dtype == dtype:
            return self
        return _moved(self, out.device, dtype)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    if isinstance(value, Components | RowNorm):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)})
    return value


class _Gate(torch.autograd.Function):
    """``out - U diag(1 - alpha) C z`` with exact gradients by out, z and alpha; alpha is (examples, k)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, z: Tensor, alpha: Tensor, parts: Components, ones: bool) -> Tensor:
        component = (z.to(parts.C) @ parts.C.T).flatten(1, -2)
        ctx.save_for_backward(component, None if ones else alpha)
        ctx.parts, ctx.ones, ctx.shape, ctx.dtype = parts, ones, z.shape, z.dtype
        if ones:
            return out.view_as(out)
        removed = ((1 - alpha)[:, None] * component) @ parts.U.T
        return out - removed.view(out.shape).to(out.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        component, alpha = ctx.saved_tensors
        along = (grad.to(ctx.parts.U) @ ctx.parts.U).flatten(1, -2)
        by_alpha = (along * component).sum(1)
        by_z = None
        if not ctx.ones:
            by_z = -(((1 - alpha)[:, None] * along) @ ctx.parts.C).view(ctx.shape).to(ctx.dtype)
        return grad, by_z, by_alpha, None, None


def gate(
    alpha: Float[Tensor, "rows k"],
    parts: Components,
    z: Tensor,
    out: Tensor,
    *,
    ones: bool = False,
    rows: Int64[Tensor, " first"] | None = None,
) -> Tensor:
    """Returns a layer's output with gates applied, a row of them for each entry of its first dimension.

    Args:
        alpha: The gates.
        parts: The module's components.
        z: (first, ..., r), what the components read; the first dimension is examples, or tokens of packed ones.
        out: (first, ..., out), what they are part of.
        ones: That all gates are one, so that the output is ``out`` and only its derivative is asked for.
        rows: Which row of gates each entry has; by default its own.
    """

    def each(values: Tensor) -> Tensor:
        return values if rows is None else values.index_select(0, rows)

    if parts.norm is None:
        return _Gate.apply(out, z, each(alpha), parts, ones)
    own = out - parts.norm.bias.to(out.dtype)
    rescale = each(parts.norm.rescale(alpha)).view(len(out), *[1] * (out.ndim - 2), -1)
    return (out + (_Gate.apply(own, z, each(alpha), parts, ones) * rescale - own)).to(out.dtype)


@runtime_checkable
class Gating(Protocol):
    """What the seats ask: gated outputs where a layer's outputs are at hand, gates where only its weights are."""

    def outputs(self, path: str, parts: Components, z: Tensor, out: Tensor) -> Tensor:
        """Returns ``out`` with the module's gates applied."""

    def weights(self, path: str, parts: Components) -> Float[Tensor, "1 k"]:
        """Returns the module's gates, the same for all examples."""


@dataclass(frozen=True)
class Held:
    """Gates that are given: one row for all examples, or a row an example."""

    gates: Mapping[str, Float[Tensor, "rows k"]]

    def outputs(self, path: str, parts: Components, z: Tensor, out: Tensor) -> Tensor:
        """Returns ``out`` with the module's gates applied."""
        alpha = self.gates[path].to(parts.C)
        if len(alpha) == 1:
            z, shaped = z.reshape(1, -1, z.shape[-1]), out.reshape(1, -1, out.shape[-1])
            return gate(alpha, parts, z, shaped).view(out.shape)
        if z.ndim < 3 or z.shape[0] != len(alpha):
            raise NotPerExampleError(f"{path}: input of shape {tuple(z.shape)} for {len(alpha)} examples")
        return gate(alpha, parts, z, out)

    def weights(self, path: str, parts: Components) -> Float[Tensor, "1 k"]:
        """Returns the module's one row of gates."""
        alpha = self.gates[path].to(parts.C)
        if len(alpha) != 1:
            raise NotPerExampleError(f"{path}: it works on weights, which all {len(alpha)} examples share")
        return alpha


@dataclass
class Probe:
    """One batch's gates at one, as leaves of the graph, and what the forward and backward pass leave there."""

    examples: int
    """Number of examples in the batch."""
    mask: Tensor | None = None
    """(examples, length), true at real tokens; output energy is averaged over them."""
    segments: Int64[Tensor, " tokens"] | None = None
    """Which example every token belongs to, where they are packed into one sequence."""
    gates: dict[str, Float[Tensor, "examples k"]] = field(default_factory=dict)
    """By module path; their ``.grad`` is ``dL_i / d alpha_k`` after the backward pass."""
    energies: dict[str, Float[Tensor, "examples k"]] = field(default_factory=dict)
    """Mean over tokens of each component's squared scaled output, summed over the places where a module works."""
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def outputs(self, path: str, parts: Components, z: Tensor, out: Tensor) -> Tensor:
        """Returns ``out``, unchanged, with this batch's gates in its graph."""
        first = self._leading(path, z)
        z, shaped = z.reshape(*first, z.shape[-1]), out.reshape(*first, out.shape[-1])
        alpha = self._leaf(path, parts)
        if (path, parts.label) not in self._seen:
            self._seen.add((path, parts.label))
            self.energies[path] = self.energies[path] + self._energy(z, parts)
        return gate(alpha, parts, z, shaped, ones=True, rows=self._rows).view(out.shape)

    def weights(self, path: str, parts: Components) -> Float[Tensor, "1 k"]:
        """Returns this batch's gates, which must be those of one example."""
        if self.examples != 1:
            raise NotPerExampleError(f"{path}: it works on weights, which all examples of a batch share")
        alpha = self._leaf(path, parts)
        if parts.energy is not None:
            self.energies[path] = parts.energy[None]
        return alpha

    @property
    def _rows(self) -> Tensor | None:
        return None if self.examples == 1 else self.segments

    def _leading(self, path: str, z: Tensor) -> tuple[int, ...]:
        """Returns the leading dimensions as they are seen: (examples, ...), or (tokens, 1) where they are packed."""
        if self.examples == 1:
            return 1, -1
        if self._rows is not None and z.shape[:-1] == (1, len(self._rows)):
            return -1, 1
        if self._rows is None and z.ndim >= 3 and z.shape[0] == self.examples:
            return tuple(z.shape[:-1])
        packed = "" if self._rows is None else "packed "
        raise NotPerExampleError(f"{path}: input of shape {tuple(z.shape)} in a {packed}batch of {self.examples}")

    def _leaf(self, path: str, parts: Components) -> Tensor:
        if path not in self.gates:
            self.gates[path] = parts.C.new_ones(self.examples, len(parts.C), requires_grad=True)
            self.energies[path] = parts.C.new_zeros(self.examples, len(parts.C))
        return self.gates[path]

    @torch.no_grad()
    def _energy(self, z: Tensor, parts: Components) -> Tensor:
        squared = (parts.scale * (z.to(parts.C) @ parts.C.T)).flatten(1, -2) ** 2 * parts.U.square().sum(0)
        if self._rows is not None:
            return mean_of_segments(squared[:, 0], self._rows, self.examples)
        if self.mask is None or self.mask.shape != squared.shape[:2]:
            return squared.sum(1) / max(squared.shape[1], 1)
        weight = self.mask.to(squared)[..., None]
        return (squared * weight).sum(1) / weight.sum(1)
