"""Live model and batches in, Measurement out: the one expensive pass, made once.

:func:`measure` is the whole of it, from an adapter or a loaded model. What can be known without the base model's
weights (:func:`prepare`) is done first: adapter, modules, rows, tokens, and whether adapter and base fit.

For every batch: one forward, one backward of the sum of per-example losses, and from it the derivative of each
example's own loss by each gate (the gates are per example, so the sum mixes nothing). No weight gets a gradient.
Everything is measured at the unedited point, where all gates are one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spectral_surgery import processes
from spectral_surgery.adapter import Adapter
from spectral_surgery.batching import (
    Fitting,
    budget,
    check_packing,
    indices_of,
    on_device,
    packing,
    probe_of,
    size_of,
    split,
)
from spectral_surgery.calibration import (
    Batch,
    Tokenized,
    data_digest,
    hash_order,
    load_examples,
    split_examples,
    tokenize,
)
from spectral_surgery.enough import MOST, Needs, in_words, joined, until_sure
from spectral_surgery.errors import DataError, RunError
from spectral_surgery.formats import DataOptions, Example
from spectral_surgery.live import Live, NotPerExampleError, Probe
from spectral_surgery.live.backward import backward
from spectral_surgery.live.loading import (
    TASKS,
    base_name,
    check_fits,
    check_invoked,
    load,
    load_config,
    load_tokenizer,
)
from spectral_surgery.manifest import run_record
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.objective import Loss, answer_loss
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.packing import Packed, formed
from spectral_surgery.paired import tokenize_apart
from spectral_surgery.selection import Selection, select

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(examples done, examples in all)."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a measurement needs except the base model's weights."""

    adapter: Adapter
    paths: list[str]
    """Modules to measure."""
    tokenizer: Any
    examples: list[Example]
    """In the order in which they are measured."""
    tokenized: Tokenized
    model: ModelOptions
    about: dict[str, str]
    """Hashes and names, for the record."""
    until_sure: bool = False
    """Measure only as many of the examples as it takes; see :mod:`.enough`."""


def prepare(
    adapter: Adapter,
    data: str | Path,
    *,
    selection: Selection | None = None,
    data_options: DataOptions | None = None,
    model: ModelOptions | None = None,
    batching: BatchOptions | None = None,
) -> Prepared:
    """Returns what a measurement needs, after every check that needs no base model weights.

    Raises:
        InputError: Whatever is wrong with selection, rows, tokenizer, or the fit of adapter and base model.
    """
    data_options, model = data_options or DataOptions(), model or ModelOptions()
    processes.check(model.device, model.device_map)
    paths = select(adapter.updates, selection or Selection())
    check_packing(adapter, paths, batching or BatchOptions())
    config = load_config(adapter, model, tasks=TASKS)
    tokenizer = load_tokenizer(adapter, model)
    found = load_examples(str(data), data_options, tokenizer, adapter.folder)
    count = min(data_options.count(MOST), len(hash_order(found, data_options.seed)))
    examples = split_examples(found, (count, 0, 0), data_options.seed).calibration
    tokenized = _tokenized(examples, tokenizer, data_options.max_length, adapter, config)
    check_fits(adapter, config, trust_remote_code=model.trust_remote_code)
    check_invoked(adapter, tokenized.examples)
    about = {
        "data": str(data),
        "data_sha256": data_digest(examples),
        "base_model": base_name(adapter, model),
        "recorded_base_model": adapter.config.base_model or "",
        "model_options": json.dumps(asdict(model)),
        "seed": str(data_options.seed),
        "loss": "mean negative log-likelihood of the answer's tokens, nats per token",
        "run": json.dumps(run_record()),
    }
    auto = data_options.examples == "auto"
    return Prepared(adapter, paths, tokenizer, examples, tokenized, model, about, auto)


def _tokenized(examples: list[Example], tokenizer: Any, longest: int, adapter: Adapter, config: Any) -> Tokenized:
    task = adapter.config.task_type
    if task in ("SEQ_2_SEQ_LM", "SEQ_CLS"):
        return tokenize_apart(examples, tokenizer, longest, config, classes=task == "SEQ_CLS")
    return tokenize(examples, tokenizer, longest)


