"""Files of rows as tasks of lm-evaluation-harness: whoever has rows of their own needs no YAML.

- Prompt and answer, under whatever usual names or as conversations: the greedy answer must be the row's, but for white
  space around it.
- Question, choices and answer: CommonsenseQA's format, the likeliest letter.

Rows stay in memory; nothing of them is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spectral_surgery.columns import mappings_of, text_of
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, Render, to_examples
from spectral_surgery.reading import read_rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Config = dict[str, Any]
"""A task's definition in lm-evaluation-harness's terms."""


def in_memory(rows: Mapping[str, list[dict[str, Any]]], **_: Any) -> Any:
    """Returns rows by split as lm-evaluation-harness wants them, in memory: nothing is cached."""
    import datasets

    return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})


def rows_task(path: Path, render: Render | None = None, plain: Callable[[str], str] = str) -> Config:
    """Returns the task of a file of rows: exact answers, or where there are choices the likeliest letter.

    Args:
        path: The file, whose name without its ending names the task.
        render: Writes a conversation with the chat template, for rows that hold one.
        plain: Leaves an answer's special tokens out, which generated answers are decoded without.

    Raises:
        DataError: If the rows are of neither kind.
    """
    rows = read_rows(str(path), DataOptions())
    if "choices" in rows[0]:
        return _choice_task(path, rows)
    examples = to_examples(rows, DataOptions(), source=path.name, render=render)
    answers = [plain(example.answer).strip() for example in examples]
    docs = [{"prompt": e.prompt, "answer": answer} for e, answer in zip(examples, answers, strict=True)]
    one_line = not any("\n" in answer for answer in answers)
    return {
        "task": path.stem,
        "custom_dataset": partial(in_memory, {"test": docs}),
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": lambda doc: doc["answer"],
        "process_results": lambda doc, results: {"exact_match": float(results[0].strip() == doc["answer"])},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        # No token is shorter than a byte, so a right answer always fits, with an end.
        "generation_kwargs": {
            "until": ["\n"] if one_line else [],
            "max_gen_toks": min(1024, max(len(answer.encode()) for answer in answers) + 8),
            "do_sample": False,
        },
        "num_fewshot": 0,
    }


def _choice_task(path: Path, rows: Sequence[Mapping[str, Any]]) -> Config:
    """Returns a multiple-choice task in CommonsenseQA's format: the likeliest letter."""
    docs = [_choice_row(row, f"{path}: row {number}") for number, row in enumerate(rows)]
    return {
        "task": path.stem,
        "custom_dataset": partial(in_memory, {"test": docs}),
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": choice_text,
        "doc_to_target": lambda doc: doc["right"],
        "doc_to_choice": lambda doc: list(LETTERS[: len(doc["choices"])]),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }


def choice_text(doc: Mapping[str, Any]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, doc["choices"], strict=False)]
    return "\n".join([f"Question: {doc['question']}", *lines, "Answer:"])


def _choice_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns a row with its question, the choices' texts, and the number of the right one.

    Choices are a list of texts, or labels and texts as CommonsenseQA has them; the answer is a label, a letter, the
    number of a choice counting from 0, or its text.

    Raises:
        DataError: If something is missing, or the answer is none of the choices.
    """
    cell = row.get("choices")
    if isinstance(cell, list) and all(isinstance(choice, str) for choice in cell):
        choices, labels = cell, list(LETTERS[: len(cell)])
    else:
        choices = [text_of(choice.get("text")) for choice in mappings_of(cell)]
        labels = [text_of(choice.get("label")) for choice in mappings_of(cell)]
    question = text_of(row.get("question") or row.get("prompt")).strip()
    answer = next((row[key] for key in ("answer", "answerKey", "label") if row.get(key) is not None), None)
    if not question or answer is None or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(
            f"{place} needs a question, 2 to {len(LETTERS)} choices and an answer; found {', '.join(row)}."
        )
    if isinstance(answer, int) and 0 <= answer < len(choices):
        right = answer
    elif text_of(answer) in labels:
        right = labels.index(text_of(answer))
    elif text_of(answer) in choices:
        right = choices.index(text_of(answer))
    else:
        raise DataError(f"{place}: the answer {answer!r} is none of its {len(choices)} choices.")
    return {"question": question, "choices": choices, "right": right}
