"""How far a model's answers have moved from a reference model's: KL divergence per example, and agreement.

At every answer position the reference model (the base, or the unedited adapter) has a distribution over the next
token. :func:`reference` runs it once and keeps the k most likely tokens and, as one more bucket, what is left: with
p for the reference and q for the model,

    KL = sum_{i in top k} p_i (log p_i - log q_i)  +  p_tail (log p_tail - log q_tail).

Merging tokens into a bucket can only lessen a divergence, so this is a lower bound of the KL over the whole
vocabulary, and equal to it where the vocabulary has no more than k tokens. The direction KL(p || q) asks the model to
keep everything that the reference would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from spectral_surgery import processes
from spectral_surgery.calibration import IGNORED, Batch, Tokenized, batches
from spectral_surgery.errors import DataError, RunError
from spectral_surgery.live import Live
from spectral_surgery.objective import answer_logits, in_halves
from spectral_surgery.options import BatchOptions

TOP = 256
"""Tokens kept at a position; the rest is one bucket."""
IMPOSSIBLE = -1e4
"""Log-probabilities below this count as this, so that a token masked to minus infinity gives 0, not NaN."""


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a model says at each answer position of one example, or of several one after the other."""

    ids: Int32[Tensor, "positions top"]
    """The most likely tokens, the first of them first."""
    log_probs: Float[Tensor, "positions buckets"]
    """Their log-probabilities, then that of all other tokens together where there are others."""


@dataclass(frozen=True)
class Reference:
    """What a model says at every answer position of some examples."""

    predicted: Mapping[str, Predicted]
    """By content hash of the example."""

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(kept.ids.nbytes + kept.log_probs.nbytes for kept in self.predicted.values())


