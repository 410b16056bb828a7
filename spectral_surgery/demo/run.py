"""The demo: one adapter that works and forgot the rest, refined by the very command that users type.

The embedded base model does ten short text tasks. Its adapter learnt an eleventh, ``compare``, from rows of which a
third have wrong labels, and lost the ten. The demo writes its rows into the output folder, runs refine on them and
prints what comes out, and the command that repeats it.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

import torch

from spectral_surgery.adapter import Adapter
from spectral_surgery.demo import world
from spectral_surgery.options import ModelOptions
from spectral_surgery.refining.bench import Progress
from spectral_surgery.refining.entry import CACHE, carry_out, check_folder
from spectral_surgery.refining.job import Job, prepare
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.report import summary, unavailable

TASK = ("calibration", "validation", "test")
SKILLS = ("skills",)
OPTIONS = {"objective": "exact", "ladder": "paper"}


def run(output: Path, *, overwrite: bool, progress: Progress | None = None) -> str:
    """Refines the embedded adapter, writes everything to ``output`` and returns what to print.

    Raises:
        OutputError: If the output folder may not be written.
        RunError: If something fails midway.
    """
    adapter = Adapter.load(world() / "adapter")
    check_folder(output, overwrite=overwrite, adapter=adapter)
    (output / CACHE).mkdir(parents=True, exist_ok=True)
    data, keep = _written(output / "rows.jsonl", TASK), _written(output / "keep.jsonl", SKILLS)
    torch.set_num_threads(1)  # so small a model gains little by a second one, and loses much on a busy machine
    job = prepare(
        adapter,
        str(data),
        options=RefineOptions(keep=str(keep), **OPTIONS),  # type: ignore[arg-type]
        model=ModelOptions(base_model=str(world() / "base"), dtype="float32", device="cpu"),
    )
    found = carry_out(job, output, overwrite=overwrite, progress=progress)
    told = [_introduction(job), summary(found.verdict, output), unavailable() or "", _command(output)]
    return "\n\n".join(part for part in told if part)


def _written(path: Path, names: tuple[str, ...]) -> Path:
    """Writes the embedded rows of these names as one file and returns its path."""
    parts = [(world() / "data" / f"{name}.jsonl").read_text(encoding="utf-8") for name in names]
    path.write_text("".join(parts), encoding="utf-8")
    return path


def _introduction(job: Job) -> str:
    skills = sorted({json.loads(line)["task"] for line in Path(job.options.keep).read_text("utf-8").splitlines()})
    text = (
        f"A small base model knows {len(skills)} skills: {', '.join(skills)}. A rank-16 adapter taught it one more "
        f"task, compare, from rows of which {_share_wrong()} % have a wrong label. Here is what the adapter does to "
        f"both, and what can be done about it without training it again."
    )
    return textwrap.fill(text, 100)


def _share_wrong() -> int:
    rows = [json.loads(line) for line in (world() / "data" / "train.jsonl").read_text("utf-8").splitlines()]
    return round(100 * sum(_wrong(row) for row in rows) / len(rows))


def _wrong(row: dict[str, str]) -> bool:
    first, second = (int(number) for number in row["prompt"].rstrip(":").split()[1:])
    right = "less" if first < second else "greater" if first > second else "equal"
    return row["answer"] != right


def _command(output: Path) -> str:
    parts = ["spectral-surgery", "refine", str(world() / "adapter"), "--base-model", str(world() / "base")]
    parts += ["--dtype", "float32", "--data", str(output / "rows.jsonl"), "--keep", str(output / "keep.jsonl")]
    for name, value in OPTIONS.items():
        parts += [f"--{name}", value]
    return f"The same by hand:\n  {shlex.join([*parts, '--output', f'{output}-again'])}"
