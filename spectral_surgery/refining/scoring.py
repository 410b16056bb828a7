"""Per-row scores of whatever the loaded model computes now: losses in one forward pass, or greedy answers."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from spectral_surgery import processes
from spectral_surgery.calibration import Batch, Tokenized, batches, tokenize
from spectral_surgery.divergence import in_halves
from spectral_surgery.errors import DataError, InputError, RunError
from spectral_surgery.formats import Example
from spectral_surgery.judging.trials import Measure
from spectral_surgery.live import Live
from spectral_surgery.objective import Loss, answer_loss, greedy_answers
from spectral_surgery.options import BatchOptions

Vector = Float[np.ndarray, " rows"]
LossOf = Callable[[Tokenized], Loss]
"""The loss for some rows; batches refer to them by position."""


@dataclass(frozen=True)
class Rows:
    """Some rows, as texts and as tokens, in one order."""

    examples: Sequence[Example]
    tokenized: Tokenized

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, positions: Sequence[int]) -> Rows:
        """Returns the rows at these positions."""
        tokens = Tokenized([self.tokenized.examples[i] for i in positions], self.tokenized.truncated)
        return Rows([self.examples[i] for i in positions], tokens)


@dataclass(frozen=True)
class Objective:
    """What rows are scored by."""

    measure: Measure
    score: Callable[[Live, Rows], Vector]
    """Scores of the rows by the model as it computes now."""
    source: str = ""
    """Hash of the user's own code, where it is that."""


@torch.no_grad()
def per_example(live: Live, rows: Tokenized, loss_of: LossOf, batching: BatchOptions | None = None) -> Vector:
    """Returns a loss's value on every row; a batch that does not fit into memory is halved.

    Several processes share the batches, and all get every value.

    Raises:
        RunError: If a value is not finite, or one row alone does not fit.
    """
    batching = batching or BatchOptions()
    size = None if batching.batch_size == "auto" else batching.batch_size
    loss = loss_of(rows)
    values = np.zeros(len(rows.examples))

    def score(batch: Batch) -> tuple[list[int], np.ndarray]:
        return list(batch.indices), loss(live.model, batch.to(live.device)).to("cpu", torch.float64).numpy()

    def scored(share: list[Batch]) -> list[tuple[list[int], np.ndarray]]:
        return [found for batch in share for found in in_halves(score, batch)]

    with live.still():
        every = batches(rows, token_budget=batching.tokens, batch_size=size)
        for indices, losses in chain.from_iterable(processes.dealt(every, scored)):
            values[indices] = losses
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))
        raise RunError(
            f"The loss of {len(bad)} of {len(values)} rows is not finite, the first is row {bad[0]}. "
            f"Use --dtype bfloat16 or float32, and check these rows."
        )
    return values


def answer_loss_of(rows: Tokenized) -> Loss:
    """Returns the mean negative log-likelihood of the answer's tokens, which is the same for all rows."""
    return answer_loss


def loss_objective(loss_of: LossOf, measure: Measure, batching: BatchOptions) -> Objective:
    """Returns the objective that is a loss in one forward pass."""
    return Objective(measure, lambda live, rows: per_example(live, rows.tokenized, loss_of, batching))


def answer_loss_objective(batching: BatchOptions) -> Objective:
    """Returns the objective: mean negative log-likelihood of the answer's tokens."""
    return loss_objective(answer_loss_of, Measure("answer loss", "nats per token", lower_is_better=True), batching)


def exact_objective(normalise: str, batching: BatchOptions) -> Objective:
    """Returns the objective: whether the greedy answer is the row's, after normalising both.

    Args:
        normalise: One of :data:`NORMALISERS`.
        batching: Its batch size, or token budget, limits the prompts generated at once.
    """

    def score(live: Live, rows: Rows) -> Vector:
        same = NORMALISERS[normalise]
        found = answers(live, rows, batching)
        return np.array(
            [same(a) == same(row.answer) for a, row in zip(found, rows.examples, strict=True)], dtype=float
        )

    return Objective(Measure("exact answers", "share of rows", lower_is_better=False, binary=True), score)


