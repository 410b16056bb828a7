"""The ladder: everything that is tried on one adapter, from plain strengths to gates found by a few steps.

Cheap explanations come first. Each candidate is a set of gates, or another set of tensors for the same modules, and
opens on the loaded model as a context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from spectral_surgery import policies
from spectral_surgery.adapter import Adapter
from spectral_surgery.judging.claims import Contender
from spectral_surgery.judging.trials import BASE, UNEDITED
from spectral_surgery.live import Live
from spectral_surgery.manifest import source_record
from spectral_surgery.measurement import Measurement
from spectral_surgery.policies import Gates
from spectral_surgery.refining.steps import Pull, along, one_step, only_sure, scaled
from spectral_surgery.surgery import operate

STRENGTHS = (1.25, 1.1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
RESHAPED_STRENGTHS = (0.5, 0.75, 1.0, 1.5, 2.5)
STEP_SIZES = (0.15, 0.3, 0.5)
POWERS = (1.0, 0.7, 0.4)
BETWEEN = {1 / 3: "1/3", 2 / 3: "2/3"}
PAPER = {
    "abs_select": ("abs_select", "abs_select:amplify=1.1,suppress=0.9"),
    "smooth_abs": ("smooth_abs", "smooth_abs:amplify=1.1,suppress=0.9"),
    "grad_direction": ("grad_direction", "grad_direction:eta_suppress=0.5,eta_enhance=0.05"),
    "random_index": ("random_index",),
}
RIVALS = ("continue", "temperature")
"""Families that are shown but are no edit of the adapter, so they are never written."""


@dataclass(frozen=True)
class Candidate:
    """One thing to try."""

    name: str
    family: str
    what: str
    """In a user's words."""
    gates: Gates | None = None
    """Multipliers of singular values; None for other tensors, or for none at all."""
    adapter: Adapter | None = None
    """Other tensors for the same modules."""
    temperature: float = 1.0
    """What logits are divided by."""
    equivalent: str | None = None
    """The same in one line of another program's settings."""
    command: str | None = None
    """How to make it, where it is no edit."""

    @cached_property
    def key(self) -> str:
        """Hash of what it makes of the model."""
        found = hashlib.sha256(f"{self.name == BASE}:{self.temperature}".encode())
        for path, alpha in sorted((self.gates or {}).items()):
            found.update(path.encode() + np.asarray(alpha, dtype=np.float64).tobytes())
        found.update(self.adapter.digest.encode() if self.adapter else b"")
        return found.hexdigest()

    @property
    def contender(self) -> Contender:
        """What the verdict needs to know of it."""
        return Contender(self.name, self.family, self.equivalent, self.command)

    def open(self, live: Live) -> AbstractContextManager[Any]:
        """Returns the context in which the loaded model computes as this candidate."""
        if self.name == BASE:
            return live.base()
        if self.adapter is not None:
            return live.holding(self.adapter)
        if self.temperature != 1:
            return cooled(live.model, self.temperature)
        return live.gated(self.gates) if self.gates else nullcontext()

    def written(self, adapter: Adapter) -> Candidate:
        """Returns this candidate with the tensors as they would be stored: rounding and all.

        An edit that would drown in the rounding of the stored dtype is stored in float32.
        """
        if self.gates is None:
            return self
        edited = _edited(adapter, self.gates)
        if edited.report and edited.report.drowned:
            edited = _edited(in_float32(adapter), self.gates)
        return replace(self, adapter=edited)


def _edited(adapter: Adapter, gates: Gates) -> Adapter:
    updates, report = operate(adapter.updates, gates)
    return adapter.with_updates(updates, report)


def in_float32(adapter: Adapter) -> Adapter:
    """Returns the adapter with its factors stored in float32."""
    tensors = {name: value.float() if "lora_" in name else value for name, value in adapter.tensors.items()}
    return replace(adapter, tensors=tensors, edited_from=adapter.edited_from or source_record(adapter))


@contextmanager
def cooled(model: Any, temperature: float) -> Iterator[None]:
    """Divides the model's logits while open."""
    handle = model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: out / temperature)
    try:
        yield
    finally:
        handle.remove()


def references() -> list[Candidate]:
    """Returns the two that everything is held against."""
    return [
        Candidate(BASE, "base", "the base model without an adapter"),
        Candidate(UNEDITED, "unedited", "your adapter as it is"),
    ]


