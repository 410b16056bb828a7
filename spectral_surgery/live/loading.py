"""Loading a base model with an adapter, after checking on a skeleton without weights that the two fit.

PEFT only warns, or says nothing, when an adapter's tensors match no module of the base; the model then runs without
the adapter. So a skeleton of the base is made on the meta device, PEFT itself injects the configuration into it, and
the tensor names and shapes that it then expects must be the file's.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import BaseModelError
from spectral_surgery.live.live import Live
from spectral_surgery.options import ModelOptions

if TYPE_CHECKING:
    from peft import PeftConfig
else:
    PeftConfig = Any

log = logging.getLogger(__name__)


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


def load_config(adapter: Adapter, options: ModelOptions) -> Any:
    """Returns the base model's configuration.

    Raises:
        BaseModelError: If it cannot be had, or the adapter's task is not text generation.
    """
    from transformers import AutoConfig

    if adapter.config.task_type not in (None, "CAUSAL_LM"):
        raise BaseModelError(
            f"The adapter's task is {adapter.config.task_type}, and the command line measures CAUSAL_LM. "
            f"Load the model yourself and call spectral_surgery.measure(model, batches, loss=...)."
        )
    name = base_name(adapter, options)
    try:
        return AutoConfig.from_pretrained(name, **_hub_arguments(adapter, options))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BaseModelError(f"The base model {name} cannot be found ({reason}). Pass --base-model.") from error


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
    found = {_plain_name(name): tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected and "lora_" in name]
    if missing or foreign:
        raise BaseModelError(
            f"The adapter does not fit {config.model_type}: {len(foreign)} of its tensors match no module "
            f"({_first(foreign)}) and {len(missing)} that PEFT expects are not in it ({_first(missing)}). PEFT would "
            f"run the base model without them. Pass the --base-model that it was trained on."
        )
    if ignored := [name for name in found if name not in expected]:
        log.warning(
            "%d tensors beside the LoRA factors are not loaded by PEFT: %s",
            len(ignored),
            _first(ignored),
        )
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if wrong and not all("embed" in name or "lm_head" in name for name in wrong):
        raise BaseModelError(
            f"{wrong[0]}: the adapter has shape {found[wrong[0]]}, this base model needs {expected[wrong[0]]}. "
            f"Pass the --base-model that it was trained on."
        )


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
        check_fits(adapter, load_config(adapter, options), trust_remote_code=options.trust_remote_code)
    tokenizer = tokenizer or load_tokenizer(adapter, options)
    base = _load_base(adapter, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = adapter.folder if adapter.edited_from is None else None
        folder = folder or adapter.save(Path(scratch) / "adapter")
        model = _with_adapter(base, adapter, folder)
    return Live(model, adapter, tokenizer=tokenizer, paths=paths)


def _load_base(adapter: Adapter, options: ModelOptions) -> Any:
    from transformers import AutoModelForCausalLM

    name = base_name(adapter, options)
    arguments = _hub_arguments(adapter, options) | {"dtype": options.dtype}
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit or options.load_in_8bit:
        arguments["quantization_config"] = _quantization(options)
    if options.device_map or "quantization_config" in arguments:
        arguments["device_map"] = options.device_map or {"": options.device or default_device()}
    try:
        base = AutoModelForCausalLM.from_pretrained(name, **arguments)
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
    """Returns the first accelerator, else the CPU."""
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
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            model = get_peft_model(skeleton, _peft_config(adapter))
        except (ValueError, AttributeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise BaseModelError(
                f"PEFT cannot place the adapter on {config.model_type} ({reason}). "
                f"Pass the --base-model that it was trained on."
            ) from error
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _peft_config(adapter: Adapter) -> PeftConfig:
    from peft import LoraConfig

    known = LoraConfig.__dataclass_fields__
    raw = {key: value for key, value in adapter.config.raw.items() if key in known and key != "runtime_config"}
    return LoraConfig(**{**raw, "init_lora_weights": False, "inference_mode": True})


def _plain_name(name: str) -> str:
    """Returns a tensor name without an adapter's name in it, as PEFT writes it."""
    for end in (".weight", ".bias"):
        for side in ("lora_A", "lora_B"):
            head, infix, tail = name.rpartition(f".{side}.")
            if infix and tail.endswith(end) and tail != end[1:]:
                return f"{head}{infix}{end[1:]}"
    return name


def _first(names: list[str]) -> str:
    return f"the first is {names[0]}" if names else "none"
