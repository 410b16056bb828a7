"""Per-example losses and scores: what is measured and compared. Never a batch mean.

Transformers' own ``loss`` is a token mean over the batch, which weights an example by its share of the batch's tokens.
Here every example has its own value.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_surgery.calibration import Batch
from spectral_surgery.errors import RunError
from spectral_surgery.paired import apart_logits, is_apart

log = logging.getLogger(__name__)

Part = TypeVar("Part", Batch, list[int])
Result = TypeVar("Result")

Loss = Callable[[Any, Any], Tensor]
"""(model, batch) -> one differentiable loss an example, shape (examples,)."""


def answer_loss(model: Any, batch: Batch) -> Float[Tensor, " examples"]:
    """Returns each example's mean negative log-likelihood over its answer tokens, in nats per token."""
    logits, labels = answer_logits(model, batch)
    loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return loss.view(labels.shape).sum(1) / (labels != -100).sum(1)


def answer_logits(
    model: Any, batch: Batch
) -> tuple[Float[Tensor, "examples wanted vocabulary"], Int64[Tensor, "examples wanted"]]:
    """Returns the logits that predict answer tokens, and those tokens: -100 where an example has none.

    Logits are computed only at positions that predict an answer token of some example in the batch, where the model's
    forward has ``logits_to_keep``. Encoder-decoders and classifiers take prompt and answer apart.
    """
    if is_apart(model):
        return apart_logits(model, batch)
    labels = batch.labels[:, 1:]
    wanted = (labels != -100).any(0).nonzero()[:, 0]
    keep = {"logits_to_keep": wanted} if _keeps_logits(model) else {}
    logits = model(**batch.inputs, use_cache=False, **keep).logits
    if logits.shape[1] != len(wanted):
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

    Prompts are padded on the left in batches of like length; a batch that does not fit into memory is halved.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one each.
        max_new_tokens: Where an answer that does not end is cut.
        batch_size: Prompts generated at once.
        progress: Called with (prompts done, prompts in all).

    Raises:
        RunError: If one prompt alone does not fit into memory.
    """
    ends = end_tokens(model, tokenizer)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = model.get_input_embeddings().weight.device

    def generate(numbers: list[int]) -> list[list[int]]:
        ids, mask = _left_padded([prompts[i] for i in numbers], fill)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=fill,
        )
        return [_up_to_end(row, ends) for row in out[:, ids.shape[1] :].tolist()]

    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        found.update(zip(numbers, chain.from_iterable(in_halves(generate, numbers)), strict=True))
        if progress:
            progress(len(found), len(prompts))
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
