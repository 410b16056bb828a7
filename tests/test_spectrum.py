"""The thin SVD of B A without forming it, the projector edit, and which components can be told apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_surgery.spectrum import (
    LowRank,
    edited_factor,
    effective_rank,
    exact,
    rounding_noise,
    singular_values,
    spacing,
    stable_rank,
    thin_svd,
    tied,
    update_norm,
)

OUT, IN = 24, 20
SIZES = [(r, OUT, IN) for r in (1, 2, 3, 16)] + [(9, 5, 20), (9, 24, 5)]
LOW = [torch.bfloat16, torch.float16, torch.float32]


def factors(r: int, out: int = OUT, into: int = IN, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    """Random factors of unequal components."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(out, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, into, generator=generator, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype), scale=2.0)


def with_spectrum(S: Tensor, dtype: torch.dtype, seed: int = 0, condition: float = 1.0) -> LowRank:
    """Factors of an update with these singular values, in a random gauge ``B R, R^-1 A`` of this condition number."""
    generator = torch.Generator().manual_seed(seed)
    r = len(S)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V, P, Q = (torch.linalg.qr(random(n, r))[0] for n in (OUT, IN, r, r))
    R = P * torch.logspace(0, math.log10(condition), r, dtype=torch.float64) @ Q
    root = S.double().sqrt()
    return LowRank((U * root @ R).to(dtype), (torch.linalg.inv(R) @ (root[:, None] * V.T)).to(dtype), scale=1.0)


def rebuilt(update: LowRank, gates: np.ndarray | float = 1.0) -> Tensor:
    spectrum = thin_svd(update)
    return spectrum.U * (torch.as_tensor(gates) * spectrum.S) @ spectrum.Vh


def random_gates(k: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 2, k)


@pytest.mark.parametrize(("r", "out", "into"), SIZES)
def test_the_thin_svd_rebuilds_the_update(r: int, out: int, into: int) -> None:
    update = factors(r, out, into)
    spectrum = thin_svd(update)
    assert spectrum.S.shape == (min(r, out, into),)
    assert torch.equal(spectrum.S, spectrum.S.sort(descending=True).values)
    torch.testing.assert_close(rebuilt(update), update.B @ update.A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("r", "out", "into"), SIZES)
def test_directions_are_orthonormal_and_singular_values_are_those_of_the_dense_update(
    r: int, out: int, into: int
) -> None:
    update = factors(r, out, into)
    spectrum = thin_svd(update)
    one = torch.eye(len(spectrum.S), dtype=torch.float64)
    torch.testing.assert_close(spectrum.U.T @ spectrum.U, one, rtol=0, atol=1e-13)
    torch.testing.assert_close(spectrum.Vh @ spectrum.Vh.T, one, rtol=0, atol=1e-13)
    dense = torch.linalg.svdvals(update.B @ update.A)[: len(one)]
    torch.testing.assert_close(spectrum.S, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [1, 2, 3, 16])
def test_an_untrained_adapter_has_a_zero_spectrum_in_orthonormal_directions(r: int) -> None:
    update = factors(r)
    spectrum = thin_svd(LowRank(torch.zeros_like(update.B), update.A, scale=1.0))
    assert torch.equal(spectrum.S, torch.zeros(r, dtype=torch.float64))
    torch.testing.assert_close(spectrum.U.T @ spectrum.U, torch.eye(r, dtype=torch.float64))
    assert effective_rank(spectrum.S.numpy()) == stable_rank(spectrum.S.numpy()) == 0


def test_the_spectrum_does_not_depend_on_how_the_update_is_factorised() -> None:
    update = factors(3)
    R = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    other = LowRank(update.B @ R, torch.linalg.inv(R) @ update.A, scale=1.0)
    torch.testing.assert_close(thin_svd(other).S, thin_svd(update).S, rtol=1e-12, atol=0)
    gates = random_gates(3)
    torch.testing.assert_close(rebuilt(other, gates), rebuilt(update, gates), rtol=1e-11, atol=1e-11)