def answers(live: Live, rows: Rows, batching: BatchOptions, *, longest: int | None = None) -> list[str]:
    """Returns the model's greedy answer to every row.

    Args:
        live: The model as it computes now.
        rows: With their answers, whose length in tokens says where generation may stop.
        batching: Limits the prompts generated at once.
        longest: Tokens an answer may have; by default a quarter more than the longest of the rows' own, and 4.
    """
    prompts = [row.input_ids[: row.answer_start] for row in rows.tokenized.examples]
    new = longest or longest_answer(rows) * 5 // 4 + 4
    size = batching.batch_size
    at_once = size if size != "auto" else max(1, batching.tokens // (max(map(len, prompts)) + new))
    with live.still():
        return greedy_answers(live.model, live.tokenizer, prompts, max_new_tokens=new, batch_size=at_once)


def longest_answer(rows: Rows) -> int:
    """Returns the tokens of the longest of the rows' own answers, its end included; 0 without rows."""
    return max((len(row.input_ids) - row.answer_start for row in rows.tokenized.examples), default=0)


def choice_objective(choices: Sequence[str], batching: BatchOptions) -> Objective:
    """Returns the objective: whether the row's answer is the likeliest of the choices, by likelihood per token.

    Args:
        choices: Every answer that a row may have.
        batching: How rows are batched; every row is read once with each choice.
    """

    def score(live: Live, rows: Rows) -> Vector:
        losses = [per_example(live, _answered(live, rows, choice), answer_loss_of, batching) for choice in choices]
        best = np.argmin(losses, axis=0)
        return np.array([choices[i] == row.answer for i, row in zip(best, rows.examples, strict=True)], dtype=float)

    return Objective(Measure("right choices", "share of rows", lower_is_better=False, binary=True), score)


def _answered(live: Live, rows: Rows, answer: str) -> Tokenized:
    longest = max(len(row.input_ids) for row in rows.tokenized.examples) + 64
    return tokenize([replace(row, answer=answer) for row in rows.examples], live.tokenizer, longest)


def choices_of(examples: Sequence[Example], *, most: int = 20) -> list[str]:
    """Returns the different answers of the rows.

    Raises:
        DataError: If there are more than ``most``, or only one.
    """
    found = sorted({row.answer for row in examples})
    if not 2 <= len(found) <= most:
        raise DataError(
            f"Choice accuracy needs rows with 2 to {most} different answers, and these have {len(found)}. "
            f"Use --objective exact or loss."
        )
    return found


def custom_objective(name: str, batching: BatchOptions) -> Objective:
    """Returns the objective of a user's own function ``(prompts, answers, references) -> one number a row``.

    Args:
        name: ``module:function``; importable from the current folder or the environment. Higher is better.
        batching: Limits the prompts generated at once.

    Raises:
        InputError: If it cannot be imported.
    """
    function = imported(name)

    def score(live: Live, rows: Rows) -> Vector:
        found = answers(live, rows, batching)
        prompts = [row.prompt for row in rows.examples]
        wanted = [row.answer for row in rows.examples]
        try:
            values = np.asarray(processes.of_first(lambda: function(prompts, found, wanted)), dtype=float)
        except Exception as error:
            raise RunError(f"The objective {name} raised {type(error).__name__}: {error}.") from error
        if values.shape != (len(rows),) or not np.isfinite(values).all():
            raise RunError(
                f"The objective {name} returned an array of shape {values.shape} for {len(rows)} rows, "
                f"expected ({len(rows)},) finite numbers."
            )
        return values

    code = Path(file).read_bytes() if (file := inspect.getsourcefile(function)) else name.encode()
    measure = Measure(name, "your own score", lower_is_better=False)
    return Objective(measure, score, hashlib.sha256(code).hexdigest())


def imported(name: str) -> Callable[..., Any]:
    """Returns the function that ``module:function`` names.

    Raises:
        InputError: If there is none.
    """
    module, _, function = name.partition(":")
    if not function:
        raise InputError(f"The objective {name!r} is unknown. Choose loss, exact, choice, or module:function.")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise InputError(f"The objective {name} cannot be imported ({type(error).__name__}: {error}).") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise InputError(f"The objective {name} is {type(found).__name__}, expected a function.")
    return found


def _words(text: str) -> str:
    bare = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in bare.split() if word not in {"a", "an", "the"})


def _number(text: str) -> str:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return str(float(found[-1].replace(",", ""))) if found else text.strip()


NORMALISERS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": lambda text: text.strip().casefold(),
    "words": _words,
    "number": _number,
}
"""How answers are compared: as they are; without case; without case, punctuation and articles; by the last number."""
