"""The whole job on the embedded world with few rows: files, verdict, resuming, repeating, a planted defect."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectral_surgery.adapter import Adapter
from spectral_surgery.demo import tasks, world
from spectral_surgery.errors import OutputError
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import ModelOptions
from spectral_surgery.refining import Refinement, refine
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.repeating import differences, options_of, recorded
from spectral_surgery.surgery import operate

pytestmark = pytest.mark.slow

PLANTED, AMPLIFIED = "model.layers.2.mlp.down_proj", 5.0
MODEL = ModelOptions(base_model=str(world() / "base"), dtype="float32", device="cpu")

NUMBER = (int, float)
SHOWN = {"task": {"mean": NUMBER, "se": NUMBER}, "skills": {"mean": NUMBER, "se": NUMBER}}
INTERVAL = {"estimate": NUMBER, "low": (*NUMBER, type(None)), "high": (*NUMBER, type(None))}
MEASURE = {"name": str, "unit": str, "lower_is_better": bool, "binary": bool, "margin": NUMBER}
EXACT = {
    "n": int,
    "of": int,
    "scores": [{"name": str, "mean": NUMBER, "se": NUMBER, "gain": (INTERVAL, None)}],
}
COUNTS = ("measuring", "validation", "test", "keep_measuring", "keep_validation", "keep_test", "seen", "duplicates")
CONTRACT: dict[str, Any] = {
    "schema": int,
    "created": str,
    "version": str,
    "command": str,
    "outcome": str,
    "sentence": str,
    "notes": [str],
    "adapter": {
        "name": str,
        "digest": str,
        "base_model": str,
        "modules": int,
        "components": int,
        "rank": int,
        "serving_note": (str, type(None)),
    },
    "rule": {
        "may_lose": NUMBER,
        "error_rate": NUMBER,
        "earlier_verdicts": int,
        "level": NUMBER,
        "seen_rows_only": bool,
        "swapped": bool,
    },
    "measures": {"task": MEASURE, "skills": MEASURE},
    "rows": {
        **dict.fromkeys(COUNTS, int),
        "smallest_difference": NUMBER,
        "source": str,
        "keep_source": str,
        "first": (str, type(None)),
        "guess": ({"seen": bool, "rows": int, "base_loss": NUMBER, "own_loss": NUMBER, "harm": NUMBER}, None),
    },
    "exact": {"task": (EXACT, None), "skills": (EXACT, None)},
    "checks": [{"name": str, "n": int, "lower_is_better": bool, "share": bool, "scores": list}],
    "few_rows": [{"rows": int, "name": str, "ahead": ({"task": INTERVAL, "skills": INTERVAL}, None), **SHOWN}],
    "candidates": [
        {
            "name": str,
            "family": str,
            "what": str,
            "equivalent": (str, type(None)),
            "edit_size": (*NUMBER, type(None)),
            "validation": (SHOWN, None),
            "test": (SHOWN, None),
            "stage": str,
        }
    ],
    "chain": [{"name": str, "task": INTERVAL, "skills": INTERVAL, "passed": bool}],
    "question_zero": {"task": INTERVAL, "skills": INTERVAL, "better_than_base": (bool, type(None))},
    "claims": [{"against": str, "passed": bool, "sentence": str}],
    "random": ({"permutations": int, "p": NUMBER, "statistic": str}, None),
    "error_rate": ({"estimate": NUMBER, "low": NUMBER, "high": NUMBER, "replays": int}, None),
    "categories": [{"name": str, "n": int, "base": NUMBER, "unedited": NUMBER, "refined": (*NUMBER, type(None))}],
    "examples": [
        {
            "prompt": str,
            "answer": (str, type(None)),
            "base": str,
            "unedited": str,
            "refined": (str, type(None)),
            "change": str,
            "kind": str,
        }
    ],
    "generations": ({"n": int, "empty": dict, "loops": dict}, None),
    "gates": (
        [
            {
                "module": str,
                "layer": (int, type(None)),
                "kind": str,
                "gates": [NUMBER],
                "S": [NUMBER],
                "S_edited": [NUMBER],
            }
        ],
        None,
    ),
    "edit": ({"components": int, "edited": int, "size": NUMBER, "rounding": NUMBER, "dtype": str}, None),
    "times": dict,
    "environment": dict,
    "options": dict,
}


def faults(value: Any, wanted: Any, at: str = "verdict") -> Iterator[str]:
    """What of a verdict is not as agreed."""
    if isinstance(wanted, tuple) and wanted[-1] is None:
        if value is not None:
            yield from faults(value, wanted[0], at)
    elif isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f"{at}: {value!r} is no object"
            return
        for key, part in wanted.items():
            if key not in value:
                yield f"{at}.{key} is missing"
            else:
                yield from faults(value[key], part, f"{at}.{key}")
    elif isinstance(wanted, list):
        for i, part in enumerate(value):
            yield from faults(part, wanted[0], f"{at}[{i}]")
    elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted in (int, NUMBER)):
        yield f"{at} is {value!r}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{at} is {value}"


@dataclass(frozen=True)
class Place:
    folder: Path
    unseen: Path
    seen: Path
    keep: Path


def written(path: Path, rows: list[tasks.Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("whole")
    kept = [row for task in tasks.SKILLS for row in tasks.rows(task, 7, seed=3)]
    train = [json.loads(line) for line in (world() / "data" / "train.jsonl").open(encoding="utf-8")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRAL_SURGERY_STATE", str(folder / "state"))
        yield Place(
            folder,
            written(folder / "unseen.jsonl", tasks.rows("compare", 96, seed=41)),
            written(folder / "seen.jsonl", train[:66]),
            written(folder / "keep.jsonl", kept),
        )
    torch.set_num_threads(threads)


def options(place: Place, **changes: Any) -> RefineOptions:
    few = dict(keep=str(place.keep), steps=3, permutations=5, replays=50, may_lose="10%")
    return RefineOptions(**{**few, **changes})


def run(place: Place, name: str, adapter: Path | None = None, **arguments: Any) -> Refinement:
    given: dict[str, Any] = dict(
        data=place.unseen, options=options(place), model=MODEL, rows=DataOptions(), output=place.folder / name
    )
    return refine(adapter or world() / "adapter", **{**given, **arguments})


@pytest.fixture(scope="module")
def planted(place: Place) -> Path:
    """The shipped adapter with one component five times as strong."""
    adapter = Adapter.load(world() / "adapter")
    gates = np.ones(len(adapter.updates[PLANTED].A))
    gates[0] = AMPLIFIED
    updates, report = operate({PLANTED: adapter.updates[PLANTED]}, {PLANTED: gates})
    return adapter.with_updates(updates, report).save(place.folder / "planted")


@pytest.fixture(scope="module")
def found(place: Place, planted: Path) -> Refinement:
    with pytest.MonkeyPatch.context() as patch:  # a ledger of its own: it judges by the rows of the runs below
        patch.setenv("SPECTRAL_SURGERY_STATE", str(place.folder / "state of planted"))
        return run(place, "planted-refined", planted)


@pytest.fixture(scope="module")
def controls(place: Place) -> Refinement:
    """A short run whose answer is found by controls alone."""
    return run(place, "controls", options=options(place, ladder="controls"))


class Counted:
    """Counts forward passes of the base model that score or measure rows; generation keeps a cache of its own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from transformers import LlamaForCausalLM

        self.passes, forward = 0, LlamaForCausalLM.forward

        def counting(model: Any, *given: Any, **named: Any) -> Any:
            self.passes += named.get("use_cache") is False
            return forward(model, *given, **named)

        counting.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        patch.setattr(LlamaForCausalLM, "forward", counting)


