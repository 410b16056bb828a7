"""Scores of every row, against loops written by hand."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from spectral_surgery.calibration import Batch, tokenize
from spectral_surgery.divergence import Divergence, reference
from spectral_surgery.errors import DataError, InputError, RunError
from spectral_surgery.formats import Example
from spectral_surgery.judging.trials import Measure
from spectral_surgery.live import Live
from spectral_surgery.objective import answer_loss
from spectral_surgery.options import BatchOptions
from spectral_surgery.refining.scoring import (
    NORMALISERS,
    Rows,
    answer_loss_objective,
    answer_loss_of,
    answers,
    choice_objective,
    choices_of,
    custom_objective,
    exact_objective,
    imported,
    loss_objective,
    per_example,
)

ONE_BY_ONE, MANY = BatchOptions(batch_size=1), BatchOptions(batch_size=64)


@pytest.fixture(scope="module")
def live() -> Live:
    return Live(tiny.lora(tiny.llama()), tokenizer=tiny.tokenizer())


def rows(replies: list[str] | None = None) -> Rows:
    """Prompts and answers of different lengths."""
    replies = replies or ["less", "greater", "equal", "12", "a", "less", "4 5 6"]
    examples = [
        Example(f"ask {'abc'[: i % 4]} {i}:", answer, f"group {i}", False, i) for i, answer in enumerate(replies)
    ]
    return Rows(examples, tokenize(examples, tiny.tokenizer(), 64))


@torch.no_grad()
def loss_by_hand(live: Live, prompt: str, answer: str) -> float:
    """Minus the mean log-probability of the answer's characters and of the end of text."""
    tokenizer = live.tokenizer
    before, reply = tokenizer(prompt + " ")["input_ids"], [*tokenizer(answer)["input_ids"][1:], tokenizer.eos_token_id]
    ids, total = before + reply, 0.0
    for place, token in enumerate(reply):
        seen = torch.tensor([ids[: len(before) + place]])
        total -= live.model(input_ids=seen).logits[0, -1].double().log_softmax(-1)[token].item()
    return total / len(reply)