def measure(
    target: Adapter | Live | PeftModel | str | Path,
    data: str | Path | Iterable[Any],
    *,
    loss: Loss = answer_loss,
    selection: Selection | None = None,
    data_options: DataOptions | None = None,
    model: ModelOptions | None = None,
    batching: BatchOptions | None = None,
    adapter_name: str = "default",
    progress: Progress | None = None,
) -> Measurement:
    """Returns the per-example sensitivity of every selected component.

    Either an adapter and rows, and the base model is loaded; or any loaded PEFT model and batches, with any
    per-example loss, so that classifiers, speech, vision and diffusion models work as well.

    Args:
        target: An adapter, its folder or Hub id; or a PEFT model, or a :class:`Live`.
        data: A file or Hub id of rows for an adapter; batches (mappings of tensors, examples first) for a model.
        loss: ``loss(model, batch) -> (examples,)``, differentiable, one value an example.
        selection: Modules and layers; by default ``auto``. A :class:`Live` has its own.
        data_options: How rows are read. With an adapter only.
        model: How the base model is loaded. With an adapter only.
        batching: How examples are batched, and whether activations are recomputed.
        adapter_name: The adapter's name in the model. With a model only.
        progress: Called with (examples done, examples in all).

    Raises:
        InputError: Whatever is wrong with adapter, data, selection or base model.
        RunError: If a loss is not finite.
    """
    if isinstance(target, str | Path):
        target = Adapter.load(target)
    if isinstance(target, Adapter):
        prepared = prepare(
            target, _rows(data), selection=selection, data_options=data_options, model=model, batching=batching
        )
        return measure_prepared(prepared, load_prepared(prepared), batching, loss=loss, progress=progress)
    if isinstance(data, str | Path):
        raise DataError(
            "A loaded model is measured on batches, not on a file of rows. Pass the adapter's folder instead."
        )
    live = target if isinstance(target, Live) else _live(target, selection, adapter_name)
    return measure_live(live, data, loss=loss, progress=progress)


def load_prepared(prepared: Prepared) -> Live:
    """Returns the base model with the adapter loaded, ready to be gated at the prepared modules."""
    return load(
        prepared.adapter,
        prepared.model,
        paths=prepared.paths,
        tokenizer=prepared.tokenizer,
        checked=True,
    )


def measure_prepared(
    prepared: Prepared,
    live: Live,
    batching: BatchOptions | None = None,
    *,
    loss: Loss = answer_loss,
    needs: Needs = "ranking",
    progress: Progress | None = None,
) -> Measurement:
    """Returns the sensitivities on the prepared examples; see :func:`measure`.

    Args:
        prepared: What to measure.
        live: The loaded model.
        batching: How examples are batched.
        loss: Per example.
        needs: With ``--examples auto``, what has to be decided.
        progress: Called with (examples done, examples in all).
    """
    batching = batching or BatchOptions()
    total, tokens = len(prepared.examples), budget(live, prepared.model, batching)
    packed = packing(live, prepared.tokenized, batching, loss)

    def some(first: int, end: int) -> Measurement:
        rows = Tokenized(prepared.tokenized.examples[first:end], 0)
        return measure_together(
            live,
            formed(rows, tokens, batching, packed=packed),
            [example.digest for example in rows.examples],
            loss=loss,
            checkpointing=prepared.model.gradient_checkpointing,
            progress=(lambda done, _: progress(first + done, total)) if progress else None,
            about={**prepared.about, "packed": "yes" if packed else "no"},
        )

    if not prepared.until_sure:
        return some(0, total)
    found, looks = until_sure(some, total, needs)
    return replace(
        found,
        about={
            **found.about,
            "data_sha256": data_digest(prepared.examples[: found.examples]),
            "examples": "auto",
            "looks": in_words(looks, needs),
        },
    )


def measure_together(
    live: Live,
    batches: Sequence[Batch | Packed],
    digests: Sequence[str],
    *,
    about: Mapping[str, str] | None = None,
    **settings: Any,
) -> Measurement:
    """Returns what :func:`measure_live` does, in the examples' order, with the batches dealt out to all processes.

    Args:
        live: The loaded model.
        batches: Of all examples; every process forms the same.
        digests: Content hash of each example.
        about: Recorded in the measurement, with the number of processes.
        **settings: As for :func:`measure_live`.
    """
    about = {**(about or {}), "processes": str(processes.count())}

    def some(share: list[Batch | Packed]) -> tuple[list[int], Measurement]:
        numbers = sorted(index for batch in share for index in batch.indices)
        mine = [digests[number] for number in numbers]
        return numbers, measure_live(live, share, digests=mine, about=about, **settings)

    parts = processes.dealt(batches, some)
    if len(parts) == 1:
        return parts[0][1]
    whole = reduce(joined, (measured for _, measured in parts))
    return whole.taken(np.argsort([number for numbers, _ in parts for number in numbers]))


def _rows(data: str | Path | Iterable[Any]) -> str | Path:
    if isinstance(data, str | Path):
        return data
    raise DataError(
        "An adapter is measured on a file or Hub id of rows. Pass a loaded PEFT model with batches instead."
    )


def _live(model: PeftModel, selection: Selection | None, adapter_name: str) -> Live:
    adapter = Adapter.from_model(model, adapter_name)
    paths = select(adapter.updates, selection or Selection())
    return Live(model, adapter, adapter_name=adapter_name, paths=paths)


