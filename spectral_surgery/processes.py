"""Several processes on one piece of work, as ``accelerate launch`` or ``torchrun`` starts them.

Every process runs the same program. What takes a model is dealt out and gathered (:func:`dealt`), what must be the
same everywhere is done by the first and sent to all (:func:`of_first`); so all hold the same values, and decide alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from spectral_surgery.errors import InputError, RunError, SpectralSurgeryError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(weeks=1)
"""How long a process waits for the others; the launcher ends all where one fails."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor or context parallel)",
}
"""What accelerate's launcher sets where it would spread one model over the processes."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def rank() -> int:
    """Returns this process's number; 0 writes and prints."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def count() -> int:
    """Returns the number of processes that work together here."""
    return 1 if _alone.get() else int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def alone() -> Iterator[None]:
    """Lets this process work for itself while open, as if there were no others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def device() -> str:
    """Returns this process's own device.

    Raises:
        RunError: If the processes do not find each other.
    """
    own = _state().device
    return "cpu" if own.type == "cpu" else str(own)


def check(asked: str | None, device_map: str | None) -> None:
    """Checks that several processes can work together; one always can.

    Args:
        asked: The device that was asked for.
        device_map: How one model was to be spread over devices.

    Raises:
        InputError: If the launcher or the options would spread one model over them, or the devices do not agree.
        RunError: If the processes do not find each other.
    """
    if count() == 1:
        return
    if spread := [name for variable, name in SHARDED.items() if os.environ.get(variable) == "true"]:
        raise InputError(
            f"accelerate is configured for {spread[0]}, which spreads one model over the {count()} processes. Here "
            f"each process holds the whole base model. Launch with --multi_gpu; for a base that is larger than one "
            f"device, start one process with --device-map auto."
        )
    if device_map:
        raise InputError(
            f"--device-map {device_map} spreads one model over the devices, and {count()} processes were started, "
            f"each with a model of its own. Start one process, or leave --device-map out."
        )
    if asked and asked != device().partition(":")[0]:
        raise InputError(
            f"--device {asked} is one device for {count()} processes, and accelerate gives this one {device()}. Leave "
            f"--device out; ACCELERATE_USE_CPU=true in the environment keeps to the CPU."
        )


def dealt(items: Sequence[T], work: Callable[[list[T]], R]) -> list[R]:
    """Returns what each process makes of its share of the items, process after process; every process must call this.

    Items are dealt out in turns, and a process without any makes nothing. Within ``work`` a process is alone.

    Raises:
        RunError: In every process, if the work of one fails.
    """
    if count() == 1:
        return [work(list(items))] if items else []
    from accelerate.utils import gather_object

    share, number = list(items[rank() :: count()]), rank()
    _state()
    made, fault = _tried(lambda: [work(share)] if share else [])
    every = gather_object([(number, made or [], _reason(fault))])
    if fault:
        raise fault
    for other, _, reason in every:
        if reason:
            raise RunError(f"Process {other} of {len(every)} failed: {reason}")
    return [result for _, results, _ in every for result in results]


def of_first(work: Callable[[], T]) -> T:
    """Returns what the first process makes, the same in all; every process must call this.

    Within ``work`` the first process is alone.

    Raises:
        RunError: In every other process, if it fails.
    """
    if count() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    _state()
    made, fault = _tried(work) if rank() == 0 else (None, None)
    value, reason = broadcast_object_list([made, _reason(fault)])
    if fault:
        raise fault
    if reason:
        raise RunError(f"The first process failed: {reason}")
    return value


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns each tensor's sum over the processes; every process must call this with the same shapes."""
    if count() == 1:
        return list(tensors)
    from accelerate.utils import reduce

    _state()
    return list(reduce(list(tensors), "sum"))


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns what the work gives, or what went wrong, so that the others can be told."""
    try:
        with alone():
            return work(), None
    except Exception as error:
        return None, error


def _reason(fault: Exception | None) -> str | None:
    if fault is None:
        return None
    return str(fault) if isinstance(fault, SpectralSurgeryError) else f"{type(fault).__name__}: {fault}."


def _state() -> Any:
    """Returns accelerate's own state of the processes, which brings them together when first asked for.

    Raises:
        RunError: If they do not find each other.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != wanted:
        raise RunError(f"{wanted} processes were started and accelerate sees {state.num_processes}. Start one.")
    return state
