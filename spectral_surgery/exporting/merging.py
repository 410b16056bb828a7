"""The base model with an adapter merged into its weights, and how far that model is from the adapter.

Every adapted weight is merged in float32 and rounded once to the dtype that is written; the other weights are those of
the base. PEFT does the merging, so every kind of adapter that it can merge is merged by its own rule.

How close the result is, is measured and not assumed: the written folder is loaded again, and at every token of some
texts its prediction is held against that of the base with the adapter beside it. Beside the divergence stands that of
the base alone, because what is small is decided by what the adapter does.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spectral_surgery.adapter import Adapter, saving
from spectral_surgery.calibration import Tokenized, batches, load_examples, tokenize
from spectral_surgery.divergence import Agreement, Divergence, Reference, evaluating, reference
from spectral_surgery.errors import BaseModelError, combine
from spectral_surgery.exporting.probe import sentences
from spectral_surgery.formats import DataOptions
from spectral_surgery.live import loading
from spectral_surgery.options import ModelOptions

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

LENGTH = 256
"""Most tokens of a text that is compared."""
ROWS = 64
"""Most texts that are compared."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "shared")
"""Last names of modules whose weights are often one."""


@dataclass(frozen=True)
class Parity:
    """The merged model against the adapter on its base, at every token of some texts."""

    divergence: float
    """KL(adapter || merged), mean over tokens, nats per token."""
    worst: float
    """The largest mean of one text."""
    agreement: float
    """Share of tokens at which both have the same likeliest next token, in [0, 1]."""
    base_divergence: float
    """KL(adapter || base without the adapter), mean over tokens: what the adapter does."""
    base_agreement: float
    """Share of tokens at which adapter and base have the same likeliest next token."""
    texts: int
    tokens: int
    dtype: str
    """Of the merged weights."""


@dataclass(frozen=True)
class Plan:
    """What a merge needs except the base model's weights."""

    adapter: Adapter
    options: ModelOptions
    tokenizer: Any
    texts: Tokenized


def prepare(adapter: Adapter, options: ModelOptions, data: str | None) -> Plan:
    """Returns the plan of a merge, after checking everything that can be known without the base model's weights.

    Args:
        adapter: What to merge.
        options: The base model; ``dtype`` is what is written, ``auto`` the base's own.
        data: Rows to compare on; by default a few sentences of the package.

    Raises:
        InputError: If the adapter does not fit, the base is stored or asked for quantised, or the rows cannot be read.
    """
    if options.load_in_4bit or options.load_in_8bit:
        raise BaseModelError(QUANTISED)
    if adapter.config.task_type not in (None, "CAUSAL_LM"):
        raise BaseModelError(
            f"The adapter's task is {adapter.config.task_type}, and only models that generate text are merged and "
            f"compared here. Load the model with PEFT and call merge_and_unload."
        )
    config = loading.load_config(adapter, options)
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise BaseModelError(
            f"The base model {loading.base_name(adapter, options)} is stored quantised ({_plain(method)}). Merging "
            f"into quantised weights would round the update away. Pass the unquantised --base-model that it was made "
            f"from: the adapter is merged into that, and the result can be quantised afterwards."
        )
    faults = [f"{field} is switched on: {UNMERGED[field]}." for field in UNMERGED if adapter.config.raw.get(field)]
    combine([*faults, *_tied_faults(adapter, config)], BaseModelError)
    loading.check_fits(adapter, config, trust_remote_code=options.trust_remote_code)
    tokenizer = loading.load_tokenizer(adapter, options)
    return Plan(adapter, options, tokenizer, _texts(adapter, tokenizer, data))


QUANTISED = (
    "A model is not merged in 4 or 8 bits: rounding the merged weights would destroy most of the update. Leave "
    "--load-in-4bit and --load-in-8bit out: the adapter is merged into the unquantised base, and the result can be "
    "quantised afterwards."
)


UNMERGED = {
    "alora_invocation_tokens": "aLoRA acts only from its invocation tokens on, which no merged weight can. Serve the "
    "adapter beside the base",
    "layer_replication": "replicated layers share one base weight, which cannot hold several updates. Serve the "
    "adapter beside the base",
}
"""Fields of adapters that no single weight can hold, with the reason."""

TIED = (
    "shares its weight with another module of this base (tie_word_embeddings), so merging the adapter into one would "
    "change the other. Serve the adapter beside the base instead."
)


def _plain(method: Any) -> str:
    return str(getattr(method, "value", method))


def _tied_faults(adapter: Adapter, config: Any) -> Iterator[str]:
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return
    names = [path for path in adapter.updates if path.rpartition(".")[2] in EMBEDDINGS]
    if names and not adapter.config.raw.get("ensure_weight_tying"):
        yield f"{names[0]} {TIED}"
    ends = tuple(f"{name}.weight" for name in EMBEDDINGS)
    trained = {name: tensor for name, tensor in adapter.tensors.items() if name.endswith(ends)}
    if trained and not (len(trained) == 2 and torch.equal(*trained.values())):
        yield f"{next(iter(trained))} was trained in full, and {TIED}"


