"""Clamp, then energy, then cap: what each keeps, and in which order."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest

from spectral_surgery.constraints import Constraint, constrain, edit_size, with_edit_size
from spectral_surgery.errors import PolicyError
from spectral_surgery.measurement import ModuleMeasurement
from spectral_surgery.policies import POLICIES, default_constraint

S = np.array([3.0, 2.0, 1.0, 0.5])
ALPHA = np.array([0.2, 1.5, 1.0, 3.0])
ENERGY = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 1.0, 2.0]])


def module(S: np.ndarray = S, energy: np.ndarray = ENERGY) -> ModuleMeasurement:
    return ModuleMeasurement(S, np.arange(len(S)), np.zeros_like(energy), energy)


def test_each_energy_is_kept_by_one_common_factor() -> None:
    kept = {
        "nuclear": lambda alpha: (alpha * S).sum(),
        "frobenius": lambda alpha: np.linalg.norm(alpha * S),
        "functional": lambda alpha: (alpha**2 * ENERGY).sum(),
    }
    for energy, measure in kept.items():
        alpha = constrain(ALPHA, module(), Constraint(energy=energy))
        assert measure(alpha) == pytest.approx(measure(np.ones(4)), rel=1e-12)
        np.testing.assert_allclose(alpha / ALPHA, alpha[0] / ALPHA[0], rtol=1e-12)
        assert abs(alpha[0] / ALPHA[0] - 1) > 0.01


def test_none_keeps_the_gates() -> None:
    np.testing.assert_array_equal(constrain(ALPHA, module(), Constraint(energy="none")), ALPHA)


def test_the_floor_is_in_units_of_singular_values() -> None:
    alpha = constrain(ALPHA, module(), Constraint(energy="none", floor=1.2))
    np.testing.assert_allclose(alpha * S, [1.2, 3.0, 1.2, 1.5], rtol=1e-12)


def test_energy_comes_after_the_clamp_so_values_may_fall_below_the_floor_again() -> None:
    alpha = constrain(ALPHA, module(), Constraint(energy="nuclear", floor=1.2))
    np.testing.assert_allclose(alpha * S, np.array([1.2, 3.0, 1.2, 1.5]) * 6.5 / 6.9, rtol=1e-12)


def test_a_negative_gate_is_clamped_to_zero() -> None:
    alpha = constrain(np.array([-1.0, 1, 1, 1]), module(), Constraint(energy="none"))
    assert alpha.tolist() == [0, 1, 1, 1]


def test_a_larger_edit_is_shortened_along_its_own_direction_and_a_smaller_one_is_not() -> None:
    free = constrain(ALPHA, module(), Constraint())
    capped = constrain(ALPHA, module(), Constraint(max_edit_size=0.1))
    assert edit_size(S, capped) == pytest.approx(0.1, rel=1e-12)
    np.testing.assert_allclose((capped - 1) / (free - 1), 0.1 / edit_size(S, free), rtol=1e-12)
    np.testing.assert_array_equal(constrain(ALPHA, module(), Constraint(max_edit_size=10.0)), free)
    assert constrain(ALPHA, module(), Constraint(max_edit_size=0.0)).tolist() == [1, 1, 1, 1]


def test_a_capped_edit_still_keeps_the_nuclear_norm() -> None:
    capped = constrain(ALPHA, module(), Constraint(max_edit_size=0.1))
    assert (capped * S).sum() == pytest.approx(S.sum(), rel=1e-12)


def test_dead_components_keep_their_gate_and_take_no_part_in_the_energy() -> None:
    dead = module(np.append(S, [1e-15, 0.0]), np.pad(ENERGY, ((0, 0), (0, 2)), constant_values=100.0))
    for energy in ("nuclear", "frobenius", "functional"):
        alpha = constrain(np.append(ALPHA, [1.0, 1.0]), dead, Constraint(energy=energy, floor=0.1))
        alone = constrain(ALPHA, module(), Constraint(energy=energy, floor=0.1))
        np.testing.assert_allclose(alpha, np.append(alone, [1.0, 1.0]), rtol=1e-12)


@pytest.mark.parametrize("energy", ["nuclear", "frobenius", "functional"])
def test_an_edit_to_nothing_stays_nothing_instead_of_dividing_by_zero(energy: str) -> None:
    assert constrain(np.zeros(4), module(), Constraint(energy=energy)).tolist() == [0, 0, 0, 0]


def test_functional_energy_without_rows_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"Functional energy needs output energies .* Measure first"):
        constrain(ALPHA, module(energy=np.zeros((0, 4))), Constraint(energy="functional"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"floor": -1.0}, r"floor is -1.0, expected a finite number of at least 0"),
        ({"max_edit_size": float("nan")}, "max_edit_size is nan, expected a finite number"),
        ({"floor": -1.0, "max_edit_size": -2.0}, r"2 things are wrong:\n.*floor is.*\n.*max_edit_size is"),
    ],
)
def test_a_limit_that_is_no_limit_is_refused(fields: dict[str, float], sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        Constraint(**fields)


def test_an_unknown_energy_is_refused_and_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(PolicyError, match=r"Unknown energy 'l1'\. Choose one of: nuclear, frobenius, functional"):
        Constraint(energy="l1")


def test_the_paper_keeps_the_nuclear_norm_and_controls_keep_nothing() -> None:
    keeps = {name: default_constraint(entry.policy()).energy for name, entry in POLICIES.items()}
    controls = {"identity", "scale", "flat", "newton_schulz", "random"}
    assert keeps == {name: "none" if name in controls else "nuclear" for name in POLICIES}


def test_edit_size_is_the_relative_change_of_the_singular_values() -> None:
    assert edit_size(S, ALPHA) == pytest.approx(np.linalg.norm(ALPHA * S - S) / np.linalg.norm(S))
    assert edit_size(np.zeros(3), np.full(3, 2.0)) == 0


@pytest.mark.parametrize("size", [1e-6, 0.3, 2.0, 50.0])
def test_gates_are_stretched_to_an_edit_size(size: float) -> None:
    alpha = with_edit_size(S, ALPHA, size)
    assert edit_size(S, alpha) == pytest.approx(size, rel=1e-9)
    moved = alpha > 0
    steps = (alpha - 1)[moved & (ALPHA != 1)] / (ALPHA - 1)[moved & (ALPHA != 1)]
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert (alpha >= 0).all()


def test_an_edit_size_out_of_reach_gives_the_largest_edit_of_that_shape() -> None:
    alpha = with_edit_size(S, np.array([0.5, 0.9, 1.0, 1.0]), size=5.0)
    assert alpha.tolist() == [0, 0, 1, 1]


def test_no_edit_cannot_be_stretched_and_size_zero_is_no_edit() -> None:
    assert with_edit_size(S, np.ones(4), 0.3).tolist() == [1, 1, 1, 1]
    assert with_edit_size(S, ALPHA, 0.0).tolist() == [1, 1, 1, 1]
