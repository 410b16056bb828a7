"""Subspaces by another route (SciPy, brute force), their chance levels, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import planted
import pytest
import torch
from scipy.linalg import subspace_angles

from spectral_surgery import alignment, geometry
from spectral_surgery.anatomy import Leading, closest_pair, leading, participation_ratio, update_cosine
from spectral_surgery.spectrum import LowRank, thin_svd


def side(update: LowRank, k: int) -> Leading:
    return leading(thin_svd(update), k)


def basis(d: int, k: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, k)))[0]


@pytest.mark.parametrize(("d", "k", "m"), [(5, 1, 1), (8, 2, 3), (40, 4, 4), (7, 6, 6), (64, 16, 3)])
def test_principal_angles_are_those_of_scipy(d: int, k: int, m: int) -> None:
    X, Y = basis(d, k, 1), basis(d, m, 2)
    np.testing.assert_allclose(geometry.principal_angles(X, Y), np.sort(subspace_angles(X, Y)), atol=1e-12)


def test_principal_angles_near_zero_keep_their_digits() -> None:
    X, away = np.eye(6)[:, :2], np.eye(6)[:, 2:4]
    wanted = np.array([1e-10, 1e-5])
    Y = X * np.cos(wanted) + away * np.sin(wanted)
    np.testing.assert_allclose(geometry.principal_angles(X, Y), wanted, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(k: int) -> None:
    X, Y = basis(40, k, 1), basis(40, k, 2)
    assert geometry.overlap(X, Y) == pytest.approx((np.cos(subspace_angles(X, Y)) ** 2).mean())
    assert geometry.overlap(X, X) == pytest.approx(1)


def test_blocks_of_all_pairs_are_the_products_one_by_one() -> None:
    X = np.stack([basis(5000, 3, seed) for seed in range(3)])
    Y = np.stack([basis(5000, 3, seed) for seed in range(5, 7)])
    found = geometry.blocks(X, Y)
    assert found.shape == (3, 2, 3, 3)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(found[i, j], X[i].T @ Y[j], atol=1e-12)


@pytest.mark.parametrize(("k", "d"), [(1, 3), (2, 3), (3, 9), (4, 30)])
def test_sampled_chance_is_that_of_whole_random_subspaces(k: int, d: int) -> None:
    generator = np.random.default_rng(0)
    drawn = np.linalg.qr(generator.standard_normal((8000, d, k)))[0]
    brute = geometry.overlaps(drawn[:, :k])
    sampled = geometry.overlaps(geometry.random_blocks(k, d))
    spread = brute.std() * math.sqrt(1 / 8000 + 1 / 4000)
    assert abs(sampled.mean() - brute.mean()) < 5 * spread
    assert geometry.overlap_baseline(k, d).mean == pytest.approx(brute.mean(), abs=5 * brute.std() / math.sqrt(8000))
    assert sampled.std() == pytest.approx(brute.std(), rel=0.1)


def test_chance_of_overlap_and_of_cosine_are_different_numbers() -> None:
    assert geometry.overlap_baseline(4, 4096).mean == pytest.approx(0.000977, rel=1e-3)
    assert geometry.cosine_baseline(4096).mean == pytest.approx(math.sqrt(2 / (math.pi * 4096)), rel=1e-3)


def test_an_interval_of_chance_narrows_with_the_root_of_the_pairs() -> None:
    one, many = geometry.overlap_baseline(4, 256), geometry.overlap_baseline(4, 256, 100)
    assert (one.high - one.low) / (many.high - many.low) == pytest.approx(10, rel=0.25)


@pytest.mark.parametrize(("k", "d"), [(1, 32), (4, 32), (4, 128), (1, 4096), (4, 4096)])
@pytest.mark.parametrize("comparisons", [1, 50])
def test_the_chance_limit_is_passed_no_more_often_than_stated(k: int, d: int, comparisons: int) -> None:
    limit = geometry.chance_limit(k, d, comparisons=comparisons)
    draws = geometry.overlaps(geometry.random_blocks(k, d, 100_000, 3))
    assert (draws > limit).mean() * comparisons < 0.014
    assert limit < 20 * k / d + 20 / d


def test_singular_directions_do_not_depend_on_gauge_scale_or_sign() -> None:
    (B, A), R = planted.factors()["model.layers.0.self_attn.o_proj"], torch.randn(6, 6).double() + 3 * torch.eye(6)
    first = side(LowRank(B, A, 1.0), 3)
    second = side(LowRank(B.double() @ R, torch.linalg.solve(R, A.double()), -0.3), 3)
    for one, other in ((first.U, second.U), (first.V, second.V)):
        np.testing.assert_allclose(np.abs(np.diag(one.T @ other)), 1, atol=1e-5)
        assert geometry.overlap(one, other) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_geometry_survives_the_storage_dtype(dtype: torch.dtype, tolerance: float) -> None:
    def matrices(dtype: torch.dtype) -> list[alignment.Matrix]:
        updates = planted.adapter(dtype=dtype).updates
        return alignment.matrices({path: side(update, 4) for path, update in updates.items()}, 4)

    for exact, rounded in zip(matrices(torch.float32), matrices(dtype), strict=True):
        np.testing.assert_allclose(rounded.overlap, exact.overlap, atol=tolerance)


def test_matrices_and_curves_are_the_pairs_one_by_one() -> None:
    updates = planted.adapter().updates
    found = {path: side(update, 3) for path, update in updates.items()}
    dense = {path: np.linalg.svd((u.B @ u.A).double().numpy()) for path, u in updates.items()}
    down = [dense[planted.path(layer, "down_proj")][0] for layer in range(4)]
    out = [dense[planted.path(layer, "o_proj")][0] for layer in range(4)]
    matrix = next(m for m in alignment.matrices(found, 3) if (m.group, m.side) == ("down_proj", "output"))
    assert (matrix.space, matrix.shared, matrix.dimension, matrix.layers) == (
        "residual stream",
        True,
        96,
        (0, 1, 2, 3),
    )
    angles = np.degrees(subspace_angles(down[1][:, :3], down[3][:, :3]))
    assert matrix.overlap[1, 3] == pytest.approx((np.cos(np.radians(angles)) ** 2).mean(), abs=1e-6)
    assert matrix.cosine[1, 3] == pytest.approx(abs(down[1][:, 0] @ down[3][:, 0]), abs=1e-6)
    np.testing.assert_allclose(matrix.angles[1, 3], np.sort(angles), atol=1e-3)
    curve = next(c for c in alignment.synergy(found, 3) if c.name == "o_proj output with down_proj output")
    assert curve.cosine[2] == pytest.approx(abs(out[2][:, 0] @ down[2][:, 0]), abs=1e-6)
    assert len(curve.overlap) == 4


def test_only_sides_that_share_a_space_are_paired() -> None:
    found = {p: side(u, 3) for p, u in planted.adapter().updates.items()}
    pairs = {frozenset((c.first, c.second)) for c in alignment.synergy(found, 3)}
    residual = {"q_proj input", "k_proj input", "up_proj input", "o_proj output", "down_proj output"}
    inside = {frozenset(("up_proj output", "down_proj input"))}
    assert pairs == {frozenset((a, b)) for a in residual for b in residual if a != b} | inside


def test_a_direction_that_storage_cannot_tell_apart_takes_no_part() -> None:
    B, A = basis(40, 4, 0), basis(30, 4, 1).T
    flat = LowRank(torch.tensor(B), torch.tensor(A), 1.0)
    graded = LowRank(torch.tensor(B * [4, 3, 2, 1]), torch.tensor(A), 1.0)
    found = {"l.0.o_proj": side(graded, 2), "l.1.o_proj": side(flat, 2)}
    assert not found["l.1.o_proj"].separate
    matrix = alignment.matrices(found, 2)[0]
    assert np.isnan(matrix.overlap[0, 1])
    assert matrix.overlap[0, 0] == pytest.approx(1, abs=1e-5)


def test_kinds_that_share_a_last_name_are_told_apart() -> None:
    paths = [f"transformer.h.{i}.{block}.c_proj" for i in range(2) for block in ("attn", "mlp")]
    assert [group.name for group in alignment.groups(paths)] == ["attn.c_proj", "mlp.c_proj"]
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(2)]
    assert [group.layers for group in alignment.groups(experts)] == [(0, 1), (0, 1)]
    assert [group.layers for group in alignment.groups(["classifier", "score"])] == [(-1,), (-1,)]


def test_modules_of_too_few_components_or_another_shape_are_left_out() -> None:
    def random(d: int, k: int) -> Leading:
        return Leading(basis(d, k, d).astype(np.float32), basis(d, k, 1).astype(np.float32), True, True)

    found = {
        "l.0.q_proj": random(9, 3),
        "l.1.q_proj": random(9, 3),
        "l.2.q_proj": random(9, 1),
        "l.3.q_proj": random(7, 3),
    }
    assert [matrix.layers for matrix in alignment.matrices(found, 3)] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("r", [1, 2, 3, 16])
def test_participation_ratio_counts_equal_components(r: int) -> None:
    assert participation_ratio(np.full(r, 0.3)) == pytest.approx(r)
    assert participation_ratio(np.array([5.0] + [0.0] * (r - 1))) == pytest.approx(1)
    assert participation_ratio(np.zeros(r)) == 0


def test_cosines_of_updates_and_of_pieces_are_those_of_the_dense_matrices() -> None:
    first, second = planted.adapter(seed=1).updates, planted.adapter(seed=2).updates
    path = planted.path(0, "k_proj")
    one, other = first[path], second[path]
    x, y = (one.B @ one.A).double().flatten(), (other.B @ other.A).double().flatten()
    assert update_cosine(one, other) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-9)
    assert update_cosine(one, LowRank(-one.B, one.A, one.scale)) == pytest.approx(-1)
    B, A = one.B.double(), one.A.double()
    pieces = torch.stack([torch.outer(B[:, i], A[i]).flatten() for i in range(6)])
    pieces /= pieces.norm(dim=1, keepdim=True)
    assert closest_pair(B, A) == pytest.approx(float((pieces @ pieces.T).fill_diagonal_(0).abs().max()))


def test_the_chance_of_the_best_partner_is_that_of_random_directions() -> None:
    generator = np.random.default_rng(3)
    directions = generator.standard_normal((20000, 30))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    nearest = np.abs(directions[:, :5]).max(1)
    found = geometry.best_cosine_baseline(30, 5)
    assert found.mean == pytest.approx(nearest.mean(), rel=0.02)
    assert (found.low, found.high) == pytest.approx(np.quantile(nearest, [0.005, 0.995]), rel=0.1)
    assert geometry.best_cosine_baseline(5, 5).low > 1 / np.sqrt(5) - 1e-9
