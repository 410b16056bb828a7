"""Leading directions of base weights against dense decompositions; intruders planted; weight files of every shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import subspace_angles

from spectral_surgery import weight_study
from spectral_surgery.cli import main
from spectral_surgery.errors import BaseModelError
from spectral_surgery.inspecting import inspect
from spectral_surgery.spectrum import LowRank
from spectral_surgery.weight_files import open_folder


def weight(out: int, inside: int, seed: int = 0) -> torch.Tensor:
    """A matrix with a power-law spectrum, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    n = min(out, inside)
    U = torch.linalg.qr(torch.randn(out, n, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(inside, n, generator=generator, dtype=torch.float64))[0]
    return (U * torch.arange(1, n + 1) ** -0.5) @ V.T


def update(out: int, inside: int, strength: float, rank: int = 4) -> LowRank:
    generator = torch.Generator().manual_seed(9)
    B = torch.linalg.qr(torch.randn(out, rank, generator=generator, dtype=torch.float64))[0]
    A = torch.linalg.qr(torch.randn(inside, rank, generator=generator, dtype=torch.float64))[0].T
    return LowRank(B.contiguous(), A.contiguous(), strength)


@pytest.mark.parametrize("shape", [(600, 700), (900, 560), (40, 30), (3, 5)])
def test_leading_triples_are_those_of_a_dense_decomposition(shape: tuple[int, int]) -> None:
    W, delta = weight(*shape), update(*shape, 0.4, min(2, *shape))
    found = weight_study.leading_triples(weight_study.changed(weight_study.unchanged(W), delta), 3)
    U, S, Vh = torch.linalg.svd(W + 0.4 * delta.B @ delta.A, full_matrices=False)
    np.testing.assert_allclose(found.S, S[:3], rtol=1e-5)
    np.testing.assert_allclose((found.U.T @ U[:, :3]).diagonal().abs(), 1, atol=1e-3)
    np.testing.assert_allclose((found.Vh @ Vh[:3].T).diagonal().abs(), 1, atol=1e-3)
    assert found.residual < weight_study.TOLERANCE


def test_the_residual_is_that_of_the_returned_triples() -> None:
    matrix = weight_study.unchanged(weight(600, 700))
    found = weight_study.leading_triples(matrix, 10)
    errors = torch.stack(
        [
            (matrix.W @ found.Vh.T - found.U * found.S).norm(dim=0),
            (matrix.W.T @ found.U - found.Vh.T * found.S).norm(dim=0),
        ]
    )
    assert float(errors.max() / found.S[0]) == pytest.approx(found.residual, rel=1e-6)


def test_a_weight_studied_against_itself_has_not_moved() -> None:
    same = weight_study.known(weight(60, 80), 8)
    found = weight_study.study(same, same.matrix, 8)
    for values in (found.ratio, found.output_by_index, found.input_by_index, found.output_best, found.input_best):
        np.testing.assert_allclose(values, 1, atol=1e-6)
    np.testing.assert_allclose(found.output_angles, 0, atol=1e-3)
    assert found.nearness.intruders == 0


def test_the_study_is_that_of_two_dense_decompositions() -> None:
    before, after = weight(60, 80), weight(60, 80) + 0.05 * weight(60, 80, 3)
    found = weight_study.study(weight_study.known(before, 5), weight_study.unchanged(after), 5)
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    U2, S2, Vh2 = torch.linalg.svd(after, full_matrices=False)
    np.testing.assert_allclose(found.ratio, (S2 / S)[:5], rtol=1e-9)
    np.testing.assert_allclose(found.output_by_index, (U.T @ U2).diagonal()[:5].abs(), atol=1e-9)
    np.testing.assert_allclose(found.input_best, (Vh[:10] @ Vh2[:5].T).abs().max(0).values, atol=1e-9)
    angles = np.degrees(np.sort(subspace_angles(Vh[:5].T.numpy(), Vh2[:5].T.numpy())))
    np.testing.assert_allclose(found.input_angles, angles, atol=1e-5)


def test_triples_of_a_changed_weight_that_start_from_the_old_ones_are_those_of_a_dense_decomposition() -> None:
    W, delta = weight(600, 700), update(600, 700, 0.4)
    found = weight_study.study(weight_study.known(W, 6), weight_study.changed(weight_study.unchanged(W), delta), 6)
    S, S_new = torch.linalg.svdvals(W), torch.linalg.svdvals(W + 0.4 * delta.B @ delta.A)
    np.testing.assert_allclose(found.before, S[:6], rtol=1e-5)
    np.testing.assert_allclose(found.after, S_new[:6], rtol=1e-5)


def base(folder: Path, shards: int = 1, turned: str = "", prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights for every module of the planted adapter, in one file or several."""
    folder.mkdir()
    made = {
        f"{prefix}{path}.weight": weight(*planted.SIZES[path.rpartition(".")[2]], seed=i).float()
        for i, path in enumerate(planted.factors())
    }
    stored = {n: (w.T if turned and turned in n else w).contiguous().bfloat16() for n, w in made.items()}
    names = list(stored)
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
    else:
        where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            save_file({name: stored[name] for name in names if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return stored


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"prefix": "language_model."}, {"turned": "up_proj"}])
def test_every_weight_is_found_in_files_of_any_layout(tmp_path: Path, options: dict[str, object]) -> None:
    stored = base(tmp_path / "base", **options)  # type: ignore[arg-type]
    opened = open_folder(tmp_path / "base")
    for path, (B, A) in planted.factors().items():
        found = opened.weight(path, (B.shape[0], A.shape[1]))
        expected = stored[f"{options.get('prefix', '')}{path}.weight"]
        assert torch.equal(found, expected if expected.shape == found.shape else expected.T)


def test_an_update_is_held_against_its_own_weight(tmp_path: Path) -> None:
    stored = base(tmp_path / "base", shards=2)
    (view,) = inspect([planted.readable()], base=open_folder(tmp_path / "base"))
    path = planted.path(3, "down_proj")
    update, W = planted.adapter().updates[path], stored[f"{path}.weight"].float()
    delta = 2 * update.B @ update.A
    assert view.base[path].relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
    U, top = torch.linalg.svd(delta)[0][:, :4], torch.linalg.svd(W)[0][:, :20]
    assert view.base[path].top_overlap_output == pytest.approx(float(((top.T @ U) ** 2).sum() / 4), abs=1e-4)
    assert view.base[path].top_by_chance == (20 / 96, 20 / 160)
    U, changed = torch.linalg.svd(W)[0], torch.linalg.svd(W + delta)[0][:, :10]
    assert view.base[path].intruders == int(((U.T @ changed).abs().max(0).values < 0.5).sum()) > 0
    assert view.base[path].undecided == 0


def test_two_adapters_on_one_base_are_held_against_the_same_weights(tmp_path: Path) -> None:
    base(tmp_path / "base")
    opened, seen = open_folder(tmp_path / "base"), []
    pair = inspect(
        [planted.readable(), planted.readable(seed=3)], base=opened, progress=lambda *step: seen.append(step)
    )
    alone = [inspect([one], base=opened)[0] for one in (planted.readable(), planted.readable(seed=3))]
    assert seen[-1] == (20, 20)
    for both, one in zip(pair, alone, strict=True):
        assert {p: v.relative_norm for p, v in both.base.items()} == {p: v.relative_norm for p, v in one.base.items()}


def test_a_damaged_or_wrong_base_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"holds neither model\.safetensors nor"):
        open_folder(tmp_path)
    base(tmp_path / "base", shards=3)
    opened = open_folder(tmp_path / "base")
    with pytest.raises(BaseModelError, match=r"has no weight for lm_head, expected one"):
        opened.weight("lm_head", (3, 3))
    with pytest.raises(BaseModelError, match=r"has shape \(96, 96\), and the update"):
        opened.weight(planted.path(0, "q_proj"), (96, 95))
    (tmp_path / "base" / "model-1.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"lacks model-1\.safetensors"):
        open_folder(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BaseModelError, match="cannot be read"):
        open_folder(tmp_path / "base")


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    save_file({"l.0.q_proj.weight": torch.zeros(8, 1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match="is quantised"):
        open_folder(tmp_path).weight("l.0.q_proj", (4, 4))


def test_the_command_names_large_updates_and_intruders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base(tmp_path / "base")
    planted.saved(tmp_path / "adapter", planted.factors())
    assert main(["inspect", str(tmp_path / "adapter"), "--base-weights", str(tmp_path / "base"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in found["findings"]] == ["large-update", "intruder"]
    assert len(found["modules"][0]["base"]["study"]["ratio"]) == 10
    assert main(["inspect", str(tmp_path / "adapter"), "--base-weights", str(tmp_path / "base")]) == 0
    assert "intruders" in capsys.readouterr().out
