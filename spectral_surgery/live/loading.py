"""Loading a base model with an adapter, after checking on a skeleton without weights that the two fit.

PEFT only warns, or says nothing, when an adapter's tensors match no module of the base; the model then runs without
the adapter. So a skeleton of the base is made on the meta device, PEFT itself injects the configuration into it, and
the tensor names and shapes that it then expects must be the file's.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_surgery import processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.adapter.kinds import plain_name
from spectral_surgery.errors import BaseModelError, DataError
from spectral_surgery.live.live import Live
from spectral_surgery.options import ModelOptions

if TYPE_CHECKING:
    from peft import PeftConfig
else:
    PeftConfig = Any

log = logging.getLogger(__name__)

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
"""Tasks that are measured from rows of text, and the class that loads their base models."""
HEAD = re.compile(r".*\.(score|classifier|classifier\.out_proj)\.weight")
"""The trained weight of a classifier, a row a class."""
EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+")
"""A module of one expert."""


def base_name(adapter: Adapter, options: ModelOptions) -> str:
    """Returns the base model's name or path: the option, else what the adapter records.

    Raises:
        BaseModelError: If neither names one, or the path does not exist.
    """
    name = options.base_model or adapter.config.base_model
    if not name:
        raise BaseModelError("The adapter records no base model. Pass --base-model.")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        origin = "given" if options.base_model else "recorded in the adapter"
        raise BaseModelError(f"The base model {name} {origin} is not a folder here. Pass --base-model.")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_config(adapter: Adapter, options: ModelOptions, *, tasks: Collection[str] = ("CAUSAL_LM",)) -> Any:
    """Returns the base model's configuration; a classifier's has as many classes as the adapter trained.

    Args:
        adapter: The adapter.
        options: Base model and revision.
        tasks: PEFT's task types that the caller can work with.

    Raises:
        BaseModelError: If it cannot be had, or the adapter's task is none of these.
    """
    from transformers import AutoConfig

    if adapter.config.task_type not in (None, *tasks):
        raise BaseModelError(
            f"The adapter's task is {adapter.config.task_type}, and the command line works on {', '.join(tasks)} "
            f"here. Load the model yourself and call spectral_surgery.measure(model, batches, loss=...)."
        )
    name = base_name(adapter, options)
    try:
        config = AutoConfig.from_pretrained(name, **_hub_arguments(adapter, options))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BaseModelError(f"The base model {name} cannot be found ({reason}). Pass --base-model.") from error
    heads = [tensor.shape[0] for name, tensor in adapter.tensors.items() if HEAD.fullmatch(name)]
    if adapter.config.task_type == "SEQ_CLS" and heads and heads[0] != config.num_labels:
        config.num_labels = heads[0]
    return config


def _auto_class(adapter: Adapter) -> Any:
    import transformers

    return getattr(transformers, TASKS.get(adapter.config.task_type or "CAUSAL_LM", "AutoModelForCausalLM"))


def load_tokenizer(adapter: Adapter, options: ModelOptions) -> Any:
    """Returns the tokenizer: the option's, else the one beside the adapter, else the base model's.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    beside = adapter.folder if adapter.folder and (adapter.folder / "tokenizer_config.json").is_file() else None
    name = options.tokenizer or beside or base_name(adapter, options)
    extra = {} if options.tokenizer or beside else _hub_arguments(adapter, options)
    try:
        return AutoTokenizer.from_pretrained(str(name), **extra)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BaseModelError(f"No tokenizer can be loaded from {name} ({reason}). Pass --tokenizer.") from error


