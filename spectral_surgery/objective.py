"""Per-example losses and scores: what is measured and compared. Never a batch mean.

Transformers' own ``loss`` is a token mean over the batch, which weights an example by its share of the batch's tokens.
Here every example has its own value.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_surgery import processes
from spectral_surgery.calibration import IGNORED, Batch
from spectral_surgery.errors import RunError
from spectral_surgery.packing import Packed
from spectral_surgery.paired import apart_logits, is_apart

log = logging.getLogger(__name__)

Part = TypeVar("Part", Batch, list[int])
Result = TypeVar("Result")

AT_ONCE = 2**24
"""Logits that are held in float32 at a time: 64 MiB, and as much for their softmax."""

Loss = Callable[[Any, Any], Tensor]
"""(model, batch) -> one differentiable loss an example, shape (examples,)."""


def answer_loss(model: Any, batch: Batch | Packed) -> Float[Tensor, " examples"]:
    """Returns each example's mean negative log-likelihood over its answer tokens, in nats per token."""
    logits, labels, mask = _at_answers(model, batch)
    losses = token_losses(logits, labels)
    if isinstance(batch, Packed):
        return batch.at_answers(losses)
    return losses.new_zeros(mask.shape).masked_scatter(mask, losses).sum(1) / mask.sum(1)


