"""Gates from sensitivities alone: against dense algebra, planted components and counted false discoveries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.refining.steps import HIGHEST, LOWEST, Pull, along, one_step, only_sure, scaled

RANK = 6
PATHS = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj")
WIDTH = RANK * len(PATHS)


def measured(gradients: np.ndarray, *, S: np.ndarray | None = None, ties: np.ndarray | None = None) -> Measurement:
    """A measurement whose per-example derivatives are these columns, module after module."""
    spectrum = np.linspace(3.0, 0.5, RANK) if S is None else S
    labels = np.arange(RANK) if ties is None else ties
    pieces = np.split(gradients, len(PATHS), axis=1)
    modules = {
        path: ModuleMeasurement(S=spectrum, ties=labels, gate_gradient=piece, output_energy=np.ones_like(piece))
        for path, piece in zip(PATHS, pieces, strict=True)
    }
    return Measurement(modules, tuple(f"row {i}" for i in range(len(gradients))), np.ones(len(gradients)))


def columns(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([found[path] for path in PATHS])


def noise(rows: int, seed: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


def pull(task: np.ndarray, keep: np.ndarray | None = None, **changes: object) -> Pull:
    settings: dict[str, object] = dict(task_scale=0.5, keep_scale=2.0, keep_weight=3.0)
    kept = None if keep is None else measured(keep)
    return Pull(measured(task), kept, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("rows", [(5, 4), (60, 40)])
def test_one_step_solves_the_damped_system_of_all_components(rows: tuple[int, int], damping: float) -> None:
    task, keep = noise(rows[0], 1) + 0.3, noise(rows[1], 2) - 0.2
    found = columns(one_step(pull(task, keep), damping=damping))
    ours, theirs = task / 0.5, keep * 3.0 / 2.0
    F = ours.T @ ours / len(ours) + theirs.T @ theirs / len(theirs)
    mu = damping * np.linalg.eigvalsh(F).mean()
    wanted = -np.linalg.solve(F + mu * np.eye(WIDTH), ours.mean(0) + theirs.mean(0))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_sign_of_rows_of_the_training_does_not_count_but_their_size_does() -> None:
    task, keep = noise(30, 3) + 1.0, noise(30, 4) + 0.5
    unsigned = columns(one_step(pull(task, keep, signed=False), damping=0.1))
    np.testing.assert_allclose(unsigned, columns(one_step(pull(-task, keep, signed=False), damping=0.1)))
    ours, theirs = task / 0.5, keep * 3.0 / 2.0
    F = ours.T @ ours / 30 + theirs.T @ theirs / 30
    system = F + 0.1 * np.trace(F) / WIDTH * np.eye(WIDTH)
    np.testing.assert_allclose(unsigned, -np.linalg.solve(system, theirs.mean(0)), rtol=1e-9)
    assert np.abs(unsigned - columns(one_step(pull(task, keep), damping=0.1))).max() > 1e-3
    one, other = only_sure(pull(task, keep, signed=False)), only_sure(pull(10 * task, keep, signed=False))
    np.testing.assert_array_equal(columns(one), columns(other))


def test_rows_of_the_training_alone_move_nothing() -> None:
    silent = pull(noise(30, 5) + 2.0, signed=False)
    for direction in (only_sure(silent), one_step(silent)):
        assert not columns(direction).any()


def test_nothing_measured_moves_nothing() -> None:
    empty = pull(np.zeros((8, WIDTH)), np.zeros((8, WIDTH)))
    for direction in (only_sure(empty), one_step(empty)):
        assert not columns(direction).any()
        assert all((gates == 1).all() for gates in along(direction, empty.task, 0.3).values())


@pytest.mark.parametrize("side", ["task", "keep"])
def test_only_sure_moves_the_planted_components_against_their_pull(side: str) -> None:
    planted, rows = {1: 2.0, 8: -2.0, 15: 2.5}, 80
    parts = {"task": noise(rows, 6), "keep": noise(rows, 7)}
    for column, mean in planted.items():
        parts[side][:, column] += mean * (3 if side == "task" else 1) * 2
    found = columns(only_sure(pull(parts["task"], parts["keep"]), level=0.001))
    assert set(np.flatnonzero(found)) == set(planted)
    assert all(found[column] * mean < 0 for column, mean in planted.items())


def test_so_many_of_the_moved_components_are_false_as_was_said() -> None:
    planted, draws = np.arange(3), 200
    false, missed = [], 0
    for seed in range(draws):
        task = noise(40, 100 + seed)
        task[:, planted] += 2.0
        moved = np.flatnonzero(columns(only_sure(pull(task), level=0.2)))
        missed += len(set(planted) - set(moved))
        false.append(len(set(moved) - set(planted)) / max(1, len(moved)))
    expected = 0.2 * (WIDTH - len(planted)) / WIDTH
    error = np.std(false) / np.sqrt(draws)
    assert missed == 0
    assert abs(np.mean(false) - expected) < 4 * error


def test_where_nothing_is_there_something_moves_as_rarely_as_was_said() -> None:
    moved = [columns(only_sure(pull(noise(40, seed), noise(50, 9000 + seed)))).any() for seed in range(200)]
    assert np.mean(moved) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_its_size_is_the_t_value() -> None:
    from scipy.stats import ttest_1samp

    task = noise(25, 8) + 3.0
    found = columns(only_sure(pull(task)))
    np.testing.assert_allclose(found, -ttest_1samp(task, 0.0).statistic, rtol=1e-9)


def test_dead_components_stay_and_tied_ones_move_together() -> None:
    S, ties = np.array([3.0, 2.0, 2.0, 1.0, 0.0, 0.0]), np.array([0, 1, 1, 2, 3, 3])
    gradients = noise(50, 9) + 2.0
    task, keep = measured(gradients, S=S, ties=ties), measured(noise(40, 10) + 1.0, S=S, ties=ties)
    for direction in (only_sure(Pull(task, keep, 1.0, 1.0)), one_step(Pull(task, keep, 1.0, 1.0))):
        for values in direction.values():
            assert (values[4:] == 0).all()
            assert values[1] == values[2] != 0
        for gates in along(direction, task, 0.2).values():
            assert (gates[4:] == 1).all()
            assert gates[1] == gates[2] != 1


@pytest.mark.parametrize("size", [0.001, 0.1, 0.3, 0.45])
def test_along_gives_the_edit_the_wanted_size_within_bounds(size: float) -> None:
    signs = noise(1, 11)[0]
    direction = dict(zip(PATHS, np.split(signs, len(PATHS)), strict=True))
    task = measured(noise(2, 12))
    gates = along(direction, task, size)
    S = np.tile(np.linspace(3.0, 0.5, RANK), len(PATHS))
    alpha = columns(gates)
    assert np.linalg.norm((alpha - 1) * S) / np.linalg.norm(S) == pytest.approx(size, rel=1e-9)
    assert ((alpha >= LOWEST * (1 - 1e-12)) & (alpha <= HIGHEST * (1 + 1e-12))).all()
    assert (np.sign(alpha - 1) == np.sign(signs)).all()
    inside = (alpha > LOWEST * 1.001) & (alpha < HIGHEST * 0.999)
    ratio = np.log(alpha[inside]) / signs[inside]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_a_size_out_of_reach_gives_the_largest_edit() -> None:
    direction = {path: np.array([1.0, -1.0, 0.5, -0.5, 0.2, 0.0]) for path in PATHS}
    gates = along(direction, measured(noise(2, 13)), 5.0)
    for alpha in gates.values():
        np.testing.assert_allclose(alpha, [HIGHEST, LOWEST, HIGHEST, LOWEST, HIGHEST, 1.0])


def test_its_size_does_not_depend_on_how_long_the_direction_is() -> None:
    direction = {path: noise(1, i, RANK)[0] for i, path in enumerate(PATHS)}
    task = measured(noise(2, 14))
    one, other = (along({p: factor * v for p, v in direction.items()}, task, 0.2) for factor in (1e-6, 1e6))
    np.testing.assert_allclose(columns(one), columns(other), rtol=1e-9)


def test_scaled_multiplies_logarithms_within_bounds() -> None:
    gates = {"one": np.array([0.5, 1.0, 1.5, 0.05, 2.0])}
    np.testing.assert_allclose(np.log(scaled(gates, 0.4)["one"]), 0.4 * np.log(gates["one"]))
    np.testing.assert_array_equal(scaled(gates, 1.0)["one"], gates["one"])
    assert (scaled(gates, 0.0)["one"] == 1).all()
    far = scaled(gates, 10.0)["one"]
    assert far.min() == LOWEST
    assert far.max() == HIGHEST
    assert gates["one"][0] == 0.5


def test_scales_and_weight_make_the_two_pulls_comparable() -> None:
    task, keep = noise(30, 15) + 1.0, noise(30, 16) + 1.0
    one = one_step(pull(task, keep))
    other = one_step(pull(10 * task, keep / 7, task_scale=5.0, keep_scale=2.0 / 7))
    np.testing.assert_allclose(columns(one), columns(other), rtol=1e-9)
    heavier = replace(pull(task, keep), keep_weight=6.0)
    np.testing.assert_allclose(heavier.mean, task.mean(0) / 0.5 + keep.mean(0) * 3.0)
