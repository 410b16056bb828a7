"""Every kind of candidate opens as what it says, and is written as it will be stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from spectral_surgery import policies
from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import Tokenized, TokenizedExample, batches
from spectral_surgery.constraints import edit_size
from spectral_surgery.judging.trials import BASE, UNEDITED
from spectral_surgery.live import Live
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import greedy_answers
from spectral_surgery.policies import Gates
from spectral_surgery.refining.cache import Cache
from spectral_surgery.refining.candidates import (
    POWERS,
    STRENGTHS,
    Candidate,
    between,
    controls,
    few_steps,
    of_paper,
    references,
    single_steps,
)
from spectral_surgery.refining.permuting import permuted, shuffled
from spectral_surgery.refining.scoring import Rows, answer_loss_of, per_example
from spectral_surgery.refining.searching import temperature
from spectral_surgery.refining.steps import HIGHEST, LOWEST, Pull, scaled

FIRST = np.array([5.0, 0.0, 0.0, 0.0])


def rows(count: int = 10) -> Tokenized:
    generator = torch.Generator().manual_seed(8)
    found = []
    for i in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (7 + i % 4,), generator=generator).tolist()
        found.append(TokenizedExample(tuple(ids), len(ids) - 3, f"row {i}"))
    return Tokenized(found, 0)


@pytest.fixture(scope="module")
def live() -> Live:
    return Live(tiny.lora(tiny.llama()), tokenizer=tiny.tokenizer())


@pytest.fixture(scope="module")
def measured(live: Live) -> Measurement:
    return measure_live(live, batches(rows()))


@pytest.fixture(scope="module")
def tried(live: Live, measured: Measurement) -> list[Candidate]:
    """Every family that needs no descent of its own."""
    pull = Pull(sure(measured), measured, 1.0, 1.0, 0.5)
    gates = {path: np.linspace(0.5, 1.5, len(module.S)) for path, module in measured.modules.items()}
    found = [
        *references(),
        *controls(live.adapter, measured, stronger=True),
        *single_steps([pull]),
        *of_paper(measured, seed=3),
    ]
    return [*found, *few_steps(gates, 0.03), Candidate("checkpoint", "checkpoint", "other", adapter=moved(live))]


def sure(measured: Measurement) -> Measurement:
    """The measurement with a first component of every module that clearly hurts."""
    modules = {
        path: replace(module, gate_gradient=module.gate_gradient + np.abs(module.gate_gradient).max() * FIRST)
        for path, module in measured.modules.items()
    }
    return replace(measured, modules=modules)


def moved(live: Live) -> Adapter:
    return replace(live.adapter, tensors={name: value * 1.3 for name, value in live.adapter.tensors.items()})


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    batch = tiny.batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # type: ignore


@torch.no_grad()
def with_deltas(deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the plain base model with these matrices added to its weights."""
    base = tiny.llama(dtype=torch.float64)
    for path, delta in deltas.items():
        base.get_submodule(path.split("base_model.model.")[-1]).weight += delta
    return logits(base)


def deltas(adapter: Adapter, gates: Gates) -> dict[str, torch.Tensor]:
    """Dense updates with their singular values multiplied, by a dense SVD."""
    found = {}
    for path, update in adapter.updates.items():
        U, S, Vh = torch.linalg.svd(update.B.double() @ update.A.double(), full_matrices=False)
        alpha = torch.as_tensor(gates.get(path, np.ones(len(update.A))))
        k = len(alpha)
        found[path] = update.scale * (U[:, :k] * (alpha * S[:k])) @ Vh[:k]
    return found


def test_names_and_keys_tell_candidates_apart(tried: list[Candidate]) -> None:
    names = [candidate.name for candidate in tried]
    assert len(set(names)) == len(names)
    assert names[:2] == [BASE, UNEDITED]
    assert {"strength", "module_strength", "flat", "newton_schulz", "significance", "natural", "descend"} <= {
        candidate.family for candidate in tried
    }
    different = {candidate.key for candidate in tried}
    assert len(different) >= len(tried) - 3  # two policies may come to the same gates
    one = next(candidate for candidate in tried if candidate.family == "strength")
    assert replace(one, name="another").key == one.key
    assert len({one.key, replace(one, temperature=2.0).key, replace(one, gates=None).key}) == 3


