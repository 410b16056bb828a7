"""What is measured of every kind in :mod:`kinds`: the table that tests hold and that the documentation prints."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinds import CASES, Case
from torch import Tensor

from spectral_surgery import Adapter, Live
from spectral_surgery.measuring import measure_live
from spectral_surgery.policies import Gates
from spectral_surgery.surgery import operate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_gates(adapter: Adapter) -> Gates:
    """Gates between 0 and 2, unequal."""
    rng = np.random.default_rng(5)
    return {path: rng.uniform(0, 2, min(*u.B.shape, *u.A.shape)) for path, u in adapter.updates.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One kind as PEFT saved it in one dtype."""

    case: Case
    folder: Path
    """Has the adapter, and room beside it."""

    @classmethod
    def make(cls, name: str, dtype: str, folder: Path) -> Stored:
        """Saves the adapter of a case."""
        CASES[name].adapted(stored=DTYPES[dtype]).save_pretrained(folder / "adapter")
        return cls(CASES[name], folder)

    @functools.cached_property
    def adapter(self) -> Adapter:
        """As the package reads it."""
        return Adapter.load(self.folder / "adapter")

    @functools.cached_property
    def gates(self) -> Gates:
        """Random gates for every component."""
        return random_gates(self.adapter)

    @functools.cached_property
    def edited(self) -> Path:
        """The adapter with the random gates, as the package writes it."""
        out = self.folder / "edited"
        return self.adapter.with_updates(*operate(self.adapter.updates, self.gates)).save(out)

    @torch.no_grad()
    def logits(self, model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a model answers to the case's inputs."""
        return self.case.logits(model, batch_of(self.case, dtype))

    def by_peft(self, folder: Path | None = None) -> Tensor:
        """What stock PEFT computes from a folder."""
        return self.logits(self.case.reloaded(folder or self.folder / "adapter"))

    def by_formula(self, gates: Gates | None) -> Tensor:
        """What the dense formula computes from the unedited file, in float64."""
        config = json.loads((self.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        return self.logits(self.case.dense(self.folder / "adapter", config, gates), torch.float64)

    def live(self) -> Tensor:
        """What the loaded, unedited model computes with the gates switched in."""
        model = self.case.reloaded(self.folder / "adapter")
        with Live(model, self.adapter).gated(self.gates):
            return self.logits(model)

    def errors(self) -> dict[str, float]:
        """Relative errors of logits."""
        edited = self.by_peft(self.edited)
        return {
            "identity": relative(self.by_peft(), self.by_formula(None)),
            "gates": relative(edited, self.by_formula(self.gates)),
            "live": relative(self.live(), edited),
            "effect": relative(self.by_peft(), edited),
        }


def batch_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The case's inputs."""
    batch = case.inputs(case.fresh())
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def sensitivity_error(name: str, modules: int = 6, components: int = 2) -> float:
    """Relative error of sensitivities against central differences of the gated loss, in float64."""
    case = CASES[name]
    live, batch = Live(case.adapted(torch.float64)), batch_of(case, torch.float64)
    found = measure_live(live, [batch], loss=case.loss)
    ours, differences = [], []
    for path in live.paths[:: max(1, len(live.paths) // modules)]:
        count = len(found.modules[path].S)
        for k in range(min(count, components)):
            sides = []
            for sign in (1, -1):
                gates = np.ones(count)
                gates[k] += sign * case.step
                with live.gated({path: gates}), torch.no_grad():
                    sides.append(case.loss(live.model, batch).numpy())
            ours.append(found.modules[path].gate_gradient[:, k])
            differences.append((sides[0] - sides[1]) / (2 * case.step))
    return float(np.linalg.norm(np.subtract(ours, differences)) / np.linalg.norm(differences))
