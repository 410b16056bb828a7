"""How time and memory of measuring grow with what is measured: ``python benchmarks/growth.py``.

On a small Llama of random weights one thing at a time is doubled and the rest kept: rows, tokens of a row, layers,
the adapter's rank, and the kinds of modules that are edited. Rows are measured in batches of one number of tokens,
except where rows get longer: there all are one batch, so that memory has something to grow with.

Time is the process's own, each point several times in turns. Memory is the most bytes that all tensors hold at once
beside model and adapter, counted exactly, once. The slope of the logarithms is 1 where a cost grows in proportion,
below where part of it is fixed; its interval is that of a straight line through all points, at 95 %. The last column
is what the last step costs, by the factor it multiplies what is varied by.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib import rc_context
from measuring import KINDS, Sizes, adapted, rows
from peak import Peak
from scipy.stats import linregress, t

from spectral_surgery.calibration import batches
from spectral_surgery.measuring import measure_live
from spectral_surgery.plots import STYLE, canvas
from spectral_surgery.tables import table

NESTED = [("q_proj",), ("q_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), tuple(KINDS)]
"""Kinds of modules; in each the first of the first layer, so that the backward pass is equally long."""
TICKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Options:
    """What is varied, and where results go."""

    output: Path = Path("build/benchmark-growth.json")
    """File for all figures."""
    image: Path = Path("build/cost-growth.svg")
    """Picture."""
    rows: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of rows."""
    tokens: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens of the longest row."""
    layers: tuple[int, ...] = (2, 4, 8, 16)
    """Transformer layers."""
    rank: tuple[int, ...] = (8, 16, 32, 64)
    """LoRA ranks."""
    rounds: int = 3
    """How often each point is timed, after once to warm up."""
    base: Sizes = field(
        default_factory=lambda: Sizes(
            hidden=256, layers=4, vocabulary=2000, modules=("all",), examples=16, length=64, candidates=0
        )
    )
    """What is kept while one thing varies."""


def points(options: Options) -> dict[str, list[tuple[float, Sizes]]]:
    """Returns, for all that is varied, its values and what is measured at each."""
    base = options.base
    return {
        "rows": [(n, replace(base, examples=n)) for n in options.rows],
        "tokens of a row": [
            (n, replace(base, length=n, token_budget=base.examples * max(options.tokens))) for n in options.tokens
        ],
        "layers": [(n, replace(base, layers=n)) for n in options.layers],
        "rank": [(n, replace(base, rank=n)) for n in options.rank],
        "edited modules": [(len(kinds) * base.layers, replace(base, modules=kinds)) for kinds in NESTED],
    }


def costs(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns seconds of every round and bytes at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        live = adapted(sizes, Path(folder))
    made = batches(rows(sizes), token_budget=sizes.token_budget)
    measure_live(live, made)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        measure_live(live, made)
        seconds.append(time.process_time() - start)
    with Peak() as memory:
        measure_live(live, made)
    return {"seconds": seconds, "bytes": memory.peak}


def slope(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Returns the slope of the logarithms and its 95 % interval."""
    fit = linregress(np.log(xs), np.log(ys))
    half = float(t.ppf(0.975, len(xs) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def growth(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns slopes and last steps of one thing's points."""
    repeated = [(one["value"], seconds) for one in found for seconds in one["seconds"]]
    factor = found[-1]["value"] / found[-2]["value"]
    times, bytes_ = [statistics.median(one["seconds"]) for one in found], [one["bytes"] for one in found]
    return {
        "time": slope(*map(list, zip(*repeated, strict=True))),
        "memory": slope([one["value"] for one in found], bytes_),
        "last time": times[-1] / times[-2] / factor,
        "last memory": bytes_[-1] / bytes_[-2] / factor,
    }


def drawn(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws time and memory against all that is varied, each relative to its first point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = canvas(7, 3)
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        for axis, title, of in (
            (axes[0], "Process time", lambda one: statistics.median(one["seconds"])),
            (axes[1], "Peak memory beside the model", lambda one: one["bytes"]),
        ):
            for (name, several), marker in zip(found.items(), "osd^v", strict=True):
                times = [one["value"] / several[0]["value"] for one in several]
                cost = [of(one) / of(several[0]) for one in several]
                axis.loglog(times, cost, marker=marker, markersize=3, linewidth=1, label=name)
            axis.loglog([1, 8], [1, 8], color="0.6", linestyle="--", linewidth=1, label="in proportion")
            axis.set(title=title, xlabel="what is varied, times the first point")
            axis.set_xticks(TICKS, map(str, TICKS))
            axis.set_yticks(TICKS, map(str, TICKS))
            axis.minorticks_off()
        axes[0].set_ylabel("cost, times the first point")
        axes[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def printed(found: dict[str, list[dict[str, Any]]], grown: dict[str, dict[str, Any]]) -> str:
    """Returns the table."""
    lines = []
    for name, several in found.items():
        one = grown[name]
        for kind, unit in (("time", "s"), ("memory", "MiB")):
            ends = [
                statistics.median(several[i]["seconds"]) if kind == "time" else several[i]["bytes"] / 2**20
                for i in (0, -1)
            ]
            middle, low, high = one[kind]
            span = f"{several[0]['value']:g} to {several[-1]['value']:g}"
            figures = [f"{ends[0]:.2f} to {ends[1]:.2f} {unit}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
            lines.append([name, span, kind, *figures, f"{one[f'last {kind}']:.2f}"])
    return table(["varied", "from, to", "cost", "from, to", "slope", "95 %", "last step"], lines)


def main() -> None:
    """Measures, prints the table, keeps figures and picture."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    found = {
        name: [{"value": value, **costs(sizes, options.rounds)} for value, sizes in several]
        for name, several in points(options).items()
    }
    grown = {name: growth(several) for name, several in found.items()}
    print(printed(found, grown))
    drawn(found, options.image)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"points": found, "growth": grown}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
