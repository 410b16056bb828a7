"""From the rows of a data set to batches of tokens whose answers are labelled.

The way of a row: :func:`read_rows`, :func:`to_examples`, :func:`split_examples`, :func:`tokenize`,
:func:`batches`. The order in which examples are taken depends on their content and the seed alone,
never on the order of the file, and the calibration part of a split is the beginning of that order,
so two commands with one seed use the same examples for one purpose.

Labels follow the Hugging Face convention: ``labels[t]`` is the token at t, which the model predicts
from those before it, and -100 where no loss is taken. Only answers are labelled, with the end of
text that closes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from spectral_surgery.chat import chat_renderer
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, Example, Render, digest_of, to_examples
from spectral_surgery.reading import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Splits",
    "Tokenized",
    "TokenizedExample",
    "batches",
    "chat_renderer",
    "data_digest",
    "hash_order",
    "last_ids",
    "load_examples",
    "longest_first",
    "preview",
    "prompt_ids",
    "read_rows",
    "split_examples",
    "tokenize",
]

IGNORED = -100
"""The label of a token on which no loss is taken."""


def load_examples(
    data: str,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    adapter_dir: Path | None = None,
) -> list[Example]:
    """The examples of a data set in its own order; a chat template is looked for only if needed.

    Args:
        data: As :func:`read_rows` takes it.
        options: How the rows are read.
        tokenizer: Whose chat template serves where the adapter has none.
        adapter_dir: The adapter's folder, or None.

    Raises:
        DataError: Whatever :func:`read_rows`, :func:`to_examples` and :func:`chat_renderer` raise.
    """

    @cache
    def renderer() -> Render:
        return chat_renderer(tokenizer, adapter_dir)

    rows = read_rows(data, options)
    return to_examples(rows, options, source=data, render=lambda turns: renderer()(turns))


def hash_order(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in an order that their content and the seed decide, without exact duplicates.

    Groups stay together: first by the hash of seed and group, then by the hash of the content. Of
    examples with equal prompt and answer the first is kept, also where their groups differ; what
    the list is shorter by is the number of duplicates.
    """
    ordered = sorted(examples, key=lambda e: (digest_of(seed, e.group), e.digest, e.row))
    kept: dict[str, Example] = {}
    for example in ordered:
        kept.setdefault(example.digest, example)
    return list(kept.values())


@dataclass(frozen=True)
class Splits:
    """Three lists of examples that share no group."""

    calibration: list[Example]
    """Sensitivities are measured on these."""
    validation: list[Example]
    """Choices are made on these."""
    test: list[Example]
    """The verdict is made on these."""
    duplicates: int
    """How many exact duplicates were dropped before."""


def split_examples(examples: Sequence[Example], sizes: tuple[int, int, int], seed: int) -> Splits:
    """Calibration, validation and test examples, taken one after the other in :func:`hash_order`.

    Whole groups are taken until a part has its size, so a part may be larger than asked for, by
    less than its last group. With one seed, the calibration part of a given size is the same
    whatever the other sizes are, and a smaller one is the beginning of a larger one.

    Args:
        examples: Any order; exact duplicates are dropped.
        sizes: Least number of examples of each part; 0 leaves a part empty.
        seed: Of the order.

    Raises:
        DataError: If a size is negative, or there are too few examples.
    """
    if min(sizes) < 0:
        raise DataError(f"the parts have the sizes {sizes}; expected none below 0.")
    ordered = hash_order(examples, seed)
    groups = [list(members) for _, members in groupby(ordered, key=lambda example: example.group)]
    remaining = iter(groups)
    calibration, validation, test = parts = [_take(remaining, size) for size in sizes]
    if any(len(part) < size for part, size in zip(parts, sizes, strict=True)):
        raise DataError(
            f"{len(ordered)} different examples in {len(groups)} groups are too few for "
            f"{' + '.join(map(str, sizes))} (calibration, validation, test) without a group in two "
            "parts; give more rows, or ask for fewer."
        )
    return Splits(calibration, validation, test, duplicates=len(examples) - len(ordered))


def _take(groups: Iterator[list[Example]], size: int) -> list[Example]:
    """The examples of the next groups, until there are enough."""
    part: list[Example] = []
    while len(part) < size and (group := next(groups, None)) is not None:
        part.extend(group)
    return part


def data_digest(examples: Sequence[Example] | Sequence[TokenizedExample]) -> str:
    """One SHA-256, in hexadecimal, of the examples' contents, whatever their order."""
    return digest_of(*sorted(example.digest for example in examples))


@dataclass(frozen=True)
class TokenizedExample:
    """One example as token ids."""

    input_ids: tuple[int, ...]
    """Prompt, answer and end of text."""
    answer_start: int
    """Position of the first token with a label; at least 1, since nothing predicts the first."""
    digest: str
    """Content hash of the example, before any truncation."""