def test_small_singular_values_are_right_where_a_dense_svd_in_float32_loses_them() -> None:
    S = torch.logspace(0, -6, 16, dtype=torch.float64)
    update = with_spectrum(S, torch.float64)
    low = LowRank(update.B.float(), update.A.float(), scale=1.0)
    reference = torch.linalg.svdvals(exact(low.B) @ exact(low.A))[:16]

    def error(found: Tensor) -> float:
        return float(((found - reference) / reference).abs().max())

    assert error(torch.linalg.svdvals(low.B @ low.A)[:16].double()) > 1e-4
    assert error(thin_svd(low).S) < 1e-8


@pytest.mark.parametrize(("r", "out", "into"), SIZES)
def test_editing_either_factor_gives_the_gated_spectrum(r: int, out: int, into: int) -> None:
    update = factors(r, out, into)
    spectrum = thin_svd(update)
    gates = random_gates(len(spectrum.S))
    wanted = rebuilt(update, gates)
    left, S, _ = edited_factor(update, gates)
    right, _, _ = edited_factor(replace(update, side="A"), gates)
    for values in (S, singular_values(update)):
        torch.testing.assert_close(values, spectrum.S, rtol=1e-12, atol=1e-12)
    left, right = left @ update.A, update.B @ right
    torch.testing.assert_close(left, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(right, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", LOW)
def test_gates_of_one_give_back_the_very_same_tensor(dtype: torch.dtype) -> None:
    update = factors(3, dtype=dtype)
    assert edited_factor(update, np.ones(3))[0] is update.B
    assert edited_factor(replace(update, side="A"), np.ones(3))[0] is update.A


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("condition", [1.0, 1e5])
@pytest.mark.parametrize("dtype", LOW)
def test_what_rounding_does_is_the_dense_difference(
    side: Literal["A", "B"], condition: float, dtype: torch.dtype
) -> None:
    low = with_spectrum(torch.logspace(0, -2, 4, dtype=torch.float64), dtype, condition=condition)
    update, gates = replace(low, side=side), random_gates(4)
    factor, _, lost = edited_factor(update, gates)
    wide = replace(update, B=exact(update.B), A=exact(update.A))
    wanted, _, nothing = edited_factor(wide, gates)
    stored, dense = update.with_stored(factor), wide.with_stored(wanted)
    assert factor.dtype == dtype
    assert nothing == 0
    difference = exact(stored.B) @ exact(stored.A) - dense.B @ dense.A
    assert lost == pytest.approx(float(difference.norm()), rel=1e-5)
    torch.testing.assert_close(dense.B @ dense.A, rebuilt(wide, gates), rtol=1e-8, atol=1e-8)


def test_components_whose_gate_is_one_are_not_touched_by_an_edit_of_another() -> None:
    update = factors(3)
    spectrum = thin_svd(update)
    B, _, _ = edited_factor(update, np.array([1.0, 0.3, 1.0]))
    before, after = spectrum.U.T @ update.B, spectrum.U.T @ B
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(after[1], 0.3 * before[1])


@pytest.mark.parametrize("r", [1, 16, 30])
def test_the_norm_of_an_update_is_the_dense_frobenius_norm(r: int) -> None:
    update = factors(r)
    assert update_norm(update.B, update.A) == pytest.approx(float((update.B @ update.A).norm()), rel=1e-12)
    assert update_norm(torch.zeros_like(update.B), update.A) == 0


def test_effective_and_stable_rank_equal_values_by_hand() -> None:
    S = np.array([4.0, 2.0, 1.0, 1.0])
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert effective_rank(S) == pytest.approx(math.exp(entropy))
    assert stable_rank(S) == pytest.approx((16 + 4 + 1 + 1) / 16)
    assert effective_rank(np.full(5, 0.3)) == pytest.approx(5)
    assert stable_rank(np.full(5, 0.3)) == pytest.approx(5)
    assert effective_rank(np.array([2.0, 0.0])) == stable_rank(np.array([2.0, 0.0])) == 1


@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("dtype", LOW)
def test_a_flattened_update_is_one_group_in_every_stored_dtype_and_gauge(dtype: torch.dtype, condition: float) -> None:
    for seed in range(10):
        update = with_spectrum(torch.full((16,), 0.7), dtype, seed, condition)
        assert thin_svd(update).ties.tolist() == [0] * 16


def test_a_flattened_update_stays_one_group_when_its_low_precision_factors_are_widened() -> None:
    for seed in range(10):
        low = with_spectrum(torch.full((16,), 0.7), torch.bfloat16, seed)
        assert thin_svd(LowRank(low.B.float(), low.A.float(), scale=1.0)).ties.tolist() == [0] * 16
        exact_B = with_spectrum(torch.full((16,), 0.7), torch.float32, seed).B
        assert thin_svd(LowRank(exact_B, low.A.float(), scale=1.0)).ties.tolist() == [0] * 16


@pytest.mark.parametrize("dtype", LOW)
def test_the_spacing_is_that_of_the_coarsest_format_that_holds_the_values(dtype: torch.dtype) -> None:
    stored = factors(3, dtype=dtype).B
    assert spacing(stored) == spacing(stored.double()) == torch.finfo(dtype).eps
    assert spacing(factors(3).B) == torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", LOW)
def test_a_geometric_spectrum_is_not_grouped(dtype: torch.dtype) -> None:
    for seed in range(10):
        update = with_spectrum(0.8 ** torch.arange(16), dtype, seed)
        assert thin_svd(update).ties.tolist() == list(range(16))


def test_two_equal_values_among_others_are_tied_and_the_others_are_not() -> None:
    S = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert thin_svd(with_spectrum(S, torch.bfloat16)).ties.tolist() == [0, 1, 1, 2]


def test_values_are_tied_up_to_their_rounding_and_no_further() -> None:
    S = np.array([1.0, 1.0 - 3e-7, 1.0 - 1e-4])
    update = with_spectrum(torch.tensor(S), torch.float32)
    assert thin_svd(update).ties.tolist() == [0, 0, 1]


def test_a_value_of_zero_never_joins_a_positive_one() -> None:
    S = np.array([1.0, 1e-3, 0.0, 0.0])
    assert tied(S, np.full(4, 10.0)).tolist() == [0, 0, 1, 1]


def test_a_group_grows_with_the_width_that_noise_spreads_it_to() -> None:
    width = 2 * math.sqrt(2 * 2)
    assert tied(np.array([10.0, 10 - 0.99 * width]), np.ones(2)).tolist() == [0, 0]
    assert tied(np.array([10.0, 10 - 1.01 * width]), np.ones(2)).tolist() == [0, 1]


def test_the_noise_of_storage_has_the_size_that_rounding_really_causes() -> None:
    """Rounding many random gauges of one update moves its singular values as first-order theory says."""
    S = 0.8 ** torch.arange(6)
    moves, predicted = [], []
    for seed in range(200):
        update = with_spectrum(S, torch.float64, seed, condition=3)
        spectrum = thin_svd(update)
        low = LowRank(update.B.bfloat16(), update.A.bfloat16(), scale=1.0)
        moves.append((thin_svd(low).S - spectrum.S).numpy())
        spacings = (torch.finfo(torch.bfloat16).eps,) * 2
        predicted.append(rounding_noise(update.B, update.A, spectrum.U, spectrum.Vh, spacings))
    ratio = np.sqrt(np.mean(np.square(moves), 0) / np.mean(np.square(predicted), 0))
    assert (ratio > 0.5).all()
    assert (ratio < 1.1).all()