@torch.no_grad()
def reference(
    model: Live | Any,
    tokenized: Tokenized,
    batching: BatchOptions | None = None,
    k: int = TOP,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Returns what the model, as it now computes, says at every answer position.

    For the base model, open :meth:`Live.base` around the call; for the unedited adapter, nothing. Several processes
    share the batches, and all get every prediction.

    Args:
        model: A :class:`Live`, or any causal model.
        tokenized: The examples; equal ones are kept once.
        batching: How they are batched; a batch that does not fit into memory is halved.
        k: Most tokens kept at a position.
        progress: Called with (examples done, examples in all) of this process's share.

    Raises:
        RunError: If a prediction is not finite, or one example alone does not fit into memory.
    """
    network = model.model if isinstance(model, Live) else model

    def some(share: list[Batch]) -> dict[str, Predicted]:
        predicted: dict[str, Predicted] = {}
        done = 0
        for batch in share:
            found = chain.from_iterable(in_halves(lambda part: _predictions(network, part, k), batch))
            digests = [tokenized.examples[index].digest for index in batch.indices]
            predicted.update(zip(digests, found, strict=True))
            done += len(batch.indices)
            if progress:
                progress(done, sum(len(batch.indices) for batch in share))
        return predicted

    with evaluating(network):
        shares = processes.dealt(_batches(tokenized, batching or BatchOptions()), some)
    return Reference({digest: kept for predicted in shares for digest, kept in predicted.items()})


def _predictions(model: Any, batch: Batch, k: int) -> list[Predicted]:
    """Returns what the model says at the answer positions of each example, on the CPU."""
    logits, labels = answer_logits(model, batch.to(model.get_input_embeddings().weight.device))
    mask = labels != IGNORED
    found, counts = _most_likely(_at_least_float32(logits[mask]), k), mask.sum(1).tolist()
    pieces = zip(found.ids.cpu().split(counts), found.log_probs.cpu().split(counts), strict=True)
    return [Predicted(ids.clone(), log_probs.clone()) for ids, log_probs in pieces]


class _Against:
    """Scores a model's predictions on some examples against a reference's.

    Args:
        reference: Of the same examples, tokenized alike.
        tokenized: Whose positions a batch's ``indices`` are.

    Raises:
        DataError: If the reference lacks an example, or has another number of answer tokens for one.
    """

    def __init__(self, reference: Reference, tokenized: Tokenized) -> None:
        self.reference, self.tokenized = reference, tokenized
        for number, example in enumerate(tokenized.examples):
            kept = reference.predicted.get(example.digest)
            tokens = len(example.input_ids) - example.answer_start
            if kept is None or len(kept.ids) != tokens:
                held = "nothing" if kept is None else f"{len(kept.ids)} positions"
                raise DataError(
                    f"example {number} has {tokens} answer tokens, but the reference holds {held} for it; make the "
                    "reference on the same examples, with the same tokenizer and --max-length."
                )

    def __call__(self, model: Any, batch: Batch) -> Float[Tensor, " examples"]:
        """Returns the mean over each example's answer positions."""
        logits, labels = answer_logits(model, batch)
        mask = labels != IGNORED
        at_positions = self._positions(_at_least_float32(logits[mask]), self._kept(batch, logits.device))
        return _row_means(at_positions, mask)

    def _positions(
        self, logits: Float[Tensor, "positions vocabulary"], kept: Predicted
    ) -> Float[Tensor, " positions"]:
        raise NotImplementedError

    def _kept(self, batch: Batch, device: torch.device) -> Predicted:
        """Returns the reference's predictions at the batch's answer positions, example after example."""
        kept = [self.reference.predicted[self.tokenized.examples[index].digest] for index in batch.indices]
        return Predicted(
            torch.cat([one.ids for one in kept]).to(device), torch.cat([one.log_probs for one in kept]).to(device)
        )


class Divergence(_Against):
    """KL(reference || model) per example, mean over its answer positions, in nats per token; differentiable.

    A :data:`~spectral_surgery.objective.Loss`. Zero, up to the rounding of float32, where the model is the reference.
    """

    def _positions(
        self, logits: Float[Tensor, "positions vocabulary"], kept: Predicted
    ) -> Float[Tensor, " positions"]:
        ours = _buckets(logits, kept.ids.long()).clamp(min=IMPOSSIBLE)
        theirs = kept.log_probs.to(ours.dtype).clamp(min=IMPOSSIBLE)
        return (theirs.exp() * (theirs - ours)).sum(1)


class Agreement(_Against):
    """Share of an example's answer positions at which the model's likeliest token is the reference's; no gradient.

    A token as likely as the likeliest counts as it: in bfloat16 two are often exactly alike.
    """

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch) -> Float[Tensor, " examples"]:
        """Returns the share for each example."""
        return super().__call__(model, batch)

    def _positions(
        self, logits: Float[Tensor, "positions vocabulary"], kept: Predicted
    ) -> Float[Tensor, " positions"]:
        chosen = logits.gather(1, kept.ids[:, :1].long())[:, 0]
        return (chosen >= logits.amax(1)).to(logits.dtype)


def _most_likely(logits: Float[Tensor, "positions vocabulary"], k: int) -> Predicted:
    """Returns the k likeliest tokens, and the rest as one bucket.

    Raises:
        RunError: If a position has no finite distribution.
    """
    ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    log_probs = _buckets(logits, ids)
    if log_probs.isnan().any():
        raise RunError(
            "The model's predictions are not finite, so nothing can be compared with them. Use --dtype bfloat16 or "
            "float32."
        )
    return Predicted(ids.int(), log_probs)


def _buckets(
    logits: Float[Tensor, "positions vocabulary"], ids: Int64[Tensor, "positions top"]
) -> Float[Tensor, "positions buckets"]:
    """Returns log-probabilities of the given tokens and, where others exist, of all others together.

    The tail is summed over its own tokens: one minus the rest would lose it where it is small.
    """
    total = logits.logsumexp(-1, keepdim=True)
    top = logits.gather(-1, ids) - total
    if ids.shape[-1] == logits.shape[-1]:
        return top
    tail = logits.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True) - total
    return torch.cat([top, tail], dim=-1)


def _row_means(
    values: Float[Tensor, " positions"], mask: Bool[Tensor, "examples wanted"]
) -> Float[Tensor, " examples"]:
    """Returns the mean over each row's true places of values given for all true places, row after row."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1) / mask.sum(1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _batches(tokenized: Tokenized, batching: BatchOptions) -> list[Batch]:
    size = None if batching.batch_size == "auto" else batching.batch_size
    return batches(tokenized, token_budget=batching.tokens, batch_size=size)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switches dropout and the like off while open; afterwards every module is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
