"""Builds the embedded world from seeds: ``python -m spectral_surgery.demo.build --output DIR``.

Three stages, all seeded: a base model that learns the ten skills, six small data sets, and an
adapter that ``spectral-surgery train`` trains hard on ``compare`` rows of which 30 % have the wrong label. The adapter
comes to work on its task and to have lost the skills; that is what the demo needs. It takes a CPU,
under an hour and no network. The seed fixes every row; the trained weights also depend on the
processor and on the version of torch, so a second machine gets a world of the same kind, not the
same bits.
"""

from __future__ import annotations

import json
import pathlib
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import islice
from statistics import mean
from typing import Any

import torch
import tyro
from peft import PeftModelForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spectral_surgery.adapter import files
from spectral_surgery.demo import tasks
from spectral_surgery.errors import OutputError
from spectral_surgery.training import BaseOptions, RowOptions, ScheduleOptions, TrainOptions, running
from spectral_surgery.training.recipes import SEVEN_PROJECTIONS

# A causal model of transformers or PEFT; their generate() has no type that fits both.
Model = Any

BASE_NAME = "spectral-surgery-demo-base"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
IGNORED_LABEL = -100

# Skills that carry digits or move letters need more examples than copying and counting.
SKILL_WEIGHTS = {"add": 2, "subtract": 2, "reverse": 2, "sort": 2, "modulo": 2}
BASE_BATCH = 128
BASE_LEARNING_RATE = 1.5e-3

ADAPTER_ROWS = 600
ADAPTER_EPOCHS = 10
ADAPTER_BATCH = 16
ADAPTER_LEARNING_RATE = 2e-3
WRONG_LABELS = 0.3
TARGET_MODULES = list(SEVEN_PROJECTIONS)

CALIBRATION_ROWS, VALIDATION_ROWS, TEST_ROWS, ROWS_A_SKILL = 128, 200, 400, 40
SCORED_ROWS = 200
PACKAGES = ("torch", "transformers", "peft", "tokenizers")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token a byte, which in ASCII is a character.

    It puts ``<bos>`` first by itself. Every byte has a token and nothing is normalised, so there is
    no unknown token and decoding restores any text exactly.
    """
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", symbols.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns an untrained Llama of 2.7 million parameters in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def text_of(row: tasks.Row) -> str:
    """Returns the text a model is trained on: prompt, one space, answer, end of sequence."""
    return f"{row['prompt']} {row['answer']}<eos>"


def encode(rows: Sequence[tasks.Row], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and labels, both (rows, longest), padded on the right.

    Labels are the ids from the space after the prompt to ``<eos>``, and -100 elsewhere.
    """
    ids = tokenizer([text_of(row) for row in rows])["input_ids"]
    prompt_lengths = torch.tensor([len(p) for p in tokenizer([row["prompt"] for row in rows])["input_ids"]])
    lengths = torch.tensor([len(tokens) for tokens in ids])
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokens) for tokens in ids],
        batch_first=True,
        padding_value=tokenizer.pad_token_id,
    )
    position = torch.arange(padded.shape[1])
    answer = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return padded, padded.where(answer, IGNORED_LABEL)


def train(model: Model, ids: torch.Tensor, labels: torch.Tensor, seed: int, **arguments: Any) -> float:
    """Trains ``model`` in place with AdamW on all rows and returns the mean training loss.

    Args:
        model: A causal language model in float32.
        ids: Token ids, (rows, length), padded on the right.
        labels: Targets, (rows, length), -100 where there is none.
        seed: Order of the rows and dropout.
        arguments: Further fields of ``transformers.TrainingArguments``.
    """

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        # No attention mask: with padding on the right and causal attention no answer token sees a
        # padded one, and without a mask torch takes its fast causal kernel.
        return {"input_ids": ids[indices], "labels": labels[indices]}

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            adam_beta2=0.98,
            seed=seed,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        )
        trainer = Trainer(model, settings, data_collator=collate, train_dataset=range(len(ids)))
        return trainer.train().training_loss


def train_base(folder: pathlib.Path, seed: int, steps: int) -> float:
    """Trains the base on fresh rows of the ten skills and writes it to ``folder`` in bfloat16.

    Returns:
        Mean training loss in nats per answer token.
    """
    tokenizer = make_tokenizer()
    weights = [SKILL_WEIGHTS.get(task, 1) for task in tasks.SKILLS]
    rows = list(islice(tasks.stream(tasks.SKILLS, seed, weights), steps * BASE_BATCH))
    ids, labels = encode(rows, tokenizer)
    set_seed(seed)
    model = make_base(tokenizer)
    loss = train(
        model,
        ids,
        labels,
        seed,
        max_steps=steps,
        per_device_train_batch_size=BASE_BATCH,
        learning_rate=BASE_LEARNING_RATE,
        logging_steps=50,
    )
    model.config.use_cache = True  # The trainer switches it off and leaves it so.
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def make_data(seed: int) -> dict[str, list[tasks.Row]]:
    """Returns the shipped sets by name, all prompts distinct; only ``train`` has wrong labels."""
    count = ADAPTER_ROWS + CALIBRATION_ROWS + VALIDATION_ROWS + TEST_ROWS
    compare = iter(tasks.rows(tasks.COMPARE, count, seed))
    skills = [tasks.rows(skill, 2 * ROWS_A_SKILL, seed) for skill in tasks.SKILLS]
    return {
        "train": tasks.corrupt(list(islice(compare, ADAPTER_ROWS)), WRONG_LABELS, seed),
        "calibration": list(islice(compare, CALIBRATION_ROWS)),
        "validation": list(islice(compare, VALIDATION_ROWS)),
        "test": list(compare),
        "skills": [row for rows in skills for row in rows[:ROWS_A_SKILL]],
        "skills_test": [row for rows in skills for row in rows[ROWS_A_SKILL:]],
    }


