"""Several adapters of one base model, loaded once beside one another and switched in place.

PEFT holds any number of adapters in one model, of whatever rank and modules, and computes only with the active one. So
a variant is a context: :meth:`Live.base` for none, and for each adapter its name made active. No merge, no reload, and
what a variant computes does not depend on what was computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spectral_surgery import processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.adapter.saving import is_ours
from spectral_surgery.errors import BaseModelError, InputError, combine
from spectral_surgery.live import Live, check_fits, load, load_tokenizer
from spectral_surgery.live.loading import base_name, load_config
from spectral_surgery.options import ModelOptions

BASE = "base"
"""Name of the variant without an adapter."""

Variants = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""What to open for each variant: while it is open, the loaded model computes as that variant does."""


@dataclass(frozen=True)
class Candidates:
    """Adapters of one base model by name, checked as far as can be without its weights."""

    adapters: Mapping[str, Adapter]
    model: ModelOptions
    config: Any
    """The base model's configuration."""
    tokenizer: Any

    @property
    def base_model(self) -> str:
        """Name or folder of the base model."""
        return base_name(self.first, self.model)

    @property
    def first(self) -> Adapter:
        """The adapter whose tokenizer and chat template are used."""
        return next(iter(self.adapters.values()))

    @property
    def unedited(self) -> str:
        """Name of the adapter to hold the others against: the last that spectral-surgery did not write, else the last.

        So ``edited, unedited`` and ``unedited, edited`` mean the same.
        """
        plain = [name for name, found in self.adapters.items() if not (found.folder and is_ours(found.folder))]
        return (plain or list(self.adapters))[-1]


def prepare_adapters(names: Sequence[str], model: ModelOptions | None = None) -> Candidates:
    """Returns adapters of one base model, after every check that needs no weights of it.

    Raises:
        InputError: If one cannot be read, is named twice, records another base model, or does not fit the base model.
    """
    model = model or ModelOptions()
    processes.check(model.device, model.device_map)
    faults = [
        f"{name} is given twice. Give each adapter once." for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    adapters = {}
    for given, name in short_names(names).items():
        try:
            adapters[name] = Adapter.load(given)
        except InputError as fault:
            faults.append(str(fault))
    combine(faults)
    bases = {name: base_name(adapter, model) for name, adapter in adapters.items()}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{name} on {base}" for name, base in bases.items())
        raise BaseModelError(
            f"The adapters were trained on different base models: {listed}. Compare adapters of one base; where "
            f"these are copies of one, pass --base-model."
        )
    first = next(iter(adapters.values()))
    config, tokenizer = load_config(first, model), load_tokenizer(first, model)
    for name, adapter in adapters.items():
        try:
            check_fits(adapter, config, trust_remote_code=model.trust_remote_code)
        except InputError as fault:
            faults.append(f"{name}: {fault}")
    combine(faults, BaseModelError)
    return Candidates(adapters, model, config, tokenizer)


def short_names(given: Sequence[str]) -> dict[str, str]:
    """Returns what to call each adapter: the last part of its path, or all of it where that is no name of its own."""
    last = {name: Path(name).name for name in given}
    taken = [BASE, "", *last.values()]
    return {name: short if taken.count(short) == 1 else name for name, short in last.items()}


def load_variants(candidates: Candidates) -> tuple[Live, dict[str, Callable[[], AbstractContextManager[None]]]]:
    """Returns the base model with all adapters loaded, and what to open for each variant, the base first.

    Raises:
        BaseModelError: If the base model or an adapter cannot be loaded.
    """
    live = load(candidates.first, candidates.model, tokenizer=candidates.tokenizer, checked=True)
    held = dict(zip(candidates.adapters, _names(len(candidates.adapters)), strict=True))
    for name, adapter in list(candidates.adapters.items())[1:]:
        with TemporaryDirectory() as scratch:
            folder = adapter.folder or adapter.save(Path(scratch) / "adapter")
            live.model.load_adapter(str(folder), adapter_name=held[name], is_trainable=False)
        with active(live, held[name]):
            Live(live.model, adapter, adapter_name=held[name])  # checks that what is loaded is the file's
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {BASE: live.base}
    return live, variants | {name: partial(active, live, held[name]) for name in candidates.adapters}


def _names(count: int) -> list[str]:
    return ["default", *(f"other_{number}" for number in range(1, count))]


@contextmanager
def active(live: Live, adapter_name: str) -> Iterator[None]:
    """Computes with one of the loaded adapters while open; afterwards the model is as before."""
    model = live.model
    before = model.active_adapter
    learning = {name: weight.requires_grad for name, weight in model.named_parameters() if "lora_" in name}
    model.set_adapter(adapter_name)
    try:
        yield
    finally:
        model.set_adapter(before)
        for name, weight in model.named_parameters():
            if name in learning:
                weight.requires_grad_(learning[name])
