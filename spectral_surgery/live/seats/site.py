"""One place where one update works in the loaded model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapter.kinds import Place
from spectral_surgery.live.gating import Components, Gating


@dataclass
class Site:
    """Where a module's gates go."""

    path: str
    """The module."""
    place: Place
    layer: Any
    """PEFT's layer."""
    adapter: str
    """The adapter's name in the model."""
    model: Any
    """The base model that the layer is in."""
    parts: Components
    """Kept on the device and in the dtype of the last call."""

    def like(self, out: Tensor) -> Components:
        """Returns the components on a tensor's device."""
        self.parts = self.parts.like(out)
        return self.parts

    @property
    def acts(self) -> bool:
        """Whether the layer computes with the adapter now, for seats outside of PEFT's own branch."""
        layer = self.layer
        return not layer.disable_adapters and not layer.merged and self.adapter in layer.active_adapters


def gated_output(site: Site, gating: Gating, z: Tensor, out: Tensor, channel: int = -1) -> Tensor:
    """Returns a layer's output with gates applied.

    Args:
        site: Where it is.
        gating: The gates.
        z: What the components read.
        out: What they are part of.
        channel: The dimension of features, the last one except in convolutions.
    """
    with torch.autocast(out.device.type, enabled=False):
        gated = gating.outputs(site.path, site.like(out), z.movedim(channel, -1), out.movedim(channel, -1))
        return gated.movedim(-1, channel)


def override(instance: Any, name: str, function: Any, stack: ExitStack) -> None:
    """Replaces a method of one object until the stack closes."""
    before = instance.__dict__.get(name)
    instance.__dict__[name] = function
    stack.callback(lambda: instance.__dict__.update({name: before}) if before else instance.__dict__.pop(name, None))