def _texts(adapter: Adapter, tokenizer: Any, data: str | None) -> Tokenized:
    if data:
        options = DataOptions(examples=ROWS)
        examples = load_examples(data, options, tokenizer, adapter.folder)[:ROWS]
    else:
        examples = sentences()
    return tokenize(examples, tokenizer, LENGTH)


def merge(
    plan: Plan,
    output: Path,
    *,
    manifest: Callable[[Parity], dict[str, Any]],
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Parity:
    """Writes the merged model with its tokenizer to a folder as one step, and returns its parity with the adapter.

    Args:
        plan: From :func:`prepare`.
        output: Folder to write.
        manifest: What to record, given the parity.
        overwrite: Replace a folder that spectral-surgery wrote.
        progress: Told what is being done.

    Raises:
        BaseModelError: If the base model cannot be loaded.
        RunError: If a prediction is not finite, or writing fails; the target is then as it was.
    """
    progress("Loading the base model")
    stored = _with_dtype(plan.options, "auto")
    live = loading.load(plan.adapter, stored, tokenizer=plan.tokenizer, checked=True)
    if any(weight.is_meta for weight in live.model.parameters()):
        raise BaseModelError(
            "The base model does not fit into memory as it was spread, and parts of it are offloaded. Merging needs "
            "all weights at once: pass --device cpu in place of --device-map."
        )
    progress("Predicting with the adapter beside the base")
    expected = reference(live, plan.texts)
    with live.base():
        base = _against(live.model, plan.texts, expected)
    progress("Merging")
    model = _merged(live.model, None if plan.options.dtype == "auto" else getattr(torch, plan.options.dtype))
    kind, dtype = type(model), str(model.dtype).removeprefix("torch.")
    device = live.device
    del live
    found: list[Parity] = []

    def write(new: Path) -> None:
        nonlocal model
        model.save_pretrained(new)
        plan.tokenizer.save_pretrained(new)
        model = None
        gc.collect()
        progress("Loading the merged model and predicting with it")
        there = {"device_map": plan.options.device_map or {"": device}}
        again = kind.from_pretrained(new, dtype="auto", trust_remote_code=plan.options.trust_remote_code, **there)
        found.append(_parity(again.eval(), plan.texts, expected, base, dtype))
        saving.write_json(new / saving.MANIFEST, manifest(found[0]))

    sources = (plan.adapter.folder,) if plan.adapter.folder else ()
    saving.write_folder(output, write, overwrite=overwrite, sources=sources)
    return found[0]


def _with_dtype(options: ModelOptions, dtype: str) -> ModelOptions:
    return ModelOptions(**{**vars(options), "dtype": dtype})


@torch.no_grad()
def _merged(model: PeftModel, dtype: torch.dtype | None) -> Any:
    """Returns the base model of a PEFT model with every adapter layer merged in float32, in another dtype if asked."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        with _in_float32(layer.get_base_layer(), dtype):
            try:
                layer.merge()
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise BaseModelError(f"PEFT cannot merge this adapter: {error} Serve it beside the base.") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload()
    return merged if dtype is None else merged.to(dtype)


@contextmanager
def _in_float32(layer: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Holds a layer's weights in float32 while open; afterwards each has the given dtype, or its own again."""
    weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
    before = [weight.dtype for weight in weights]
    layer.float()
    try:
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            weight.data = weight.data.to(dtype or own)


@torch.no_grad()
def _against(model: Any, texts: Tokenized, expected: Reference) -> tuple[list[float], list[float]]:
    """Returns divergence and agreement of every text, in the order of the texts."""
    scores = Divergence(expected, texts), Agreement(expected, texts)
    found: tuple[dict[int, float], dict[int, float]] = ({}, {})
    with evaluating(model):
        for batch in batches(texts):
            there = batch.to(model.get_input_embeddings().weight.device)
            for score, values in zip(scores, found, strict=True):
                values |= dict(zip(batch.indices, score(model, there).tolist(), strict=True))
    first, second = ([values[i] for i in range(len(texts.examples))] for values in found)
    return first, second


def _parity(
    model: Any, texts: Tokenized, expected: Reference, base: tuple[list[float], list[float]], dtype: str
) -> Parity:
    divergence, agreement = _against(model, texts, expected)
    tokens = [len(example.input_ids) - example.answer_start for example in texts.examples]

    def mean(values: list[float]) -> float:
        return sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)

    return Parity(
        divergence=max(0.0, mean(divergence)),  # the rounding of float32 may take it below
        worst=max(divergence),
        agreement=mean(agreement),
        base_divergence=max(0.0, mean(base[0])),
        base_agreement=mean(base[1]),
        texts=len(tokens),
        tokens=sum(tokens),
        dtype=dtype,
    )
