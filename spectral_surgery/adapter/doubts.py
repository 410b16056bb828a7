"""What is worth a warning when an adapter is read: it can be edited, and something else about it may mislead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import compress

import torch

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds import Stored
from spectral_surgery.threads import each

HALF = (torch.float16, torch.bfloat16)
CANCELLED = 1e-2
"""Norm of B A relative to the norms of B and A under which 16-bit factors no longer say what their product is."""

FEW = 8
"""About so many modules are looked at before all are: what cancels does so throughout an adapter."""


def doubts(config: AdapterConfig, stored: Mapping[str, Stored]) -> Iterator[str]:
    """Yields what a user should know of an adapter before editing it, a sentence each."""
    if config.raw.get("init_lora_weights") == "loftq":
        yield (
            "The adapter was initialised by LoftQ: part of its update repairs the rounding of the quantised base that "
            "it was trained on, and is no part of what it learnt. Measure and use it on that base."
        )
    few = list(stored.values())[:: max(len(stored) // FEW, 1)]
    if any(map(_cancels, few)) and (cancelled := list(compress(stored, each(_cancels, stored.values())))):
        yield (
            f"{cancelled[0]}{f' and {len(cancelled) - 1} more modules' if len(cancelled) > 1 else ''}: the update is "
            f"less than {CANCELLED:g} of its 16-bit factors, as of a PiSSA, OLoRA or CorDA adapter that was converted "
            f"and then rounded. Much of it is rounding. Convert it again from float32, and save that as float32."
        )


def _cancels(stored: Stored) -> bool:
    """Returns whether the factors' product is lost in their rounding; a zero update is not."""
    update = stored.update
    if update.A.dtype not in HALF or update.B.dtype not in HALF:
        return False
    B, A = update.B.float(), update.A.float()
    of_B, of_A = B.T @ B, A @ A.T
    return 0 < float((of_B * of_A).sum()) < CANCELLED**2 * float(of_B.trace() * of_A.trace())
