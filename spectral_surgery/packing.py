"""Rows end to end in one sequence, without padding, kept apart by position ids that start again at every row.

Where a model is given such position ids and no attention mask, transformers keeps the rows apart: flash attention by
its variable-length kernels, other implementations by a mask of blocks. Without such kernels the mask and the attention
grow with the square of the whole sequence, so padded rows are the better choice there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectral_surgery.calibration import IGNORED, Batch, Tokenized, TokenizedExample, batches, longest_first
from spectral_surgery.options import BatchOptions


@dataclass(frozen=True, eq=False)
class Packed:
    """Examples end to end in one sequence."""

    input_ids: Int64[Tensor, "1 tokens"]
    position_ids: Int64[Tensor, "1 tokens"]
    """From 0 in every example."""
    labels: Int64[Tensor, "1 tokens"]
    """The ids of the answers, -100 elsewhere; not shifted. Nothing predicts an example's first token."""
    segments: Int64[Tensor, " tokens"]
    """Which of the examples a token belongs to; ascending."""
    indices: tuple[int, ...]
    """Positions of the rows in the tokenized list."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model takes by name."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Packed:
        start, stop, _ = rows.indices(len(self))
        kept = (self.segments >= start) & (self.segments < stop)
        ids, positions, labels = self.input_ids[:, kept], self.position_ids[:, kept], self.labels[:, kept]
        return Packed(ids, positions, labels, self.segments[kept] - start, self.indices[rows])

    def to(self, device: torch.device | str) -> Packed:
        """The batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            segments=self.segments.to(device),
        )

    def at_answers(self, values: Float[Tensor, " answers"]) -> Float[Tensor, " examples"]:
        """Returns each example's mean of what there is one of for every answer token, in order."""
        return mean_of_segments(values, self.segments[self.labels[0] != IGNORED], len(self))


def mean_of_segments(
    values: Float[Tensor, "tokens *k"], segments: Int64[Tensor, " tokens"], count: int
) -> Float[Tensor, "{count} *k"]:
    """Returns the mean over the tokens of each of ``count`` segments."""
    sums = values.new_zeros(count, *values.shape[1:]).index_add(0, segments, values)
    return sums / segments.bincount(minlength=count).view(-1, *[1] * (values.ndim - 1))


def is_wanted(options: BatchOptions, attention: str | None) -> bool:
    """Returns whether rows are to be packed, if the model can: as asked for, by default with flash attention.

    Args:
        options: What was asked for.
        attention: Attention implementation, by the name that transformers has for it.
    """
    from transformers.utils.generic import is_flash_attention_requested

    if options.packing != "auto":
        return options.packing == "on"
    return is_flash_attention_requested(requested_attention_implementation=attention)


def formed(rows: Tokenized, budget: int, options: BatchOptions, *, packed: bool) -> Sequence[Batch | Packed]:
    """Returns every example once, in padded batches or in packed ones.

    Args:
        rows: The examples.
        budget: Most tokens in a batch; a longer example is alone.
        options: Whose number of examples, if it is one, takes the budget's place.
        packed: Whether to pack.
    """
    size = None if options.batch_size == "auto" else options.batch_size
    return (packs if packed else batches)(rows, token_budget=budget, batch_size=size)


def packs(tokenized: Tokenized, *, token_budget: int = 4096, batch_size: int | None = None) -> list[Packed]:
    """Every example once, longest first, in packed sequences.

    Args:
        tokenized: What to pack.
        token_budget: Most tokens in a sequence; a longer example is alone.
        batch_size: Examples in a sequence, in place of the budget.

    Raises:
        DataError: If the budget or the size is below 1.
    """
    order, found = longest_first(tokenized, token_budget, batch_size), []
    while order:
        tokens = accumulate(len(tokenized.examples[index].input_ids) for index in order)
        count = batch_size or max(1, sum(1 for _ in takewhile(token_budget.__ge__, tokens)))
        found.append(_pack(tokenized.examples, tuple(order[:count])))
        order = order[count:]
    return found


def _pack(examples: Sequence[TokenizedExample], indices: tuple[int, ...]) -> Packed:
    """The examples at the indices as one sequence."""
    chosen = [examples[index] for index in indices]
    lengths = torch.tensor([len(example.input_ids) for example in chosen])
    ids = torch.tensor([token for example in chosen for token in example.input_ids])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    segments = torch.arange(len(chosen)).repeat_interleave(lengths)
    starts = torch.tensor([max(example.answer_start, 1) for example in chosen])
    labels = torch.where(positions >= starts[segments], ids, IGNORED)
    return Packed(ids[None], positions[None], labels[None], segments, indices)
