"""A base model with one adapter loaded once, whose gates are switched in place: no merge, no reload, no copy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.checkpoint
from jaxtyping import Float
from torch import Tensor, nn

from spectral_surgery.adapter import Adapter
from spectral_surgery.adapter.kinds import Place, plain_name
from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.gating import Components, Held, Probe
from spectral_surgery.live.seats import SEATS, Site, attached
from spectral_surgery.policies import Gates
from spectral_surgery.spectrum import Spectrum
from spectral_surgery.surgery import spectra

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

ABSENT = object()

log = logging.getLogger(__name__)


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
        _check_whole(model)
        self.model = model
        self.adapter = adapter or Adapter.from_model(model, adapter_name)
        self.tokenizer = tokenizer
        self.adapter_name = adapter_name
        self.paths = list(paths) if paths is not None else list(self.adapter.updates)
        self._layers = [
            (path, place, self._layer(path, place))
            for path in self.paths
            for place in self.adapter.stored[path].places
        ]
        self._check_held()
        self._check_others()

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """Thin SVD of every gated module's update, from the file's factors."""
        updates = self.adapter.updates
        return spectra({path: updates[path] for path in self.paths})

    @cached_property
    def _sites(self) -> list[Site]:
        """Where every gate goes, with the components that it needs there."""
        updates, base, sites = self.adapter.updates, self.model.get_base_model(), []
        for label, (path, place, layer) in enumerate(self._layers):
            update, spectrum = updates[path], self.spectra[path]
            parts = Components.of(update, spectrum, transposed=place.transposed, label=label)
            site = Site(path, place, layer, self.adapter_name, base, parts)
            site.parts = SEATS[place.seat].components(site, update, spectrum)
            sites.append(site)
        return sites

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        try:
            entry = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # not every model has token embeddings
            entry = None
        weight = getattr(entry, "weight", None)
        if weight is None:
            return next(self.model.parameters()).device
        if weight.is_meta:  # offloaded: accelerate brings it to where it is used
            inner = entry.get_base_layer() if hasattr(entry, "get_base_layer") else entry
            hook = getattr(inner, "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or "cpu")
        return weight.device

    @property
    def _invoked(self) -> bool:
        return bool(self.adapter.config.raw.get("alora_invocation_tokens"))

    @property
    def indivisible(self) -> str | None:
        """Why the examples of a batch cannot be told apart, where that is known beforehand."""
        return indivisible(self.adapter, self.paths)

    @contextmanager
    def gated(self, gates: Gates) -> Iterator[None]:
        """Computes with these gates while open. Modules whose gates are all one are not touched at all.

        Args:
            gates: By module path, (k,) for all examples or (examples, k); a subset of :attr:`paths`.
        """
        changed = {path: np.atleast_2d(alpha) for path, alpha in gates.items() if (np.asarray(alpha) != 1).any()}
        alphas = {path: torch.as_tensor(alpha) for path, alpha in changed.items()}
        with attached([site for site in self._sites if site.path in alphas], Held(alphas)):
            yield

    @contextmanager
    def tuned(self, gates: Mapping[str, Float[Tensor, " k"]]) -> Iterator[None]:
        """Computes with gates held as tensors while open; they get gradients, no weight does.

        Args:
            gates: By module path, one row for all examples; a subset of :attr:`paths`.
        """
        rows = {path: gate[None] for path, gate in gates.items()}
        with attached([site for site in self._sites if site.path in rows], Held(rows)):
            yield

    @contextmanager
    def holding(self, adapter: Adapter) -> Iterator[None]:
        """Computes with another adapter's tensors while open, such as an edited one as it will be written.

        Args:
            adapter: One with the same tensors, by name and shape.

        Raises:
            AdapterError: If it has others.
        """
        try:
            adapter.apply_(self.model, self.adapter_name)
            yield
        finally:
            self.adapter.apply_(self.model, self.adapter_name)

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Puts a probe's gates into the graph while open; the model computes what it computes without."""
        with attached(self._sites, probe):
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
            BaseModelError: If checkpointing is asked of a model or an adapter that cannot.
        """
        if checkpointing and self._invoked:
            raise BaseModelError(
                "PEFT does not find an aLoRA's invocation tokens again when activations are recomputed. Leave "
                "--gradient-checkpointing out; rows are measured one at a time."
            )
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

    def _layer(self, path: str, place: Place) -> Any:
        """Returns PEFT's layer of a module, after checking that it computes with the adapter as its kind says."""
        name = self.adapter_name
        try:
            layer = self.model.get_base_model().get_submodule(place.layer)
            active = layer.active_adapters
        except AttributeError as error:
            raise BaseModelError(f"{path}: the model has no LoRA layer {name!r} here.") from error
        if not any(name in getattr(layer, factors, ()) for factors in ("lora_B", "lora_embedding_B")):
            raise BaseModelError(f"{path}: the model has no LoRA layer {name!r} here.")
        if layer.merged:
            raise BaseModelError(f"{path}: the adapter is merged into the base weight. Unmerge it first.")
        if name not in active:
            raise BaseModelError(f"{path}: adapter {name!r} is not active. Call set_adapter first.")
        SEATS[place.seat].check(layer, path)
        return layer

    def _check_others(self) -> None:
        """Says which other adapters are active, which everything here then includes."""
        others = {name for _, _, layer in self._layers for name in layer.active_adapters} - {self.adapter_name}
        if others and any(place.seat == "dora" for _, place, _ in self._layers):
            raise BaseModelError(
                f"Adapters {', '.join(sorted(others))} are active beside {self.adapter_name!r}, and DoRA's row norms "
                f"cannot be told apart then. Activate one: model.set_adapter({self.adapter_name!r})."
            )
        if others:
            log.warning("Adapters %s are active as well; every loss includes them.", ", ".join(sorted(others)))

    def _check_held(self) -> None:
        """Checks that the model holds the adapter's own tensors, where they are in memory."""
        held = held_tensors(self.model, self.adapter_name)
        edited = {slot.name: path for path in self.paths for slot in self.adapter.stored[path].slots}
        for name, path in edited.items():
            if not _agree(held.get(plain_name(name)), self.adapter.tensors[name]):
                raise BaseModelError(f"{path}: the loaded {name} is not the adapter's. The adapter did not load.")


