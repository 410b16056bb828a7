"""Benchmarks of several variants in one loaded model, on tiny models: who computes what, and what is said of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel

from spectral_surgery.cli import main
from spectral_surgery.errors import BaseModelError, InputError
from spectral_surgery.evaluating.records import read_records
from spectral_surgery.evaluating.suite import SuiteOptions, prepare_suite
from spectral_surgery.evaluating.variants import load_variants, prepare_adapters, short_names

pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")

from spectral_surgery.evaluating import evaluation
from spectral_surgery.evaluating.evaluation import another_size, evaluate
from spectral_surgery.evaluating.harness import LiveModel, run
from spectral_surgery.evaluating.scoring import score


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    """A base model with rows, and two adapters of it: ``adapter``, and ``other`` of another rank on other modules."""
    folder = tmp_path_factory.mktemp("world")
    there = tiny.world(folder)
    base = tiny.llama()
    base.config.name_or_path = base.name_or_path = str(there.base)
    tiny.lora(base, seed=5, r=2, target_modules=["k_proj", "up_proj"]).save_pretrained(folder / "other")
    choices = [{"question": f"which {i}?", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(6)]
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    return there


@pytest.fixture
def both(world: tiny.World) -> list[str]:
    return [str(world.adapter), str(world.adapter.parent / "other")]


def options(world: tiny.World, **changes: Any) -> SuiteOptions:
    pick = world.data.with_name("pick.jsonl")
    return SuiteOptions(
        **{"suite": f"{world.data},{pick}", "limit": 6, "batch_size": 4, "max_gen_toks": 12, **changes}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_each_variant_computes_what_its_adapter_alone_computes(world: tiny.World, both: list[str]) -> None:
    candidates = prepare_adapters(both)
    live, variants = load_variants(candidates)
    found = {}
    for _ in range(2):  # the second time around nothing may have stayed behind
        for name, open_variant in variants.items():
            with open_variant():
                now = logits(live.model)
            torch.testing.assert_close(now, found.setdefault(name, now), rtol=0, atol=0)
    fresh = tiny.llama().from_pretrained(world.base).eval()
    torch.testing.assert_close(found["base"], logits(fresh), rtol=0, atol=0)
    for name, folder in zip(("adapter", "other"), both, strict=True):
        alone = PeftModel.from_pretrained(tiny.llama().from_pretrained(world.base), folder).eval()
        torch.testing.assert_close(found[name], logits(alone), rtol=0, atol=0)
    assert not torch.equal(found["adapter"], found["other"])
    torch.testing.assert_close(logits(live.model), found["adapter"], rtol=0, atol=0)


def test_an_evaluation_scores_base_and_adapters_on_the_same_documents(world: tiny.World, both: list[str]) -> None:
    calls: list[tuple[int, int]] = []
    found = evaluate(
        both[0], both[1:], options(world), noise_floor=1, progress=lambda done, total: calls.append((done, total))
    )
    names = list(dict.fromkeys(record.variant for record in found.records))
    assert names == ["base", "adapter", "other", "other, again 1"]
    assert found.reference == "other"
    assert {(record.task, record.metric) for record in found.records} == {("rows", "exact_match"), ("pick", "acc")}
    assert len(found.records) == 4 * (6 + 6)
    total = 4 * (6 + 6 * 3)
    assert calls[-1] == (total, total)
    assert "other, again 1" not in {standing.variant for standing in found.standings()}
    assert "Noise floor: other scored 2 times" in found.text()


def test_truncated_answers_are_those_without_stop_or_end(world: tiny.World, both: list[str]) -> None:
    candidates = prepare_adapters(both[:1])
    live, _ = load_variants(candidates)
    suite = prepare_suite(options(world, limit=12, max_gen_toks=6), candidates.tokenizer, model_length=128)
    lm = LiveModel(live.model, live.tokenizer, batch_size=5, max_length=suite.max_length)
    samples, ledger = run(lm, {"rows": suite.tasks["rows"]}, suite.settings)
    ended = []
    for sample in samples["rows"]:
        ids = torch.tensor([candidates.tokenizer(sample["doc"]["prompt"])["input_ids"]])
        out = live.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = candidates.tokenizer.decode(out)
        ended.append("\n" in text or candidates.tokenizer.eos_token_id in out.tolist())
        stopped = text.split("\n")[0].split("</s>")[0]
        assert sample["resps"][0][0] == stopped.replace("<s>", "").replace("<pad>", "")
    assert [ledger.truncated(sample) for sample in samples["rows"]] == [not end for end in ended]
    assert len(set(ended)) == 2, "both kinds should occur, or this shows nothing"


def test_gates_are_variants_too_and_the_model_is_left_as_it_was(world: tiny.World, both: list[str]) -> None:
    candidates = prepare_adapters(both[:1])
    live, _ = load_variants(candidates)
    live.model.train()
    suite = prepare_suite(options(world), candidates.tokenizer, model_length=128)
    off = {path: np.zeros(len(spectrum.S)) for path, spectrum in live.spectra.items()}
    variants = {"base": live.base, "nothing": lambda: live.gated(off)}
    records = score(live, variants, suite)
    by_variant = {name: [r.value for r in records if r.variant == name] for name in variants}
    assert by_variant["base"] == by_variant["nothing"]
    assert live.model.training
    assert live.tokenizer.padding_side == candidates.tokenizer.padding_side == "right"


def test_the_unedited_adapter_is_the_reference_whatever_the_order(world: tiny.World, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    assert main(["edit", str(world.adapter), "--policy", "scale:strength=0.5", "--output", str(edited)]) == 0
    for names in ([str(edited), str(world.adapter)], [str(world.adapter), str(edited)]):
        assert prepare_adapters(names).unedited == "adapter"


def test_the_command_writes_records_table_and_manifest(
    world: tiny.World, both: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["evaluate", both[0], "--suite", str(world.data), "--limit", "4", "--max-gen-toks", "4"]
    assert main([*arguments, "--output", str(out), "--dry-run"]) == 0
    assert "rows (4 requests); 2 scorings" in capsys.readouterr().out
    assert not out.exists()
    assert main([*arguments, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "rows exact_match" in printed
    assert len(read_records(out / "records.jsonl")) == 2 * 4
    assert "| rows exact_match |" in (out / "table.md").read_text()
    manifest = json.loads((out / "spectral_surgery.json").read_text())
    assert manifest["tasks"]["rows"]["documents"] == 12
    assert manifest["suite"]["limit"] == 4
    assert [score["variant"] for score in manifest["scores"]] == ["base", "adapter"]
    assert main([*arguments, "--output", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["compare", str(out), str(out), "--variant-a", "base", "--variant-b", "adapter"]) == 0


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    world: tiny.World, both: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(both[0], both[1:], options(world), noise_floor=1)
    out = tmp_path / "out"
    scored: list[str] = []

    def interrupted(live: Any, variants: Any, suite: Any, **more: Any) -> Any:
        scored.extend(variants)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(live, variants, suite, **more)

    monkeypatch.setattr(evaluation, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(both[0], both[1:], options(world), noise_floor=1, output=out)
    assert not out.exists()
    assert evaluation.there(evaluation.prepare(both, options(world), noise_floor=1), out) == 2
    assert evaluation.there(evaluation.prepare(both, options(world, limit=5)), out) == 0
    mine = evaluation.unfinished(out) / "mine.jsonl"
    mine.write_text("")
    calls: list[tuple[int, int]] = []
    found = evaluate(
        both[0],
        both[1:],
        options(world),
        noise_floor=1,
        output=out,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert scored == ["base", "adapter", "other", "other", "other, again 1"]
    assert list(found.records) == list(whole.records)
    assert calls[0] == (2 * 24 + 1, 4 * 24)
    assert list(evaluation.unfinished(out).iterdir()) == [mine], "only finished scorings are deleted"


def test_adapters_of_different_bases_are_refused_before_anything_loads(world: tiny.World, tmp_path: Path) -> None:
    base = tiny.llama()
    base.config.name_or_path = base.name_or_path = "someone/else"
    tiny.lora(base).save_pretrained(tmp_path / "foreign")
    with pytest.raises(BaseModelError, match=r"different base models: adapter on .*, foreign on someone/else"):
        prepare_adapters([str(world.adapter), str(tmp_path / "foreign")])


def test_all_that_is_wrong_is_named_at_once(world: tiny.World, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear me")
    with pytest.raises(InputError) as refused:
        evaluate(
            tmp_path / "none",
            [world.adapter, world.adapter],
            SuiteOptions(suite="humaneval", limit=0),
            noise_floor=-1,
            output=tmp_path / "mine",
        )
    said = str(refused.value)
    for fault in (
        "is given twice",
        "none",
        "--confirm-run-unsafe-code",
        "--limit is 0",
        "never overwritten",
        "-floor",
    ):
        assert fault in said, fault


def test_a_missing_vllm_is_found_before_anything_loads(both: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    with pytest.raises(InputError, match="vLLM is not installed"):
        evaluate(both[0], suite=SuiteOptions(suite="rows.jsonl"), vllm="")


def test_batch_sizes_of_scorings_again_differ_from_the_first() -> None:
    assert [another_size(4, number) for number in range(1, 6)] == [3, 2, 1, 3, 2]
    assert [another_size(1, number) for number in (1, 2)] == [2, 3]


def test_adapters_are_called_by_the_end_of_their_path_where_that_tells_them_apart() -> None:
    assert short_names(["x/a", "y/b"]) == {"x/a": "a", "y/b": "b"}
    assert short_names(["x/a", "y/a"]) == {"x/a": "x/a", "y/a": "y/a"}
    assert short_names(["x/base"]) == {"x/base": "x/base"}
