"""What can be chosen about a training run, and what is wrong with a choice. Light: imports no model library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from spectral_surgery.formats import DataOptions, Format
from spectral_surgery.training.recipes import RECIPES, Recipe, RecipeName, accumulation

Method = Literal["lora", "rslora", "dora", "pissa", "loraplus", "speclora"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The rows to learn from."""

    data: str | None = None
    """A JSONL, JSON, CSV or Parquet file, a folder of them, or a Hub id; by default the recipe's own data set."""
    data_name: str | None = None
    """Configuration of a data set on the Hub, such as "main"."""
    data_split: str = "train"
    """Split to read."""
    format: Literal["recipe"] | Format = "recipe"
    """What a row looks like; recipe is that of the recipe's own data set, auto decides by the columns."""
    prompt_column: str | None = None
    """Column with the prompt, for the format prompt."""
    answer_column: str | None = None
    """Column with the answer, for the format prompt."""
    text_column: str | None = None
    """Column with the conversation or the rendered text, for the formats chat and text."""
    response_marker: str | None = None
    """Text after which the answer begins, for the format text."""
    max_rows: int | None = None
    """Most rows to take, by a seeded shuffle."""
    row_seed: int = 42
    """Seed of that shuffle; the same for every training seed."""
    max_length: int | None = None
    """Longest text in tokens."""
    loss: Literal["answer", "text"] | None = None
    """What is learnt: the answer alone (default), or prompt and answer (--faithful)."""
    prompts: Literal["measuring", "training"] | None = None
    """Texts of the recipe's data: those that it is measured with (default), or that the authors trained on
    (--faithful)."""

    def reading(self, recipe: Recipe) -> DataOptions:
        """Returns how the rows are read."""
        chosen: Any = recipe.format if self.format == "recipe" else self.format
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name in DataOptions.__dataclass_fields__}
        return DataOptions(**same | {"format": chosen, "max_length": recipe.max_length})


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is trained."""

    method: Method = "lora"
    """LoRA; rsLoRA (scale alpha / sqrt(rank)); DoRA; PiSSA (starts from the weight's top directions, saved as LoRA of
    twice the rank); LoRA+ (a higher learning rate for lora_B); SpecLoRA."""
    rank: int | None = None
    """LoRA rank."""
    lora_alpha: int | None = None
    """LoRA's alpha."""
    dropout: float | None = None
    """Dropout before lora_A."""
    modules: tuple[str, ...] | None = None
    """Names of the modules that get an adapter; all-linear for every linear layer but the output's."""
    loraplus_ratio: float = 20.0
    """LoRA+: learning rate of lora_B as a multiple of lora_A's."""
    speclora_k: int = 200
    """SpecLoRA: scaled rows of each module."""
    delta_learning_rate: float = 10.0
    """SpecLoRA: learning rate of the scales as a multiple of the factors'."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How it is trained."""

    learning_rate: float | None = None
    """Highest learning rate."""
    epochs: float | None = None
    """Passes over the rows."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; the learning rate's course is that of a run of this length."""
    global_batch: int | None = None
    """Rows in one optimiser step, over all devices; reached by accumulating gradients."""
    micro_batch: int | None = None
    """Rows on one device at a time."""
    seeds: tuple[int, ...] = (42,)
    """One training run a seed; of several, each writes OUTPUT/seed-N."""
    save_every: int = 50
    """Optimiser steps between two checkpoints, which --resume goes on from."""


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The base model and how it is loaded."""

    revision: str | None = None
    """Branch, tag or commit of the base model."""
    tokenizer: str | None = None
    """Tokenizer folder or Hub id; by default the base model's."""
    base_name: str | None = None
    """What the adapter records as its base model, in place of --model, such as its Hub id."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the base weights and of the arithmetic; auto is bfloat16 on an accelerator and float32 on a CPU. The
    adapter itself is trained and saved in float32."""
    load_in_4bit: bool = False
    """Quantise the base with bitsandbytes (QLoRA)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    attn_implementation: str | None = None
    """Attention implementation such as sdpa, eager or flash_attention_2."""
    trust_remote_code: bool = False
    """Run model code that comes with the base model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cpu: bool = False
    """Train on the CPU although there is an accelerator."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training command. What is None comes from the recipe."""

    recipe: RecipeName
    """The paper's fine-tuning to follow."""
    model: str
    """Base model folder or Hub id."""
    output: Path
    """Folder to write the adapter to; checkpoints lie in OUTPUT.training meanwhile."""
    faithful: bool = False
    """Take the authors' choice where a better one is known: their training texts, and the loss on the whole text."""
    resume: bool = False
    """Go on from the last checkpoint of the same command."""
    overwrite: bool = False
    """Replace an adapter that spectral-surgery wrote, and drop its checkpoints."""
    keep_checkpoints: bool = False
    """Leave OUTPUT.training in place at the end."""
    rows: RowOptions = field(default_factory=RowOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    base: BaseOptions = field(default_factory=BaseOptions)

    @property
    def loss(self) -> Literal["answer", "text"]:
        """What the loss is taken on."""
        return self.rows.loss or ("text" if self.faithful else "answer")

    @property
    def prompts(self) -> Literal["measuring", "training"]:
        """Which texts the recipe's data is given."""
        return self.rows.prompts or ("training" if self.faithful else "measuring")

    def folder(self, seed: int) -> Path:
        """Returns where one seed's adapter goes."""
        return self.output if len(self.schedule.seeds) == 1 else self.output / f"seed-{seed}"

    def numbers(self) -> Recipe:
        """Returns the recipe with what was chosen in its place."""
        chosen = {**asdict(self.rows), **asdict(self.adapter), **asdict(self.schedule)}
        known = {f.name for f in fields(Recipe)}
        given = {name: value for name, value in chosen.items() if name in known and value is not None}
        return replace(RECIPES[self.recipe], **given)


def faults(options: TrainOptions, devices: int) -> list[str]:
    """Returns one sentence for everything wrong with the options that needs no file and no model to be known.

    Args:
        options: What was chosen.
        devices: How many processes train together.
    """
    if unknown := list(_unknown(options)):
        return unknown
    recipe = options.numbers()
    return [*_numbers(options, recipe), *_batches(recipe, devices), *_combinations(options), *_packages(options)]


def _unknown(options: TrainOptions) -> Iterator[str]:
    """Names that the command line would not let through."""
    given = {"recipe": (options.recipe, tuple(RECIPES)), "method": (options.adapter.method, get_args(Method))}
    for what, (name, known) in given.items():
        if name not in known:
            yield f"The {what} is {name!r}, expected one of {', '.join(known)}."


def _numbers(options: TrainOptions, recipe: Recipe) -> Iterator[str]:
    schedule, adapter = options.schedule, options.adapter
    least = {
        "--rank": (recipe.rank, 1),
        "--lora-alpha": (recipe.lora_alpha, 1),
        "--max-rows": (1 if recipe.max_rows is None else recipe.max_rows, 1),
        "--max-length": (recipe.max_length, 2),
        "--global-batch": (recipe.global_batch, 1),
        "--micro-batch": (recipe.micro_batch, 1),
        "--max-steps": (1 if schedule.max_steps is None else schedule.max_steps, 1),
        "--save-every": (schedule.save_every, 1),
        "--speclora-k": (adapter.speclora_k, 0),
    }
    for option, (value, minimum) in least.items():
        if value < minimum:
            yield f"{option} is {value}, expected at least {minimum}."
    positive = {
        "--learning-rate": recipe.learning_rate,
        "--epochs": recipe.epochs,
        "--loraplus-ratio": adapter.loraplus_ratio,
        "--delta-learning-rate": adapter.delta_learning_rate,
    }
    for option, number in positive.items():
        if not number > 0:
            yield f"{option} is {number}, expected more than 0."
    if not 0 <= recipe.dropout < 1:
        yield f"--dropout is {recipe.dropout}, expected from 0 to below 1."
    if not schedule.seeds or len(set(schedule.seeds)) < len(schedule.seeds):
        yield f"--seeds is {' '.join(map(str, schedule.seeds)) or 'empty'}, expected different whole numbers."
    if not recipe.modules:
        yield "--modules is empty, expected at least one name."


def _batches(recipe: Recipe, devices: int) -> Iterator[str]:
    """Eq. 9 rounds the accumulation up; a global batch that it cannot reach exactly is a fault here."""
    if min(recipe.global_batch, recipe.micro_batch) < 1:
        return
    at_once = devices * recipe.micro_batch
    held = f"{devices} device{'s' * (devices > 1)} x micro-batch {recipe.micro_batch} = {at_once} rows at a time"
    if at_once > recipe.global_batch:
        yield f"{held}, more than the global batch of {recipe.global_batch}. Lower --micro-batch."
    elif recipe.global_batch % at_once:
        reached = at_once * accumulation(recipe.global_batch, devices, recipe.micro_batch)
        yield (
            f"{held}, of which no whole number makes the global batch of {recipe.global_batch}. "
            f"Pass another --micro-batch, or --global-batch {reached}."
        )


def _combinations(options: TrainOptions) -> Iterator[str]:
    rows, base = options.rows, options.base
    if options.adapter.method == "pissa" and base.load_in_4bit:
        yield (
            "--method pissa takes the top directions out of the base weight, which a 4-bit weight cannot hold. "
            "Leave --load-in-4bit out, or choose another --method."
        )
    if rows.data is None and rows.format != "recipe":
        yield f"--format {rows.format} is given without --data, and the recipe's own data has its own. Leave it out."
    named = {
        "--prompt-column": rows.prompt_column,
        "--answer-column": rows.answer_column,
        "--text-column": rows.text_column,
        "--response-marker": rows.response_marker,
    }
    if rows.format == "recipe" and (given := [option for option, value in named.items() if value]):
        yield f"{given[0]} is given, and the recipe's format knows its columns. Pass --format prompt, chat or text."
    if options.resume and options.overwrite:
        yield "Both --resume and --overwrite are given. Pass one: to go on, or to begin anew."


def _packages(options: TrainOptions) -> Iterator[str]:
    needed = {"trl": "train"} | ({"bitsandbytes": "quantized"} if options.base.load_in_4bit else {})
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            yield f"This needs {package}. Install it with: pip install 'spectral-surgery[{extra}]'."
