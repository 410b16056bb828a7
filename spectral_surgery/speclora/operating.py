"""Spectral Surgery on a SpecLoRA adapter: its LoRA part and its deltas, measured in one pass and edited by one policy.

The LoRA part is an ordinary adapter whose model happens to have scales; the components of ``B A`` are gated as
everywhere. Of the scales each delta is a component of its own: a gate multiplies it, ``delta' = alpha delta``, so
``dL/d alpha = delta dL/d delta``. Its strength, what is called S elsewhere, is ``|delta|``.

The same forward and backward pass gives both. A hook adds ``theta_i E^T (y - b)``, with ``theta = 0``, to what the
scales of example i give: the model computes what it computes without, and ``dL_i/d theta_i`` is that example's
derivative by delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spectral_surgery.adapter import Adapter, AdapterConfig
from spectral_surgery.constraints import Constraint
from spectral_surgery.editing import edit
from spectral_surgery.errors import PolicyError
from spectral_surgery.live import Live, NotPerExampleError, Probe
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import Loss, answer_loss
from spectral_surgery.policies import Policy, gates
from spectral_surgery.speclora.export import lora_config, speclora_layers
from spectral_surgery.speclora.scale import Scale
from spectral_surgery.surgery import EditReport

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

LORA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")


@dataclass(frozen=True)
class SpecMeasurement:
    """What one pass says about both parts of a SpecLoRA adapter."""

    lora: Measurement
    """The LoRA part's components."""
    delta: Measurement
    """The deltas as components, the largest first; modules without scales, or with none moved, are not in it."""
    delta_gradient: Mapping[str, Float[np.ndarray, "examples k"]]
    """``dL_i / d delta`` by module path, in the order of the rows; nats per unit of delta."""


def lora_part(model: PeftModel, adapter_name: str = "default") -> Adapter:
    """Returns the LoRA part of a loaded SpecLoRA adapter as a value that every other function takes."""
    from peft import get_peft_model_state_dict

    speclora_layers(model, adapter_name)
    raw = model.peft_config[adapter_name].to_dict()
    config = lora_config(model, adapter_name) | {name: raw[name] for name in LORA_FIELDS}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in state.items() if ".lora_spec." not in n}
    return Adapter(AdapterConfig(config), tensors, {"format": "pt"}, None, "a SpecLoRA adapter's LoRA part")


