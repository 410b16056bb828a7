"""The distance of the states between layers from the base's: by its definition, row by row, and differentiable."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_refining_descent import assert_untouched, rows, trace

from spectral_surgery.calibration import batches
from spectral_surgery.live import Live
from spectral_surgery.live.live import blocks
from spectral_surgery.objective import answer_loss
from spectral_surgery.refining.closeness import with_distance
from spectral_surgery.refining.descent import Steps, Term, descend
from spectral_surgery.refining.scoring import answer_loss_of, per_example


@pytest.fixture
def live() -> Live:
    return Live(tiny.lora(tiny.llama()))


@torch.no_grad()
def states(live: Live, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every layer gives out: what the next reads, and what the last norm reads."""
    read: list[torch.Tensor] = []
    model = live.model.get_base_model().model
    handle = model.norm.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    found = live.model(input_ids=ids, output_hidden_states=True).hidden_states
    handle.remove()
    return [*found[1:-1], read[0]]


def by_hand(live: Live, ids: tuple[int, ...]) -> float:
    alone = torch.tensor([ids])
    ours = states(live, alone)
    with live.base():
        base = states(live, alone)
    each = [((a - b) ** 2).sum(-1) / (b**2).sum(-1) for a, b in zip(ours, base, strict=True)]
    return float(torch.stack(each).mean())


def test_it_is_what_it_says_for_every_row_by_itself_and_leaves_no_trace(live: Live) -> None:
    tokens = rows(6)
    gates = {path: np.linspace(0.2, 1.8, len(live.spectra[path].S)) for path in live.paths}
    with live.gated(gates):
        wanted = [by_hand(live, row.input_ids) for row in tokens.examples]
    before = trace(live)
    with live.gated(gates):
        losses = per_example(live, tokens, answer_loss_of)
        found = per_example(live, tokens, with_distance(live, answer_loss_of, 3.0))
    np.testing.assert_allclose(found, losses + 3 * np.array(wanted), rtol=1e-4)
    assert min(wanted) > 0.001
    assert_untouched(live, before)


def test_the_base_is_at_no_distance_from_itself(live: Live) -> None:
    nothing = {path: np.zeros(len(live.spectra[path].S)) for path in live.paths}
    with live.gated(nothing):
        losses = per_example(live, rows(), answer_loss_of)
        found = per_example(live, rows(), with_distance(live, answer_loss_of, 100.0))
    np.testing.assert_allclose(found, losses, rtol=1e-4)


def test_gates_descend_towards_the_base_on_rows_they_never_step_on(live: Live) -> None:
    fresh = rows(12, seed=9)
    distance = with_distance(live, lambda tokens: lambda model, batch: 0 * answer_loss(model, batch), 1.0)

    def apart() -> float:
        return float(np.mean([by_hand(live, row.input_ids) for row in fresh.examples]))

    start = apart()
    gates = descend(live, [Term(distance, rows(), 1.0)], Steps(count=8, check=4))
    with live.gated(gates):
        assert apart() < 0.8 * start


def test_a_model_without_such_layers_has_the_loss_alone(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(blocks(live.model)) == live.model.config.num_hidden_layers
    monkeypatch.setattr("spectral_surgery.refining.closeness.blocks", lambda model: [])
    batch = batches(rows(3), batch_size=3)[0]
    with live.still(), torch.no_grad():
        found = with_distance(live, answer_loss_of, 5.0)(rows(3))(live.model, batch)
        assert torch.equal(found, answer_loss_of(rows(3))(live.model, batch))