def indivisible(adapter: Adapter, paths: Sequence[str]) -> str | None:
    """Returns why a batch's examples cannot be told apart at these modules, where an adapter's files say so."""
    places = [(path, place) for path in paths for place in adapter.stored[path].places]
    if shared := [path for path, place in places if place.seat in ("experts", "attention")]:
        return f"{shared[0]}: it works on weights, which all examples of a batch share"
    if adapter.config.raw.get("alora_invocation_tokens"):
        return f"{paths[0]}: an aLoRA takes the tokens of all examples together"
    return None


def held_tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Returns the LoRA tensors that a model holds for an adapter, by their names in a file."""
    return {
        plain_name(name): weight.detach()
        for name, weight in model.named_parameters()
        if "lora_" in name and adapter_name in name.rpartition("lora_")[2].split(".")
    }


def _check_whole(model: PeftModel) -> None:
    """Refuses a model whose weights are spread over processes: gates need a layer's whole output and its own factors.

    Raises:
        BaseModelError: If FSDP or tensor parallelism holds them.
    """
    from torch.distributed.tensor import DTensor

    pieces = [f"{name} is a DTensor" for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    pieces += [f"{name} is in FSDP" for name, part in model.named_modules() if "FullySharded" in type(part).__name__]
    if pieces:
        raise BaseModelError(
            f"The model is spread over processes by FSDP or tensor parallelism ({pieces[0]}). Load the whole base in "
            f"each process, or spread it over the devices of one process with a device map."
        )


def _agree(held: Tensor | None, stored: Tensor) -> bool:
    if held is None or held.shape != stored.shape:
        return False
    coarser = max(held.dtype, stored.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return held.is_meta or torch.equal(held.cpu().to(coarser), stored.to(coarser))


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that Transformers' models are stacked of; none where a model has no such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Makes every checkpointing layer recompute while open, by its own attributes alone."""
    layers = blocks(model)
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