@dataclass(frozen=True)
class Tokenized:
    """Examples as token ids, in the order in which they were given."""

    examples: list[TokenizedExample]
    truncated: int
    """How many were longer than allowed."""


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    separator: str = " ",
) -> Tokenized:
    """The examples as token ids, with the position where each answer begins.

    Prompt and answer are tokenized as one text, so tokens are what the model reads; a token that
    holds any character of the answer belongs to it. Special tokens are added as the tokenizer adds
    them, and the end of text after the answer where it is not there yet. Texts from a chat template
    stay as they are.

    Args:
        examples: What to tokenize.
        tokenizer: The base model's, or the adapter's own.
        max_length: In tokens, at least 2. A longer example loses tokens from the left of its
            prompt, after a beginning-of-text token; only an answer that is itself longer loses its
            end.
        separator: Put between prompt and answer where neither has white space there.

    Raises:
        DataError: If ``max_length`` is below 2, or an answer has no token to take a loss on.
    """
    if max_length < 2:
        raise DataError(f"the longest example has {max_length} tokens; expected at least 2.")
    tokenized = []
    truncated = 0
    for example in examples:
        ids, start = _encode(example, tokenizer, separator)
        kept, kept_start = _truncate(ids, start, tokenizer.bos_token_id, max_length)
        truncated += len(kept) < len(ids)
        tokenized.append(TokenizedExample(tuple(kept), kept_start, example.digest))
    return Tokenized(tokenized, truncated)


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], int]:
    """The token ids of one example, and where its answer begins.

    Raises:
        DataError: If no token holds a character of the answer and has one before it.
    """
    ids, start = _joint_ids(example, tokenizer, separator)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # one in the text, one by the tokenizer
        ids, start = ids[1:], start - 1
    if eos is not None and ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    start = max(start, 1)
    if start >= len(ids):
        raise DataError(
            f"row {example.row} (counting from 0): the answer {example.answer[:40]!r} has no token "
            "that a model could predict; correct or remove the row."
        )
    closed = example.templated or example.finished or eos is None or ids[-1] == eos
    return ids if closed else [*ids, eos], start


def _joint_ids(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], int]:
    """The token ids of prompt and answer as one text, and the first that holds any of the answer.

    Without offsets (tokenizers written in Python) it is the first that differs from the prompt's
    own tokens.
    """
    before = example.prompt
    spaced = before[-1:].isspace() or example.answer[:1].isspace()
    if before and not spaced and not example.templated:
        before += separator
    special = not example.templated
    fast = tokenizer.is_fast
    encoded = tokenizer(
        before + example.answer,
        add_special_tokens=special,
        return_offsets_mapping=fast,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    if fast:
        inside = [end > len(before) for _, end in encoded["offset_mapping"]]
    else:
        alone = tokenizer(before, add_special_tokens=special, verbose=False)["input_ids"]
        inside = [place >= len(alone) or alone[place] != ids[place] for place in range(len(ids))]
    return ids, next((place for place, is_inside in enumerate(inside) if is_inside), len(ids))


def _truncate(ids: list[int], start: int, bos: int | None, max_length: int) -> tuple[list[int], int]:
    """At most ``max_length`` ids, and where the answer now begins."""
    if len(ids) <= max_length:
        return ids, start
    head = ids[:1] if ids[0] == bos else []
    answer = ids[start:][: max_length - len(head)]
    room = max_length - len(head) - len(answer)
    prompt = ids[start - room : start]
    return head + prompt + answer, max(len(head) + len(prompt), 1)


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a prompt that is to be answered, without an end of text.

    Raises:
        DataError: If the prompt has no token.
    """
    ids = list(tokenizer(example.prompt, add_special_tokens=not example.templated, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if not example.templated and eos != bos and ids[-1:] == [eos]:
        ids = ids[:-1]
    if not ids:
        raise DataError(f"row {example.row} (counting from 0): the prompt {example.prompt[:40]!r} has no token.")
    return ids


def last_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """At most ``max_length`` ids: of more, the last, after the beginning-of-text token where there is one."""
    return _truncate(ids, len(ids), tokenizer.bos_token_id, max_length)[0]


def preview(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example's text as the model reads it, with ``[[`` and ``]]`` around what is labelled."""
    prompt, answer = (
        tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        for ids in (
            example.input_ids[: example.answer_start],
            example.input_ids[example.answer_start :],
        )
    )
    return f"{prompt}[[{answer}]]"


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of similar length as tensors, padded on the right."""

    input_ids: Int64[Tensor, "batch length"]
    attention_mask: Int64[Tensor, "batch length"]
    """1 on an example's own tokens, from its length, whatever the id that pads."""
    labels: Int64[Tensor, "batch length"]
    """The ids of the answers, -100 elsewhere; not shifted."""
    indices: tuple[int, ...]
    """Positions of the rows in the tokenized list."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model takes by name."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.input_ids[rows], self.attention_mask[rows], self.labels[rows], self.indices[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )


def batches(tokenized: Tokenized, *, token_budget: int = 4096, batch_size: int | None = None) -> list[Batch]:
    """Every example once, longest first, in batches of similar length.

    Args:
        tokenized: What to batch.
        token_budget: Most tokens in a batch, padding included; a longer example is alone.
        batch_size: Most examples in a batch, in place of the budget.

    Raises:
        DataError: If the budget or the size is below 1.
    """
    order, found = longest_first(tokenized, token_budget, batch_size), []
    while order:
        count = batch_size or max(1, token_budget // len(tokenized.examples[order[0]].input_ids))
        found.append(_batch(tokenized.examples, tuple(order[:count])))
        order = order[count:]
    return found


def longest_first(tokenized: Tokenized, token_budget: int, batch_size: int | None) -> list[int]:
    """The positions of the examples, longest first, which is how batches are filled.

    Raises:
        DataError: If the budget or the size of a batch is below 1.
    """
    if min(token_budget, 1 if batch_size is None else batch_size) < 1:
        raise DataError(
            f"a batch of {token_budget} tokens or {batch_size} examples holds nothing; expected at least 1."
        )
    return sorted(range(len(tokenized.examples)), key=lambda index: -len(tokenized.examples[index].input_ids))


def _batch(examples: Sequence[TokenizedExample], indices: tuple[int, ...]) -> Batch:
    """The examples at the indices, the first of which is the longest, as tensors."""
    chosen = [examples[index] for index in indices]
    shape = (len(chosen), len(chosen[0].input_ids))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(chosen):
        ids = torch.tensor(example.input_ids)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, example.answer_start : len(ids)] = ids[example.answer_start :]
    return Batch(input_ids, attention_mask, labels, indices)
