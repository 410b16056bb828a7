"""Looking into adapters from their files alone, without a base model: the jobs behind ``spectral-surgery inspect``.

Each module's factors are decomposed once, its numbers and leading directions are kept and the rest is let go, so
memory stays at a few leading directions a module and time is linear in modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np

from spectral_surgery import alignment, weight_study
from spectral_surgery.adapter import Adapter, AdapterConfig, files
from spectral_surgery.adapter.kinds import DTYPES
from spectral_surgery.anatomy import Leading, ModuleSummary, dissect, update_cosine
from spectral_surgery.editing import check_measured_on
from spectral_surgery.errors import AdapterError
from spectral_surgery.findings import findings
from spectral_surgery.inspection import Comparison, Inspection
from spectral_surgery.measurement import Measurement
from spectral_surgery.selection import Selection, select
from spectral_surgery.significance import respond
from spectral_surgery.spectrum import finite
from spectral_surgery.threads import each, one_thread
from spectral_surgery.weight_files import WeightFiles
from spectral_surgery.weight_study import BaseView

DIGITS = 6
"""Significant digits of figures in JSON."""


@dataclass(frozen=True)
class Readable:
    """An adapter without the modules that hold values that are not finite."""

    adapter: Adapter
    nonfinite: tuple[str, ...] = ()
    """Names of the tensors that hold such values."""


@dataclass(frozen=True)
class Dissected:
    """An adapter with the numbers and leading directions of its selected modules."""

    readable: Readable
    modules: Mapping[str, ModuleSummary]
    leading: Mapping[str, Leading] = field(default_factory=dict)


def read(name: str, *, revision: str | None = None, subfolder: str | None = None) -> Readable:
    """Returns an adapter for looking at, with modules left out that hold values that are not finite.

    Raises:
        AdapterError: If it cannot be read, is inconsistent, or nothing finite is left of it.
    """
    try:
        return Readable(Adapter.load(name, revision=revision, subfolder=subfolder))
    except AdapterError:
        found = _finite_part(name, revision, subfolder)
        if found is None:
            raise
        return found


def _finite_part(name: str, revision: str | None, subfolder: str | None) -> Readable | None:
    folder = files.locate(name, revision=revision, subfolder=subfolder)
    if folder.is_file():
        return None
    config = AdapterConfig(files.read_config(folder))
    tensors, metadata = files.read_tensors(folder)
    bad = [key for key, tensor in tensors.items() if tensor.dtype in DTYPES and not finite(tensor)]
    owners = {key.rpartition(".lora_")[0] or key for key in bad}
    left = {key: tensor for key, tensor in tensors.items() if (key.rpartition(".lora_")[0] or key) not in owners}
    if not bad or not any("lora_" in key for key in left):
        return None
    adapter = Adapter(config, left, metadata, folder, name)
    adapter.stored  # noqa: B018 (checks every tensor now)
    return Readable(adapter, tuple(bad))


def inspect(
    adapters: Sequence[Readable],
    *,
    selection: Selection | None = None,
    k: int = 4,
    geometry: bool = True,
    sensitivities: Sequence[Measurement] = (),
    base: WeightFiles | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Inspection]:
    """Returns what is known about every adapter, and about every two of them.

    Args:
        adapters: From :func:`read`.
        selection: Modules and layers; all by default.
        k: Dimension of the compared subspaces, 4 in the paper.
        geometry: Whether directions are compared.
        sensitivities: Measurements of any of the adapters, matched by hash.
        base: Weights of the base model that all of the adapters belong to.
        progress: Told how many base weights were compared with, and of how many.

    Raises:
        SelectionError: If the selection names nothing in an adapter.
        MeasurementError: If a measurement was made on none of the adapters.
        BaseModelError: If the base has no weight for a module, or one of another shape.
    """
    selection = selection or Selection(modules=("all",))
    for measured in sensitivities:
        _check_measured(adapters, measured)
    with one_thread():
        found = [_dissect(readable, selection, k, directions=geometry or base is not None) for readable in adapters]
        views = [_view(one, k, geometry, name) for one, name in zip(found, _names(found), strict=True)]
        if geometry:
            views = [_compared(i, found, views, k) for i in range(len(views))]
    views = [_with_responses(d.readable.adapter, view, sensitivities) for d, view in zip(found, views, strict=True)]
    return _with_base(found, views, base, progress) if base else views


def _dissect(readable: Readable, selection: Selection, k: int, *, directions: bool) -> Dissected:
    updates = readable.adapter.updates
    paths = select(updates, selection)
    modules, kept = {}, {}
    found = each(lambda path: dissect(path, updates[path], k if directions else 0), paths)
    for path, (summary, leading) in zip(paths, found, strict=True):
        modules[path] = summary
        if leading:
            kept[path] = leading
    return Dissected(readable, modules, kept)


def _view(one: Dissected, k: int, geometry: bool, name: str) -> Inspection:
    adapter = one.readable.adapter
    return Inspection(
        name=name,
        digest=adapter.digest,
        base_model=adapter.config.base_model,
        parameters=sum(update.A.numel() + update.B.numel() for update in adapter.updates.values()),
        other_tensors=len(set(adapter.tensors).difference(*(stored.claims for stored in adapter.stored.values()))),
        nonfinite=one.readable.nonfinite,
        modules=one.modules,
        k=k,
        matrices=tuple(alignment.matrices(one.leading, k)) if geometry else (),
        curves=tuple(alignment.synergy(one.leading, k)) if geometry else (),
    )


def _names(found: Sequence[Dissected]) -> list[str]:
    names: list[str] = []
    for one in found:
        name, count = one.readable.adapter.name, 1
        while (unique := name if count == 1 else f"{name} ({count})") in names:
            count += 1
        names.append(unique)
    return names


def _compared(i: int, found: Sequence[Dissected], views: Sequence[Inspection], k: int) -> Inspection:
    others = {views[j].name: _compare(found[i], found[j], k) for j in range(len(found)) if j != i}
    return replace(views[i], against=others)


def _compare(one: Dissected, other: Dissected, k: int) -> Comparison:
    first, second = one.readable.adapter.updates, other.readable.adapter.updates
    shared = [p for p in one.modules if p in other.modules and one.modules[p].shape == other.modules[p].shape]
    norms = {p: (one.modules[p].delta_norm, other.modules[p].delta_norm) for p in shared}
    return Comparison(
        cosine={p: update_cosine(first[p], second[p]) for p in shared},
        strength={p: mine / its if its else float("nan") for p, (mine, its) in norms.items()},
        curves=tuple(alignment.between({p: one.leading[p] for p in shared}, {p: other.leading[p] for p in shared}, k)),
        missing=len(set(one.modules) ^ set(other.modules)) + len(set(one.modules) & set(other.modules)) - len(shared),
    )


def _with_base(
    found: Sequence[Dissected],
    views: Sequence[Inspection],
    base: WeightFiles,
    progress: Callable[[int, int], None],
) -> list[Inspection]:
    seen: list[dict[str, BaseView]] = [{} for _ in found]
    weights = list(dict.fromkeys((path, one.modules[path].shape) for one in found for path in one.leading))
    for done, (path, shape) in enumerate(weights, 1):
        before = weight_study.known(base.weight(path, shape))
        for one, views_of in zip(found, seen, strict=True):
            if path in one.leading and one.modules[path].shape == shape:
                leading = one.leading[path]
                views_of[path] = weight_study.view(before, one.readable.adapter.updates[path], leading.U, leading.V)
        progress(done, len(weights))
    return [replace(view, base=views_of) for view, views_of in zip(views, seen, strict=True)]


def _check_measured(adapters: Sequence[Readable], measured: Measurement) -> None:
    digests = [readable.adapter.digest for readable in adapters]
    if measured.about.get("adapter_sha256") not in digests:
        check_measured_on(adapters[0].adapter, measured)


def _with_responses(adapter: Adapter, view: Inspection, measurements: Sequence[Measurement]) -> Inspection:
    for measured in measurements:
        if measured.about.get("adapter_sha256") == adapter.digest:
            responses = {path: one for path, one in respond(measured).items() if path in view.modules}
            return replace(view, responses=responses, examples=measured.examples)
    return view


def to_json(inspections: Sequence[Inspection]) -> list[dict[str, Any]]:
    """Returns everything as plain values, one object an adapter; NaN becomes null."""
    return [_json(inspection) for inspection in inspections]


def _json(inspection: Inspection) -> dict[str, Any]:
    return {
        "adapter": inspection.name,
        "tensors_sha256": inspection.digest,
        "base_model": inspection.base_model,
        "parameters": inspection.parameters,
        "findings": plain(findings(inspection)),
        "total": plain(inspection.total),
        "kinds": {group.name: plain(inspection.aggregate(group.paths)) for group in inspection.groups},
        "blocks": {
            f"{family}.{number}": plain(one)
            for family, blocks in inspection.blocks.items()
            for number, one in blocks.items()
        },
        "layers": {str(number): plain(one) for number, one in inspection.layers.items()},
        "modules": [_module_json(inspection, path) for path in inspection.modules],
        "k": inspection.k,
        "layers_against_layers": plain(inspection.matrices),
        "kinds_within_layers": plain(inspection.curves),
        "against": plain(inspection.against),
    }


def _module_json(inspection: Inspection, path: str) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if path in inspection.responses:
        extra["sensitivity"] = plain(inspection.responses[path])
    if path in inspection.base:
        extra["base"] = plain(inspection.base[path])
    return {**vars(inspection.modules[path]), **extra}


def plain(value: Any) -> Any:
    """Returns dataclasses, mappings and arrays as JSON values, floats at six digits."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    return value
