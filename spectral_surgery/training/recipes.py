"""The paper's four fine-tunings in numbers and in texts, each number with its source.

Sources are the paper (arXiv 2603.03995: its text and Table 6) and, where the paper is silent, the authors' published
launch scripts. Where the two disagree, and where both leave a choice, `docs/training.md` says which is taken here.

Two sets of texts exist. :data:`spectral_surgery.formats.FORMATTERS` holds those that the authors measure with; they
are the default here too, so that an adapter is trained, measured and evaluated on one form. :attr:`Recipe.training`
holds those that the authors' training used, which agree with neither their measuring nor their evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from spectral_surgery.columns import text_of
from spectral_surgery.formats import FORMATTERS, Formatter, Row

RecipeName = Literal["math", "code", "instruct", "commonsense"]
SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one fine-tuning is made of, beside base model, method and seed."""

    name: RecipeName
    """The task family."""
    dataset: str
    """Hub id of its training data (paper)."""
    training: Formatter
    """Texts that the authors trained on (scripts)."""
    max_rows: int | None
    """Most rows that are taken, by a seeded shuffle; None for all (paper: 50k for math and code)."""
    max_length: int
    """Longest text in tokens (Table 6)."""
    global_batch: int
    """Rows in one optimiser step, over all devices (Table 6)."""
    micro_batch: int
    """Rows on one device at a time (scripts)."""
    learning_rate: float
    """Highest learning rate (scripts; Table 6 prints it, in cells that could not be read)."""
    rank: int = 16
    """LoRA rank (paper)."""
    lora_alpha: int = 32
    """LoRA's alpha, so that the scale is 2 (paper)."""
    dropout: float = 0.05
    """Dropout before lora_A (paper)."""
    modules: tuple[str, ...] = SEVEN_PROJECTIONS
    """Modules that get an adapter (paper)."""
    epochs: float = 3.0
    """Passes over the rows (paper)."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates (paper)."""
    weight_decay: float = 0.0
    """AdamW's weight decay (paper)."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly from 0 (paper)."""
    min_learning_rate: float = 0.01
    """What the cosine falls to, as a share of the highest learning rate (paper)."""
    clip: float = 1.0
    """Largest norm of the gradient (paper)."""

    @property
    def format(self) -> str:
        """Key in :data:`FORMATTERS` of the texts that this data is measured with."""
        return next(key for key, formatter in FORMATTERS.items() if self.dataset.casefold() in formatter.sources)

    def steps(self, rows: int) -> int:
        """Returns how many optimiser steps a number of rows makes; the last of an epoch may hold fewer rows."""
        return math.ceil(self.epochs * math.ceil(rows / self.global_batch))


def accumulation(global_batch: int, devices: int, micro_batch: int) -> int:
    """Returns micro-batches a device and step: ``max(1, ceil(global / (devices micro)))`` (Eq. 9)."""
    return max(1, math.ceil(global_batch / (devices * micro_batch)))


PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def _alpaca_prompt(row: Row) -> dict[str, str]:
    """What stands before the answer: in the data set's own text, or built where a row has none."""
    instruction, given, output = (text_of(row.get(name)) for name in ("instruction", "input", "output"))
    if not instruction.strip():
        return {"before": ""}
    text = text_of(row.get("text"))
    if output and text.endswith(output):
        return {"before": text.removesuffix(output)}
    given = f"\n\nInput:\n{given}" if given.strip() else ""
    return {"before": f"### Instruction:\n{instruction}{given}\n\n### Response:\n"}


RECIPES: dict[RecipeName, Recipe] = {
    "math": Recipe(
        name="math",
        dataset="meta-math/MetaMathQA",
        training=Formatter(
            columns=("query", "response"),
            prompt=PREAMBLE + "\n\n### Instruction:\n{query}\n\n### Response: Let's think step by step.\n",
            answer="{response}",
            sources=(),
        ),
        max_rows=50_000,
        max_length=1024,
        global_batch=768,
        micro_batch=2,
        learning_rate=1e-4,
    ),
    "code": Recipe(
        name="code",
        dataset="ise-uiuc/Magicoder-Evol-Instruct-110K",
        training=Formatter(
            columns=("instruction", "response"), prompt="{instruction}\n", answer="{response}", sources=()
        ),
        max_rows=50_000,
        max_length=4096,
        global_batch=192,
        micro_batch=1,
        learning_rate=2e-4,
    ),
    "instruct": Recipe(
        name="instruct",
        dataset="tatsu-lab/alpaca",
        training=Formatter(
            columns=("instruction", "output"),
            prompt="{before}",
            answer="{output}",
            sources=(),
            extra=_alpaca_prompt,
        ),
        max_rows=None,
        max_length=2048,
        global_batch=256,
        micro_batch=2,
        learning_rate=2e-4,
    ),
    "commonsense": Recipe(
        name="commonsense",
        dataset="tau/commonsense_qa",
        training=Formatter(
            columns=("question", "choices", "answerKey"),
            prompt="Question:\n{question}\n\nChoices:\n{choice_lines}\n\n"
            "Answer with a single letter: A, B, C, D, or E.\n",
            answer="{answerKey}",
            sources=(),
            extra=FORMATTERS["commonsense_qa"].extra,
        ),
        max_rows=None,
        max_length=2048,
        global_batch=256,
        micro_batch=2,
        learning_rate=2e-4,
    ),
}
assert tuple(RECIPES) == get_args(RecipeName)
