"""What a training leaves: a PEFT adapter folder with its manifest, loss curve and card."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_surgery.adapter import files, saving
from spectral_surgery.errors import RunError
from spectral_surgery.manifest import run_record
from spectral_surgery.plots import STYLE
from spectral_surgery.training import methods
from spectral_surgery.training.preparing import Prepared

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One optimiser step."""

    step: int
    epoch: float
    loss: float
    """Mean over the labelled tokens of the global batch, before the step, in nats."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""


@dataclass(frozen=True)
class LossCurve:
    """The loss of every optimiser step."""

    points: tuple[Point, ...]

    @classmethod
    def of(cls, history: Sequence[dict[str, Any]]) -> LossCurve:
        """Returns the curve that a trainer logged."""
        return cls(
            tuple(
                Point(entry["step"], entry["epoch"], entry["loss"], entry["learning_rate"], entry["grad_norm"])
                for entry in history
                if "loss" in entry
            )
        )

    def write(self, path: Path) -> None:
        """Writes one line a step."""
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(Point.__dataclass_fields__))
            table.writeheader()
            table.writerows(asdict(point) for point in self.points)

    def draw(self, path: Path) -> None:
        """Draws the curve, with a running mean of a twentieth of its length.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        import matplotlib
        from matplotlib.figure import Figure

        steps, losses = [p.step for p in self.points], [p.loss for p in self.points]
        width = max(1, len(losses) // 20)
        means = [sum(part) / len(part) for part in (losses[max(0, i - width + 1) : i + 1] for i in range(len(losses)))]
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(3.4, 2.2), layout="constrained")
            axes = figure.subplots()
            axes.plot(steps, losses, color="0.6" if width > 1 else "black", linewidth=0.8, label="every step")
            if width > 1:
                axes.plot(steps, means, color="black", linewidth=1.2, label=f"mean of the last {width}")
                axes.legend(frameon=False)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel("loss, nats per token")
            figure.savefig(path, metadata={"Software": None})


def write_adapter(prepared: Prepared, seed: int, model: PeftModel, curve: LossCurve, out: Path, work: Path) -> None:
    """Writes one trained adapter's folder in one step, after reading it back.

    Args:
        prepared: The run.
        seed: Which of its seeds.
        model: The trained model.
        curve: Its losses.
        out: Folder to write.
        work: Folder of the checkpoints.

    Raises:
        RunError: If saving fails or a trained number is not finite; nothing is changed at ``out`` then.
    """

    def write(new: Path) -> None:
        methods.save(model, prepared.options, work, new)
        prepared.tokenizer.save_pretrained(new)
        curve.write(new / "loss.csv")
        try:
            curve.draw(new / "loss.png")
        except ImportError:
            log.info("There is no picture of the loss: pip install 'spectral-surgery[report]' gives one.")
        tensors, _ = files.read_tensors(new)
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise RunError(f"{bad[0]}: not finite after training. Pass a lower --learning-rate.")
        record = _manifest(prepared, seed, curve, files.digest(tensors))
        (new / saving.MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (new / "README.md").write_text(_card(prepared, seed, curve), encoding="utf-8")

    saving.write_folder(out, write, overwrite=prepared.options.overwrite)


def _manifest(prepared: Prepared, seed: int, curve: LossCurve, digest: str) -> dict[str, Any]:
    rows, run = prepared.rows, run_record()
    return {
        **run,
        "versions": {**run["versions"], "trl": version("trl")},
        "source": {"name": f"a training on {prepared.model_name}"},
        "training": prepared.record(seed),
        "rows": {
            "read": rows.read,
            "taken": rows.taken,
            "malformed": len(rows.malformed),
            "first_malformed": list(rows.malformed[:5]),
            "truncated": rows.truncated,
        },
        "final_loss": curve.points[-1].loss,
        "result": {"tensors_sha256": digest},
    }


def _card(prepared: Prepared, seed: int, curve: LossCurve) -> str:
    """Returns the adapter's README, with the metadata that the Hub reads."""
    options, recipe, rows = prepared.options, prepared.recipe, prepared.rows
    base = options.base.base_name or prepared.model_name
    return f"""---
base_model: {json.dumps(base)}
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
tags: [{options.adapter.method}, sft, trl]
---

# {options.adapter.method} adapter of {base}

Trained by `spectral-surgery train` after the {recipe.name} recipe of Spectral Surgery (arXiv 2603.03995):
{len(rows.examples)} rows of {rows.source}, {prepared.steps} steps of {recipe.global_batch} rows, rank {recipe.rank},
learning rate {recipe.learning_rate:g}, loss on the {options.loss}, seed {seed}. The loss of the last step was
{curve.points[-1].loss:.4f} nats per token; `loss.csv` has every step, and `{saving.MANIFEST}` everything else.
"""
