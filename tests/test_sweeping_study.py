"""Studies: what a file says, everything that is wrong with it, and the grid that follows; presets of the paper."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from spectral_surgery.cli import main
from spectral_surgery.errors import InputError
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.results.runs import BASE, UNEDITED
from spectral_surgery.sweeping.grid import spell_out
from spectral_surgery.sweeping.presets import PresetOptions, preset_study
from spectral_surgery.sweeping.study import Study, read_study, study_from
from spectral_surgery.sweeping.workers import share

STUDY = """
measuring_rows = "rows.jsonl"
[[adapters]]
path = "adapter"
[grid]
policies = ["smooth_abs", "scale"]
rows = [32, 64]
energy = ["auto", "none"]
suites = ["rows.jsonl"]
[hyperparameters]
amplify = [1.1, 1.25]
[model]
dtype = "float32"
"""


def written(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl").write_text("")
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_a_file_is_read_with_paths_from_its_own_folder(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY))
    (adapter,) = study.adapters
    assert (adapter.path, adapter.name) == ("adapter", "adapter")
    assert adapter.data == str(tmp_path / "rows.jsonl")
    assert adapter.suites == (str(tmp_path / "rows.jsonl"),)
    assert study.policies == ("smooth_abs:amplify=1.1", "smooth_abs", "scale")
    assert study.model.dtype == "float32"


def test_the_grid_varies_only_what_matters(tmp_path: Path) -> None:
    items = spell_out(read_study(written(tmp_path, STUDY)))
    assert [item.policy for item in items[:2]] == [BASE, UNEDITED]
    smooth = [item for item in items if item.policy.startswith("smooth_abs")]
    assert {(item.rows, item.energy) for item in smooth} == {(r, e) for r in (32, 64) for e in ("nuclear", "none")}
    assert len(smooth) == 2 * 4
    assert [(item.rows, item.energy) for item in items if item.policy == "scale"] == [(None, "none")]


def test_functional_energy_is_measured_even_for_a_policy_that_is_not(tmp_path: Path) -> None:
    text = STUDY.replace('["auto", "none"]', '["functional"]')
    items = spell_out(read_study(written(tmp_path, text)))
    assert {item.rows for item in items if item.policy == "scale"} == {32, 64}


def test_three_mistakes_are_named_together(tmp_path: Path) -> None:
    text = STUDY.replace('"smooth_abs"', '"smoth"').replace("[32, 64]", "[0]").replace('"float32"', '"double"')
    with pytest.raises(InputError) as error:
        read_study(written(tmp_path, text))
    message = str(error.value)
    assert "Unknown policy 'smoth'" in message
    assert "grid.rows is [0]" in message
    assert "model.dtype is 'double', expected one of auto, bfloat16, float16, float32" in message


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[grid]", "[gird]", "gird is unknown. Did you mean grid?"),
        ("amplify", "amplifi", "hyperparameters.amplifi is no list"),
        ('["auto", "none"]', '["l1"]', "grid.energy has 'l1'"),
        ("[1.1, 1.25]", "[-1.0]", "amplify is -1.0"),
        ('["smooth_abs", "scale"]', "[]", "grid.policies is empty"),
        ('suites = ["rows.jsonl"]', "", "is scored in nothing"),
        ('path = "adapter"', 'name = "x"', "path is None"),
        ('[model]\ndtype = "float32"', "[data]\nexamples = 3", "data.examples is unknown"),
        ('[model]\ndtype = "float32"', '[suite]\nlimit = "many"', "suite.limit is 'many', expected a whole number"),
        ("[[adapters]]", '[[adapters]]\npath = "other/adapter"\n[[adapters]]', "Two adapters called adapter"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in STUDY
    with pytest.raises(InputError) as error:
        read_study(written(tmp_path, STUDY.replace(old, new)))
    assert told in str(error.value)


def test_an_empty_grid_and_missing_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="The grid is empty"):
        spell_out(Study(adapters=(), policies=("scale",)))
    with pytest.raises(InputError, match="no measuring rows are given"):
        spell_out(read_study(written(tmp_path, STUDY.replace('measuring_rows = "rows.jsonl"', ""))))
    with pytest.raises(InputError, match="There are no adapters"):
        study_from({"grid": {"policies": ["scale"]}})


def grid_of(preset: str, **options: object) -> list:
    chosen = PresetOptions(preset=preset, **options)  # type: ignore[arg-type]
    return spell_out(preset_study(chosen, SuiteOptions(), ModelOptions(base_model="org/Llama-3.1-8B"), BatchOptions()))


@pytest.mark.parametrize(
    ("preset", "edited"),
    [
        ("table2", 4 * 4),
        ("table3", 2 * 2),
        ("table4", 2 * (4 + 1)),
        ("table5", 4 * 3),
        ("figure3", 4 * 2),
        ("figure4", 4 * 4),
    ],
)
def test_presets_have_the_paper_s_runs(preset: str, edited: int) -> None:
    items = grid_of(preset)
    assert sum(item.edited for item in items) == edited
    assert {item.adapter.name for item in items} == {"Llama-3.1-8B"}
    assert {item.adapter.data for item in items} == {"openai/gsm8k"}


def test_the_code_s_aggregate_goes_to_the_policies_that_have_one() -> None:
    found = {item.policy for item in grid_of("table2", sensitivities="code") if item.edited}
    assert found == {
        "random_index",
        "smooth_abs:aggregate=abs_mean",
        "abs_select:aggregate=abs_mean",
        "grad_direction",
    }


def test_a_preset_s_grid_is_shown_without_any_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--preset", "table2", "--base-model", "org/Llama-3.1-8B", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "24 runs: 16 of edited adapters, 8 of unedited ones and their base; 4 measurements" in out
    assert "--adapters" in out
    assert main(["sweep", "--preset", "table2"]) == 2


def test_presets_and_files_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, STUDY))
    for told in (["sweep"], ["sweep", path, "--preset", "table2"], ["sweep", path, "--limit", "3"]):
        assert main(told) == 2
    wrong = ["sweep", "--preset", "table3", "--adapters", "gsm8k=x", "--dry-run"]
    assert main(wrong) == 2
    assert "commonsense_qa, ifeval" in capsys.readouterr().err


def test_workers_that_cannot_be_are_refused_before_anything_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(written(tmp_path, STUDY.replace('dtype = "float32"', 'device = "cuda:1"\ndevice_map = "auto"')))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    assert main(["sweep", path, "--workers", "2", "--ray-address", "127.0.0.1:1"]) == 2
    said = capsys.readouterr().err
    for fault in (
        "4 things",
        "spectral-surgery[ray]",
        "--device cuda:1",
        "--device-map auto",
        "Nothing answers at 127",
    ):
        assert fault in said, fault
    assert main(["sweep", path, "--workers", "0"]) == 2
    assert "--workers is 0" in capsys.readouterr().err


def machines(*held: tuple[int, int]) -> list[dict]:
    return [{"Alive": True, "Resources": {"CPU": float(cores), "GPU": float(gpus)}} for cores, gpus in held]


def test_a_worker_has_a_gpu_where_there_are_any_and_else_its_share_of_the_cores() -> None:
    anywhere, cpu = ModelOptions(), ModelOptions(device="cpu")
    assert share(machines((16, 2), (16, 2)), 4, anywhere) == {"num_gpus": 1, "num_cpus": 0}
    assert share(machines((16, 2)), 4, cpu) == {"num_cpus": 4}
    assert share(machines((8, 0), (8, 0)), 3, anywhere) == {"num_cpus": 4}, "no worker spans two machines"
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    assert share([*machines((2, 0)), dead], 2, anywhere) == {"num_cpus": 1}
    with pytest.raises(InputError, match="--workers is 3, and Ray has 2 CPU cores"):
        share(machines((2, 0)), 3, anywhere)
    with pytest.raises(InputError, match="--workers is 3, and Ray has 2 GPUs"):
        share(machines((64, 2)), 3, anywhere)
