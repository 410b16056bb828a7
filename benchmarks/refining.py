"""What refine gets back on the embedded adapter, of skills that it was shown and of skills that it never saw.

Half of the ten skills are among the kept rows, the other half never: not to measure on, not to choose on. Every run
draws its own rows. Afterwards the verdict's winner is scored on fresh rows of the task, of the kept and of the
never-kept skills, beside base, unedited adapter and, as rivals at the same task score, one of each family: of the
strengths, even spectra and continued trainings that keep as much of the task as the answer on the run's validation
rows the one with most of the other skills there, or the one with most of the task where none does.

    python benchmarks/refining.py --output build/benchmark-refine
    python benchmarks/refining.py --scenario seen --runs 1
    python benchmarks/refining.py --scenario nothing --runs 1
    python benchmarks/refining.py --scenario defect --runs 1

Scenarios: ``unseen`` (unseen rows, keep rows with answers), ``seen`` (rows of the training only, keep prompts without
answers), ``nothing`` (``--may-lose 0`` where there is nothing to gain: the answer should be to leave it alone),
``defect`` (one component of the adapter amplified five times).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import load_examples, tokenize
from spectral_surgery.demo import tasks, world
from spectral_surgery.demo.build import train_adapter
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.refining.candidates import Candidate
from spectral_surgery.refining.job import prepare
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.refining.run import Found, run
from spectral_surgery.refining.scoring import Rows, exact_objective
from spectral_surgery.statistics import paired_proportions
from spectral_surgery.surgery import operate
from spectral_surgery.tables import table

KEPT, NEVER = ("add", "copy", "max", "reverse", "upper"), ("count", "min", "modulo", "sort", "subtract")
RIVALS = ("strength", "newton_schulz", "module_strength", "continue")
"""Families of which one is shown beside the answer."""
CLEAN = 1500
"""Rows with right labels that the adapter with nothing to gain is trained on."""
BATCHING = BatchOptions(token_budget=16384)
BASE = ModelOptions(base_model=str(world() / "base"), dtype="float32", device="cpu")


def write(path: Path, rows: list[dict[str, str]]) -> str:
    """Writes rows as JSONL and returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shipped(name: str) -> list[dict[str, str]]:
    """Returns an embedded set of rows."""
    return [json.loads(line) for line in (world() / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def drawn(names: tuple[str, ...], count: int, seed: int) -> list[dict[str, str]]:
    """Returns so many held-out rows of each task, none of which the adapter was trained on."""
    known = tasks.prompts(shipped("train"))
    rows = [dict(row) for name in names for row in tasks.rows(name, count, seed, exclude=known)]
    random.Random(seed).shuffle(rows)
    return rows


def spoilt(adapter: Adapter, seed: int) -> str:
    """Returns the random module whose strongest component is amplified."""
    return random.Random(seed).choice(sorted(adapter.updates))


def defective(adapter: Adapter, seed: int) -> Adapter:
    """Returns the adapter with one component of one module amplified five times."""
    path = spoilt(adapter, seed)
    gates = np.ones(adapter.updates[path].A.shape[0])
    gates[0] = 5.0
    updates, report = operate(adapter.updates, {path: gates})
    return adapter.with_updates(updates, report)


def job_of(options: argparse.Namespace, seed: int, folder: Path) -> Any:
    """Returns the prepared job of one run."""
    adapter = Adapter.load(world() / "adapter")
    task = drawn((tasks.COMPARE,), options.rows + CLEAN * (options.scenario == "nothing"), seed)
    keep = drawn(KEPT, options.keep // len(KEPT), seed + 1)
    common = {"seed": seed}
    if options.scenario == "seen":
        keep = [{key: row[key] for key in ("prompt", "task")} for row in keep]
        refining = RefineOptions(keep=write(folder / "keep.jsonl", keep), keep_tokens=16)
        data = write(folder / "train.jsonl", shipped("train"))
        return prepare(adapter, None, train_data=data, options=refining, rows=DataOptions(**common), model=BASE)
    refining = RefineOptions(objective="exact", keep=write(folder / "keep.jsonl", keep))
    if options.scenario == "nothing":
        refining = replace(refining, may_lose="0")
        train_adapter(world() / "base", folder / "clean", Path(write(folder / "clean.jsonl", task[:CLEAN])), seed)
        adapter, task = Adapter.load(folder / "clean"), task[CLEAN:]
    if options.scenario == "defect":
        adapter = defective(adapter, seed)
    data = write(folder / "rows.jsonl", task)
    return prepare(adapter, data, options=refining, rows=DataOptions(**common), model=BASE)


def exact(found: Found, candidate: Candidate, rows: Rows) -> np.ndarray:
    """Returns which rows a candidate answers exactly, with the tensors as they would be written."""
    bench = found.ready.bench
    with candidate.written(found.ready.job.adapter).open(bench.live):
        return exact_objective("strip", BATCHING).score(bench.live, rows)


def fresh(found: Found, names: tuple[str, ...], count: int, seed: int) -> Rows:
    """Returns rows that this run has not used."""
    path = Path(found.ready.job.options.keep).with_name(f"fresh-{names[0]}.jsonl")
    write(path, drawn(names, count, seed + 1000))
    examples = load_examples(str(path), DataOptions(), found.ready.job.tokenizer)
    used = {row.digest for part in (found.ready.measuring, found.ready.validation, found.ready.test)
            for row in (*part.task.examples, *part.keep.examples)}  # fmt: skip
    examples = [row for row in examples if row.digest not in used]
    return Rows(examples, tokenize(examples, found.ready.job.tokenizer, 1024))


def scores(found: Found, options: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """Returns every shown candidate's exact answers on fresh rows."""
    sets = {
        "task": fresh(found, (tasks.COMPARE,), options.fresh, seed),
        "kept": fresh(found, KEPT, options.fresh // (2 * len(KEPT)), seed),
        "never kept": fresh(found, NEVER, options.fresh // (2 * len(NEVER)), seed),
    }
    shown = ["base", "unedited", *([found.verdict.winner] if found.verdict.winner else [])]
    shown += [name for family in RIVALS if (name := rival(found, family, shown[-1]))]
    return {name: {key: exact(found, found.candidates[name], rows) for key, rows in sets.items()} for name in shown}


def rival(found: Found, family: str, answer: str) -> str | None:
    """Returns the family's candidate that is shown beside the answer, by the run's own validation rows."""
    measure, scored = found.tried.split.skills, found.tried.split.scores
    names = [name for name in scored if found.candidates[name].family == family]
    able = [name for name in names if scored[name].task.mean() >= scored[answer].task.mean()]
    sign = -1 if measure.lower_is_better else 1
    if able:
        return max(able, key=lambda name: sign * scored[name].skills.mean())
    return max(names, key=lambda name: scored[name].task.mean(), default=None)


def defect(found: Found, seed: int) -> dict[str, Any]:
    """Returns what became of the component that was amplified: undone, its gate is a fifth."""
    path, winner = spoilt(found.ready.job.adapter, seed), found.verdict.winner
    gates = (found.candidates[winner].gates if winner else None) or {}
    return {"module": path, "gates": gates[path].tolist() if path in gates else None}


def one_run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Returns one run's figures."""
    folder = options.output / f"{options.scenario}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = job_of(options, seed, folder)
    start = time.perf_counter()
    found = run(job, folder / "cache")
    seconds = time.perf_counter() - start
    values = scores(found, options, seed)
    unedited, chosen = values["unedited"]["task"], values[found.verdict.winner or "unedited"]["task"]
    wins, losses = int((chosen > unedited).sum()), int((chosen < unedited).sum())
    return {
        "seed": seed,
        "winner": found.verdict.winner,
        "sentence": found.verdict.sentence,
        "seconds": seconds,
        "times": found.times.spent,
        "rows": {key: len(value) for key, value in values["unedited"].items()},
        "task_bound": paired_proportions(wins, losses, len(chosen), confidence=0.9).low,
        "error_rate": vars(found.verdict.error_rate) if found.verdict.error_rate else None,
        "defect": defect(found, seed) if options.scenario == "defect" else None,
        "families": {name: found.candidates[name].family for name in values},
        "exact": {name: {key: float(v.mean()) for key, v in one.items()} for name, one in values.items()},
    }


def retained(one: dict[str, float], base: dict[str, float], key: str) -> float:
    """Returns a score as a percentage of the base's own."""
    return 100 * one[key] / base[key] if base[key] else float("nan")


def told(result: dict[str, Any]) -> str:
    """Returns one run as text."""
    exact, rate, gates = result["exact"], result["error_rate"], (result["defect"] or {}).get("gates")
    lines = [
        [
            name,
            *(f"{100 * value:.1f}" for value in one.values()),
            *(f"{retained(one, exact['base'], key):.1f}" for key in ("kept", "never kept")),
        ]
        for name, one in exact.items()
    ]
    said = [
        f"\nRun {result['seed']}, {result['seconds']:.0f} s: {result['sentence']}",
        table(["exact %", *result["rows"], "kept / base", "never / base"], lines),
        f"Lower 95 % bound of the task's change: {100 * result['task_bound']:+.2f} points",
    ]
    if rate:
        said.append(f"Error rate {100 * rate['estimate']:.2f} %, Clopper-Pearson from {100 * rate['low']:.2f} %")
    if result["defect"]:
        first = f"{gates[0]:.3f} (undone: 0.200)" if gates else "not touched"
        said.append(f"Gate of the amplified component of {result['defect']['module']}: {first}")
    return "\n".join(said)


def summed(results: list[dict[str, Any]]) -> str:
    """Returns the means over runs: of base, unedited, the answer, and each family's rival at its task score."""
    found: dict[str, list[list[float]]] = {}
    for result in results:
        exact, families = result["exact"], result["families"]
        for name, one in exact.items():
            kept = [retained(one, exact["base"], key) for key in ("kept", "never kept")]
            word = "answer" if name == result["winner"] else families[name]
            found.setdefault(word, []).append([100 * one["task"], *kept])
    lines = [
        [word, str(len(rows)), *(f"{value:.1f}" for value in np.mean(rows, axis=0))] for word, rows in found.items()
    ]
    reached = sum(result["task_bound"] > -0.03 for result in results)
    sure = sum(result["error_rate"]["low"] <= 0.05 for result in results if result["error_rate"])
    return "\n".join(
        [
            f"\nMeans of {len(results)} runs; on validation rows rivals keep as much of the task as the answer, or "
            "the most they can",
            table(["", "runs", "task %", "kept / base", "never / base"], lines),
            f"Lower bound of the task's change above -3 points: {reached} of {len(results)}",
            f"Error rate's lower bound at most 5 %: {sure} of {len(results)}",
        ]
    )


def main() -> None:
    """Runs the scenario and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/benchmark-refine"))
    parser.add_argument("--scenario", choices=("unseen", "seen", "nothing", "defect"), default="unseen")
    parser.add_argument("--runs", type=int, default=10, help="whole runs, each with its own seed")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--rows", type=int, default=1200, help="unseen rows of the task that refine is given")
    parser.add_argument("--keep", type=int, default=600, help="rows of other skills that refine is given")
    parser.add_argument("--fresh", type=int, default=4000, help="fresh test rows of the task, and of other skills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["SPECTRAL_SURGERY_STATE"] = str(options.output / "ledger")  # what was refined elsewhere counts there
    results = []
    for seed in range(options.seed, options.seed + options.runs):
        result = one_run(options, seed)
        results.append(result)
        print(told(result), flush=True)
        path = options.output / f"{options.scenario}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(summed(results))


if __name__ == "__main__":
    main()
