"""Looking into adapters: numbers by another route, broken files, JSON, the terminal view and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest
import torch

from spectral_surgery import anatomy
from spectral_surgery.cli import main
from spectral_surgery.errors import AdapterError, MeasurementError
from spectral_surgery.inspecting import inspect, read, to_json
from spectral_surgery.measurement import Measurement
from spectral_surgery.selection import Selection
from spectral_surgery.sensitivity_file import save_measurement
from spectral_surgery.spectrum import LowRank, Spectrum, thin_svd
from spectral_surgery.terminal import render, sparkline


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return planted.saved(tmp_path / "adapter", planted.factors())


def test_a_module_s_numbers_are_those_of_its_dense_update() -> None:
    (view,) = inspect([planted.readable()])
    update = planted.adapter().updates[planted.path(2, "k_proj")]
    S = torch.linalg.svdvals((update.B @ update.A).double()).numpy()[:6]
    found = view.modules[planted.path(2, "k_proj")]
    np.testing.assert_allclose(found.S, S, rtol=1e-5)
    share = S / S.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert found.participation_ratio == pytest.approx((S**2).sum() ** 2 / (S**4).sum(), rel=1e-5)
    assert found.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-5)
    assert (found.nuclear, found.spectral) == (pytest.approx(S.sum(), rel=1e-5), pytest.approx(S[0], rel=1e-5))
    assert found.delta_norm == pytest.approx(2 * np.linalg.norm(S), rel=1e-5)
    np.testing.assert_allclose(found.energy_kept, np.cumsum(S**2) / (S**2).sum(), rtol=1e-5)


def test_kinds_and_layers_share_the_whole_energy_between_them() -> None:
    (view,) = inspect([planted.readable()])
    assert sum(view.aggregate(group.paths).share for group in view.groups) == pytest.approx(1)
    assert sum(one.share for one in view.layers.values()) == pytest.approx(1)
    assert list(view.layers) == [0, 1, 2, 3]
    assert math.hypot(*(one.delta_norm for one in view.layers.values())) == pytest.approx(view.total.delta_norm)


@pytest.mark.parametrize("layers", [3, 6])
def test_the_work_of_spectra_is_one_decomposition_a_module(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its cost grows linearly in layers; nothing of one module is looked at for another."""
    seen: list[tuple[int, int]] = []

    def counted(update: LowRank) -> Spectrum:
        seen.append((update.B.shape[0], update.A.shape[1]))
        return thin_svd(update)

    monkeypatch.setattr(anatomy, "thin_svd", counted)
    inspect([planted.readable(layers=layers)], geometry=False)
    assert sorted(seen) == sorted(list(planted.SIZES.values()) * layers)


def test_torch_has_as_many_threads_afterwards_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inspect([planted.readable()])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_modules_that_are_not_finite_are_left_out_and_named(tmp_path: Path) -> None:
    found = planted.factors()
    found[planted.path(1, "o_proj")][0][3, 2] = math.inf
    folder = planted.saved(tmp_path / "broken", found)
    (view,) = inspect([read(str(folder))])
    assert view.nonfinite == (f"base_model.model.{planted.path(1, 'o_proj')}.lora_B.weight",)
    assert len(view.modules) == 19
    assert to_json([view])[0]["findings"][0]["code"] == "non-finite"


def test_an_adapter_with_nothing_finite_left_is_refused_by_name(tmp_path: Path) -> None:
    found = {path: (B * math.nan, A) for path, (B, A) in planted.factors().items()}
    with pytest.raises(AdapterError, match="not finite"):
        read(str(planted.saved(tmp_path / "broken", found)))


def test_an_inconsistent_adapter_is_refused_as_ever(tmp_path: Path) -> None:
    found = planted.factors()
    found[planted.path(0, "o_proj")] = (torch.ones(96, 5), torch.ones(6, 96))
    with pytest.raises(AdapterError, match="6 rows but lora_B has 5 columns"):
        read(str(planted.saved(tmp_path / "broken", found)))


def test_a_measurement_of_another_adapter_is_refused() -> None:
    measured = Measurement({}, about={"adapter_sha256": "0" * 64})
    with pytest.raises(MeasurementError, match=r"hash 000000000000, and this one has"):
        inspect([planted.readable()], sensitivities=[measured])


def test_json_has_everything_and_no_nan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "adapter", "adapter", "--json") == 0
    first, second = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (first["adapter"], second["adapter"]) == ("adapter", "adapter (2)")
    assert len(first["modules"]) == 20
    assert set(first["kinds"]) == set(planted.SIZES)
    matrix = first["layers_against_layers"][0]
    assert np.shape(matrix["overlap"]) == (4, 4)
    assert np.shape(matrix["angles"]) == (4, 4, 4)
    assert matrix["overlap_by_chance"]["mean"] == pytest.approx(4 / matrix["dimension"])
    assert first["against"]["adapter (2)"]["cosine"][planted.path(0, "o_proj")] == pytest.approx(1)
    assert [finding["code"] for finding in first["findings"]] == ["same-update"]


def test_one_screen_holds_an_adapter_of_many_layers() -> None:
    text = render(inspect([planted.readable(layers=40)]))
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines()[2:12])) <= 110
    assert render(inspect([planted.readable(layers=40)]), modules=True).count("q_proj") >= 40


def test_a_selection_limits_what_is_looked_at() -> None:
    (view,) = inspect([planted.readable()], selection=Selection(("o_proj",), "1-2"))
    assert list(view.modules) == [planted.path(layer, "o_proj") for layer in (1, 2)]


@pytest.mark.parametrize(
    ("values", "bars"), [([1.0, 4.0, 8.0], "▁▄█"), ([0.0, 0.0], "▁▁"), ([math.nan, 2.0], " █"), ([], "")]
)
def test_sparklines_rise_from_zero(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


def test_a_long_series_is_averaged_into_one_line() -> None:
    assert sparkline([1.0, 3.0] * 32, top=4.0) == "▄" * 32


def test_fail_on_gives_an_exit_status_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planted.factors()
    found[planted.path(0, "o_proj")] = tuple(0 * factor for factor in found[planted.path(0, "o_proj")])
    planted.saved(folder.parent / "dead", found)
    assert run("inspect", "dead") == 0
    assert run("inspect", "dead", "--fail-on", "error") == 0
    assert run("inspect", "dead", "--fail-on", "warning") == 3
    assert "dead-module" in capsys.readouterr().err
    assert run("inspect", "adapter", "--fail-on", "note") == 0


def test_the_command_writes_page_and_figures_and_reads_sensitivities(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = read("adapter").adapter
    spectra = adapter.spectrum_only().modules
    modules = {
        path: type(one)(one.S, one.ties, np.ones((9, len(one.S))) + np.arange(9)[:, None], np.zeros((9, len(one.S))))
        for path, one in spectra.items()
    }
    measured = Measurement(modules, tuple("abcdefghi"), np.zeros(9), {"adapter_sha256": adapter.digest})
    save_measurement(measured, "s.safetensors")
    arguments = ("inspect", "adapter", "--sensitivity", "s.safetensors", "--html", "page.html", "--figures", "figures")
    assert run(*arguments, "--figure-format", "svg") == 0
    assert "component-signs" in capsys.readouterr().out
    assert len(list(Path("figures").iterdir())) == 5
    assert run(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_text_output_imports_nothing_heavier_than_torch(folder: Path) -> None:
    code = (
        "import sys; from spectral_surgery.cli import main; assert main(['inspect', 'adapter']) == 0\n"
        "heavy = {'transformers', 'peft', 'datasets', 'matplotlib', 'jinja2', 'scipy.stats', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
