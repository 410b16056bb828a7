"""The paper's tables and figures as studies, at its settings (arXiv 2603.03995, section 5), for any base and adapters.

What an exact repetition would need and is not here is in :data:`MISSING`, which the command prints. Rows are taken in
an order that depends on their content and a seed, never in the file's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from spectral_surgery import policies
from spectral_surgery.errors import InputError, combine
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.evaluating.tasks import PAPER
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.sweeping.study import Level, Study, StudyAdapter

Preset = Literal["table2", "table3", "table4", "table5", "figure3", "figure4"]
Following = Literal["paper", "code"]

FOUR = ("random_index", "smooth_abs", "abs_select", "grad_direction")
GSM8K_ROWS = "openai/gsm8k"
"""What the authors' scripts measure every adapter on, whatever its task: GSM8K's training rows."""


@dataclass(frozen=True)
class Shape:
    """What a preset varies."""

    policies: tuple[str, ...] = FOUR
    rows: tuple[int, ...] = (128,)
    energy: tuple[str, ...] = ("nuclear",)
    modules: tuple[str, ...] = ("residual",)
    tasks: tuple[str, ...] = PAPER


SHAPES: Mapping[Preset, Shape] = {
    "table2": Shape(),
    "table3": Shape(("grad_direction",), energy=("nuclear", "none"), tasks=("commonsense_qa", "ifeval")),
    "table4": Shape(("grad_direction", "random_index"), rows=(32, 64, 128, 256), tasks=("commonsense_qa", "ifeval")),
    "table5": Shape(("grad_direction",), modules=("attention-inputs", "all", "residual")),
    "figure3": Shape(("random_index", "grad_direction")),
    "figure4": Shape(),
}

MISSING = (
    "the first rows in the file's order (here: an order by content and seed), "
    "float16 gradients, token weighting inside a batch of two, prompts without a beginning-of-text token, and vLLM "
    "on merged weights"
)


@dataclass(frozen=True)
class PresetOptions:
    """A table or figure of the paper, and with what."""

    preset: Preset | None = None
    """Table or figure of the paper, in place of a study file."""
    adapters: tuple[str, ...] = ()
    """With --preset: the adapter of each task as TASK=ADAPTER, such as gsm8k=runs/math commonsense_qa=runs/csqa."""
    name: str | None = None
    """With --preset: what tables call the model; by default the base model's last name."""
    measuring_rows: str = GSM8K_ROWS
    """With --preset: rows to measure on; by default GSM8K's training rows for every adapter, as the authors' scripts
    do (the paper says only: a fixed set)."""
    sensitivities: Following = "paper"
    """With --preset: over rows, the mean of |g| (paper) or |the sum of g| (code)."""
    ifeval: Level = "prompt"
    """With --preset: the level that tables call IFEval: prompt, as the paper says, or instruction, which its printed
    figures are. Both are scored."""
    seeds: tuple[int, ...] = (0,)
    """With --preset: seeds of rows and random policies; the paper has one."""


def preset_study(options: PresetOptions, suite: SuiteOptions, model: ModelOptions, batching: BatchOptions) -> Study:
    """Returns the study of a table or figure.

    Raises:
        InputError: If an adapter is not TASK=ADAPTER, or is of a task that the preset does not score.
    """
    assert options.preset is not None
    shape = SHAPES[options.preset]
    given = _by_task(options.adapters, shape.tasks)
    name = options.name or (Path(model.base_model).name if model.base_model else "model")
    official = options.measuring_rows == GSM8K_ROWS
    return Study(
        adapters=tuple(StudyAdapter(path, name, (task,), options.measuring_rows) for task, path in given.items()),
        policies=tuple(_following(policy, options.sensitivities) for policy in shape.policies),
        rows=shape.rows,
        energy=shape.energy,
        modules=shape.modules,
        seeds=options.seeds,
        suite=suite,
        data=DataOptions(data_name="main") if official else DataOptions(),
        model=model,
        batching=batching,
        ifeval=options.ifeval,
    )


def _by_task(texts: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Returns adapters by task; placeholders for all tasks where none are given."""
    if not texts:
        return {task: f"<adapter of {task}>" for task in tasks}
    found, faults = {}, []
    for text in texts:
        task, equals, path = text.partition("=")
        if not equals or not path or task not in tasks:
            faults.append(f"--adapters {text!r} is not TASK=ADAPTER with one of: {', '.join(tasks)}.")
        elif task in found:
            faults.append(f"--adapters gives {task} twice.")
        found[task] = path
    combine(faults, InputError)
    return found


def _following(policy: str, following: Following) -> str:
    """Returns a policy with the aggregate of the paper or of the authors' code, where it has one."""
    found = policies.parse(policy)
    if following == "paper" or not hasattr(found, "aggregate"):
        return policy
    return policies.spell(replace(found, aggregate="abs_mean"))  # type: ignore[type-var]
