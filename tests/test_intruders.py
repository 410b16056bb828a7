"""Intruder directions by products with the weight alone, against the whole decomposition that PEFT makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_weights import update, weight
from torch import Tensor

from spectral_surgery import weight_study
from spectral_surgery.intruders import NEAR, NEGLIGIBLE, Nearness, nearness
from spectral_surgery.spectrum import LowRank


def gaussian(out: int, inside: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(out, inside, generator=generator, dtype=torch.float64) / inside**0.5


def dense(W: Tensor, delta: LowRank) -> np.ndarray:
    """|cos| of the first ten output directions of W + delta with the nearest of W's own, by two dense SVDs."""
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    changed = torch.linalg.svd(W + delta.scale * delta.B @ delta.A, full_matrices=False)[0][:, :10]
    return (U[:, NEGLIGIBLE * S[0] <= S].T @ changed).abs().max(0).values.numpy()


def found_in(W: Tensor, delta: LowRank) -> Nearness:
    before = weight_study.known(W)
    return weight_study.study(before, weight_study.changed(before.matrix, delta)).nearness


@pytest.mark.parametrize("strength", [0.4, 3.0])
@pytest.mark.parametrize("shape", [(60, 80), (700, 520), (520, 700)], ids=str)
@pytest.mark.parametrize("made", [weight, gaussian])
def test_the_bounds_hold_and_decide_nearly_every_direction(made, shape: tuple[int, int], strength: float) -> None:
    W, delta = made(*shape), update(*shape, strength)
    exact, found = dense(W, delta), found_in(W, delta)
    assert (found.high >= exact - 1e-3).all()
    assert (found.low <= exact + 1e-3).all()
    assert found.intruders <= (exact < NEAR).sum() <= found.intruders + found.undecided
    assert found.undecided <= 2


def test_a_direction_raised_from_deep_inside_the_weight_is_no_intruder() -> None:
    """Index 200 of 520 is far outside of what is known of W, so only the bounds can tell."""
    W = weight(520, 600)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    raised = LowRank(U[:, 200:201].contiguous(), Vh[200:201].contiguous(), 3.0)
    found = found_in(W, raised)
    assert found.intruders == found.undecided == 0
    assert found.low[0] == pytest.approx(1, abs=1e-3)
    new = found_in(W, update(520, 600, 3.0, rank=1))
    assert (new.intruders, new.undecided) == (1, 0)


def test_directions_of_a_tall_weight_s_null_space_are_intruders() -> None:
    """Half of a random output direction lies in the null space, which no direction of the weight itself spans."""
    W, delta = gaussian(1200, 520), update(1200, 520, 4.0)
    found = found_in(W, delta)
    assert (found.intruders, found.undecided) == (int((dense(W, delta) < NEAR).sum()), 0)


def test_the_bound_is_attained_by_a_measure_of_few_atoms() -> None:
    """A sum of three directions of W: after three products the measure is known whole."""
    W = weight(40, 50)
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    share = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    u = U[:, [3, 9, 20]] @ share.sqrt()
    found = nearness(lambda X: W @ (W.T @ X), u[:, None], np.zeros(1), float(S[0]))
    assert found.low[0] == pytest.approx(0.7**0.5, abs=1e-6)
    assert found.high[0] == pytest.approx(0.7**0.5, abs=1e-3)


def test_a_weight_of_zeros_has_no_directions_of_its_own() -> None:
    assert found_in(torch.zeros(520, 600, dtype=torch.float64), update(520, 600, 1.0)).low.max() == 0