def check_fits(adapter: Adapter, config: Any, *, trust_remote_code: bool = False) -> None:
    """Checks that the adapter's tensors are exactly those that PEFT expects on this base model.

    Args:
        adapter: The adapter.
        config: The base model's configuration; no weights are loaded.
        trust_remote_code: Run model code that comes with the base model.

    Raises:
        BaseModelError: If a module of either is missing in the other, or a shape differs.
    """
    expected = _expected_shapes(adapter, config, trust_remote_code)
    found = {
        plain_name(name): tuple(tensor.shape)
        for name, tensor in adapter.tensors.items()
        if ".lora_monteclora_sampler." not in name  # PEFT makes the samplers of training after the skeleton
    }
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected and "lora_" in name]
    if missing or foreign:
        raise BaseModelError(
            f"The adapter does not fit {config.model_type}: {len(foreign)} of its tensors match no module "
            f"({_first(foreign)}) and {len(missing)} that PEFT expects are not in it ({_first(missing)}). PEFT would "
            f"run the base model without them. Pass the --base-model that it was trained on."
        )
    if ignored := [name for name in found if name not in expected and not name.endswith(".base_layer.weight")]:
        log.warning(
            "%d tensors beside the LoRA factors are not loaded by PEFT: %s",
            len(ignored),
            _first(ignored),
        )
    pruned = adapter.config.raw.get("peft_type") == "ADALORA"  # PEFT cuts its factors when it reads the file
    expected = _pooled(adapter, expected)
    wrong = [name for name in expected if name in found and found[name] != expected[name] and not pruned]
    if wrong and not all("embed" in name or "lm_head" in name for name in wrong):
        raise BaseModelError(
            f"{wrong[0]}: the adapter has shape {found[wrong[0]]}, this base model needs {expected[wrong[0]]}. "
            f"Pass the --base-model that it was trained on."
        )


def check_invoked(adapter: Adapter, examples: Sequence[Any]) -> None:
    """Checks that an aLoRA's invocation tokens are in the rows; where they are not, it is not active.

    Args:
        adapter: The adapter.
        examples: With ``input_ids``.

    Raises:
        DataError: If they are in no row.
    """
    wanted = tuple(adapter.config.raw.get("alora_invocation_tokens") or ())
    if not wanted:
        return
    starts = [range(len(example.input_ids) - len(wanted) + 1) for example in examples]
    found = [
        any(tuple(example.input_ids[i : i + len(wanted)]) == wanted for i in places)
        for example, places in zip(examples, starts, strict=True)
    ]
    if not any(found):
        raise DataError(
            f"The adapter acts only from its invocation tokens {list(wanted)} on, and none of the {len(found)} rows "
            f"has them. Put the invocation text where it stood in training, before the answer."
        )
    if not all(found):
        log.warning("%d of %d rows do not have the adapter's invocation tokens.", found.count(False), len(found))


def load(
    adapter: Adapter,
    options: ModelOptions,
    *,
    paths: Iterable[str] | None = None,
    tokenizer: Any = None,
    checked: bool = False,
) -> Live:
    """Returns the base model with the adapter loaded, after :func:`check_fits`.

    Args:
        adapter: The adapter; one without a folder goes through a temporary one.
        options: Base model, dtype, devices, quantisation.
        paths: Module paths to be gated; by default all.
        tokenizer: By default loaded as :func:`load_tokenizer` does.
        checked: Whether :func:`check_fits` was called already.

    Raises:
        BaseModelError: If the base model cannot be loaded or does not fit.
    """
    if not checked:
        check_fits(adapter, load_config(adapter, options, tasks=TASKS), trust_remote_code=options.trust_remote_code)
    tokenizer = tokenizer or load_tokenizer(adapter, options)
    base = _load_base(adapter, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = adapter.folder if adapter.edited_from is None else None
        folder = folder or adapter.save(Path(scratch) / "adapter")
        model = _with_adapter(base, adapter, folder)
    if adapter.config.task_type == "SEQ_CLS" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which a classifier finds the end of a row
    return Live(model, adapter, tokenizer=tokenizer, paths=paths)


def _load_base(adapter: Adapter, options: ModelOptions) -> Any:
    name = base_name(adapter, options)
    arguments = _hub_arguments(adapter, options) | {"dtype": options.dtype}
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit or options.load_in_8bit:
        arguments["quantization_config"] = _quantization(options)
    if options.device_map or "quantization_config" in arguments:
        arguments["device_map"] = options.device_map or {"": options.device or default_device()}
    if adapter.config.task_type == "SEQ_CLS":
        arguments["config"] = load_config(adapter, options, tasks=TASKS)
    try:
        base = _auto_class(adapter).from_pretrained(name, **arguments)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BaseModelError(f"The base model {name} cannot be loaded ({reason}).") from error
    return base if "device_map" in arguments else base.to(options.device or default_device())


def _with_adapter(base: Any, adapter: Adapter, folder: Path) -> Any:
    from peft import PeftModel

    rows = [t.shape[0] for name, t in adapter.tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if rows and rows[0] != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows[0])
    return PeftModel.from_pretrained(base, str(folder)).eval()


def _quantization(options: ModelOptions) -> Any:
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute,
    )