def test_each_opens_as_the_base_with_the_dense_edited_update(live: Live, tried: list[Candidate]) -> None:
    plain = logits(live.model)
    by_family = {candidate.family: candidate for candidate in tried}
    assert len(by_family) >= 12
    for candidate in by_family.values():
        with candidate.open(live):
            found = logits(live.model)
        adapter = candidate.adapter or live.adapter
        wanted = {} if candidate.name == BASE else deltas(adapter, candidate.gates or {})
        torch.testing.assert_close(found.double(), with_deltas(wanted), rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(live.model), plain)
        if candidate.name != UNEDITED:
            assert (found - plain).abs().max() > 1e-4, candidate.name


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_strength_is_the_lora_alpha_that_it_names(live: Live, measured: Measurement, strength: float) -> None:
    named = next(c for c in controls(live.adapter, measured, stronger=True) if c.name == f"strength {strength:g}")
    assert named.equivalent is not None
    before, after = named.equivalent.split("lora_alpha ")[1].split(",")[0].split(" -> ")
    assert float(before) == 8
    stock = tiny.lora(tiny.llama(), lora_alpha=float(after))
    with named.open(live):
        torch.testing.assert_close(logits(live.model), logits(stock), rtol=1e-4, atol=1e-5)


def test_strengths_above_one_are_tried_only_where_a_better_task_is_asked_for(
    live: Live, measured: Measurement
) -> None:
    names = {c.name for stronger in (False, True) for c in controls(live.adapter, measured, stronger=stronger)}
    less = {c.name for c in controls(live.adapter, measured, stronger=False)}
    assert names - less == {"strength 1.25", "strength 1.1"}


def test_only_a_strength_of_every_module_is_equivalent_to_a_setting(live: Live, measured: Measurement) -> None:
    some = measured.only(list(measured.modules)[:2])
    assert all(candidate.equivalent is None for candidate in controls(live.adapter, some, stronger=True))
    every = controls(live.adapter, measured, stronger=True)
    assert {candidate.family for candidate in every if candidate.equivalent} == {"strength"}


@torch.no_grad()
def test_module_strengths_have_the_output_energy_of_the_edit_they_are_like(
    live: Live, measured: Measurement, tried: list[Candidate]
) -> None:
    like = [candidate for candidate in tried if candidate.family == "module_strength"]
    by_name = {candidate.name: candidate for candidate in tried}
    assert len(like) == 5
    for candidate in like:
        model = by_name[candidate.name.removeprefix("module strengths like ")]
        assert candidate.gates is not None
        assert model.gates is not None
        for path, alpha in candidate.gates.items():
            assert np.ptp(alpha) == 0
            energy = measured.modules[path].output_energy.mean(0)
            assert (alpha**2 * energy).sum() == pytest.approx((model.gates[path] ** 2 * energy).sum())
        constants = {float(alpha[0]) for alpha in candidate.gates.values()}
        assert len(constants) > 1


def test_the_energy_is_that_of_the_modules_outputs(live: Live, measured: Measurement) -> None:
    """On one example: the mean over tokens of the squared norm of what the module adds."""
    path = live.paths[0]
    tokens = Tokenized(rows().examples[:1], 0)
    seen: list[torch.Tensor] = []
    layer = live.model.get_base_model().get_submodule(path.split("base_model.model.")[-1])
    handle = layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].detach()))
    per_example(live, tokens, answer_loss_of)
    handle.remove()
    update = live.adapter.updates[path]
    added = update.scale * seen[0][0].double() @ update.A.double().T @ update.B.double().T
    one = measure_live(live, batches(tokens)).modules[path]
    assert one.output_energy.sum() == pytest.approx(added.square().sum(1).mean().item(), rel=1e-4)


def test_few_steps_are_tried_whole_and_in_part(tried: list[Candidate]) -> None:
    found = [candidate for candidate in tried if candidate.family == "descend"]
    assert len(found) == len(POWERS)
    assert found[0].name == "few-step tuning keep 0.03"
    whole = found[0].gates
    assert whole is not None
    for candidate, power in zip(found, POWERS, strict=True):
        assert candidate.gates is not None
        for path in whole:
            np.testing.assert_array_equal(candidate.gates[path], scaled(whole, power)[path])


