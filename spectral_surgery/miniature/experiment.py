"""Adapters trained by the paper's recipes and edited as in its tables, by ``train`` and ``sweep`` themselves.

A part is one adapter: a family and a training seed. Its folder holds ``adapter/`` and ``study/``, a sweep's folder
like any other. Parts are independent, so several processes may work on them; each goes on where it was interrupted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from spectral_surgery.demo import world
from spectral_surgery.errors import InputError, OutputError
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.miniature.families import FAMILIES, pair, rows
from spectral_surgery.options import ModelOptions
from spectral_surgery.results.runs import Run, read_runs
from spectral_surgery.sweeping.grid import Item, spell_out
from spectral_surgery.sweeping.presets import SHAPES, Preset
from spectral_surgery.sweeping.study import Study, StudyAdapter
from spectral_surgery.training.options import BaseOptions, RowOptions, ScheduleOptions, TrainOptions

TABLES: tuple[Preset, ...] = ("table2", "table3", "table4", "table5")
HIDDEN = "up_proj,gate_proj"
"""The module set that the authors ran and did not print."""
WEAKENED = ("scale:strength=0.75", "scale:strength=0.5")
MATCHED = "random:like=grad_direction"
GUIDED = "grad_direction"
OWN = "own rows"
"""Name in a study of the adapter that is measured on rows of its own task."""
BATCH, LEARNING_RATE = 16, 2e-3
"""Rows of an optimiser step, and the highest learning rate: so small a model needs more and larger steps."""
OPTIONS = "miniature.json"
MEASURED = "sums"
"""The family whose training rows every adapter is measured on, as the authors' scripts measure all on GSM8K's."""
ROW_SEED = 0
"""Of all rows: adapters of one family differ in their training seed alone."""

Progress = Callable[[int, int], None]
"""(parts done, parts in all)."""


@dataclass(frozen=True, kw_only=True)
class MiniatureOptions:
    """How large the miniature is."""

    output: Path = Path("miniature")
    """Folder for adapters, studies, tables, figures and the page; an interrupted run goes on in it."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Training seeds: one adapter of every family for each."""
    train_rows: int | None = None
    """Rows that each adapter learns from; by default each task's own number."""
    test_rows: int = 150
    """Rows that each adapter is scored on."""
    measuring_rows: tuple[int, ...] = (32, 64, 128, 256)
    """Numbers of measuring rows of Table 4."""
    usual_rows: int = 128
    """The one of them that everything else is measured on."""
    max_steps: int | None = None
    """Stop every training after so many optimiser steps, to try this out."""
    workers: int = 2
    """Processes at once."""

    def learnt(self, family: str) -> int:
        """Returns how many rows an adapter of a family learns from."""
        return FAMILIES[family].train_rows if self.train_rows is None else self.train_rows

    def parts(self) -> list[Part]:
        """Returns every adapter's part."""
        return [Part(name, seed) for seed in self.seeds for name in FAMILIES]


@dataclass(frozen=True)
class Part:
    """One adapter to be trained and edited."""

    family: str
    seed: int

    def folder(self, options: MiniatureOptions) -> Path:
        """Returns where it lies."""
        return options.output / f"{self.family}-{self.seed}"


