"""An adapter in; the same adapter in another form, written, read back and verified, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spectral_surgery.adapter import Adapter, saving
from spectral_surgery.adapter.diffusion import DiffusionAdapter
from spectral_surgery.adapter.portable import portability_faults
from spectral_surgery.errors import AdapterError, RunError, combine
from spectral_surgery.exporting import destination as to
from spectral_surgery.exporting import merging
from spectral_surgery.exporting.consumers import readings, readings_of
from spectral_surgery.exporting.resizing import Losses, lost, ranks_for, refitted
from spectral_surgery.exporting.strength import block_strengths, scaled
from spectral_surgery.manifest import run_record, source_record
from spectral_surgery.options import ModelOptions
from spectral_surgery.spectrum import LowRank

TOLERANCE = {"torch.bfloat16": 1e-2, "torch.float16": 1e-3}
"""Largest relative error of a portable adapter's reading, by the dtype of its factors; 1e-5 for wider ones."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what is known about it."""

    output: Path
    losses: Losses | None = None
    """What the written deltas lose against the source's, by module; None for a merged model."""
    parameters: tuple[int, int] = (0, 0)
    """Values in the factors, before and after."""
    per_module: int | None = None
    """Values in the factors if each module had its own rank, where all were given one under energy or ratio."""
    readings: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Relative error of each program's own reading, of the source and of what was written; portable only."""
    parity: merging.Parity | None = None
    """The merged model against the adapter; merged only."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """By module path, where updates were multiplied."""


def export(
    adapter: Adapter,
    destination: str | to.Destination,
    output: str | Path,
    *,
    per_module: bool = False,
    model: ModelOptions | None = None,
    data: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Exported:
    """Writes an adapter in another form as one step, reads it back and verifies it.

    Args:
        adapter: The adapter.
        destination: ``portable``, ``merged``, ``rank=8``, ``energy=0.95``, ``ratio=20``, ``scale=0.7`` or
            ``blocks=input=0.5,output.3=0``, or what :func:`destination.parse` makes of it.
        output: Folder to write; for an image model's file also a path that ends in .safetensors.
        per_module: Give every module the rank that it needs under energy or ratio, and no more than it has under
            rank, rather than one rank to all. Files of image models, whose format knows no common rank, always do.
        model: The base model of a merged export; its ``dtype`` is what is written.
        data: Rows on which a merged model is held against the adapter.
        overwrite: Replace a folder or file that spectral-surgery wrote.
        progress: Told what is being done.

    Returns:
        What was written and what it loses.

    Raises:
        InputError: If the destination does not suit the adapter, or the output may not be written.
        RunError: If writing or verifying fails; the target is then as it was.
    """
    wanted = to.parse(destination) if isinstance(destination, str) else destination
    sources = (adapter.folder,) if adapter.folder else ()
    saving.check_output(Path(output), overwrite=overwrite, sources=sources)
    job = _Job(adapter, Path(output).expanduser(), overwrite, {"export": _spelt(wanted)}, progress)
    if isinstance(wanted, to.Portable):
        return job.portable()
    if isinstance(wanted, to.Merged):
        return job.merged(model or ModelOptions(), data)
    if isinstance(wanted, to.Resize):
        return job.resized(wanted, per_module=per_module)
    if isinstance(wanted, to.Scale):
        return job.scaled(dict.fromkeys(adapter.updates, wanted.strength))
    return job.scaled(block_strengths(adapter.updates, wanted))


def check(adapter: Adapter, destination: to.Destination) -> None:
    """Checks what can be known of an export before anything is computed.

    Raises:
        AdapterError: If the destination does not suit the adapter.
    """
    if isinstance(adapter, DiffusionAdapter) and isinstance(destination, to.Portable):
        raise AdapterError(
            f"{adapter.name} is a file for image tools, which all read its own format. "
            f"Export it to rank=R, energy=E, ratio=Q, scale=X or blocks=...."
        )
    if isinstance(adapter, DiffusionAdapter) and isinstance(destination, to.Merged):
        raise AdapterError(
            f"{adapter.name} is a file for image tools, whose base model is not loaded here. "
            f"Merge it with the tool that runs the model."
        )
    if isinstance(destination, to.Portable):
        faults = portability_faults(adapter.config.raw, adapter.stored, adapter.tensors)
        combine([f"This adapter has no portable form: {fault}" for fault in faults], AdapterError)


@dataclass(frozen=True)
class _Job:
    adapter: Adapter
    output: Path
    overwrite: bool
    manifest: Mapping[str, Any]
    progress: Callable[[str], None]

    def portable(self) -> Exported:
        """Writes the adapter with one rank, no patterns and the scale inside of B."""
        check(self.adapter, to.Portable())
        source = self.adapter
        rank = max(update.A.shape[0] for update in source.updates.values())
        written = self._refitted(dict.fromkeys(source.updates, rank))
        losses = _losses(source.updates, written.updates)
        before = readings(source.config.raw, source.tensors, source.updates)
        after: dict[str, float] = {}

        def verify(folder: Path) -> None:
            after.update(readings_of(folder, source.updates))
            allowed = max(TOLERANCE.get(str(update.B.dtype), 1e-5) for update in source.updates.values())
            if wrong := [name for name, error in after.items() if not error <= allowed]:
                raise RunError(
                    f"{wrong[0]} would read the written adapter with a relative error of {after[wrong[0]]}."
                )

        record = {"losses": _summary(losses), "readings": after}
        written.save(self.output, overwrite=self.overwrite, manifest={**self.manifest, **record}, check=verify)
        return replace(self._result(written, losses), readings={name: (before[name], after[name]) for name in after})

    def resized(self, resize: to.Resize, *, per_module: bool) -> Exported:
        """Writes the best update of a lower rank in every module."""
        source = self.adapter
        own = per_module or isinstance(source, DiffusionAdapter)
        written = self._refitted(ranks_for(source.updates, resize, per_module=own))
        losses = _losses(source.updates, written.updates)
        written.save(self.output, overwrite=self.overwrite, manifest={**self.manifest, "losses": _summary(losses)})
        result = self._result(written, losses)
        if own or resize.rule == "rank":
            return result
        needed = ranks_for(source.updates, resize, per_module=True)
        return replace(result, per_module=_parameters_at(source.updates, needed))

    def scaled(self, strengths: Mapping[str, float]) -> Exported:
        """Writes the adapter with its updates times a number each."""
        written = scaled(self.adapter, strengths)
        written.save(self.output, overwrite=self.overwrite, manifest=self.manifest)
        return replace(self._result(written, None), strengths=strengths)

    def merged(self, model: ModelOptions, data: str | None) -> Exported:
        """Writes the base model with the adapter merged in."""
        check(self.adapter, to.Merged())
        plan = merging.prepare(self.adapter, model, data)
        source = self.adapter.edited_from or source_record(self.adapter)

        def manifest(parity: merging.Parity) -> dict[str, Any]:
            base = merging.loading.base_name(self.adapter, model)
            record = {**run_record(), "source": dict(source), "base_model": base, "parity": asdict(parity)}
            return {**record, **self.manifest}

        parity = merging.merge(plan, self.output, manifest=manifest, overwrite=self.overwrite, progress=self.progress)
        return Exported(self.output, parity=parity)

    def _refitted(self, ranks: Mapping[str, int]) -> Adapter:
        scales = {path: self.adapter.scale_at(path, rank) for path, rank in ranks.items()}
        return self.adapter.with_factors(refitted(self.adapter.updates, ranks, scales))

    def _result(self, written: Adapter, losses: Losses | None) -> Exported:
        return Exported(self.output, losses, (_parameters(self.adapter), _parameters(written)))


def _losses(source: Mapping[str, LowRank], written: Mapping[str, LowRank]) -> Losses:
    return Losses({path: lost(source[path], written[path]) for path in source})


def _parameters(adapter: Adapter) -> int:
    return _parameters_at(adapter.updates, {path: update.A.shape[0] for path, update in adapter.updates.items()})


def _parameters_at(updates: Mapping[str, LowRank], ranks: Mapping[str, int]) -> int:
    return sum(rank * (updates[path].A.shape[1] + updates[path].B.shape[0]) for path, rank in ranks.items())


def _summary(losses: Losses) -> dict[str, Any]:
    ranks = {path: [loss.before, loss.after] for path, loss in losses.modules.items()}
    return {"energy_kept": losses.energy, "relative_error": losses.error, "ranks": ranks}


def _spelt(destination: to.Destination) -> dict[str, Any]:
    return {"to": type(destination).__name__.lower(), **asdict(destination)}