def on_file(found: Refinement) -> dict[str, Any]:
    """The verdict as it was written, which must be plain JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert found.folder is not None
    text = (found.folder / "verdict.json").read_text(encoding="utf-8")
    return dict(json.loads(text, parse_constant=refuse))


def means(verdict: dict[str, Any], name: str, split: str = "test") -> tuple[float, float]:
    row = next(candidate for candidate in verdict["candidates"] if candidate["name"] == name)
    return row[split]["task"]["mean"], row[split]["skills"]["mean"]


def winner(verdict: dict[str, Any]) -> str:
    return next(candidate["name"] for candidate in verdict["candidates"] if candidate["stage"] == "winner")


def test_a_planted_defect_is_found_and_undone(found: Refinement) -> None:
    verdict = on_file(found)
    assert verdict["outcome"] == "refined", verdict["sentence"]
    ours, planted_scores = means(verdict, winner(verdict)), means(verdict, "unedited")
    assert ours[0] < planted_scores[0]
    assert ours[1] < planted_scores[1]
    gates = {row["module"]: row["gates"] for row in verdict["gates"]}
    assert gates[PLANTED][0] < 0.7
    assert gates[PLANTED][0] <= np.quantile([gate for values in gates.values() for gate in values], 0.1)


def test_the_verdict_has_every_field(found: Refinement, controls: Refinement) -> None:
    for one in (found, controls):
        verdict = on_file(one)
        assert list(faults(verdict, CONTRACT)) == []
        assert json.loads(json.dumps(dict(one.verdict))) == verdict
        assert [candidate["family"] for candidate in verdict["candidates"][:2]] == ["base", "unedited"]
        assert verdict["schema"] == 1
        assert verdict["outcome"] in ("refined", "leave_alone", "not_better_than_base")
        stages = {candidate["stage"].split()[0] for candidate in verdict["candidates"]}
        assert stages <= {"dropped", "validation", "finalist", "confirmed", "winner", "rival"}
        assert sum(verdict["rows"][part] for part in ("measuring", "validation", "test")) == 96
        assert sum(verdict["rows"][f"keep_{part}"] for part in ("measuring", "validation", "test")) == 70
        assert verdict["rows"]["first"].endswith("<eos>]]")


def test_the_numbers_fit_together(found: Refinement) -> None:
    verdict = on_file(found)
    for row in verdict["gates"]:
        np.testing.assert_allclose(row["S_edited"], np.multiply(row["S"], row["gates"]))
    assert verdict["edit"]["edited"] == sum(gate != 1 for row in verdict["gates"] for gate in row["gates"])
    for link in verdict["chain"]:
        gain = [b - a for a, b in zip(means(verdict, link["name"]), means(verdict, "unedited"), strict=True)]
        assert [link[side]["estimate"] for side in ("task", "skills")] == pytest.approx(gain)
    assert verdict["random"] is None or verdict["random"]["permutations"] == 5
    assert sum(row["n"] for row in verdict["categories"]) == len(
        [row for row in verdict["examples"] if row["kind"] == "other skills"]
    )


@torch.no_grad()
def test_the_adapter_is_written_where_it_won_and_loads_in_stock_peft(found: Refinement, controls: Refinement) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for one in (found, controls):
        won = one.verdict["outcome"] == "refined"
        assert one.folder is not None
        assert (one.folder / "adapter").exists() == won == (one.adapter is not None)
    assert found.folder is not None
    assert found.adapter is not None
    tokenizer = AutoTokenizer.from_pretrained(world() / "base")
    base = AutoModelForCausalLM.from_pretrained(world() / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, found.folder / "adapter").eval()
    shown = [row for row in found.verdict["examples"] if row["kind"] == "task"][:8]
    for row in shown:
        ids = tokenizer(row["prompt"] + " ", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert said == row["refined"]
    assert Adapter.load(found.folder / "adapter").digest == found.adapter.digest


def test_a_second_run_works_nothing_out_again(
    place: Place, controls: Refinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    before = {path.name for path in (place.folder / "controls" / "cache").iterdir()}
    again = run(place, "controls", options=options(place, ladder="controls"), overwrite=True)
    assert {path.name for path in (place.folder / "controls" / "cache").iterdir()} == before
    assert differences(controls.verdict, again.verdict) == []
    assert again.verdict["rule"]["earlier_verdicts"] == 0
    rest = counted.passes
    fresh = run(place, "controls-anew", options=options(place, ladder="controls"))
    assert differences(controls.verdict, fresh.verdict) == []
    assert rest < (counted.passes - rest) / 2


def test_an_interrupted_run_goes_on(place: Place, controls: Refinement, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "trying" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, "stopped", options=options(place, ladder="controls"), progress=interrupt)
    folder = place.folder / "stopped"
    assert [path.name for path in folder.iterdir()] == ["cache"]
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    resumed = run(place, "stopped", options=options(place, ladder="controls"))
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    assert len(kept) > 15
    assert kept.items() <= after.items()
    assert len(after) > len(kept)
    assert differences(controls.verdict, resumed.verdict) == []


def test_a_recorded_run_can_be_repeated_from_its_verdict(place: Place, controls: Refinement) -> None:
    assert controls.folder is not None
    kept = recorded(controls.folder / "verdict.json")
    again = refine(world() / "adapter", output=place.folder / "repeated", **options_of(kept))
    assert differences(kept, again.verdict) == []


def test_a_folder_that_is_not_ours_is_refused_before_anything(place: Place, controls: Refinement) -> None:
    folder = place.folder / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by refine"):
        run(place, "thesis", data="no-such-rows.jsonl", overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["chapter.txt"]
    with pytest.raises(OutputError, match="has a verdict"):
        run(place, "controls", data="no-such-rows.jsonl")


def test_seen_rows_alone_never_say_better(place: Place) -> None:
    seen = run(place, "seen", data=None, train_data=place.seen, options=options(place, ladder="controls"))
    verdict = on_file(seen)
    assert verdict["rule"]["seen_rows_only"]
    assert verdict["question_zero"]["better_than_base"] is None
    assert verdict["measures"]["task"]["name"] == "agreement with your adapter"
    assert means(verdict, "unedited", "validation")[0] == 1.0
    said = " ".join([verdict["sentence"], *verdict["notes"], *(claim["sentence"] for claim in verdict["claims"])])
    assert "better" not in said.lower()
    assert "temperature" not in {candidate["family"] for candidate in verdict["candidates"]}
    assert list(faults(verdict, CONTRACT)) == []