def run(options: MiniatureOptions, *, progress: Progress | None = None) -> dict[Part, list[Run]]:
    """Returns the runs of every part, after training and sweeping what is left.

    Raises:
        InputError: If the options do not fit each other.
        OutputError: If the folder holds something else, or a miniature of another size.
        RunError: If something fails midway; what was done is kept.
    """
    check(options)
    begin(options)
    parts = options.parts()
    workers = min(options.workers, len(parts))
    # A fresh interpreter each: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting = [pool.submit(run_part, options, part) for part in parts]
        try:
            for done, each in enumerate(as_completed(waiting), 1):
                each.result()
                if progress:
                    progress(done, len(parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {part: read_runs(part.folder(options) / "study") for part in parts}


def check(options: MiniatureOptions) -> None:
    """Checks numbers.

    Raises:
        InputError: If one does not fit.
    """
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise InputError(f"--seeds is {' '.join(map(str, options.seeds)) or 'empty'}, expected different numbers.")
    if options.usual_rows not in options.measuring_rows:
        raise InputError(f"--usual-rows {options.usual_rows} is not among --measuring-rows.")
    learnt = min(map(options.learnt, FAMILIES))
    least = min(learnt, options.test_rows, options.workers, *options.measuring_rows)
    if least < 1 or learnt < max(options.measuring_rows):
        raise InputError(
            "--train-rows, --test-rows, --workers and --measuring-rows must be 1 or more, and there must be as many "
            "--train-rows as measuring rows, which are taken from them."
        )


def begin(options: MiniatureOptions) -> None:
    """Writes rows and sizes into a new folder, or checks that those in it are the same; seeds may be added later.

    Raises:
        OutputError: If the folder holds something else, or a miniature of another size.
    """
    sizes = {
        "train_rows": [options.learnt(name) for name in FAMILIES],
        "test_rows": options.test_rows,
    }
    sizes |= {"measuring_rows": options.measuring_rows, "usual_rows": options.usual_rows}
    text = json.dumps(sizes | {"max_steps": options.max_steps}) + "\n"
    note = options.output / OPTIONS
    if note.exists() and note.read_text(encoding="utf-8") != text:
        raise OutputError(f"{options.output} holds a miniature of another size. Choose another --output.")
    if not note.exists() and options.output.exists() and (options.output.is_file() or any(options.output.iterdir())):
        raise OutputError(f"{options.output} is not the folder of a miniature. Choose a new one with --output.")
    (options.output / "rows").mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")
    for name in FAMILIES:
        found = rows(name, options.learnt(name) + options.test_rows, ROW_SEED)
        learnt = map(pair, found[options.test_rows :])
        for path, part in ((scored(options, name), found[: options.test_rows]), (learned(options, name), learnt)):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            if not path.exists():  # what a sweep depends on keeps its date
                path.write_text(lines, encoding="utf-8")


def scored(options: MiniatureOptions, family: str) -> Path:
    """Returns the file of rows that a family is scored on; its name is the task's."""
    return options.output / "rows" / f"{family}.jsonl"


def learned(options: MiniatureOptions, family: str) -> Path:
    """Returns the file of rows that a family's adapters learn from."""
    return options.output / "rows" / f"{family}-train.jsonl"


def run_part(options: MiniatureOptions, part: Part) -> None:
    """Trains one adapter and runs its study, as far as they are not done."""
    from spectral_surgery.sweeping.preparing import prepare_study
    from spectral_surgery.sweeping.running import run_study
    from spectral_surgery.training.running import train

    train(training(options, part))
    asked = study(options, part)
    run_study(prepare_study(asked, list(items(options, asked))), part.folder(options) / "study")


def _one_thread() -> None:
    """Makes a process ready: so small a model loses more than it gains by sharing its work among threads."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def training(options: MiniatureOptions, part: Part) -> TrainOptions:
    """Returns a part's training: its family's recipe, with batches and steps that fit so small a model."""
    return TrainOptions(
        recipe=FAMILIES[part.family].recipe,
        model=str(world() / "base"),
        output=part.folder(options) / "adapter",
        resume=True,
        rows=RowOptions(data=str(learned(options, part.family)), format="prompt", max_length=128),
        schedule=ScheduleOptions(
            learning_rate=LEARNING_RATE,
            global_batch=BATCH,
            micro_batch=BATCH,
            max_steps=options.max_steps,
            seeds=(part.seed,),
        ),
        base=BaseOptions(dtype="float32", cpu=True),
    )


def study(options: MiniatureOptions, part: Part) -> Study:
    """Returns a part's adapters and how they are scored; what is varied is in :func:`items`.

    The training seed also draws the measuring rows and the random policies, so that the variation between seeds holds
    all three.
    """
    name, path = f"seed {part.seed}", str(part.folder(options) / "adapter")
    suites = (str(scored(options, part.family)),)
    plain = StudyAdapter(path, name, suites, str(learned(options, MEASURED)))
    return Study(
        adapters=(plain, replace(plain, name=OWN, data=str(learned(options, part.family)))),
        policies=(),
        seeds=(part.seed,),
        suite=SuiteOptions(batch_size=options.test_rows),
        model=ModelOptions(base_model=str(world() / "base"), dtype="float32", device="cpu"),
    )


def items(options: MiniatureOptions, asked: Study) -> Iterator[Item]:
    """Yields every run of a study once: the cells of the paper's tables, and the controls that it lacks."""
    plain, own = asked.adapters
    usual = replace(asked, adapters=(plain,), rows=(options.usual_rows,), energy=("nuclear",), modules=("residual",))
    parts = []
    for table in TABLES:
        shape = SHAPES[table]
        counts = options.measuring_rows if len(shape.rows) > 1 else usual.rows
        varied = replace(usual, policies=shape.policies, rows=counts, energy=shape.energy, modules=shape.modules)
        parts.append(varied)
    parts.append(replace(usual, policies=(GUIDED,), modules=(HIDDEN,)))
    parts.append(replace(usual, policies=(*WEAKENED, MATCHED), energy=("auto",)))
    if plain.data != own.data:
        parts.append(replace(usual, adapters=(own,), policies=(GUIDED,)))
    yield from dict.fromkeys(item for part in parts for item in spell_out(part))