def measure_live(
    live: Live,
    batches: Iterable[Any],
    *,
    loss: Loss = answer_loss,
    digests: Sequence[str] | None = None,
    checkpointing: bool = False,
    progress: Progress | None = None,
    about: Mapping[str, str] | None = None,
) -> Measurement:
    """Returns the per-example sensitivities of every gated module.

    Args:
        live: The loaded model.
        batches: :class:`~spectral_surgery.calibration.Batch`, :class:`~spectral_surgery.packing.Packed`, or mappings
            of tensors with the examples first.
        loss: ``loss(model, batch) -> (examples,)``, differentiable; see
            :func:`~spectral_surgery.objective.answer_loss`.
        digests: Content hash of each example, in the data's order; by default their numbers.
        checkpointing: Recompute activations in the backward pass.
        progress: Called after each batch.
        about: Recorded in the measurement.

    Raises:
        RunError: If a loss is not finite.
        DataError: If there is no batch, or the loss does not give one value an example.
    """
    batches = list(batches)
    total = sum(map(size_of, batches))
    if not total:
        raise DataError("There are no examples to measure on. Pass at least one batch.")
    order: list[int] = []
    parts: list[_Part] = []
    with live.still(checkpointing=checkpointing):
        fitting = Fitting()
        together = total == len(batches) or not _indivisible(live)
        for batch in batches:
            part, together = _measured(live, batch, loss, fitting, together)
            order += indices_of(batch, len(order))
            parts.append(part)
            if progress:
                progress(len(order), total)
    return _assembled(live, parts, np.argsort(order), digests, about or {})


@dataclass(frozen=True)
class _Part:
    """Results of some examples, on the CPU in float64; examples first, then components."""

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    energies: dict[str, np.ndarray]

    @classmethod
    def of(cls, losses: Tensor, probe: Probe) -> _Part:
        gradients = {path: _array(gate.grad) for path, gate in probe.gates.items()}
        energies = {path: _array(energy) for path, energy in probe.energies.items()}
        return cls(_array(losses), gradients, energies)

    @classmethod
    def joined(cls, parts: Sequence[_Part]) -> _Part:
        return cls(
            np.concatenate([part.losses for part in parts]),
            {path: np.concatenate([part.gradients[path] for part in parts]) for path in parts[0].gradients},
            {path: np.concatenate([part.energies[path] for part in parts]) for path in parts[0].energies},
        )


def _indivisible(live: Live) -> bool:
    if reason := live.indivisible:
        log.warning("Measuring one example at a time: %s.", reason)
    return reason is not None


def _measured(live: Live, batch: Any, loss: Loss, fitting: Fitting, together: bool) -> tuple[_Part, bool]:
    """Returns what a batch gives, and whether its examples could be told apart in one pass."""

    def one_pass(part: Any) -> _Part:
        return _one_pass(live, part, loss)

    if together:
        try:
            return _Part.joined(fitting.run(one_pass, batch)), True
        except NotPerExampleError as error:
            log.warning("Measuring one example at a time: %s.", error)
    return _Part.joined([part for piece in split(batch, 1) for part in fitting.run(one_pass, piece)]), False


def _one_pass(live: Live, batch: Any, loss: Loss) -> _Part:
    batch = on_device(batch, live.device)
    size = size_of(batch)
    probe = probe_of(batch)
    with torch.enable_grad(), live.probing(probe):
        losses = loss(live.model, batch)
        if losses.shape != (size,):
            raise DataError(
                f"The loss returned shape {tuple(losses.shape)} for {size} examples, expected ({size},): "
                f"one value an example, not a batch mean."
            )
        if not losses.isfinite().all():
            raise RunError(
                f"The loss of {int((~losses.isfinite()).sum())} of {size} examples is not finite. "
                f"Measure with --dtype bfloat16 or float32, and check these rows."
            )
        backward(losses, probe, live.model)
    return _Part.of(losses, probe)


def _assembled(
    live: Live,
    parts: list[_Part],
    order: np.ndarray,
    digests: Sequence[str] | None,
    about: Mapping[str, str],
) -> Measurement:
    whole = _Part.joined(parts)
    modules = {}
    for path in live.paths:
        spectrum = live.spectra[path]
        if path not in whole.gradients:
            raise RunError(f"{path}: the module took no part in the loss, so it has no sensitivity. Leave it out.")
        modules[path] = ModuleMeasurement(
            S=spectrum.S.numpy(),
            ties=spectrum.ties,
            gate_gradient=whole.gradients[path][order],
            output_energy=whole.energies[path][order],
        )
    about = {"adapter_sha256": live.adapter.digest, **about}
    names = tuple(digests) if digests is not None else tuple(map(str, range(len(order))))
    return Measurement(modules, names, whole.losses[order], about)


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.float64).numpy()
