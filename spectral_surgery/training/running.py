"""The training itself, by TRL's SFTTrainer, and what it leaves behind.

TRL is given tokens and labels as they are, so what it would add, cut or mask by itself does not apply. The loss is the
mean over all labelled tokens of a global batch, whatever the number of devices and micro-batches.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_surgery.errors import BaseModelError, RunError
from spectral_surgery.training import methods, preparing
from spectral_surgery.training.checkpoints import begin, finished, unfinished, work_folder
from spectral_surgery.training.options import TrainOptions
from spectral_surgery.training.preparing import Prepared
from spectral_surgery.training.results import LossCurve, write_adapter
from spectral_surgery.training.rows import columns

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer
else:
    SFTConfig = SFTTrainer = Any

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(optimiser steps done, optimiser steps in all)."""


@dataclass(frozen=True)
class Trained:
    """One seed's training."""

    seed: int
    folder: Path
    """The adapter."""
    curve: LossCurve
    work: Path | None
    """Folder of the checkpoints, where they were kept."""


def train(options: TrainOptions, *, progress: Progress | None = None) -> list[Trained]:
    """Trains and writes one adapter a seed, and returns what came out.

    Args:
        options: What to train.
        progress: Called after every optimiser step of all seeds together.

    Raises:
        InputError: Whatever is wrong before the base model's weights load.
        RunError: If the loss is not finite, memory runs out, or saving fails.
    """
    return train_prepared(preparing.prepare(options), progress=progress)


def train_prepared(prepared: Prepared, *, progress: Progress | None = None) -> list[Trained]:
    """Trains a checked run; see :func:`train`."""
    seeds = prepared.options.schedule.seeds
    found = []
    for place, seed in enumerate(seeds):
        if prepared.options.resume and finished(prepared.options.folder(seed), prepared.record(seed)):
            log.info("%s is trained already.", prepared.options.folder(seed))
            continue

        def told(done: int, of_one: int, place: int = place) -> None:
            if progress and prepared.processes.first:
                progress(place * of_one + done, len(seeds) * of_one)

        found.append(_train_seed(prepared, seed, told))
        _free_memory()
    return found


def _free_memory() -> None:
    """Gives back what a finished training held, to the next seed or to refining."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave_group(prepared: Prepared) -> None:
    """Ends the group of processes, after which each goes on alone."""
    if prepared.processes.count > 1:
        torch.distributed.destroy_process_group()


def _train_seed(prepared: Prepared, seed: int, progress: Progress) -> Trained:
    options, first = prepared.options, prepared.processes.first
    folder, record = options.folder(seed), prepared.record(seed)
    checkpoint = unfinished(folder, record) if options.resume else None
    work = begin(folder, record, resume=options.resume) if first else work_folder(folder)
    trainer = _trainer(prepared, seed, work, resumed=checkpoint is not None)
    trainer.add_callback(_watch(progress))
    with _naming(work if first else None):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = LossCurve.of(trainer.state.log_history)
    if first:
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_adapter(prepared, seed, model, curve, folder, work)
        if not options.keep_checkpoints:
            shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()
    return Trained(seed, folder, curve, work if options.keep_checkpoints else None)


@contextmanager
def _naming(work: Path | None) -> Iterator[None]:
    """Says, when a training ends early, where its checkpoints are, and what helps where memory ran out."""
    try:
        yield
    except BaseException as error:
        if work and any(work.glob("checkpoint-*")):
            log.info("Checkpoints are in %s; the same command with --resume goes on from the last.", work)
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError(
                "Memory ran out. Pass --gradient-checkpointing, --load-in-4bit, or less --micro-batch or --max-length."
            ) from error
        raise


def _trainer(prepared: Prepared, seed: int, work: Path, *, resumed: bool) -> SFTTrainer:
    """Returns TRL's trainer over the base model with its adapter."""
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import SFTTrainer as Trainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    options = prepared.options
    set_seed(seed)
    model = methods.adapted(_load_base(prepared), options, work, resumed=resumed, write=prepared.processes.first)
    _record_base(model, options.base.base_name or prepared.model_name)
    tokenizer = prepared.tokenizer
    padding = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    trainer = Trainer(
        model=model,
        args=sft_config(prepared, seed, work),
        train_dataset=Dataset.from_dict(columns(prepared.rows.examples)),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=padding),
    )
    trainer.remove_callback(PrinterCallback)
    # TRL puts the adapter of a quantised base into bfloat16, where small steps are lost.
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    trainer.optimizer = methods.optimizer(trainer.model, options)
    if trainer.accelerator.num_processes != prepared.processes.count:
        raise RunError(
            f"{trainer.accelerator.num_processes} processes train together and the environment said "
            f"{prepared.processes.count}. Launch with accelerate launch or torchrun."
        )
    return trainer


def sft_config(prepared: Prepared, seed: int, work: Path) -> SFTConfig:
    """Returns TRL's settings of one seed's training."""
    from trl import SFTConfig as Config

    options, recipe = prepared.options, prepared.recipe
    cpu = preparing.on_cpu(options)
    return Config(
        output_dir=str(work),
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=prepared.accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=options.schedule.max_steps or -1,
        max_length=recipe.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate},
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        bf16=preparing.dtype(options) == torch.bfloat16,
        use_cpu=cpu,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if cpu and prepared.processes.count > 1 else None,
        dataloader_pin_memory=not cpu,
        gradient_checkpointing=options.base.gradient_checkpointing,
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.schedule.save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )


def _load_base(prepared: Prepared) -> Any:
    """Returns the base model on the CPU, or quantised on this process's device."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = prepared.options.base
    kind = preparing.dtype(prepared.options)
    arguments = preparing.hub_arguments(prepared.options) | {"dtype": kind}
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit:
        arguments["device_map"] = {"": _device(prepared.options)}
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=options.bnb_4bit_quant_type, bnb_4bit_compute_dtype=kind
        )
    try:
        return AutoModelForCausalLM.from_pretrained(prepared.model_name, **arguments)
    except (OSError, ValueError, ImportError) as error:
        reason = preparing.first_line(error)
        raise BaseModelError(f"The base model {prepared.model_name} cannot be loaded ({reason}).") from error


def _device(options: TrainOptions) -> str:
    """Returns this process's own device."""
    accelerator = None if preparing.on_cpu(options) else torch.accelerator.current_accelerator()
    return f"{accelerator.type}:{os.environ.get('LOCAL_RANK', '0')}" if accelerator else "cpu"


def _record_base(model: Any, name: str) -> None:
    for config in model.peft_config.values():
        config.base_model_name_or_path = name


def _watch(progress: Progress) -> Any:
    """Returns a callback that reports every step and ends a training whose loss is not finite."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                step = state.global_step
                raise RunError(f"The loss is {loss} at step {step}. Pass a lower --learning-rate, or --dtype float32.")

    return Watch()