def test_gates_between_two_keep_weights_lie_on_the_line_between_them() -> None:
    tuned = {weight: {"q": np.array([1.0, value])} for weight, value in ((0.1, 0.1), (0.01, 0.7), (0.05, 0.4))}
    found = between(tuned)
    names = [f"few-step tuning keep {pair} at {third}/3" for pair in ("0.01 to 0.05", "0.05 to 0.1") for third in "12"]
    assert [candidate.name for candidate in found] == names
    assert [round(float(candidate.gates["q"][1]), 12) for candidate in found if candidate.gates] == [
        0.6,
        0.5,
        0.3,
        0.2,
    ]
    assert all(candidate.gates and candidate.gates["q"][0] == 1 for candidate in found)
    assert between({0.05: {"q": np.ones(2)}}) == []


def test_single_steps_that_move_nothing_are_left_out(measured: Measurement) -> None:
    modules = {
        path: replace(module, gate_gradient=np.zeros_like(module.gate_gradient))
        for path, module in measured.modules.items()
    }
    silent = replace(measured, modules=modules)
    assert single_steps([Pull(silent, silent, 1.0, 1.0)]) == []


def test_single_steps_stay_in_bounds_and_have_their_size(tried: list[Candidate], measured: Measurement) -> None:
    found = [candidate for candidate in tried if candidate.family in ("natural", "significance")]
    assert {candidate.name.split()[0] for candidate in found} == {"only-sure", "one-step"}
    for candidate in found:
        assert candidate.gates is not None
        alpha = np.concatenate(list(candidate.gates.values()))
        S = np.concatenate([measured.modules[path].S for path in candidate.gates])
        assert alpha.min() >= LOWEST * 0.999
        assert alpha.max() <= HIGHEST * 1.001
        assert edit_size(S, alpha) <= float(candidate.name.split()[2]) * 1.001


# -- as stored --------------------------------------------------------------------------------------------------------


def stored(live: Live, dtype: torch.dtype) -> Adapter:
    return replace(live.adapter, tensors={name: value.to(dtype) for name, value in live.adapter.tensors.items()})


def test_written_rounds_as_stored(live: Live, measured: Measurement) -> None:
    adapter = stored(live, torch.bfloat16)
    gates = {path: np.linspace(0.4, 1.4, 4) for path in measured.modules}
    candidate = Candidate("edit", "descend", "", gates)
    made = candidate.written(adapter)
    assert made.gates == gates
    assert made.adapter is not None
    assert made.key != candidate.key
    assert {value.dtype for value in made.adapter.tensors.values()} == {torch.bfloat16}
    exact = deltas(adapter, gates)
    for path, update in made.adapter.updates.items():
        delta = update.scale * update.B.double() @ update.A.double()
        error = (delta - exact[path]).norm() / exact[path].norm()
        assert 1e-5 < error < 2**-7
    with made.open(live):
        found = logits(live.model)
    wanted = {path: u.scale * u.B.double() @ u.A.double() for path, u in made.adapter.updates.items()}
    torch.testing.assert_close(found.double(), with_deltas(wanted), rtol=1e-4, atol=1e-4)


def test_an_edit_that_would_drown_in_its_rounding_is_stored_in_float32(live: Live, measured: Measurement) -> None:
    adapter = stored(live, torch.bfloat16)
    gates = {path: np.array([1.0, 1.0, 1.001, 0.999]) for path in measured.modules}
    made = Candidate("slight", "descend", "", gates).written(adapter)
    assert made.adapter is not None
    assert made.adapter.report is not None
    assert {value.dtype for value in made.adapter.tensors.values()} == {torch.float32}
    assert not made.adapter.report.drowned
    exact = deltas(adapter, gates)
    for path, update in made.adapter.updates.items():
        delta = update.scale * update.B.double() @ update.A.double()
        assert (delta - exact[path]).norm() / exact[path].norm() < 1e-6
    origin = made.adapter.edited_from
    assert origin is not None
    assert origin["tensors_sha256"] == adapter.digest


def test_what_has_no_gates_is_written_as_it_is(live: Live, tried: list[Candidate]) -> None:
    for candidate in tried:
        if candidate.gates is None:
            assert candidate.written(live.adapter) is candidate


# -- temperature ------------------------------------------------------------------------------------------------------


