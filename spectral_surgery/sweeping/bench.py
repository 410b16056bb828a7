"""A study's base model with all its adapters, loaded once; measured and scored by switching adapters and gates.

Nothing here touches the study's folder, so what is asked for can as well be asked of another process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from spectral_surgery.editing import gates_for
from spectral_surgery.evaluating.records import Record
from spectral_surgery.evaluating.scoring import score
from spectral_surgery.evaluating.variants import active, load_variants
from spectral_surgery.live import Live
from spectral_surgery.measurement import Measurement
from spectral_surgery.measuring import measure_prepared
from spectral_surgery.policies import parse
from spectral_surgery.results.runs import BASE, UNEDITED
from spectral_surgery.selection import Selection
from spectral_surgery.sweeping.grid import Item
from spectral_surgery.sweeping.preparing import Ready
from spectral_surgery.sweeping.study import constraint_of


@dataclass(frozen=True)
class Work:
    """What is done in one go: an item scored, or what its edit needs measured."""

    item: Item
    measures: bool = False


Result = Measurement | list[Record]


@dataclass(frozen=True)
class Bench:
    """The loaded model."""

    ready: Ready
    lives: Mapping[str, Live]
    """By adapter's path: one model, switched."""

    @classmethod
    def load(cls, ready: Ready) -> Bench:
        """Returns the base model with all adapters of a study.

        Raises:
            BaseModelError: If the base model or an adapter cannot be loaded.
        """
        live, _ = load_variants(ready.candidates)
        lives = {}
        for path, name in zip(ready.adapters, live.model.peft_config, strict=True):
            with active(live, name):
                lives[path] = Live(live.model, ready.adapters[path], tokenizer=live.tokenizer, adapter_name=name)
        return cls(ready, lives)

    def do(self, work: Work, measured: Measurement | None) -> Result:
        """Returns what came of a piece of work.

        Args:
            work: What is done.
            measured: Sensitivities on all of an item's measuring rows, for the scoring of an edit that needs them.
        """
        return self.measure(work.item) if work.measures else self.score(work.item, measured)

    def measure(self, item: Item) -> Measurement:
        """Returns the sensitivities of an item's adapter on all of its measuring rows."""
        rows, whole = self.ready.of(item), self.lives[item.adapter.path]
        live = Live(whole.model, whole.adapter, adapter_name=whole.adapter_name, paths=rows.prepared.paths)
        with active(live, live.adapter_name):
            return measure_prepared(rows.prepared, live, self.ready.study.batching)

    def score(self, item: Item, measured: Measurement | None) -> list[Record]:
        """Returns the records of an item."""
        live = self.lives[item.adapter.path]
        with active(live, live.adapter_name):
            return score(live, {item.policy: self._opened(item, live, measured)}, self.ready.suites[item.suite])

    def _opened(
        self, item: Item, live: Live, measured: Measurement | None
    ) -> Callable[[], AbstractContextManager[None]]:
        if item.policy == BASE:
            return live.base
        if item.policy == UNEDITED:
            return nullcontext
        gates = gates_for(
            self.ready.adapters[item.adapter.path],
            parse(item.policy),
            first(measured, item.rows) if measured and item.rows else None,
            constraint=constraint_of(item.policy, str(item.energy)),
            selection=Selection((str(item.modules),)),
            seed=item.seed,
        )
        return partial(live.gated, gates)


def first(measured: Measurement, count: int) -> Measurement:
    """Returns a measurement of the first examples alone: what measuring only these would have given."""
    modules = {
        path: replace(module, gate_gradient=module.gate_gradient[:count], output_energy=module.output_energy[:count])
        for path, module in measured.modules.items()
    }
    return Measurement(modules, measured.digests[:count], np.asarray(measured.losses)[:count], measured.about)