def controls(adapter: Adapter, measured: Measurement, *, stronger: bool) -> list[Candidate]:
    """Returns the cheap explanations: strengths, one strength a module, flattened spectra.

    Args:
        adapter: The unedited adapter.
        measured: For singular values and output energies.
        stronger: Also strengths above one; they bring no other skills back.
    """
    found = []
    for strength in STRENGTHS if stronger else [strength for strength in STRENGTHS if strength < 1]:
        gates = policies.gates(policies.Scale(strength=strength), measured)
        found.append(
            Candidate(
                f"strength {strength:g}",
                "strength",
                f"every update times {strength:g}",
                gates,
                equivalent=_equivalent(adapter, strength, gates),
            )
        )
    for family, policy in (("flat", policies.Flat), ("newton_schulz", policies.NewtonSchulz)):
        for mix in (0.5, 1.0):
            for strength in RESHAPED_STRENGTHS:
                spelled = policies.spell(policy(mix=mix, strength=strength))
                gates = policies.gates(policy(mix=mix, strength=strength), measured)
                found.append(Candidate(spelled, family, "spectra made more even", gates))
                if family == "newton_schulz" and mix == 1:
                    name = f"module strengths like {spelled}"
                    what = "one strength a module, with the output energy that more even spectra would have"
                    found.append(Candidate(name, "module_strength", what, _like(gates, measured)))
    return found


def _like(gates: Gates, measured: Measurement) -> Gates:
    """Returns one strength a module that gives its output the energy that these gates would give."""
    found = {}
    for path, alpha in gates.items():
        module = measured.modules[path]
        before, after = module.energy.sum(), (alpha**2 * module.energy).sum()
        strength = np.sqrt(after / before) if before > 0 else 1.0
        found[path] = np.where(module.alive, strength, 1.0)
    return found


def _equivalent(adapter: Adapter, strength: float, gates: Gates) -> str | None:
    """Returns the setting that does the same elsewhere, where every module is edited alike."""
    value = adapter.config.raw.get("lora_alpha")
    if value is None or len(gates) < len(adapter.updates):
        return None
    return (
        f"the same as lora_alpha {value:g} -> {value * strength:g}, llama.cpp --lora-scaled FILE:{strength:g}, "
        f"adapter weight {strength:g} in diffusers and ComfyUI"
    )


def single_steps(pulls: Sequence[Pull]) -> list[Candidate]:
    """Returns gates that follow from the sensitivities alone: only-sure and one-step."""
    found = []
    for pull in pulls:
        kinds = (
            ("significance", "only-sure", "only components whose effect is sure", only_sure(pull)),
            ("natural", "one-step", "one step of natural gradient", one_step(pull, damping=1.0)),
        )
        for family, word, what, direction in kinds:
            if not any(np.any(values) for values in direction.values()):
                continue
            for size in STEP_SIZES:
                name = f"{word} size {size:g} keep {pull.keep_weight:g}"
                found.append(Candidate(name, family, what, along(direction, pull.task, size)))
    return found


def few_steps(gates: Gates, keep_weight: float) -> list[Candidate]:
    """Returns gates found by few-step tuning, whole and in part."""
    return [
        Candidate(
            f"few-step tuning keep {keep_weight:g}" + ("" if power == 1 else f" x {power:g}"),
            "descend",
            "gates found by a few steps, nothing else trained",
            scaled(gates, power),
        )
        for power in POWERS
    ]


def between(tuned: Mapping[float, Gates]) -> list[Candidate]:
    """Returns gates on the straight line between those of neighbouring keep weights: further trade-offs for no steps.

    Args:
        tuned: Gates found by few-step tuning, by keep weight.
    """
    found = []
    for (low, one), (high, other) in pairwise(sorted(tuned.items())):
        for share, word in BETWEEN.items():
            gates = {path: (1 - share) * one[path] + share * other[path] for path in one}
            what = "gates between those of two keep weights, nothing else trained"
            found.append(Candidate(f"few-step tuning keep {low:g} to {high:g} at {word}", "descend", what, gates))
    return found


def of_paper(measured: Measurement, seed: int) -> list[Candidate]:
    """Returns the paper's four policies with a small grid of step sizes."""
    return [
        Candidate(spelled, name, "a policy of arXiv 2603.03995", _of_policy(spelled, measured, seed))
        for name, variants in PAPER.items()
        for spelled in variants
    ]


def _of_policy(spelled: str, measured: Measurement, seed: int) -> Gates:
    return policies.gates(policies.parse(spelled), measured, seed=seed)
