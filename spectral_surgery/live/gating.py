"""Gates on a loaded LoRA layer: switched without touching a weight, and measurable per example in one backward pass.

PEFT computes a linear LoRA layer as ``base(x) + scale lora_B(lora_A(x))``. With ``B A = U diag(S) Vh`` the output of
lora_B is the sum of components ``u_k c_k``, ``c = C z``, ``z = lora_A(x)``, ``C = U^T B``. A forward hook on lora_B
turns it into ``sum_k alpha_k u_k c_k``, for gates per module or per example. It sits inside PEFT, so scale, dropout,
quantised bases, disabled and further adapters need no thought; with all gates at one it returns lora_B's own output,
bit for bit.

The derivative by a gate is ``dL/d alpha_k = sum_t (dL/dy_t . u_k) c_tk = S_k g_k``: two thin products per module in
the backward pass, and no gradient of any weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectral_surgery.spectrum import LowRank, Spectrum, exact


class NotPerExampleError(Exception):
    """A layer's input has another first dimension than the batch, so its examples cannot be told apart."""


@dataclass(frozen=True)
class Components:
    """What a gate needs of one module; float32, or float64 where the model is."""

    U: Float[Tensor, "out k"]
    """Output directions."""
    C: Float[Tensor, "k r"]
    """``U^T B``: takes lora_A's output to component outputs."""
    scale: float
    """What PEFT multiplies lora_B's output by."""

    @classmethod
    def of(cls, update: LowRank, spectrum: Spectrum) -> Components:
        """Returns the components of an update, on the CPU."""
        return cls(spectrum.U, spectrum.U.T @ exact(update.B), update.scale)

    def like(self, out: Tensor) -> Components:
        """Returns the components on a tensor's device, in its dtype but at least float32."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        if self.U.device == out.device and self.U.dtype == dtype:
            return self
        return Components(self.U.to(out.device, dtype), self.C.to(out.device, dtype), self.scale)


class _Gate(torch.autograd.Function):
    """``out - U diag(1 - alpha) C z`` with exact gradients by out, z and alpha; alpha is (examples, k)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, z: Tensor, alpha: Tensor, parts: Components, ones: bool) -> Tensor:
        component = (z.to(parts.C) @ parts.C.T).flatten(1, -2)
        ctx.save_for_backward(component, alpha)
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


@dataclass
class Probe:
    """One batch's gates at one, as leaves of the graph, and what the forward and backward pass leave there."""

    examples: int
    """Number of examples in the batch."""
    mask: Tensor | None = None
    """(examples, length), true at real tokens; output energy is averaged over them."""
    gates: dict[str, Float[Tensor, "examples k"]] = field(default_factory=dict)
    """By module path; their ``.grad`` is ``dL_i / d alpha_k`` after the backward pass."""
    energies: dict[str, Float[Tensor, "examples k"]] = field(default_factory=dict)
    """Mean over tokens of each component's squared scaled output."""

    def attend(self, path: str, parts: Components, z: Tensor, out: Tensor) -> Tensor:
        """Returns lora_B's output, unchanged, with this batch's gates in its graph."""
        if self.examples == 1:
            z, shaped = z.reshape(1, -1, z.shape[-1]), out.reshape(1, -1, out.shape[-1])
        elif z.ndim < 3 or z.shape[0] != self.examples:
            raise NotPerExampleError(f"{path}: input of shape {tuple(z.shape)} in a batch of {self.examples}")
        else:
            shaped = out
        if path not in self.gates:
            self.gates[path] = parts.C.new_ones(self.examples, len(parts.C), requires_grad=True)
            self.energies[path] = self._energy(z, parts)
        return _Gate.apply(shaped, z, self.gates[path], parts, True).view(out.shape)

    @torch.no_grad()
    def _energy(self, z: Tensor, parts: Components) -> Tensor:
        squared = (parts.scale * (z.to(parts.C) @ parts.C.T)).flatten(1, -2) ** 2
        if self.mask is None or self.mask.shape != squared.shape[:2]:
            return squared.mean(1)
        weight = self.mask.to(squared)[..., None]
        return (squared * weight).sum(1) / weight.sum(1)


Transform = Callable[[str, Components, Tensor, Tensor], Tensor]
"""(module path, components, lora_B's input, its output) -> new output."""


@contextmanager
def hooked(layers: dict[str, nn.Module], components: dict[str, Components], transform: Transform) -> Iterator[None]:
    """Applies a transform to the output of each layer's lora_B; nothing is left behind, also after an exception."""
    with ExitStack() as stack:
        for path, lora_B in layers.items():
            handle = lora_B.register_forward_hook(_hook(path, components, transform))
            stack.callback(handle.remove)
        yield


def _hook(path: str, components: dict[str, Components], transform: Transform) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        parts = components[path] = components[path].like(out)
        with torch.autocast(out.device.type, enabled=False):
            return transform(path, parts, inputs[0], out)

    return hook


def gate_output(alpha: Float[Tensor, "rows k"], parts: Components, z: Tensor, out: Tensor) -> Tensor:
    """Returns lora_B's output with gates applied: one row for all examples, or a row an example."""
    rows = alpha.to(parts.C)
    rows = rows.expand(z.shape[0], -1) if len(rows) == 1 else rows
    return _Gate.apply(out, z, rows, parts, False)
