"""lm-evaluation-harness around a model that is already loaded: every task of a suite, per document.

One language-model object serves every variant; what changes between two calls of :func:`run` is the model inside it.
Several processes all build the same requests and share the answering. lm-evaluation-harness's own way, in which each
builds the requests of its documents, would give these other few-shot examples than one process has.
lm-evaluation-harness's two caches are never used: the one of answers does not notice that weights changed, and the one
of prompts does not notice changed data, few-shot seeds or generation settings.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import lm_eval.evaluator
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from spectral_surgery import processes
from spectral_surgery.evaluating.samples import Sample
from spectral_surgery.evaluating.tasks import quiet

SEED = 1234
"""lm-evaluation-harness's own default for few-shot examples, NumPy and torch."""


class Ledger:
    """Stands where lm-evaluation-harness would cache answers: counts requests, and notes which answers were cut."""

    def __init__(self, done: Callable[[], None] | None = None) -> None:
        self.done = done
        self.pending: deque[bool] = deque()
        self.cut: dict[str, bool] = {}
        """By prompt."""

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Notes a finished request; lm-evaluation-harness calls this once for each, in the order of a batch's rows."""
        if kind == "generate_until" and self.pending:
            self.cut[request[0]] = self.pending.popleft()
        if self.done:
            self.done()

    def truncated(self, sample: Sample) -> bool:
        """Returns whether a sample's answer ended at the token limit."""
        return any(self.cut.get(request[0], False) for request in sample["arguments"])


class LiveModel(HFLM):
    """A loaded model and its tokenizer, which knows of every generated answer whether it was cut at the limit."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, max_length: int) -> None:
        with quiet():
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=max_length
            )
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
        self.ledger = Ledger()

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        out = super()._model_generate(context, max_length, stop, **settings)
        self.ledger.pending.extend(self._cut(row, stop) for row in out[:, context.shape[1] :].tolist())
        return out

    def _cut(self, row: list[int], stop: list[str]) -> bool:
        """Returns whether generated tokens hold neither an end of text nor a stop."""
        text = self.tok_decode(row)
        return not (self.ends & set(row) or any(word and word in text for word in stop))

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As lm-evaluation-harness's, without its own bar; the documents are dealt out to all processes."""
        return self._dealt(super().generate_until, requests)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-evaluation-harness's, without its own bar; the documents are dealt out to all processes."""
        return self._dealt(super().loglikelihood, requests)

    def _dealt(self, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        """Returns the answers to all requests, in order; all processes get all of them."""

        def some(share: list[list[int]]) -> tuple[dict[int, Any], dict[str, bool]]:
            numbers = list(chain.from_iterable(share))
            answers = answer([requests[number] for number in numbers], disable_tqdm=True)
            return dict(zip(numbers, answers, strict=True)), self.ledger.cut

        found: dict[int, Any] = {}
        for answers, cut in processes.dealt(_documents(requests), some):
            found |= answers
            self.ledger.cut |= cut
        return [found[number] for number in range(len(requests))]


def _documents(requests: Sequence[Any]) -> list[list[int]]:
    """Returns the numbers of each document's requests, which share a prompt and so are answered together."""
    numbers = groupby(range(len(requests)), key=lambda number: (requests[number].task_name, requests[number].doc_id))
    return [list(group) for _, group in numbers]


def run(
    lm: Any,
    tasks: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    fewshot_seed: int = SEED,
    done: Callable[[], None] | None = None,
) -> tuple[dict[str, list[dict[str, Any]]], Ledger]:
    """Returns every task's samples, and which of their answers were cut.

    Args:
        lm: A language model of lm-evaluation-harness.
        tasks: Task objects by name.
        settings: What ``lm_eval.evaluator.evaluate`` takes: limit or samples, chat template, system instruction.
        fewshot_seed: Every task's examples are drawn anew from this seed, so that all variants see the same prompts.
        done: Called after every finished request.
    """
    ledger = Ledger(done)
    lm.ledger = lm.cache_hook = ledger
    random.seed(0)
    np.random.seed(SEED)  # noqa: NPY002 (tasks and filters of lm-evaluation-harness use the global generator)
    torch.manual_seed(SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=fewshot_seed)
    with quiet():
        found = lm_eval.evaluator.evaluate(
            lm, {"tasks": dict(tasks)}, bootstrap_iters=0, confirm_run_unsafe_code=True, **settings
        )
    assert found is not None
    return found["samples"], ledger
