"""The backward pass of a measurement, and what it means when it does not arrive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import DataError, RunError
from spectral_surgery.live.gating import Probe


def backward(losses: Tensor, probe: Probe, model: Any) -> None:
    """Takes the derivative of every example's loss by every gate of a probe.

    Raises:
        DataError: If the loss has no derivative at all.
        RunError: If quantised kernels have no backward pass, so that the derivative fails or stops at them.
    """
    cause = quantisation(model)
    if not losses.requires_grad:
        if cause:
            raise RunError(_stops(cause, "before the loss"))
        raise DataError(
            "The loss has no derivative. Compute it from the model's outputs by differentiable operations, outside of "
            "torch.no_grad."
        )
    try:
        losses.sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if not cause:
            raise
        raise RunError(_stops(cause, f"{type(error).__name__}: {str(error).splitlines()[0]}")) from error
    if unreached := [path for path, gate in probe.gates.items() if gate.grad is None]:
        raise RunError(
            _stops(cause, unreached[0])
            if cause
            else f"{unreached[0]}: the module ran and the loss does not depend on it, so it has no sensitivity. Leave "
            f"it out."
        )


def quantisation(model: Any) -> str | None:
    """Returns what a model's base is quantised by, such as gptq; None if it is not."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def _stops(method: str, where: str) -> str:
    return (
        f"The base model is quantised by {method}, and its kernels have no backward pass here ({where}). Measure on "
        f"the unquantised base model (--base-model), perhaps with --load-in-4bit; the edit then fits this one as well."
    )
