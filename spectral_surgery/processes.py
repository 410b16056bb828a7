"""Several processes on one measurement, as ``accelerate launch`` starts them: who does what, and all together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from spectral_surgery.errors import RunError

T = TypeVar("T")


def rank() -> int:
    """Returns this process's number; 0 writes and prints."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def count() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def mine(items: Sequence[T]) -> list[T]:
    """Returns this process's share of what is dealt out in turns."""
    return list(items[rank() :: count()])


def together(items: list[T]) -> list[T]:
    """Returns what all processes have, process after process; every process must call this.

    Raises:
        RunError: If the processes do not find each other.
    """
    if count() == 1:
        return items
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes != count():
        raise RunError(f"{count()} processes were started and accelerate sees {state.num_processes}. Start one.")
    return list(gather_object(items))
