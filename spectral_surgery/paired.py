"""Prompt and answer apart: encoder-decoders, which read one and write the other, and classifiers of texts.

Both go through the same batches as language models: a row is the prompt's tokens followed by the answer's, and only
the model's own call takes them apart again. A classifier's answer is one "token", the number of its class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spectral_surgery.calibration import Batch, Tokenized, TokenizedExample
from spectral_surgery.errors import DataError
from spectral_surgery.formats import Example


def tokenize_apart(
    examples: Sequence[Example], tokenizer: Any, max_length: int, config: Any, *, classes: bool = False
) -> Tokenized:
    """Returns examples as token ids of prompt and answer, each tokenized for itself.

    Args:
        examples: What to tokenize.
        tokenizer: The base model's, or the adapter's own.
        max_length: Most tokens of a prompt, and of an answer; the end of a longer one is left out.
        config: The base model's configuration, which names the classes.
        classes: Whether answers are names or numbers of classes.

    Raises:
        DataError: If an answer is not a class of the model, or a prompt has no token.
    """
    tokenized, cut = [], 0
    for example in examples:
        prompt = list(tokenizer(example.prompt, verbose=False)["input_ids"])
        if not prompt:
            raise DataError(f"row {example.row} (counting from 0): the prompt {example.prompt[:40]!r} has no token.")
        answer = [_class(example, config)] if classes else list(tokenizer(text_target=example.answer)["input_ids"])
        cut += len(prompt) > max_length or len(answer) > max_length
        prompt, answer = prompt[:max_length], answer[:max_length]
        tokenized.append(TokenizedExample((*prompt, *answer), len(prompt), example.digest))
    return Tokenized(tokenized, cut)


def _class(example: Example, config: Any) -> int:
    name, known = example.answer.strip(), dict(config.label2id)
    if name in known:
        return int(known[name])
    if name.isdigit() and int(name) < len(known):
        return int(name)
    raise DataError(
        f"row {example.row} (counting from 0): the answer {name[:40]!r} is no class of this model. It has "
        f"{', '.join(map(str, known))}, or their numbers from 0 to {len(known) - 1}."
    )


def is_apart(model: Any) -> bool:
    """Returns whether a model takes prompt and answer apart."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False)) or _classifies(base)


def _classifies(base: Any) -> bool:
    return "ForSequenceClassification" in type(base).__name__


def apart_logits(
    model: Any, batch: Batch
) -> tuple[Float[Tensor, "examples wanted choices"], Int64[Tensor, "examples wanted"]]:
    """Returns the logits that predict each answer's tokens or class, and those: -100 after an answer's end."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    starts, ends = (batch.labels != -100).int().argmax(1).tolist(), batch.attention_mask.sum(1).tolist()
    fill = base.config.pad_token_id or 0
    prompts = _padded((row[:start] for row, start in zip(batch.input_ids, starts, strict=True)), fill)
    mask = _padded((row[:start] for row, start in zip(torch.ones_like(batch.input_ids), starts, strict=True)), 0)
    answers = (row[a:b] for row, a, b in zip(batch.input_ids, starts, ends, strict=True))
    labels = _padded(answers, -100)
    if _classifies(base):
        return model(input_ids=prompts, attention_mask=mask).logits[:, None], labels
    return model(input_ids=prompts, attention_mask=mask, labels=labels, use_cache=False).logits, labels


def _padded(rows: Iterable[Tensor], fill: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill)