def write_data(folder: pathlib.Path, data: dict[str, list[tasks.Row]]) -> None:
    """Writes every set to ``NAME.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_adapter(
    base: pathlib.Path, folder: pathlib.Path, data: pathlib.Path, seed: int, max_steps: int | None = None
) -> None:
    """Trains a rank-16 LoRA adapter over the stored ``base`` and writes its two files to ``folder``.

    Args:
        base: Folder of the base model.
        folder: Folder to write; made if it does not exist.
        data: File of training rows.
        seed: Of the adapter's start, its dropout and the order of the rows.
        max_steps: Stop after so many steps, to try this out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainOptions(
            recipe="math",
            model=str(base),
            output=pathlib.Path(scratch) / "adapter",
            rows=RowOptions(data=str(data), format="prompt", max_length=128),
            schedule=ScheduleOptions(
                learning_rate=ADAPTER_LEARNING_RATE,
                epochs=float(ADAPTER_EPOCHS),
                max_steps=max_steps,
                global_batch=ADAPTER_BATCH,
                micro_batch=ADAPTER_BATCH,
                seeds=(seed,),
            ),
            base=BaseOptions(base_name=BASE_NAME, dtype="float32", cpu=True),
        )
        (trained,) = running.train(options)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (files.CONFIG, files.WEIGHTS):
            shutil.copyfile(trained.folder / name, folder / name)


def load(world: pathlib.Path, with_adapter: bool) -> tuple[Model, PreTrainedTokenizerFast]:
    """Returns the base of a world in bfloat16, with or without its adapter, and the tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world / "base")
    base = LlamaForCausalLM.from_pretrained(world / "base", dtype=torch.bfloat16)
    if not with_adapter:
        return base.eval(), tokenizer
    return PeftModelForCausalLM.from_pretrained(base, world / "adapter").eval(), tokenizer


def exact_match(model: Model, tokenizer: PreTrainedTokenizerFast, rows: Sequence[tasks.Row]) -> float:
    """Returns the share of rows completed greedily by exactly one space, the answer and the end.

    Args:
        model: Base or PEFT model.
        tokenizer: Its tokenizer, padding on the left.
        rows: Rows of one or several tasks, scored as one batch.
    """
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    room = max(len(row["answer"]) for row in rows) + len(" ") + len(["<eos>"])
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=room, do_sample=False)
    written = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
    completed = zip(written, rows, strict=True)
    return sum(text.startswith(f" {row['answer']}<eos>") for text, row in completed) / len(rows)


def score(world: pathlib.Path, with_adapter: bool, scored: dict[str, list[tasks.Row]]) -> dict[str, float]:
    """Returns the exact match on every task, and under ``skills`` the mean over the ten skills."""
    model, tokenizer = load(world, with_adapter)
    found = {task: exact_match(model, tokenizer, rows) for task, rows in scored.items()}
    return found | {"skills": round(mean(found[skill] for skill in tasks.SKILLS), 6)}


def scored_rows(count: int, seed: int) -> dict[str, list[tasks.Row]]:
    """Returns ``count`` clean rows of every task, outside the sets of ``make_data(seed)``."""
    shipped = tasks.prompts(*make_data(seed).values())
    return {task: tasks.rows(task, count, seed + 1, exclude=shipped) for task in tasks.TASKS}


def figures(world: pathlib.Path, seed: int, steps: int) -> dict[str, Any]:
    """Returns what ``figures.json`` holds: settings, versions, exact match of base and adapter."""
    scored = scored_rows(SCORED_ROWS, seed)
    return {
        "seed": seed,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "base": {"steps": steps, "batch": BASE_BATCH, "learning_rate": BASE_LEARNING_RATE},
        "adapter": {
            "rows": ADAPTER_ROWS,
            "wrong_labels": WRONG_LABELS,
            "epochs": ADAPTER_EPOCHS,
            "batch": ADAPTER_BATCH,
            "learning_rate": ADAPTER_LEARNING_RATE,
        },
        "exact_match": {
            "rows_each_task": SCORED_ROWS,
            "dtype": "bfloat16",
            "base": score(world, False, scored),
            "adapter": score(world, True, scored),
        },
    }


def finish(world: pathlib.Path, seed: int, steps: int, adapter_steps: int | None = None) -> None:
    """Adds data, adapter and figures to a folder that holds ``base/``, and prints the figures.

    Args:
        world: Folder to complete.
        seed: Seed of the data and the adapter.
        steps: How many steps the base was trained for, to be noted.
        adapter_steps: Stop the adapter's training after so many steps, to try this out.
    """
    data = make_data(seed)
    write_data(world / "data", data)
    train_adapter(world / "base", world / "adapter", world / "data" / "train.jsonl", seed, adapter_steps)
    text = json.dumps(figures(world, seed, steps), indent=2)
    (world / "figures.json").write_text(text + "\n")
    print(text)


def build(output: pathlib.Path, seed: int = 0, steps: int = 3000, adapter_steps: int | None = None) -> None:
    """Builds base, data, adapter and figures into a new folder.

    Args:
        output: Folder to write; must be absent or empty.
        seed: Seed of everything.
        steps: Training steps of the base, 128 rows each.
        adapter_steps: Stop the adapter's training after so many steps, to try this out.

    Raises:
        OutputError: If ``output`` holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is not an empty folder: name one that does not exist yet.")
    print(f"base: mean training loss {train_base(output / 'base', seed, steps):.4f}")
    finish(output, seed, steps, adapter_steps)


if __name__ == "__main__":
    tyro.cli(build)
