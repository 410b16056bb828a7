"""The recipes hold the paper's numbers, and the rows, steps and texts that follow from them."""

from __future__ import annotations

import pathlib
import re

import datasets
import pytest

from spectral_surgery.training import RECIPES, AdapterOptions, RowOptions, ScheduleOptions, TrainOptions
from spectral_surgery.training.recipes import accumulation
from spectral_surgery.training.rows import sampled

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "training.md"

# Table 6 of arXiv 2603.03995 with the learning rates of the authors' launch scripts; the numbers of steps are those in
# the names of the checkpoints that they scored.
PUBLISHED = {
    "math": ("meta-math/MetaMathQA", 50_000, 1024, 768, 2, 1e-4, 395_000, 198),
    "code": ("ise-uiuc/Magicoder-Evol-Instruct-110K", 50_000, 4096, 192, 1, 2e-4, 111_183, 783),
    "instruct": ("tatsu-lab/alpaca", None, 2048, 256, 2, 2e-4, 52_002, None),
    "commonsense": ("tau/commonsense_qa", None, 2048, 256, 2, 2e-4, 9_741, 117),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    recipe = RECIPES[name]
    dataset, rows, length, batch, micro, rate, available, steps = PUBLISHED[name]
    assert (recipe.dataset, recipe.max_rows, recipe.max_length) == (dataset, rows, length)
    assert (recipe.global_batch, recipe.micro_batch, recipe.learning_rate) == (batch, micro, rate)
    assert (recipe.rank, recipe.lora_alpha, recipe.dropout, recipe.epochs) == (16, 32, 0.05, 3)
    assert (recipe.adam_betas, recipe.weight_decay, recipe.clip) == ((0.9, 0.95), 0.0, 1.0)
    assert (recipe.warmup, recipe.min_learning_rate) == (0.1, 0.01)
    assert set(recipe.modules) == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    if steps:
        assert recipe.steps(len(sampled(available, recipe.max_rows, seed=42))) == steps


@pytest.mark.parametrize(
    ("devices", "micro", "expected"), [(8, 2, 48), (1, 2, 384), (16, 2, 24), (4, 192, 1), (8, 768, 1), (5, 2, 77)]
)
def test_gradients_are_accumulated_as_equation_9_says(devices: int, micro: int, expected: int) -> None:
    assert accumulation(768, devices, micro) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_s_data_is_measured_in_the_format_of_its_name_on_the_hub(name: str) -> None:
    formats = {"math": "metamath", "code": "magicoder", "instruct": "alpaca", "commonsense": "commonsense_qa"}
    assert RECIPES[name].format == formats[name]


def test_the_rows_taken_are_those_of_datasets_shuffle_and_select() -> None:
    rows = datasets.Dataset.from_dict({"row": list(range(1000))})
    theirs = rows.shuffle(seed=42).select(range(50))["row"]
    assert sampled(1000, 50, seed=42) == list(theirs)
    assert sampled(50, 50, seed=42) == list(range(50))


def test_an_option_takes_the_place_of_the_recipe_s_number_and_nothing_else_changes() -> None:
    options = TrainOptions(
        recipe="math",
        model="base",
        output=pathlib.Path("out"),
        rows=RowOptions(max_length=64),
        adapter=AdapterOptions(rank=4),
        schedule=ScheduleOptions(learning_rate=3e-4),
    )
    numbers = options.numbers()
    assert (numbers.max_length, numbers.rank, numbers.learning_rate) == (64, 4, 3e-4)
    assert (numbers.global_batch, numbers.max_rows, numbers.lora_alpha) == (768, 50_000, 32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documentation_has_the_recipe_s_numbers(name: str) -> None:
    recipe = RECIPES[name]
    row = re.search(rf"^\| {name} \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row
    rows = f"{recipe.max_rows:,}" if recipe.max_rows else "all"
    assert [cell.strip() for cell in row[1].split("|")] == [
        recipe.dataset,
        rows,
        str(recipe.max_length),
        str(recipe.global_batch),
        str(recipe.micro_batch),
        f"{recipe.learning_rate:.0e}".replace("e-0", "e-"),
    ]