def default_device() -> str:
    """Returns the first accelerator, else the CPU; of several processes each has its own."""
    if processes.count() > 1:
        return processes.device()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _hub_arguments(adapter: Adapter, options: ModelOptions) -> dict[str, Any]:
    recorded = adapter.config.base_revision if not options.base_model else None
    revision = options.revision or recorded
    arguments: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    return arguments | ({"revision": revision} if revision else {})


def _expected_shapes(adapter: Adapter, config: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor that PEFT would save for this configuration on this base."""
    from peft import get_peft_model, get_peft_model_state_dict

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            skeleton = _auto_class(adapter).from_config(config, trust_remote_code=trust_remote_code)
            _check_experts(adapter, skeleton)
            model = get_peft_model(skeleton, _peft_config(adapter))
        except BaseModelError:
            raise
        except (ValueError, AttributeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise BaseModelError(
                f"PEFT cannot place the adapter on {config.model_type} ({reason}). "
                f"Pass the --base-model that it was trained on."
            ) from error
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _pooled(adapter: Adapter, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes as QALoRA has them on a quantised base, which the skeleton is not."""
    if not adapter.config.raw.get("use_qalora"):
        return expected
    group = int(adapter.config.raw.get("qalora_group_size") or 16)
    return {
        name: (shape[0], shape[1] // group) if name.endswith(".lora_A.weight") else shape
        for name, shape in expected.items()
    }


def _check_experts(adapter: Adapter, skeleton: Any) -> None:
    """Refuses an adapter with a pair of factors an expert on a model whose experts are one parameter."""
    there = {name for name, _ in skeleton.named_modules()}
    layers = [place.layer for stored in adapter.stored.values() for place in stored.places]
    fused = [
        layer for layer in layers if layer not in there and (found := EXPERT.fullmatch(layer)) and found[1] in there
    ]
    if fused:
        wrong = " Its use_rslora does not survive that: PEFT makes the gate and up update sqrt(2) too large."
        raise BaseModelError(
            f"{fused[0]}: the adapter has factors of its own for every expert, and this model's experts are fused. "
            f"PEFT converts it at load, into components that mix gate and up projections and are not the file's. "
            f"Edits without data work on the file as it is. To measure, write it in the new layout first, by "
            f"PeftModel.from_pretrained(base, adapter).save_pretrained(folder)."
            + (wrong if adapter.config.raw.get("use_rslora") else "")
        )


def _peft_config(adapter: Adapter) -> PeftConfig:
    from peft import AdaLoraConfig, LoraConfig

    pruned = adapter.config.raw.get("peft_type") == "ADALORA"
    kind = AdaLoraConfig if pruned else LoraConfig
    known = kind.__dataclass_fields__.keys() - ({"rank_pattern"} if pruned else set())  # there it is what was pruned
    raw = {key: value for key, value in adapter.config.raw.items() if key in known and key != "runtime_config"}
    init = adapter.config.raw.get("init_lora_weights") == "mica" and "mica"
    return kind(**{**raw, "init_lora_weights": init, "inference_mode": True})


def _first(names: list[str]) -> str:
    return f"the first is {names[0]}" if names else "none"
