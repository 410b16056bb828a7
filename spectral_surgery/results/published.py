"""The runs that the paper reports (arXiv 2603.03995), from the results file of its authors' repository.

One line of the file is one scoring of the unedited adapter and one of each of four policies, on one benchmark. The
adapter of that benchmark's own task is meant, so a name here is that of a base model with four adapters. Figures are
facts as published, three decimals each; the single runs have neither examples nor intervals.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from spectral_surgery.results.runs import UNEDITED, Run, Score

FILE = Path(__file__).with_name("paper_results.csv")
POLICIES = ("random_index", "smooth_abs", "abs_select", "grad_direction")
"""In the order of the paper's Table 2."""
TASKS = ("GSM8K", "HumanEval", "IFEval", "CSQA")
MODELS = ("Llama-3.1-8B", "Qwen3-8B")
ENERGY: Mapping[str, str] = {"l1": "nuclear", "none": "none"}
MODULES: Mapping[str, str] = {
    "residual": "residual",
    "attn_inputs": "attention-inputs",
    "all_modules": "all",
    "up_gate": "up_proj,gate_proj",
}
"""Our spelling of the file's words."""


@cache
def published_runs() -> tuple[Run, ...]:
    """Returns every published run: 88 scorings of unedited adapters, and 352 of edited ones."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(run for row in csv.DictReader(file) for run in _runs(row))


def _runs(row: Mapping[str, str]) -> list[Run]:
    columns = {UNEDITED: "baseline"} | {policy: policy for policy in POLICIES}
    return [
        Run(
            key="/".join([row["source"], row["calib"], row["model"], row["task"], policy]),
            name=row["model"],
            policy=policy,
            rows=int(row["calib"]),
            energy=ENERGY[row["preserve_energy"]],
            modules=MODULES[row["module_set"]],
            seed=42,
            scores={row["task"]: Score(value=float(row[column]))},
        )
        for policy, column in columns.items()
    ]
