"""Gates and factors found by a few steps: they lower what they are to lower, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import Tokenized, TokenizedExample, batches
from spectral_surgery.divergence import Divergence, reference
from spectral_surgery.live import Live
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import Loss, answer_loss
from spectral_surgery.refining.descent import Steps, Term, carry_on, descend
from spectral_surgery.refining.scoring import LossOf, answer_loss_of, per_example
from spectral_surgery.refining.steps import HIGHEST, LOWEST


def rows(count: int = 24, seed: int = 4) -> Tokenized:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (8 + i % 3,), generator=generator).tolist()
        found.append(TokenizedExample(tuple(ids), len(ids) - 3, f"row {seed} {i}"))
    return Tokenized(found, 0)


@pytest.fixture
def live() -> Live:
    return Live(tiny.lora(tiny.llama()))


def from_base(live: Live, tokens: Tokenized) -> LossOf:
    with live.base():
        return partial(Divergence, reference(live, tokens))


def terms(live: Live) -> list[Term]:
    task, keep = rows(), rows(20, seed=5)
    return [Term(answer_loss_of, task, 2.0), Term(from_base(live, keep), keep, 0.5)]


def on_held_back_rows(live: Live, wanted: list[Term], seed: int = 0) -> float:
    """The objective on the quarter that stops, by its definition."""
    total = 0.0
    for term in wanted:
        held = term.parts(seed)[1]
        total += per_example(live, held, term.loss_of).mean() / term.scale
    return total


def trace(live: Live) -> dict[str, object]:
    """Everything about the model that must not change."""
    model = live.model
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for name, module in model.named_modules()
        ],
        "flags": [(name, weight.requires_grad, weight.grad is None) for name, weight in model.named_parameters()],
        "training": [module.training for module in model.modules()],
    }


def assert_untouched(live: Live, before: dict[str, object]) -> None:
    after = trace(live)
    one, other = before.pop("weights"), after.pop("weights")
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert before == after


def test_the_gradient_through_tuned_gates_is_the_measured_one() -> None:
    live = Live(tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64))
    tokens = rows(5)
    gates = {
        path: torch.ones(len(live.spectra[path].S), dtype=torch.float64, requires_grad=True) for path in live.paths
    }
    batch = batches(tokens, batch_size=5)[0]
    with live.still(), live.tuned(gates):
        answer_loss(live.model, batch).mean().backward()
    measured = measure_live(live, batches(tokens, batch_size=2))
    for path, gate in gates.items():
        assert gate.grad is not None
        np.testing.assert_allclose(gate.grad, measured.modules[path].gate_gradient.mean(0), rtol=1e-5, atol=1e-9)


def test_the_gradient_away_from_one_is_that_of_finite_differences() -> None:
    live = Live(tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64))
    said = from_base(live, rows(4))(rows(4))
    batch = batches(rows(4), batch_size=4)[0]
    start = {path: np.linspace(0.4, 1.6, len(live.spectra[path].S)) for path in live.paths}
    gates = {path: torch.tensor(values, requires_grad=True) for path, values in start.items()}
    with live.still(), live.tuned(gates):
        said(live.model, batch).mean().backward()
    for path in live.paths[::3]:
        for k in (0, 3):
            found = []
            for step in (1e-5, -1e-5):
                moved = {name: values.copy() for name, values in start.items()}
                moved[path][k] += step
                with torch.no_grad(), live.still(), live.gated(moved):
                    found.append(said(live.model, batch).mean().item())
            grad = gates[path].grad
            assert grad is not None
            assert grad[k].item() == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_descending_lowers_the_objective_on_rows_it_never_steps_on(live: Live) -> None:
    wanted, steps = terms(live), Steps(count=12, rows=8, check=4)
    before, start = trace(live), on_held_back_rows(live, wanted)
    told: list[tuple[int, int]] = []
    gates = descend(live, wanted, steps, progress=lambda *at: told.append(at))
    assert_untouched(live, before)
    with live.gated(gates):
        assert on_held_back_rows(live, wanted) < start - 0.05
    assert told == [(step, 12) for step in range(1, 13)]
    assert list(gates) == live.paths
    values = np.concatenate(list(gates.values()))
    assert ((values >= LOWEST) & (values <= HIGHEST)).all()
    assert (values != 1).any()


def test_it_stays_in_bounds_whatever_the_step(live: Live) -> None:
    keep = rows(12, seed=6)
    gates = descend(live, [Term(from_base(live, keep), keep, 1.0)], Steps(count=6, check=1, gate_rate=5.0))
    values = np.concatenate(list(gates.values()))
    assert values.min() == pytest.approx(LOWEST, rel=1e-6)
    assert values.max() <= HIGHEST * (1 + 1e-6)


def test_the_same_seed_gives_the_same_gates_and_a_start_is_gone_on_from(live: Live) -> None:
    wanted = terms(live)
    one, other = (descend(live, wanted, Steps(count=3, check=3)) for _ in range(2))
    assert all((one[path] == other[path]).all() for path in one)
    start = {path: np.full(len(live.spectra[path].S), 0.5) for path in live.paths}
    stood = descend(live, wanted, Steps(count=0), start=start)
    assert all(stood[path] == pytest.approx(0.5) for path in start)


def leading_away(live: Live, term_rows: Tokenized, seed: int) -> Term:
    """A term whose steps go to the base while its held-back rows ask to stay: any step makes these worse."""
    own = reference(live, term_rows)
    away = from_base(live, term_rows)
    held = {row.digest for row in Term(away, term_rows, 1.0).parts(seed)[1].examples}

    def loss_of(tokens: Tokenized) -> Loss:
        stays = all(row.digest in held for row in tokens.examples)
        return Divergence(own, tokens) if stays else away(tokens)

    return Term(loss_of, term_rows, 1.0)


def test_where_every_step_makes_things_worse_the_start_is_returned(live: Live) -> None:
    misled = leading_away(live, rows(16, seed=7), seed=3)
    gates = descend(live, [misled], Steps(count=6, check=2, seed=3))
    assert all((alpha == 1).all() for alpha in gates.values())
    trained = carry_on(live, [misled], Steps(count=6, check=2, seed=3), learning_rate=1e-2)
    assert all(torch.equal(trained.tensors[name], value) for name, value in live.adapter.tensors.items())


@pytest.mark.parametrize("learning_rate", [1e-3, 3e-3])
def test_carrying_on_trains_a_copy(live: Live, learning_rate: float) -> None:
    wanted, steps = terms(live), Steps(count=12, rows=8, check=4)
    before, start = trace(live), on_held_back_rows(live, wanted)
    trained = carry_on(live, wanted, steps, learning_rate=learning_rate)
    assert_untouched(live, before)
    assert isinstance(trained, Adapter)
    assert list(trained.tensors) == list(live.adapter.tensors)
    assert all(not torch.equal(trained.tensors[name], value) for name, value in live.adapter.tensors.items())
    with live.holding(trained):
        assert on_held_back_rows(live, wanted) < start
    assert on_held_back_rows(live, wanted) == start


def test_an_adapter_in_training_mode_is_left_in_training_mode() -> None:
    model = tiny.lora(tiny.llama()).train()
    live = Live(model)
    wanted, before = terms(live), trace(live)
    descend(live, wanted, Steps(count=1))
    carry_on(live, wanted, Steps(count=1), learning_rate=1e-3)
    assert_untouched(live, before)
    assert model.training


@pytest.mark.parametrize("find", [descend, partial(carry_on, learning_rate=1e-2)], ids=["descend", "carry_on"])
def test_a_step_that_fails_leaves_the_model_as_it_was(live: Live, find: Callable[..., object]) -> None:
    calls = 0

    def failing(tokens: Tokenized) -> Loss:
        def loss(model: object, batch: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return answer_loss(model, batch)  # type: ignore[arg-type]

        return loss

    before = trace(live)
    with pytest.raises(KeyboardInterrupt):
        find(live, [Term(failing, rows(), 1.0)], Steps(count=8, rows=6, check=8))
    assert_untouched(live, before)


def test_every_row_comes_once_before_any_comes_again_and_none_is_held_back(live: Live) -> None:
    tokens, seen = rows(16), list[list[str]]()

    def noting(some: Tokenized) -> Loss:
        seen.append([row.digest for row in some.examples])
        return answer_loss

    term = Term(noting, tokens, 1.0)
    used, held = term.parts(0)
    assert len(held.examples) == 4
    assert len(used.examples) == 12
    descend(live, [term], Steps(count=6, rows=5, check=100))
    steps = seen[1:-1]  # the first and the last look are at the held-back rows
    assert [len(digests) for digests in steps] == [5, 5, 2, 5, 5, 2]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(digest for step in epoch for digest in step) == sorted(row.digest for row in used.examples)
    assert sorted(seen[0]) == sorted(seen[-1]) == sorted(row.digest for row in held.examples)


def test_components_that_cannot_be_told_apart_share_and_dead_ones_keep_their_gate() -> None:
    model = tiny.lora(tiny.llama())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight[:, 3] = weight[:, 0]
                weight[:, 2] = 0
    live = Live(model)
    dead = {path: module.alive for path, module in live.adapter.spectrum_only().modules.items()}
    assert all((~alive).sum() == 2 for alive in dead.values())
    gates = descend(live, terms(live), Steps(count=4, rows=8, check=1))
    for path, alive in dead.items():
        assert (gates[path][~alive] == 1).all()
        assert (gates[path][alive] != 1).all()


# -- other tensors in the loaded model --------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    batch = tiny.batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # type: ignore


def edited(adapter: Adapter) -> Adapter:
    from spectral_surgery.surgery import operate

    gates = {path: np.linspace(0.3, 1.7, len(update.A)) for path, update in adapter.updates.items()}
    return adapter.with_updates(*operate(adapter.updates, gates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holding_another_adapter_is_loading_its_folder_with_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    from peft import PeftModel

    world = tiny.world(tmp_path)
    adapter = Adapter.load(world.adapter)
    tensors = {name: value.to(dtype) for name, value in adapter.tensors.items()}
    adapter = Adapter(adapter.config, tensors, adapter.metadata, None, "stored")
    adapter.save(tmp_path / "stored")
    live = Live(PeftModel.from_pretrained(tiny.llama(), tmp_path / "stored").eval(), adapter)
    other = edited(adapter)
    other.save(tmp_path / "edited")
    before, plain = trace(live), logits(live.model)
    with live.holding(other):
        found = logits(live.model)
    assert_untouched(live, before)
    assert torch.equal(logits(live.model), plain)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "edited").eval()
    assert torch.equal(found, logits(stock))
    assert (found - plain).abs().max() > 0.01


def test_the_adapter_is_back_after_an_exception(live: Live) -> None:
    before = trace(live)
    with pytest.raises(KeyboardInterrupt), live.holding(edited(live.adapter)):
        raise KeyboardInterrupt
    assert_untouched(live, before)


def test_an_adapter_of_another_layout_is_refused_and_changes_nothing(live: Live) -> None:
    from spectral_surgery.errors import AdapterError

    before = trace(live)
    other = Adapter.from_model(tiny.lora(tiny.llama(), r=3))
    with pytest.raises(AdapterError, match="tensors differ"), live.holding(other):
        raise AssertionError("opened")
    assert_untouched(live, before)