def test_a_temperature_changes_losses_and_no_greedy_answer(live: Live, tmp_path: Path) -> None:
    tokens = rows()
    found = temperature(live, Rows([], tokens), Cache(tmp_path, "context"))
    plain = per_example(live, tokens, answer_loss_of)
    prompts = [row.input_ids[: row.answer_start] for row in tokens.examples]
    said = greedy_answers(live.model, live.tokenizer, prompts, max_new_tokens=8)
    with found.open(live):
        cooled = per_example(live, tokens, answer_loss_of)
        assert greedy_answers(live.model, live.tokenizer, prompts, max_new_tokens=8) == said
    assert per_example(live, tokens, answer_loss_of) == pytest.approx(plain, abs=0)
    assert found.temperature != 1
    assert np.abs(cooled - plain).max() > 0.01
    assert found.family == "temperature"
    assert f"{found.temperature:g}" in found.name


@torch.no_grad()
def test_it_is_the_best_one_on_these_rows(live: Live, tmp_path: Path) -> None:
    tokens = rows()

    def loss(T: float) -> float:
        total = 0.0
        for row in tokens.examples:
            scores = live.model(input_ids=torch.tensor([row.input_ids])).logits[0, row.answer_start - 1 : -1].double()
            wanted = torch.tensor(row.input_ids[row.answer_start :])
            total -= (scores / T).log_softmax(-1).gather(1, wanted[:, None]).mean().item()
        return total / len(tokens.examples)

    grid = np.exp(np.linspace(-1.4, 1.4, 29))
    found = temperature(live, Rows([], tokens), Cache(tmp_path, "context"))
    assert loss(found.temperature) <= min(map(loss, grid)) + 1e-3
    by_hand = loss(found.temperature)
    with found.open(live):
        assert per_example(live, tokens, answer_loss_of).mean() == pytest.approx(by_hand, rel=1e-4)


# -- random orders ----------------------------------------------------------------------------------------------------


def module(S: list[float], ties: list[int] | None = None) -> ModuleMeasurement:
    empty = np.zeros((0, len(S)))
    return ModuleMeasurement(np.array(S), np.array(ties or range(len(S))), empty, empty)


def test_random_orders_keep_each_modules_edit_size_and_its_numbers() -> None:
    spectra = Measurement({"a": module([5.0, 3.0, 2.0, 1.0]), "b": module([4.0, 3.9, 3.8, 0.0])})
    gates = {"a": np.array([0.9, 1.0, 1.05, 1.2]), "b": np.array([1.1, 0.8, 1.0, 1.0])}
    winner = Candidate("winner", "descend", "", gates)
    found = permuted(winner, spectra, 30, seed=5)
    assert len({candidate.name for candidate in found}) == 30
    orders = set()
    for candidate in found:
        assert candidate.gates is not None
        assert list(candidate.gates) == ["a", "b"]
        for path, alpha in candidate.gates.items():
            S, alive = spectra.modules[path].S, spectra.modules[path].alive
            assert edit_size(S, alpha) == pytest.approx(edit_size(S, gates[path]), rel=1e-9)
            step, own = (alpha - 1)[alive], (gates[path] - 1)[alive]
            factor = np.abs(step).max() / np.abs(own).max()
            np.testing.assert_allclose(np.sort(step / factor), np.sort(own), atol=1e-9)
            assert (alpha[~alive] == 1).all()
            assert (alpha >= 0).all()
        orders.add(tuple(np.argsort(candidate.gates["a"])))
    assert len(orders) > 12
    again = permuted(winner, spectra, 30, seed=5)
    assert [candidate.key for candidate in again] == [candidate.key for candidate in found]


def test_tied_components_share_also_in_a_random_order() -> None:
    spectra = Measurement({"a": module([5.0, 3.0, 3.0, 1.0], [0, 1, 1, 2])})
    winner = Candidate("winner", "descend", "", {"a": np.array([0.5, 1.1, 1.1, 1.4])})
    for candidate in permuted(winner, spectra, 10, seed=1):
        assert candidate.gates is not None
        assert candidate.gates["a"][1] == candidate.gates["a"][2]


def test_one_strength_a_module_has_no_other_order() -> None:
    spectra = Measurement({"a": module([5.0, 3.0, 0.0])})
    assert not shuffled({"a": np.array([0.7, 0.7, 1.0])}, spectra)
    assert shuffled({"a": np.array([0.7, 0.8, 1.0])}, spectra)
    assert not shuffled(None, spectra)


def test_the_papers_policies_are_those_of_their_names(measured: Measurement) -> None:
    for candidate in of_paper(measured, seed=11):
        assert candidate.gates is not None
        wanted = policies.gates(policies.parse(candidate.name), measured, seed=11)
        assert all((candidate.gates[path] == wanted[path]).all() for path in wanted)
