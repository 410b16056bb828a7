"""Everything about a training run that can be known, and be wrong, before the base model's weights load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_surgery.errors import BaseModelError, DataError, InputError, combine
from spectral_surgery.training.checkpoints import check_folders, unfinished
from spectral_surgery.training.methods import peft_config
from spectral_surgery.training.options import TrainOptions, faults
from spectral_surgery.training.recipes import Recipe, accumulation
from spectral_surgery.training.rows import TrainingRows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as accelerate or torchrun started them."""

    count: int
    """How many, over all machines; one device each."""
    rank: int
    """Which of them this is; 0 writes and speaks."""

    @classmethod
    def here(cls) -> Processes:
        """Returns what the environment says; one process where nothing launched it."""
        return cls(int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")))

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0


@dataclass(frozen=True)
class Prepared:
    """A checked training run."""

    options: TrainOptions
    recipe: Recipe
    """The numbers in force."""
    processes: Processes
    model_name: str
    """Hub id, or the absolute path of a local folder."""
    tokenizer: PreTrainedTokenizerBase
    rows: TrainingRows
    modules: tuple[str, ...]
    """Paths of the modules that get an adapter."""

    @property
    def accumulation(self) -> int:
        """Micro-batches a device and optimiser step (Eq. 9)."""
        return accumulation(self.recipe.global_batch, self.processes.count, self.recipe.micro_batch)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.options.schedule.max_steps or self.recipe.steps(len(self.rows.examples))

    def record(self, seed: int) -> dict[str, Any]:
        """Returns everything that decides what one seed's training gives, as plain JSON values."""
        options = self.options
        numbers = {
            key: value for key, value in asdict(self.recipe).items() if key not in ("name", "dataset", "training")
        }
        adapter = {
            name: getattr(options.adapter, name) for name in ("method", *METHOD_NUMBERS[options.adapter.method])
        }
        record = {
            "recipe": self.recipe.name,
            **adapter,
            **numbers,
            "base_model": self.model_name,
            "base_revision": options.base.revision,
            "dtype": str(dtype(options)).removeprefix("torch."),
            "load_in_4bit": options.base.load_in_4bit,
            "loss": options.loss,
            "prompts": options.prompts,
            "data": str(Path(self.rows.source).resolve()) if Path(self.rows.source).exists() else self.rows.source,
            "rows": len(self.rows.examples),
            "rows_sha256": self.rows.digest,
            "row_seed": options.rows.row_seed,
            "steps": self.steps,
            "devices": self.processes.count,
            "accumulation": self.accumulation,
            "seed": seed,
        }
        return json.loads(json.dumps(record))


METHOD_NUMBERS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "rslora": (),
    "dora": (),
    "pissa": (),
    "loraplus": ("loraplus_ratio",),
    "speclora": ("speclora_k", "delta_learning_rate"),
}
"""Options that only one method reads."""


def prepare(options: TrainOptions, processes: Processes | None = None) -> Prepared:
    """Returns the run with its rows tokenized and everything checked except the base model's weights.

    Args:
        options: What to train.
        processes: By default those of the environment.

    Raises:
        InputError: Whatever is wrong with options, output folder, rows or base model; what can be known together is
            named together.
    """
    processes = processes or Processes.here()
    own = [*faults(options, processes.count), *_launch_faults(options, processes)]
    folders = partial(check_folders, options) if processes.first else lambda: None
    _together(*(partial(combine, [fault]) for fault in own), folders)
    name = _model_name(options)
    tokenizer = load_tokenizer(name, options)
    config = load_config(name, options)
    modules, rows, _ = _together(
        lambda: module_paths(config, name, options),
        lambda: _within(load_rows(options, tokenizer), config),
        lambda: peft_config(options),
    )
    prepared = Prepared(options, options.numbers(), processes, name, tokenizer, rows, modules)
    if options.resume:
        _together(*(partial(unfinished, options.folder(s), prepared.record(s)) for s in options.schedule.seeds))
    return prepared