def token_losses(
    logits: Float[Tensor, "tokens vocabulary"], labels: Int64[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Returns the cross-entropy at every token, in nats, at least in float32; differentiable once.

    Only some tokens' logits are in float32 at a time, forward and backward, so a large vocabulary in bfloat16 takes
    the logits themselves and their gradient, and nothing else of that size.
    """
    return _TokenLosses.apply(logits, labels)


class _TokenLosses(torch.autograd.Function):
    """``logsumexp(logits) - logits[label]``; the softmax of the backward pass is recomputed from the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        pieces = zip(_pieces(logits), _pieces(labels, logits), strict=True)
        losses = [cross_entropy(_exact(some), wanted, reduction="none") for some, wanted in pieces]
        ctx.save_for_backward(logits, labels)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        by_logits = torch.empty_like(logits)
        every = (_pieces(logits), _pieces(labels, logits), _pieces(grad, logits), _pieces(by_logits))
        for some, wanted, weight, result in zip(*every, strict=True):
            likely = _exact(some).softmax(-1)
            likely.scatter_add_(1, wanted[:, None], likely.new_full((len(wanted), 1), -1.0))
            result.copy_(likely.mul_(weight[:, None]))
        return by_logits, None


def _pieces(values: Tensor, logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns values in pieces of as many tokens as have :data:`AT_ONCE` logits."""
    vocabulary = (values if logits is None else logits).shape[-1]
    return values.split(max(AT_ONCE // vocabulary, 1))


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _at_answers(
    model: Any, batch: Batch | Packed
) -> tuple[Float[Tensor, "tokens vocabulary"], Int64[Tensor, " tokens"], Bool[Tensor, "examples wanted"]]:
    """Returns logits and label of every answer token, example after example, and where the examples have any.

    Each example's own positions alone go through the model's head, where that is a module that no adapter changes.
    """
    if isinstance(batch, Batch) and is_apart(model):
        logits, labels = apart_logits(model, batch)
        joined = False
    else:
        with _joining(_head(model), batch.labels[:, 1:] != IGNORED) as seen:
            logits, labels = _logits(model, batch)
        joined = bool(seen)
    mask = labels != IGNORED
    return (logits[0] if joined else logits[mask]), labels[mask], mask


def _head(model: Any) -> Any:
    """Returns the module that makes logits, or None where there is none or an adapter works on it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        head = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return None if hasattr(head, "base_layer") else head


@contextmanager
def _joining(head: Any, mask: Bool[Tensor, "examples positions"]) -> Iterator[list[bool]]:
    """Lets only the masked positions through a head while open: (examples, positions, in) becomes (1, tokens, in).

    Yields:
        A list that is empty until the head has taken them so.
    """
    joined: list[bool] = []
    if head is None:
        yield joined
        return
    wanted = mask[:, mask.any(0)]

    def join(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        some = {wanted.shape: wanted, (len(mask), mask.shape[1] + 1): mask}.get(hidden.shape[:2])
        if hidden.ndim != 3 or some is None:
            return None
        joined.append(True)
        return (hidden[:, : some.shape[1]][some.to(hidden.device)][None], *inputs[1:])

    handle = head.register_forward_pre_hook(join)
    try:
        yield joined
    finally:
        handle.remove()


def answer_logits(
    model: Any, batch: Batch | Packed
) -> tuple[Float[Tensor, "examples wanted vocabulary"], Int64[Tensor, "examples wanted"]]:
    """Returns the logits that predict answer tokens, and those tokens: -100 where an example has none.

    Logits are computed only at positions that predict an answer token of some example in the batch, where the model's
    forward has ``logits_to_keep``. Encoder-decoders and classifiers take prompt and answer apart.
    """
    return apart_logits(model, batch) if isinstance(batch, Batch) and is_apart(model) else _logits(model, batch)


def _logits(model: Any, batch: Batch | Packed) -> tuple[Tensor, Tensor]:
    labels = batch.labels[:, 1:]
    wanted = (labels != IGNORED).any(0).nonzero()[:, 0]
    keep = {"logits_to_keep": wanted} if _keeps_logits(model) else {}
    logits = model(**batch.inputs, use_cache=False, **keep).logits
    if logits.shape[:2] == batch.labels.shape:
        logits = logits[:, wanted]
    return logits, labels[:, wanted]


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Returns the model's greedy continuation of every prompt, without special tokens and surrounding white space.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        prompts: Texts as they are, or their token ids.
        max_new_tokens: Where an answer that does not end is cut.
        batch_size: Prompts generated at once.
    """
    encoded = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    found = continuations(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Returns the token ids that the model greedily puts after every prompt, the first end of text included.

    Prompts are padded on the left in batches of like length; a batch that does not fit into memory is halved. Several
    processes share the batches, and all get every answer.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one each.
        max_new_tokens: Where an answer that does not end is cut.
        batch_size: Prompts generated at once.
        progress: Called with (prompts done, prompts in all) of this process's share.

    Raises:
        RunError: If one prompt alone does not fit into memory.
    """
    ends = end_tokens(model, tokenizer)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = model.get_input_embeddings().weight.device

    def generate(numbers: list[int]) -> list[tuple[int, list[int]]]:
        ids, mask = _left_padded([prompts[i] for i in numbers], fill)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=fill,
        )
        return list(zip(numbers, [_up_to_end(row, ends) for row in out[:, ids.shape[1] :].tolist()], strict=True))

    def answered(share: list[list[int]]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for numbers in share:
            found.update(chain.from_iterable(in_halves(generate, numbers)))
            if progress:
                progress(len(found), sum(map(len, share)))
        return found

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    every = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = {number: ids for some in processes.dealt(every, answered) for number, ids in some.items()}
    return [found[i] for i in range(len(prompts))]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens with which an answer ends: the tokenizer's end of text, and those of the model's settings."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return {token for token in [*several, tokenizer.eos_token_id] if token is not None}


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    """Returns the ids up to the first that ends an answer; what comes after is padding."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]


def in_halves(function: Callable[[Part], Result], part: Part) -> list[Result]:
    """Returns what the function gives for the examples or, where they do not fit into memory, for parts in order.

    Args:
        function: What may run out of memory.
        part: A batch, or a list that stands for one.

    Raises:
        RunError: If one example alone does not fit.
    """
    try:
        return [function(part)]
    except torch.OutOfMemoryError as error:
        if len(part) == 1:
            raise RunError(
                "One example alone needs more memory than there is. Use --load-in-4bit or a smaller --max-length."
            ) from error
        log.warning("Out of memory with %d examples at once; going on with half of them.", len(part))
    half = (len(part) + 1) // 2
    return in_halves(function, part[:half]) + in_halves(function, part[half:])


def _left_padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[fill] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