@torch.no_grad()
def greedy_by_hand(live: Live, prompt: str, most: int) -> str:
    ids = live.tokenizer(prompt + " ")["input_ids"]
    start = len(ids)
    while len(ids) < start + most:
        ids.append(int(live.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == live.tokenizer.eos_token_id:
            break
    return live.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batching", [None, ONE_BY_ONE, MANY, BatchOptions(token_budget=40)])
def test_every_row_has_the_loss_of_its_own_answer(live: Live, batching: BatchOptions | None) -> None:
    some = rows()
    found = per_example(live, some.tokenized, answer_loss_of, batching)
    wanted = [loss_by_hand(live, row.prompt, row.answer) for row in some.examples]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_no_rows_have_no_scores(live: Live) -> None:
    assert per_example(live, Rows([], tokenize([], live.tokenizer, 64)).tokenized, answer_loss_of).shape == (0,)


def test_the_right_loss_is_taken_with_the_rows_of_a_part(live: Live) -> None:
    some = rows()
    with live.base():
        said = reference(live, some.tokenized)
    objective = loss_objective(partial(Divergence, said), Measure("drift", "nats", lower_is_better=True), MANY)
    whole = objective.score(live, some)
    np.testing.assert_allclose(objective.score(live, some.at([5, 0, 3])), whole[[5, 0, 3]], rtol=1e-4)
    assert whole.min() > 1e-3
    with live.base():
        np.testing.assert_allclose(objective.score(live, some), 0, atol=1e-5)


def test_memory_that_runs_out_in_the_middle_changes_no_value(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    some, sizes = rows(), list[int]()
    wanted = per_example(live, some.tokenized, answer_loss_of, MANY)
    exact = exact_objective("strip", MANY).score(live, some)
    forward = type(live.model).forward

    def small(self: object, *args: object, **inputs: Any) -> object:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(live.model), "forward", small)
    np.testing.assert_allclose(per_example(live, some.tokenized, answer_loss_of, MANY), wanted, rtol=1e-5)
    assert max(sizes) == 7
    assert sizes.count(7) == 1
    monkeypatch.undo()
    generate = live.model.generate

    def small_generate(**inputs: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(live.model, "generate", small_generate)
    np.testing.assert_array_equal(exact_objective("strip", MANY).score(live, some), exact)


def test_one_row_that_does_not_fit_is_said(live: Live) -> None:
    def full(model: object, batch: Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunError, match="One example alone needs more memory"):
        per_example(live, rows().tokenized, lambda tokens: full)


def test_losses_that_are_not_finite_stop_and_name_the_row(live: Live) -> None:
    def broken(model: object, batch: Batch) -> torch.Tensor:
        found = answer_loss(model, batch)
        return torch.where(torch.tensor(batch.indices) >= 4, torch.nan, found)

    with pytest.raises(RunError, match="3 of 7 rows is not finite, the first is row 4"):
        per_example(live, rows().tokenized, lambda tokens: broken)


def test_an_exact_answer_is_what_the_model_greedily_says(live: Live) -> None:
    told = [greedy_by_hand(live, row.prompt, 12) for row in rows().examples]
    mixed = rows([told[0][:12], "wrong", told[2][:12].upper(), "x", "y", told[5][:12], "z"])
    longest = max(len(row.input_ids) - row.answer_start for row in mixed.tokenized.examples)
    allowed = longest * 5 // 4 + 4
    hand = [greedy_by_hand(live, row.prompt, allowed) for row in mixed.examples]
    wanted = [float(said == row.answer.strip()) for said, row in zip(hand, mixed.examples, strict=True)]
    for batching in (ONE_BY_ONE, MANY, BatchOptions(token_budget=30)):
        objective = exact_objective("strip", batching)
        np.testing.assert_array_equal(objective.score(live, mixed), wanted)
        assert objective.measure.binary
        assert not objective.measure.lower_is_better
    right = [
        Example(row.prompt, said, row.group, False, row.row) for row, said in zip(mixed.examples, hand, strict=True)
    ]
    assert exact_objective("strip", MANY).score(live, Rows(right, mixed.tokenized)).all()
    assert answers(live, mixed.at([4]), MANY, longest=3) == [greedy_by_hand(live, mixed.examples[4].prompt, 3)]


def test_a_choice_is_the_likeliest_answer_per_token(live: Live) -> None:
    some = rows(["less", "greater", "equal", "less", "equal", "greater", "less"])
    choices = choices_of(some.examples)
    assert choices == ["equal", "greater", "less"]
    losses = np.array([[loss_by_hand(live, row.prompt, choice) for choice in choices] for row in some.examples])
    wanted = [choices[i] == row.answer for i, row in zip(losses.argmin(1), some.examples, strict=True)]
    found = choice_objective(choices, MANY).score(live, some)
    np.testing.assert_array_equal(found, np.array(wanted, dtype=float))
    best = zip(losses.argmin(1), some.examples, strict=True)
    likeliest = [Example(row.prompt, choices[i], "g", False, 0) for i, row in best]
    assert choice_objective(choices, MANY).score(live, Rows(likeliest, some.tokenized)).all()


def test_choices_must_be_few_and_more_than_one() -> None:
    with pytest.raises(DataError, match="2 to 20 different answers, and these have 1"):
        choices_of(rows(["same"] * 3).examples)
    with pytest.raises(DataError, match="these have 21"):
        choices_of(rows([f"{i}" for i in range(21)]).examples)


@pytest.mark.parametrize(
    ("normalise", "same", "different"),
    [
        ("strip", [(" 12 ", "12")], [("A", "a")]),
        ("lower", [(" Less\n", "less"), ("STRASSE", "straße")], [("less.", "less")]),
        ("words", [("The answer, is  A cat!", "answer is cat")], [("cat dog", "dog cat")]),
        (
            "number",
            [("so 1,234.50 it is", "1234.5"), ("3 + 4 = 7", "7"), ("-5", "it is -5."), ("none", " none ")],
            [("7 of 8", "7"), ("12", "1.2")],
        ),
    ],
)
def test_normalising(normalise: str, same: list[tuple[str, str]], different: list[tuple[str, str]]) -> None:
    norm = NORMALISERS[normalise]
    assert all(norm(one) == norm(other) for one, other in same)
    assert all(norm(one) != norm(other) for one, other in different)


# -- a user's own function --------------------------------------------------------------------------------------------

MINE = """
import numpy as np
constant = 3

def lengths(prompts, answers, references):
    assert prompts[0].startswith("ask") and references[0] == "less"
    return [len(a) - 0.5 * len(r) for a, r in zip(answers, references)]

def raising(prompts, answers, references):
    return [answers[99] for _ in prompts]

def shape(prompts, answers, references):
    return np.zeros((len(prompts), 1))

def few(prompts, answers, references):
    return [1.0]

def nan(prompts, answers, references):
    return [float("nan")] + [0.0] * (len(prompts) - 1)

def words(prompts, answers, references):
    return ["good"] * len(prompts)

def nothing(prompts, answers, references):
    return None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_objective.py").write_text(MINE)
    (tmp_path / "my_broken_objective.py").write_text("def f(:\n")
    (tmp_path / "my_failing_objective.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_objective", "my_broken_objective", "my_failing_objective"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_objective"


def test_your_own_function_scores_the_greedy_answers(live: Live, module: str) -> None:
    path, some = list(sys.path), rows()
    objective = custom_objective(f"{module}:lengths", BatchOptions())
    assert sys.path == path
    said = answers(live, some, MANY)
    wanted = [len(a) - 0.5 * len(row.answer) for a, row in zip(said, some.examples, strict=True)]
    np.testing.assert_allclose(objective.score(live, some), wanted)
    assert not objective.measure.lower_is_better
    assert not objective.measure.binary


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raising", "my_objective:raising raised IndexError: list index out of range"),
        ("shape", r"shape \(7, 1\) for 7 rows, expected \(7,\)"),
        ("few", r"shape \(1,\) for 7 rows"),
        ("nan", "finite numbers"),
        ("words", "my_objective:words"),
        ("nothing", "my_objective:nothing"),
    ],
)
def test_what_your_function_does_wrong_is_said(live: Live, module: str, function: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        custom_objective(f"{module}:{function}", BatchOptions()).score(live, rows())


@pytest.mark.parametrize(
    "name",
    [
        "my_objective:absent",
        "no_such_module_anywhere:score",
        "my_broken_objective:f",
        "my_failing_objective:f",
        "my_objective:constant",
        "my_objective:",
        ":f",
        "losss",
    ],
)
def test_a_function_that_cannot_be_had_is_an_input_error(module: str, name: str) -> None:
    path = list(sys.path)
    with pytest.raises(InputError, match=name.replace(".", r"\.") or "objective"):
        imported(name)
    assert sys.path == path


def test_the_loss_objective_is_the_answer_loss(live: Live) -> None:
    some, score = rows(), answer_loss_objective(ONE_BY_ONE)
    assert score.measure.lower_is_better
    np.testing.assert_allclose(score.score(live, some), per_example(live, some.tokenized, answer_loss_of), rtol=1e-5)
