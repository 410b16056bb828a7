"""Training rows are labelled as documented, shown by decoding what is learnt, and as measuring labels them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from transformers import AutoTokenizer

from spectral_surgery.calibration import batches, load_examples, tokenize
from spectral_surgery.demo import world
from spectral_surgery.errors import DataError
from spectral_surgery.training import RowOptions, TrainOptions
from spectral_surgery.training.rows import columns, load_rows

TOKENIZER = AutoTokenizer.from_pretrained(world() / "base")

CHOICES = {"label": ["A", "B", "C", "D", "E"], "text": ["sea", "pond", "lake", "well", "tap"]}
ROWS: dict[str, dict[str, Any]] = {
    "math": {"query": "What is 6 times 7?", "response": "6 times 7 is 42.\nThe answer is: 42"},
    "code": {"instruction": "Write f(x) = x + 1.", "response": "def f(x):\n    return x + 1"},
    "instruct": {"instruction": "Name a river.", "input": "In France.", "output": "The Loire."},
    "commonsense": {"question": "Where do whales live?", "choices": CHOICES, "answerKey": "A"},
}
MEASURED = {
    "math": "<bos>Question: What is 6 times 7?\nAnswer: [[6 times 7 is 42.\nThe answer is: 42<eos>]]",
    "code": "<bos>### Instruction:\nWrite f(x) = x + 1.\n\n### Response: [[def f(x):\n    return x + 1<eos>]]",
    "instruct": "<bos>### Instruction:\nName a river.\n\n### Input:\nIn France.\n\n### Response: [[The Loire.<eos>]]",
    "commonsense": "<bos>Question: Where do whales live?\n\nChoices:\nA. sea\nB. pond\nC. lake\nD. well\nE. tap\n\n"
    "Answer with a single letter: A, B, C, D, or E.\nAnswer: [[A<eos>]]",
}
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
TRAINED = {
    "math": PREAMBLE + "### Instruction:\nWhat is 6 times 7?\n\n### Response: Let's think step by step.\n"
    "6 times 7 is 42.\nThe answer is: 42",
    "code": "Write f(x) = x + 1.\ndef f(x):\n    return x + 1",
    "instruct": "### Instruction:\nName a river.\n\nInput:\nIn France.\n\n### Response:\nThe Loire.",
    "commonsense": "Question:\nWhere do whales live?\n\nChoices:\nA. sea\nB. pond\nC. lake\nD. well\nE. tap\n\n"
    "Answer with a single letter: A, B, C, D, or E.\nA",
}


def options(data: pathlib.Path, recipe: str = "math", *, faithful: bool = False, **rows: Any) -> TrainOptions:
    return TrainOptions(
        recipe=recipe, model="base", output=data.parent, faithful=faithful, rows=RowOptions(data=str(data), **rows)
    )


def written(folder: pathlib.Path, *rows: dict[str, Any]) -> pathlib.Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def decoded(chosen: TrainOptions) -> list[str]:
    """Every row as the trainer gets it, with [[ ]] around the tokens that have a label."""
    found = columns(load_rows(chosen, TOKENIZER).examples)
    texts = []
    for ids, labels in zip(found["input_ids"], found["labels"], strict=True):
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        learnt = [label != -100 for label in labels]
        start = learnt.index(True)
        assert all(learnt[start:]), "what is learnt is one piece, up to the end"
        texts.append(f"{TOKENIZER.decode(ids[:start])}[[{TOKENIZER.decode(ids[start:])}]]")
    return texts


@pytest.mark.parametrize("recipe", ROWS)
def test_the_answer_alone_is_learnt_in_the_texts_that_it_is_measured_with(recipe: str, tmp_path: pathlib.Path) -> None:
    assert decoded(options(written(tmp_path, ROWS[recipe]), recipe)) == [MEASURED[recipe]]


@pytest.mark.parametrize("recipe", ROWS)
def test_faithful_learns_the_whole_of_the_texts_that_the_authors_trained_on(
    recipe: str, tmp_path: pathlib.Path
) -> None:
    chosen = options(written(tmp_path, ROWS[recipe]), recipe, faithful=True)
    assert decoded(chosen) == [f"<bos>[[{TRAINED[recipe]}<eos>]]"]


@pytest.mark.parametrize("recipe", ROWS)
def test_training_texts_with_the_loss_on_the_answer_are_cut_at_the_answer(recipe: str, tmp_path: pathlib.Path) -> None:
    chosen = options(written(tmp_path, ROWS[recipe]), recipe, prompts="training", loss="answer")
    answer = MEASURED[recipe].partition("[[")[2]
    assert decoded(chosen) == [f"<bos>{TRAINED[recipe].removesuffix(answer[:-7])}[[{answer}"]


@pytest.mark.parametrize("recipe", ROWS)
def test_training_labels_exactly_the_tokens_that_measuring_labels(recipe: str, tmp_path: pathlib.Path) -> None:
    data = written(tmp_path, ROWS[recipe])
    chosen = options(data, recipe)
    measured = tokenize(load_examples(str(data), chosen.rows.reading(chosen.numbers()), TOKENIZER), TOKENIZER, 1024)
    (batch,) = batches(measured)
    found = columns(load_rows(chosen, TOKENIZER).examples)
    assert found == {"input_ids": batch.input_ids.tolist(), "labels": batch.labels.tolist()}


def test_alpaca_s_own_text_is_what_the_authors_trained_on(tmp_path: pathlib.Path) -> None:
    text = "Below is an instruction.\n\n### Instruction:\nName a river.\n\n### Response:\nThe Loire."
    row = {"instruction": "Name a river.", "input": "", "output": "The Loire.", "text": text}
    data = written(tmp_path, row)
    assert decoded(options(data, "instruct", faithful=True)) == [f"<bos>[[{text}<eos>]]"]
    cut = options(data, "instruct", prompts="training")
    assert decoded(cut) == [f"<bos>{text.removesuffix('The Loire.')}[[The Loire.<eos>]]"]


@pytest.mark.parametrize(
    ("faithful", "expected"),
    [(False, "<bos>s 6 times 7?\nAnswer: [[42<eos>]]"), (True, "<bos>[[Below is an instruction ]]")],
)
def test_no_text_is_longer_than_the_greatest_length(faithful: bool, expected: str, tmp_path: pathlib.Path) -> None:
    data = written(tmp_path, {"query": "What is 6 times 7?", "response": "42"})
    chosen = options(data, faithful=faithful, max_length=25)
    rows = load_rows(chosen, TOKENIZER)
    assert [len(example.input_ids) for example in rows.examples] == [25]
    assert rows.truncated == 1
    assert decoded(chosen) == [expected]


def test_malformed_rows_are_dropped_and_counted(tmp_path: pathlib.Path) -> None:
    good = ROWS["math"]
    data = written(tmp_path, good, {**good, "response": ""}, {"query": "left alone"}, {**good, "query": True}, good)
    rows = load_rows(options(data), TOKENIZER)
    assert (rows.read, rows.taken, len(rows.examples)) == (5, 5, 2)
    assert rows.malformed == (
        "row 1 (counting from 0): it has no answer.",
        "row 2 (counting from 0): it has no answer.",
        "row 3 (counting from 0): expected text, found bool; write the column as text.",
    )


@pytest.mark.parametrize("faithful", [False, True])
def test_a_missing_column_is_named_with_what_is_there(faithful: bool, tmp_path: pathlib.Path) -> None:
    data = written(tmp_path, {"question": "a", "response": "b"})
    with pytest.raises(DataError, match=r"rows.jsonl: the format .* needs the column 'query', found 'question'"):
        load_rows(options(data, faithful=faithful), TOKENIZER)


def test_a_data_set_without_one_usable_row_is_refused(tmp_path: pathlib.Path) -> None:
    data = written(tmp_path, {"query": "a", "response": ""}, {"query": "b", "response": " "})
    with pytest.raises(DataError, match="none of the 2 rows can be used; of the first: row 0"):
        load_rows(options(data), TOKENIZER)


def test_rows_of_another_shape_are_read_with_another_format(tmp_path: pathlib.Path) -> None:
    data = written(tmp_path, {"prompt": "double 3:", "completion": "6"}, {"prompt": "double 4:", "completion": "8"})
    expected = ["<bos>double 3: [[6<eos>]]", "<bos>double 4: [[8<eos>]]"]
    assert decoded(options(data, format="prompt")) == expected
    assert decoded(options(data, format="auto")) == expected
    whole = options(data, format="prompt", loss="text")
    assert decoded(whole) == ["<bos>[[double 3: 6<eos>]]", "<bos>[[double 4: 8<eos>]]"]
