"""A base model with one adapter loaded once, whose gates are switched in place: no merge, no reload, no copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.gating import Components, Probe, gate_output, hooked
from spectral_surgery.policies import Gates
from spectral_surgery.spectrum import Spectrum
from spectral_surgery.surgery import spectra

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

ABSENT = object()


class Live:
    """A loaded PEFT model whose LoRA components can be gated and measured.

    While a method's context is open, the model computes with those gates; outside, it is exactly as it was.

    Args:
        model: A PEFT model; its weights are never changed.
        adapter: The same adapter as a value; by default taken from the model.
        tokenizer: The tokenizer, where text is involved.
        adapter_name: The adapter's name in the model.
        paths: Module paths that may be gated; by default all.

    Raises:
        BaseModelError: If the model does not hold this adapter, unmerged and active.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: Adapter | None = None,
        *,
        tokenizer: Any = None,
        adapter_name: str = "default",
        paths: Iterable[str] | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter or Adapter.from_model(model, adapter_name)
        self.tokenizer = tokenizer
        self.paths = list(paths) if paths is not None else list(self.adapter.updates)
        self._layers = {path: self._layer(path, adapter_name) for path in self.paths}

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """Thin SVD of every gated module's update, from the file's factors."""
        updates = self.adapter.updates
        return spectra({path: updates[path] for path in self.paths})

    @cached_property
    def _components(self) -> dict[str, Components]:
        updates = self.adapter.updates
        return {path: Components.of(updates[path], found) for path, found in self.spectra.items()}

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.model.get_input_embeddings().weight.device

    @contextmanager
    def gated(self, gates: Gates) -> Iterator[None]:
        """Computes with these gates while open. Modules whose gates are all one are not touched at all.

        Args:
            gates: By module path, (k,) for all examples or (examples, k); a subset of :attr:`paths`.
        """
        alphas = {path: torch.as_tensor(np.atleast_2d(alpha)) for path, alpha in gates.items()}
        alphas = {path: alpha for path, alpha in alphas.items() if (alpha != 1).any()}

        def transform(path: str, parts: Components, z: Tensor, out: Tensor) -> Tensor:
            return gate_output(alphas[path], parts, z, out)

        layers = {path: self._layers[path] for path in alphas}
        with hooked(layers, self._components, transform):
            yield

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Puts a probe's gates into the graph while open; the model computes what it computes without."""
        with hooked(self._layers, self._components, probe.attend):
            yield

    @contextmanager
    def base(self) -> Iterator[None]:
        """Computes without the adapter while open."""
        with self.model.disable_adapter():
            yield

    @contextmanager
    def still(self, *, checkpointing: bool = False) -> Iterator[None]:
        """Keeps the model in evaluation mode without weight gradients while open; afterwards every flag is as before.

        Args:
            checkpointing: Recompute activations in the backward pass. Transformers only checkpoints layers whose own
                ``training`` flag is set, and in train mode dropout would ruin the sensitivities; so evaluation mode
                stays on and only the checkpointing layers' own flags are raised, not those of the modules inside.

        Raises:
            BaseModelError: If checkpointing is asked of a model that cannot.
        """
        training = [module for module in self.model.modules() if module.training]
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.model.eval()
        for weight in learning:
            weight.requires_grad_(False)
        try:
            with _checkpointing(self.model) if checkpointing else nullcontext():
                yield
        finally:
            for module in training:
                module.training = True
            for weight in learning:
                weight.requires_grad_(True)

    def _layer(self, path: str, adapter_name: str) -> nn.Module:
        """Returns the lora_B of a module, after checking that it holds the adapter's own factor."""
        try:
            layer = self.model.get_base_model().get_submodule(path)
            lora_B = layer.lora_B[adapter_name]
        except (AttributeError, KeyError) as error:
            raise BaseModelError(f"{path}: the model has no LoRA layer {adapter_name!r} here.") from error
        if layer.merged:
            raise BaseModelError(f"{path}: the adapter is merged into the base weight. Unmerge it first.")
        if adapter_name not in layer.active_adapters:
            raise BaseModelError(f"{path}: adapter {adapter_name!r} is not active. Call set_adapter first.")
        held, stored = lora_B.weight.detach(), self.adapter.updates[path].B
        coarser = max(held.dtype, stored.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if held.device.type != "meta" and not torch.equal(held.cpu().to(coarser), stored.to(coarser)):
            raise BaseModelError(f"{path}: the loaded lora_B is not the adapter's. The adapter did not load.")
        return lora_B


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Makes every checkpointing layer recompute while open, by its own attributes alone."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BaseModelError("This model has no layers that can checkpoint. Leave --gradient-checkpointing out.")
    recompute = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    wanted = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": recompute,
        "training": True,
    }
    before = [{name: layer.__dict__.get(name, ABSENT) for name in wanted} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(wanted)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if value is ABSENT:
                    del layer.__dict__[name]
                else:
                    layer.__dict__[name] = value