@dataclass
class _DeltaProbe:
    """One batch's zeros to be added to the deltas, as leaves of the graph."""

    examples: int
    thetas: dict[str, Float[Tensor, "examples k"]] = field(default_factory=dict)
    energies: dict[str, Float[Tensor, "examples k"]] = field(default_factory=dict)

    def attend(self, path: str, scale: Scale, out: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
        if self.examples > 1 and (out.ndim < 3 or out.shape[0] != self.examples):
            raise NotPerExampleError(f"{path}: output of shape {tuple(out.shape)} in a batch of {self.examples}")
        kept = scale.without_bias(out, bias).reshape(self.examples, -1, values.shape[-1])
        if path not in self.thetas:
            theta = torch.zeros_like(scale.delta).expand(self.examples, -1).clone()
            self.thetas[path] = theta.requires_grad_()
            self.energies[path] = values.detach().reshape(kept.shape).float().square().mean(1)
        return values + (self.thetas[path][:, None] * kept).view(values.shape)


class _SpecLive(Live):
    """A live model that probes its deltas together with its gates."""

    def __init__(self, model: PeftModel, adapter_name: str) -> None:
        super().__init__(model, lora_part(model, adapter_name), adapter_name=adapter_name)
        layers = speclora_layers(model, adapter_name)
        scales = {path: layer.scale_of(adapter_name) for path, layer in layers.items()}
        self.scales: dict[str, Scale] = {path: scale for path, scale in scales.items() if scale is not None}
        self.probes: list[_DeltaProbe] = []

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Probes gates and deltas while open; a pass that fails leaves nothing."""
        own = _DeltaProbe(probe.examples)
        with ExitStack() as stack:
            for path, scale in self.scales.items():
                stack.callback(scale.register_forward_hook(_hook(own, path)).remove)
            stack.enter_context(super().probing(probe))
            yield
        self.probes.append(own)


def _hook(probe: _DeltaProbe, path: str) -> Any:
    def hook(scale: nn.Module, inputs: tuple[Tensor, Tensor | None], values: Tensor) -> Tensor:
        assert isinstance(scale, Scale)
        return probe.attend(path, scale, *inputs, values)

    return hook


def measure_speclora(
    model: PeftModel, batches: Iterable[Any], *, loss: Loss = answer_loss, adapter_name: str = "default"
) -> SpecMeasurement:
    """Returns the per-example sensitivities of a SpecLoRA adapter's components and deltas.

    Args:
        model: A loaded model with the adapter active and not merged.
        batches: As for :func:`spectral_surgery.measure` on a model.
        loss: One differentiable loss an example.
        adapter_name: Which adapter.

    Raises:
        InputError: Whatever is wrong with the adapter or the batches.
        RunError: If a loss is not finite.
    """
    live = _SpecLive(model, adapter_name)
    batches = list(batches)
    lora = measure_live(live, batches, loss=loss)
    order = np.argsort([index for batch in batches for index in getattr(batch, "indices", ())], kind="stable")
    order = order if len(order) else np.arange(lora.examples)
    gradient, energy = {}, {}
    for path in live.scales:
        gradient[path] = _joined([probe.thetas[path].grad for probe in live.probes])[order]
        energy[path] = _joined([probe.energies[path] for probe in live.probes])[order]
    modules = {
        path: _as_components(scale, gradient[path], energy[path])
        for path, scale in live.scales.items()
        if scale.delta.detach().any()
    }
    return SpecMeasurement(lora, Measurement(modules, lora.digests, lora.losses, lora.about), gradient)


def _joined(parts: list[Tensor | None]) -> Float[np.ndarray, "examples k"]:
    return np.concatenate([part.detach().to("cpu", torch.float64).numpy() for part in parts if part is not None])


def _order(scale: Scale) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Returns the effective deltas and their order by size, the largest first."""
    delta = scale.effective.detach().to("cpu", torch.float64).numpy()
    return delta, np.argsort(-np.abs(delta), kind="stable")


def _as_components(
    scale: Scale, gradient: Float[np.ndarray, "examples k"], energy: Float[np.ndarray, "examples k"]
) -> ModuleMeasurement:
    delta, order = _order(scale)
    return ModuleMeasurement(
        S=np.abs(delta)[order],
        ties=np.arange(len(delta)),
        gate_gradient=(delta * gradient)[:, order],
        output_energy=energy[:, order],
    )


@torch.no_grad()
def edit_speclora(
    model: PeftModel,
    policy: Policy,
    measured: SpecMeasurement,
    *,
    delta_policy: Policy | None = None,
    constraint: Constraint | None = None,
    seed: int = 0,
    adapter_name: str = "default",
) -> EditReport:
    """Edits a loaded SpecLoRA adapter in place and returns what was done to its LoRA part.

    Args:
        model: The model that was measured; save it with ``save_pretrained``.
        policy: For the LoRA part's components.
        measured: What :func:`measure_speclora` returned.
        delta_policy: For the deltas; by default they stay as they are.
        constraint: Clamp, energy and cap; by default each policy's own.
        seed: Seed of random policies.
        adapter_name: Which adapter.

    Raises:
        PolicyError: If a gate would take a delta to its bound or beyond.
        MeasurementError: If the LoRA part has changed since it was measured.
    """
    layers = speclora_layers(model, adapter_name)
    edited, report = edit(lora_part(model, adapter_name), policy, measured.lora, constraint=constraint, seed=seed)
    alphas = {} if delta_policy is None else gates(delta_policy, measured.delta, constraint, seed=seed)
    scales: dict[str, Any] = {path: layers[path].lora_spec[adapter_name] for path in alphas}
    moved = {path: _gated(path, scale, alphas[path]) for path, scale in scales.items()}
    for path, update in edited.updates.items():
        layers[path].lora_B[adapter_name].weight.copy_(update.B)
    for path, parameter in moved.items():
        scales[path].delta.copy_(parameter)
    return report


def _gated(path: str, scale: Scale, alpha: Float[np.ndarray, " k"]) -> Tensor:
    """Returns the parameter whose effective deltas are the gates times the present ones."""
    delta, order = _order(scale)
    delta[order] *= alpha
    if scale.bound is None:
        return torch.from_numpy(delta)
    if np.abs(delta).max(initial=0.0) >= scale.bound:
        raise PolicyError(
            f"{path}: a gate takes a delta to {np.abs(delta).max():.3g}, and delta_bound is {scale.bound:.3g}. "
            f"Choose a milder policy, or clamp the gates."
        )
    return torch.from_numpy(scale.bound * np.arctanh(delta / scale.bound))
