"""The edit of factors against dense matrices, in every stored dtype; and the whole step from adapter to adapter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_surgery import Adapter, edit, policies
from spectral_surgery.adapter import AdapterConfig
from spectral_surgery.constraints import Constraint, edit_size
from spectral_surgery.errors import MeasurementError, PolicyError, RunError, SelectionError
from spectral_surgery.measurement import Measurement
from spectral_surgery.selection import Selection
from spectral_surgery.spectrum import LowRank
from spectral_surgery.surgery import distance, operate, spectra, unmeasured

OUT, IN, RANK = 40, 28, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIDES = ["B", "A"]


def factors(dtype: torch.dtype = torch.float32, seed: int = 0, side: str = "B", rank: int = RANK) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(OUT, rank, generator=generator) * torch.linspace(0.2, 2, rank)
    return LowRank(B.to(dtype), torch.randn(rank, IN, generator=generator).to(dtype), scale=0.5, side=side)


def random_gates(seed: int = 0, rank: int = RANK) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 2, rank)


def dense(update: LowRank) -> Tensor:
    return update.B.double() @ update.A.double()


def wanted(update: LowRank, gates: np.ndarray) -> Tensor:
    """``U diag(alpha S) Vh`` from a dense SVD of ``B A``."""
    U, S, Vh = torch.linalg.svd(dense(update), full_matrices=False)
    k = len(gates)
    return U[:, :k] * (S[:k] * torch.tensor(gates)) @ Vh[:k]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def plain(update: LowRank, gates: np.ndarray) -> Tensor:
    """The update as the paper's code writes it: both factors rebuilt with the root of S, and rounded."""
    U, S, Vh = torch.linalg.svd(dense(update), full_matrices=False)
    k = len(gates)
    root = (S[:k] * torch.tensor(gates)).sqrt()
    B, A = U[:, :k] * root, root[:, None] * Vh[:k]
    return B.to(update.B.dtype).double() @ A.to(update.B.dtype).double()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_edited_update_is_the_gated_one_up_to_the_rounding_that_is_reported(dtype: torch.dtype, side: str) -> None:
    update, gates = factors(dtype, side=side), random_gates()
    edited, report = operate({"m": update}, {"m": gates})
    error = relative(dense(edited["m"]), wanted(update, gates))
    assert error == pytest.approx(report.modules["m"].rounding, rel=1e-3)
    assert error < torch.finfo(dtype).eps
    assert edited["m"].stored.dtype == dtype
    assert edited["m"].stored.is_contiguous()
    other = "A" if side == "B" else "B"
    assert getattr(edited["m"], other) is getattr(update, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stored_error_is_no_larger_than_the_plain_implementations(dtype: torch.dtype) -> None:
    for seed in range(20):
        update, gates = factors(dtype, seed), random_gates(seed)
        expected = wanted(update, gates)
        edited, _ = operate({"m": update}, {"m": gates})
        assert relative(dense(edited["m"]), expected) <= relative(plain(update, gates), expected), seed


@pytest.mark.parametrize("side", SIDES)
def test_an_identity_edit_keeps_the_stored_tensor_where_the_plain_implementation_rounds_it(side: str) -> None:
    update = factors(torch.bfloat16, side=side)
    edited, report = operate({"m": update}, {"m": np.ones(RANK)})
    assert edited["m"].B is update.B
    assert edited["m"].A is update.A
    assert (report.edited, report.size, report.modules["m"].rounding) == (0, 0, 0)
    assert relative(plain(update, np.ones(RANK)), dense(update)) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deleted_component_leaves_only_rounding_behind(dtype: torch.dtype) -> None:
    update, gates = factors(dtype), np.ones(RANK)
    gates[0] = 0
    U, S, Vh = torch.linalg.svd(dense(update), full_matrices=False)
    edited, _ = operate({"m": update}, {"m": gates})
    assert abs(float(U[:, 0] @ dense(edited["m"]) @ Vh[0])) < torch.finfo(dtype).eps * float(S[0])


@pytest.mark.parametrize("rank", [1, 2, 3, 36])
def test_every_rank_is_edited_also_one_above_the_smaller_side(rank: int) -> None:
    update = factors(rank=rank)
    gates = random_gates(rank=min(rank, IN))
    edited, _ = operate({"m": update}, {"m": gates})
    assert relative(dense(edited["m"]), wanted(update, gates)) < 1e-6


def test_an_overflow_of_the_stored_dtype_ends_the_run_and_names_the_module() -> None:
    small, large = factors(torch.float16), factors(torch.float16, seed=1)
    large = replace(large, B=large.B / large.B.abs().max() * 40000)
    gates = np.full(RANK, 3.0)
    with pytest.raises(RunError, match=r"layers\.7: the edited factor overflows torch\.float16\. The largest gate"):
        operate({"layers.6": small, "layers.7": large}, {"layers.6": gates, "layers.7": gates})


def test_a_gate_that_is_not_a_number_ends_the_run_and_names_the_module() -> None:
    with pytest.raises(RunError, match="m: the edited factor"):
        operate({"m": factors()}, {"m": np.full(RANK, np.nan)})


def test_the_report_counts_and_adds_up_the_edit() -> None:
    updates = {"a": factors(), "b": replace(factors(seed=1), scale=4.0), "c": factors(seed=2)}
    gates = {"a": random_gates(), "b": np.array([0.5, *np.ones(RANK - 1)])}
    edited, report = operate(updates, gates)
    assert list(edited) == list(report.modules) == ["a", "b"]
    assert (report.components, report.edited) == (2 * RANK, RANK + 1)
    for path, update in edited.items():
        before = torch.linalg.svdvals(dense(updates[path]))[:RANK]
        found = report.modules[path]
        np.testing.assert_allclose(found.S, before.numpy(), rtol=1e-9)
        np.testing.assert_array_equal(found.gates, gates[path])
        assert found.scale == update.scale
        assert found.size == pytest.approx(relative(dense(update), dense(updates[path])), rel=1e-5)
    change = torch.cat([edited[p].scale * (dense(edited[p]) - dense(updates[p])) for p in edited])
    whole = torch.cat([edited[p].scale * dense(updates[p]) for p in edited])
    assert report.size == pytest.approx(float(change.norm() / whole.norm()), rel=1e-5)


def test_an_edit_that_its_own_rounding_drowns_is_reported() -> None:
    updates = {"low": factors(torch.bfloat16), "high": factors(torch.float32), "none": factors(torch.bfloat16)}
    gates = {"low": np.full(RANK, 1.001), "high": np.full(RANK, 1.001), "none": np.ones(RANK)}
    assert operate(updates, gates)[1].drowned == ["low"]


def test_an_untrained_module_stays_zero() -> None:
    zero = replace(factors(), B=torch.zeros(OUT, RANK))
    edited, report = operate({"m": zero}, {"m": random_gates()})
    assert not edited["m"].B.any()
    assert (report.size, report.modules["m"].size, report.modules["m"].rounding) == (0, 0, 0)


@pytest.mark.parametrize("side", SIDES)
def test_the_distance_of_two_updates_is_the_relative_norm_of_their_difference(side: str) -> None:
    update = factors(side=side)
    other = replace(update, B=update.B * 1.25) if side == "B" else replace(update, A=update.A * 1.25)
    assert distance(other, update) == pytest.approx(0.25)
    assert distance(update, update) == 0


def test_spectra_alone_make_a_measurement_of_no_examples() -> None:
    found = unmeasured(spectra({"m": factors()}))
    assert found.examples == 0
    np.testing.assert_allclose(found.modules["m"].S, torch.linalg.svdvals(dense(factors()))[:RANK], rtol=1e-9)


PATHS = ["layers.0.q_proj", "layers.0.o_proj", "layers.1.o_proj"]


def an_adapter(seed: int = 0) -> Adapter:
    config = AdapterConfig({"peft_type": "LORA", "r": RANK, "lora_alpha": 16})
    tensors = {}
    for i, path in enumerate(PATHS):
        update = factors(seed=seed + i)
        tensors[f"base_model.model.{path}.lora_A.weight"] = update.A
        tensors[f"base_model.model.{path}.lora_B.weight"] = update.B
    return Adapter(config, tensors, name="memory")


def measured(adapter: Adapter, paths: list[str] = PATHS) -> Measurement:
    rng = np.random.default_rng(1)
    modules = {
        path: replace(module, gate_gradient=rng.normal(size=(4, RANK)), output_energy=np.ones((4, RANK)))
        for path, module in adapter.spectrum_only(paths).modules.items()
    }
    return Measurement(modules, tuple("abcd"), np.zeros(4), {"adapter_sha256": adapter.digest})


def test_edit_writes_the_policys_gates_into_the_selected_modules_alone() -> None:
    adapter = an_adapter()
    edited, report = edit(adapter, policies.SmoothAbs(), measured(adapter), selection=Selection(("o_proj",)))
    gates = policies.gates(policies.SmoothAbs(), measured(adapter))
    assert list(report.modules) == PATHS[1:]
    for path in PATHS[1:]:
        np.testing.assert_array_equal(report.modules[path].gates, gates[path])
        found = dense(edited.updates[path])
        assert relative(found, wanted(adapter.updates[path], gates[path])) < 1e-6
    assert edited.updates[PATHS[0]].B is adapter.updates[PATHS[0]].B
    assert edited.report is report
    assert edited.edited_from["tensors_sha256"] == adapter.digest != edited.digest


def test_auto_selects_what_was_measured_and_without_a_measurement_the_residual_writers() -> None:
    adapter = an_adapter()
    found = measured(adapter, PATHS[:2])
    assert list(edit(adapter, policies.SmoothAbs(), found)[1].modules) == PATHS[:2]
    only_first = Selection(layers="0")
    assert list(edit(adapter, policies.SmoothAbs(), measured(adapter), selection=only_first)[1].modules) == PATHS[:2]
    assert list(edit(adapter, policies.Scale())[1].modules) == PATHS[1:]


def test_constraint_and_seed_reach_the_gates() -> None:
    adapter = an_adapter()
    capped = edit(adapter, policies.RandomIndex(), constraint=Constraint(max_edit_size=0.01))[1]
    assert all(edit_size(m.S, m.gates) == pytest.approx(0.01) for m in capped.modules.values())
    first, again, other = (edit(adapter, policies.RandomIndex(), seed=seed)[0].digest for seed in (1, 1, 2))
    assert first == again != other


def test_a_second_edit_remembers_the_first_source() -> None:
    adapter = an_adapter()
    once, _ = edit(adapter, policies.Scale(strength=0.5))
    twice, _ = edit(once, policies.Scale(strength=0.5))
    assert twice.edited_from == once.edited_from
    path = PATHS[1]
    assert relative(dense(twice.updates[path]), dense(adapter.updates[path]) / 4) < 1e-6


def test_a_policy_without_the_sensitivities_that_it_needs_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"Policy smooth_abs needs sensitivities\. Pass data to measure on"):
        edit(an_adapter(), policies.SmoothAbs())


def test_sensitivities_of_another_adapter_or_other_modules_are_refused() -> None:
    adapter = an_adapter()
    with pytest.raises(MeasurementError, match=r"hash [0-9a-f]{12}, and this one has [0-9a-f]{12}\. Measure this"):
        edit(adapter, policies.SmoothAbs(), measured(an_adapter(seed=9)))
    with pytest.raises(MeasurementError, match=r"1 of 1 selected modules were not measured, .* layers\.0\.q_proj"):
        edit(adapter, policies.SmoothAbs(), measured(adapter, PATHS[1:]), selection=Selection(("q_proj",)))
    with pytest.raises(SelectionError, match="matches 'k_proj'"):
        edit(adapter, policies.Scale(), selection=Selection(("k_proj",)))
