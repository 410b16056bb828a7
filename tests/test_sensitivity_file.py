"""A Measurement: its aggregates by hand, what it refuses, and the file that it is kept in."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from spectral_surgery.errors import MeasurementError, OutputError, RunError
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.policies import GradDirection, SmoothAbs, gates
from spectral_surgery.sensitivity_file import check_path, load_measurement, save_measurement

S = np.array([4.0, 2.0, 2.0, 0.0])
GRADIENT = np.array([[4.0, 2.0, -6.0, 0.0], [-8.0, 2.0, 6.0, 0.0], [4.0, -1.0, 3.0, 0.0]])
ENERGY = np.array([[3.0, 1.0, 1.0, 0.0], [6.0, 1.0, 2.0, 0.0], [0.0, 4.0, 0.0, 0.0]])


def module(ties: list[int] | None = None) -> ModuleMeasurement:
    return ModuleMeasurement(S, np.array(ties or [0, 1, 2, 3]), GRADIENT, ENERGY)


def measurement(**changes: object) -> Measurement:
    fields = {
        "modules": {"b.1": module(), "a.0": replace(module(), S=S[::-1] + 1.0)},
        "digests": ("x", "y", "z"),
        "losses": np.array([0.5, 1 / 3, 2.0]),
        "about": {"adapter_sha256": "ab12", "data": "rows.jsonl"},
    }
    return Measurement(**fields | changes)


def test_aggregates_equal_values_by_hand() -> None:
    found = module()
    np.testing.assert_allclose(found.sensitivity[0], [1, 1, -3, 0])
    np.testing.assert_allclose(found.mean, [0, 0.5, 0.5, 0])
    np.testing.assert_allclose(found.mean_abs, [4 / 3, 5 / 6, 2.5, 0])
    deviations = [np.sqrt((1 + 4 + 1) / 2), np.sqrt((0.25 + 0.25 + 1) / 2), np.sqrt((12.25 + 6.25 + 1) / 2), 0]
    np.testing.assert_allclose(found.standard_error, np.array(deviations) / np.sqrt(3))
    np.testing.assert_allclose(found.energy, [3, 2, 1, 0])


def test_one_example_has_an_infinite_standard_error() -> None:
    one = replace(module(), gate_gradient=GRADIENT[:1], output_energy=ENERGY[:1])
    assert np.isinf(one.standard_error).all()


def test_tied_components_share_the_mean_of_their_derivatives() -> None:
    tied = module([0, 1, 1, 2])
    np.testing.assert_allclose(tied.sensitivity[0], [1, -1, -1, 0])
    np.testing.assert_allclose(tied.mean_abs, [4 / 3, (1 + 2 + 0.5) / 3, (1 + 2 + 0.5) / 3, 0])


def test_sharing_averages_within_groups_along_the_last_axis() -> None:
    tied = module([0, 1, 1, 1])
    np.testing.assert_allclose(tied.share(np.array([5.0, 1, 2, 6])), [5, 3, 3, 3])
    np.testing.assert_allclose(tied.share(GRADIENT)[0], [4, -4 / 3, -4 / 3, -4 / 3])
    assert module().share(GRADIENT) is GRADIENT


def test_components_without_a_singular_value_are_not_alive() -> None:
    found = replace(module([0, 1, 1, 2]), S=np.array([1.0, 1e-8, 1e-8, 1e-10]))
    assert found.alive.tolist() == [True, True, True, False]
    assert not replace(module(), S=np.zeros(4)).alive.any()
    assert replace(module(), S=np.full(4, 1e-200)).alive.all()


def test_the_living_part_leaves_dead_components_out_and_renumbers_groups() -> None:
    found = replace(module([0, 1, 1, 2]), S=np.array([0.0, 2.0, 2.0, 1.0]))
    living = found.living()
    assert living.ties.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(living.S, [2, 2, 1])
    np.testing.assert_array_equal(living.gate_gradient, GRADIENT[:, 1:])
    np.testing.assert_array_equal(living.output_energy, ENERGY[:, 1:])
    whole = replace(module(), S=np.ones(4))
    assert whole.living() is whole


@pytest.mark.parametrize("field", ["gate_gradient", "output_energy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_by_module_and_example(field: str, value: float) -> None:
    values = GRADIENT.copy()
    values[1:, 2] = value
    with pytest.raises(MeasurementError, match=rf"b\.1: {field} is not finite on 2 of 3 .* number 1\)"):
        measurement(modules={"a.0": module(), "b.1": replace(module(), **{field: values})})


def test_inconsistent_parts_are_refused_together() -> None:
    broken = replace(module(), S=np.array([np.nan, 2.0, 2.0, 0.0]))
    with pytest.raises(MeasurementError) as caught:
        measurement(modules={"b.1": broken}, digests=("x", "y"))
    for part in (
        "4 things are wrong",
        "2 example hashes and 3 losses",
        "b.1: gate_gradient has shape (3, 4), expected (2, 4)",
        "b.1: output_energy has shape (3, 4), expected (2, 4)",
        "b.1: a singular value is not finite",
    ):
        assert part in str(caught.value)


def test_a_part_of_a_measurement_keeps_the_examples_and_refuses_what_was_not_measured() -> None:
    whole = measurement()
    part = whole.only(["a.0"])
    assert list(part.modules) == ["a.0"]
    assert (part.digests, part.about) == (whole.digests, whole.about)
    with pytest.raises(MeasurementError, match=r"1 of 2 selected modules were not measured, the first is c\.9"):
        whole.only(["a.0", "c.9"])


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    kept = measurement()
    path = save_measurement(kept, tmp_path / "new" / "found.safetensors")
    found = load_measurement(path)
    assert list(found.modules) == ["b.1", "a.0"]
    assert (found.digests, found.about) == (kept.digests, kept.about)
    np.testing.assert_array_equal(found.losses, kept.losses)
    for name, expected in kept.modules.items():
        for field in ("S", "ties", "gate_gradient", "output_energy"):
            value = getattr(found.modules[name], field)
            assert value.dtype == getattr(expected, field).dtype
            np.testing.assert_array_equal(value, getattr(expected, field))


def test_policies_give_the_same_gates_from_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = replace(module([0, 1, 2, 3]), S=np.array([3, 2.5, 1, 0.1]), gate_gradient=rng.normal(size=(3, 4)))
    kept = measurement(modules={"a": noisy})
    found = load_measurement(save_measurement(kept, tmp_path / "found"))
    for policy in (SmoothAbs(), GradDirection()):
        np.testing.assert_allclose(gates(policy, found)["a"], gates(policy, kept)["a"], rtol=1e-6)


def test_spectra_alone_can_be_kept(tmp_path: Path) -> None:
    empty = replace(module(), gate_gradient=np.zeros((0, 4)), output_energy=np.zeros((0, 4)))
    path = save_measurement(Measurement({"a": empty}), tmp_path / "spectra.safetensors")
    found = load_measurement(path)
    assert found.examples == 0
    np.testing.assert_array_equal(found.modules["a"].S, S)


def test_a_sensitivity_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = save_measurement(measurement(), tmp_path / "found.safetensors")
    with pytest.raises(OutputError, match=r"found\.safetensors exists\. Pass --overwrite"):
        save_measurement(measurement(), path)
    save_measurement(measurement(about={"data": "other"}), path, overwrite=True)
    assert load_measurement(path).about == {"data": "other"}
    assert os.listdir(tmp_path) == ["found.safetensors"]


def test_a_foreign_file_or_folder_is_never_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "adapter_model.safetensors"
    save_file({"x": np.ones(3)}, foreign)
    before = foreign.read_bytes()
    with pytest.raises(OutputError, match="is no sensitivity file, so it is never overwritten"):
        save_measurement(measurement(), foreign, overwrite=True)
    assert foreign.read_bytes() == before
    with pytest.raises(OutputError, match=r"is a folder\. Choose a file name"):
        check_path(tmp_path, overwrite=True)


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_measurement(measurement(), tmp_path / "found.safetensors")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, when, full)
    with pytest.raises(RunError, match=r"found\.safetensors failed .*No space left.* Nothing was changed there"):
        save_measurement(measurement(about={}), path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["found.safetensors"]


def test_a_file_that_is_gone_damaged_foreign_or_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"There is no sensitivity file .*gone\. Make one with"):
        load_measurement(tmp_path / "gone")
    whole = save_measurement(measurement(), tmp_path / "whole")
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(MeasurementError, match=r"cut is damaged or no safetensors file .* Measure again"):
        load_measurement(tmp_path / "cut")
    save_file({"x": np.ones(3)}, tmp_path / "foreign")
    with pytest.raises(MeasurementError, match="foreign is no sensitivity file"):
        load_measurement(tmp_path / "foreign")
    content = whole.read_bytes()
    finite = np.float32(GRADIENT[1, 0]).tobytes()
    assert finite in content
    (tmp_path / "nan").write_bytes(content.replace(finite, np.float32(np.nan).tobytes()))
    with pytest.raises(MeasurementError, match="gate_gradient is not finite"):
        load_measurement(tmp_path / "nan")
