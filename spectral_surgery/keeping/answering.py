"""What the loaded model answers to prompts, as the tokens that it generated; and whether answers have broken down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from spectral_surgery.calibration import Tokenized, TokenizedExample, last_ids, prompt_ids
from spectral_surgery.errors import DataError
from spectral_surgery.keeping.rows import Keep, KeepRow
from spectral_surgery.live import Live
from spectral_surgery.objective import continuations, end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

SHORTEST_LOOP = 24
"""Characters that a repetition must have to be called a loop."""
ROUNDS = 3
"""How often in a row its phrase must stand there."""
MOST = 0.5
"""Share of the text that it must cover."""
LOOKED_AT = 8000
"""Characters of a text that are searched for a loop, from its end."""


@dataclass(frozen=True)
class Answered:
    """Prompts with a model's own answers."""

    keep: Keep
    """The rows, in the order in which they were given, with the answers as text."""
    tokenized: Tokenized
    """The same rows as the tokens that were read and generated, in the same order."""
    empty: int
    """How many answers have no text; where the model ended at once, the end of text is their one token."""
    cut: int
    """How many answers were cut at the longest length."""


def answer_by(
    live: Live,
    keep: Keep,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 64,
    max_length: int = 1024,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Answered:
    """Returns the rows with the answer that the model, as it now computes, greedily gives to each.

    For the base model's answers, open :meth:`Live.base` around the call. The tokens are kept as they were generated:
    a text may be read as other tokens than those that wrote it.

    Args:
        live: The loaded model.
        keep: Prompts; answers that they have are replaced.
        tokenizer: The base model's, or the adapter's own.
        max_new_tokens: Where an answer that does not end is cut.
        max_length: Of prompt and answer, in tokens; a longer prompt loses its beginning.
        batch_size: Prompts generated at once.
        progress: Called with (prompts done, prompts in all).

    Raises:
        DataError: If no room for a prompt is left beside the answer.
        RunError: If one prompt alone does not fit into memory.
    """
    room = max_length - max_new_tokens
    if room < 2:
        raise DataError(
            f"answers of {max_new_tokens} tokens leave {room} of {max_length} tokens for the prompt; raise "
            "--max-length."
        )
    whole = [prompt_ids(example, tokenizer) for example in keep.examples]
    prompts = [last_ids(ids, tokenizer, room) for ids in whole]
    with live.still():
        answers = continuations(
            live.model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
    ends = end_tokens(live.model, tokenizer)
    rows = [_answered(row, ids, tokenizer) for row, ids in zip(keep.rows, answers, strict=True)]
    tokens = [
        TokenizedExample((*prompt, *answer), len(prompt), row.example.digest)
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]
    return Answered(
        replace(keep, rows=rows),
        Tokenized(tokens, truncated=sum(len(ids) > room for ids in whole)),
        empty=sum(not row.example.answer.strip() for row in rows),
        cut=sum(answer[-1] not in ends for answer in answers),
    )


def _answered(row: KeepRow, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> KeepRow:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return replace(row, example=replace(row.example, answer=text))


def degenerate(texts: Sequence[str]) -> tuple[Bool[np.ndarray, " texts"], Bool[np.ndarray, " texts"]]:
    """Returns which texts are empty, and which run in a loop.

    A loop is a phrase of any length that stands at least :data:`ROUNDS` times in a row without anything between, over
    at least :data:`SHORTEST_LOOP` characters and :data:`MOST` of the text; its last round may be broken off. White
    space counts as one space. Lists, tables, code and counting differ from line to line, so they are none; a long
    row of the very same number or sign is one. Of a longer text only the last :data:`LOOKED_AT` characters count.
    """
    empty = [not text.strip() for text in texts]
    return np.array(empty, dtype=bool), np.array([_is_loop(text) for text in texts], dtype=bool)


def _is_loop(text: str) -> bool:
    """Whether most of the text is one phrase over and over."""
    spaced = " ".join([*text.split(), ""])  # so that a last round is as long as the others
    signs = np.frombuffer(spaced[-LOOKED_AT:].encode("utf-32-le"), dtype=np.uint32)
    needed = max(SHORTEST_LOOP, MOST * len(signs))
    for period in range(1, len(signs) // ROUNDS + 1):
        length = period + _longest_run(signs[period:] == signs[:-period])
        if length >= needed and length >= ROUNDS * period:
            return True
    return False


def _longest_run(same: Bool[np.ndarray, " places"]) -> int:
    """Length of the longest stretch of truth values."""
    breaks = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
    return int(np.diff(breaks).max()) - 1
