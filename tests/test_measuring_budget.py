"""Batches that fit into memory: by arithmetic, and by halving once for all when they do not."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from spectral_surgery import Live
from spectral_surgery.batching import FEWEST, MOST, Fitting, budget, fitting_tokens
from spectral_surgery.errors import RunError
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import AT_ONCE
from spectral_surgery.options import BatchOptions, ModelOptions


def test_more_free_memory_gives_larger_batches_within_limits() -> None:
    live = Live(tiny.lora(tiny.llama()))
    config = live.model.get_base_model().config
    room = int(1.1 * 2 * 4 * AT_ONCE)
    found = [
        fitting_tokens(live, config, ModelOptions(dtype="float32"), free)
        for free in (0, room + 2**22, room + 2**23, 2**40)
    ]
    assert found[0] == FEWEST
    assert FEWEST < found[1] < found[2] <= found[3] == MOST


def test_a_budget_that_is_given_stays_and_a_cpu_has_its_own() -> None:
    live = Live(tiny.lora(tiny.llama()))
    assert budget(live, ModelOptions(), BatchOptions(token_budget=77)) == 77
    assert budget(live, ModelOptions(), BatchOptions()) == 512


def test_after_memory_ran_out_no_batch_of_that_size_is_tried_again() -> None:
    tried = []

    def one_pass(batch: dict[str, torch.Tensor]) -> int:
        tried.append(len(batch["x"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError
        return tried[-1]

    fitting, batch = Fitting(), {"x": torch.zeros(8, 5)}
    assert fitting.run(one_pass, batch) == [2, 2, 2, 2]
    assert tried == [8, 4, 2, 2, 2, 2]
    assert fitting.run(one_pass, batch) == [2, 2, 2, 2]
    assert tried[6:] == [2, 2, 2, 2]


def test_one_example_that_does_not_fit_is_an_error() -> None:
    def one_pass(batch: dict[str, torch.Tensor]) -> int:
        raise torch.OutOfMemoryError

    with pytest.raises(RunError, match="One example alone"):
        Fitting().run(one_pass, {"x": torch.zeros(3, 5)})


def test_memory_that_runs_out_in_the_middle_changes_no_sensitivity() -> None:
    live, rows = Live(tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64)), tiny.batch(rows=5)
    wanted = measure_live(live, [rows], loss=tiny.loss)

    def loss(model: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = tiny.loss(model, batch)
        if len(found) > 1:
            raise torch.OutOfMemoryError
        return found

    found = measure_live(live, [rows], loss=loss)
    for path, module in wanted.modules.items():
        np.testing.assert_allclose(found.modules[path].gate_gradient, module.gate_gradient, rtol=1e-9, atol=1e-13)