def _together(*checks: Callable[[], Any]) -> list[Any]:
    """Returns the results of all checks, or raises one error that names every fault."""
    found, results = [], []
    for check in checks:
        try:
            results.append(check())
        except InputError as error:
            found.append(str(error))
    combine(found)
    return results


def dtype(options: TrainOptions) -> torch.dtype:
    """Returns the type of base weights and arithmetic."""
    if options.base.dtype == "auto":
        return torch.float32 if on_cpu(options) else torch.bfloat16
    return torch.bfloat16 if options.base.dtype == "bfloat16" else torch.float32


def on_cpu(options: TrainOptions) -> bool:
    """Returns whether the CPU trains: asked for, by the launcher too, or for want of an accelerator."""
    launched = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return options.base.cpu or launched or torch.accelerator.current_accelerator(check_available=True) is None


def _launch_faults(options: TrainOptions, processes: Processes) -> list[str]:
    found = []
    for flag, what in {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}.items():
        if os.environ.get(flag, "false").lower() == "true":
            found.append(
                f"{what} is switched on in accelerate's configuration, and only plain data parallel training "
                f"is supported. Launch with --multi-gpu."
            )
    visible = 0 if on_cpu(options) else torch.accelerator.device_count()
    if processes.count == 1 and visible > 1:
        found.append(
            f"{visible} accelerators are visible to one process. Run it with: accelerate launch --num-processes "
            f"{visible} -m spectral_surgery train ..., or show it one with CUDA_VISIBLE_DEVICES=0."
        )
    return found


def _model_name(options: TrainOptions) -> str:
    """Returns the base model's Hub id, or the absolute path of its folder."""
    name = options.model
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BaseModelError(f"The base model {name} is not a folder here. Pass another --model.")
    return name


def load_tokenizer(name: str, options: TrainOptions) -> PreTrainedTokenizerBase:
    """Returns the base model's tokenizer, or the one that the options name.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = options.base.tokenizer or name
    extra = {} if options.base.tokenizer else hub_arguments(options)
    try:
        return AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"No tokenizer can be loaded from {source} ({first_line(error)}). Pass --tokenizer."
        ) from error


def hub_arguments(options: TrainOptions) -> dict[str, Any]:
    """Returns what every ``from_pretrained`` of the base model is given."""
    revision = {"revision": options.base.revision} if options.base.revision else {}
    return {"trust_remote_code": options.base.trust_remote_code, **revision}


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_config(name: str, options: TrainOptions) -> Any:
    """Returns the base model's configuration.

    Raises:
        BaseModelError: If it cannot be had.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **hub_arguments(options))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"The base model {name} cannot be found ({first_line(error)}). Pass another --model."
        ) from error


def _within(rows: TrainingRows, config: Any) -> TrainingRows:
    """Returns the rows, which must not be longer than the base model can read.

    Raises:
        DataError: If one is.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(example.input_ids) for example in rows.examples)
    if most and longest > most:
        raise DataError(
            f"{rows.source}: the longest row has {longest} tokens, and the base model reads at most {most}. Pass "
            f"--max-length {most}."
        )
    return rows


def module_paths(config: Any, name: str, options: TrainOptions) -> tuple[str, ...]:
    """Returns the modules that get an adapter, found on a skeleton of the base model without weights.

    Raises:
        InputError: If a name fits no linear layer of it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=options.base.trust_remote_code)
    output = skeleton.get_output_embeddings()
    linear = [
        path
        for path, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    ]
    wanted = options.numbers().modules
    if wanted == ("all-linear",):
        return tuple(linear)
    ends = {kind: [path for path in linear if f".{path}".endswith(f".{kind}")] for kind in wanted}
    if missing := [kind for kind, paths in ends.items() if not paths]:
        there = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in linear))
        raise InputError(
            f"The base model {name} has no linear layer {', '.join(missing)}; it has {there}. Pass --modules."
        )
    chosen = {path for paths in ends.values() for path in paths}
    return tuple(path for path in linear if path in chosen)
