"""Per-example losses and scores: what is measured and compared. Never a batch mean.

Transformers' own ``loss`` is a token mean over the batch, which weights an example by its share of the batch's tokens.
Here every example has its own value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_surgery.calibration import Batch

Loss = Callable[[Any, Any], Tensor]
"""(model, batch) -> one differentiable loss an example, shape (examples,)."""


def answer_loss(model: Any, batch: Batch) -> Float[Tensor, " examples"]:
    """Returns each example's mean negative log-likelihood over its answer tokens, in nats per token.

    Logits are computed only at positions that predict an answer token of some example in the batch, where the model's
    forward has ``logits_to_keep``.
    """
    labels = batch.labels[:, 1:]
    wanted = (labels != -100).any(0).nonzero()[:, 0]
    keep = {"logits_to_keep": wanted} if _keeps_logits(model) else {}
    logits = model(**batch.inputs, use_cache=False, **keep).logits
    if logits.shape[1] != len(wanted):
        logits = logits[:, wanted]
    labels = labels[:, wanted]
    loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return loss.view(labels.shape).sum(1) / (labels != -100).sum(1)


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """Returns the model's greedy continuation of every prompt, without special tokens and surrounding white space.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer; prompts are padded on the left in batches of like length.
        prompts: Text as it is.
        max_new_tokens: Where an answer that does not end is cut.
        batch_size: Prompts generated at once.
    """
    answers = [""] * len(prompts)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    device = model.get_input_embeddings().weight.device
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        ids, mask = _left_padded([encoded[i] for i in chunk], fill)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=fill,
        )
        for i, row in zip(chunk, out[:, ids.shape[1] :], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def _left_padded(rows: Iterable[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    rows = list(rows)
    length = max(map(len, rows))
    ids = torch.tensor([[fill] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
