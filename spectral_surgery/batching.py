"""Batches of any kind: how many examples they have, which, in pieces, and whether rows are packed or padded.

A batch is a :class:`~spectral_surgery.calibration.Batch`, a mapping of tensors, or a dataclass of tensors, with the
examples first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import Batch, Tokenized, batches
from spectral_surgery.errors import BaseModelError, RunError
from spectral_surgery.estimating import CPU_TOKENS, costs_of
from spectral_surgery.live import Live, NotPerExampleError, Probe
from spectral_surgery.live.live import indivisible
from spectral_surgery.objective import Loss, answer_logits, answer_loss
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.packing import Packed, is_wanted, packs

log = logging.getLogger(__name__)

T = TypeVar("T")

FEWEST, MOST = 256, 16384
"""Tokens of a batch that is made to fit: below, memory runs out for other reasons; above, nothing gets faster."""


def size_of(batch: Any) -> int:
    """Returns how many examples a batch has."""
    return len(batch) if isinstance(batch, Batch | Packed) else len(_tensors(batch)[0])


def indices_of(batch: Any, done: int) -> list[int]:
    """Returns the positions of a batch's examples in the data; by default those after the ones done."""
    return list(getattr(batch, "indices", range(done, done + size_of(batch))))


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else vars(batch).values()
    return [value for value in values if isinstance(value, Tensor)]


def on_device(batch: Any, device: torch.device) -> Any:
    """Returns the batch with its tensors on a device."""
    if isinstance(batch, Mapping):
        return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    return batch.to(device)


def split(batch: Any, size: int) -> list[Any]:
    """Returns the batch in pieces of at most ``size`` examples."""
    return [_part(batch, slice(start, start + size)) for start in range(0, size_of(batch), size)]


def _part(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Batch | Packed):
        return batch[rows]
    fields = dict(batch) if isinstance(batch, Mapping) else vars(batch)
    piece = {key: value[rows] if isinstance(value, Tensor) else value for key, value in fields.items()}
    return piece if isinstance(batch, Mapping) else replace(batch, **piece)


def probe_of(batch: Any) -> Probe:
    """Returns gates at one for a batch, with where its examples' own tokens are, as far as it says."""
    if isinstance(batch, Packed):
        return Probe(len(batch), segments=batch.segments)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)
    return Probe(size_of(batch), mask if mask is not None and mask.ndim == 2 else None)


def tokens_of(batch: Any) -> int:
    """Returns the numbers in a batch's first tensor: its tokens, padding included, where it holds text."""
    return _tensors(batch)[0].numel()


@dataclass
class Fitting:
    """What has turned out to fit into memory: once a batch did not, none of its size is tried again."""

    most: float = math.inf
    """Tokens."""

    def run(self, one_pass: Callable[[Any], T], batch: Any) -> list[T]:
        """Returns what a pass gives for the batch, or for parts of it in order, where it does not fit.

        Raises:
            RunError: If one example alone does not fit.
        """
        size = size_of(batch)
        if tokens_of(batch) <= self.most or size == 1:
            try:
                return [one_pass(batch)]
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise RunError(
                        "One example alone needs more memory than there is. Use --gradient-checkpointing, "
                        "--load-in-4bit or a smaller --max-length."
                    ) from error
            self.most = tokens_of(batch) / 2
            log.warning("Out of memory with %d examples at once; going on with half of them.", size)
        return [part for half in split(batch, (size + 1) // 2) for part in self.run(one_pass, half)]


def budget(live: Live, model: ModelOptions, batching: BatchOptions) -> int:
    """Returns the most tokens of a batch: what was asked for, or what the device's free memory has room for."""
    if batching.token_budget != "auto":
        return batching.token_budget
    if live.device.type == "cpu":
        return CPU_TOKENS
    if live.device.type != "cuda":
        return batching.tokens
    base = live.model.get_base_model()
    unused = torch.cuda.memory_reserved(live.device) - torch.cuda.memory_allocated(live.device)
    return fitting_tokens(live, base.config, model, torch.cuda.mem_get_info(live.device)[0] + unused)


def fitting_tokens(live: Live, config: Any, model: ModelOptions, free: int) -> int:
    """Returns how many tokens fit into free bytes by arithmetic, between :data:`FEWEST` and :data:`MOST`."""
    try:
        costs = costs_of(live.model.get_base_model(), config, live.adapter, model, live.paths)
    except AttributeError:  # a configuration without the usual names
        return BatchOptions().tokens
    return min(max(costs.tokens(free - costs.adapter), FEWEST), MOST)


def check_packing(adapter: Adapter, paths: Sequence[str], options: BatchOptions) -> None:
    """Checks that rows can be packed if that is asked for, as far as an adapter's files say.

    Raises:
        BaseModelError: If they cannot.
    """
    if options.packing == "on" and (reason := _never(adapter, paths)):
        raise BaseModelError(_refusal(reason))


def packing(live: Live, rows: Tokenized, options: BatchOptions, loss: Loss = answer_loss) -> bool:
    """Returns whether rows are measured packed: where it is asked for, by default with flash attention.

    Two rows are run together and alone to see that the model keeps them apart.

    Raises:
        BaseModelError: If it is asked for and would be wrong.
    """
    if not is_wanted(options, getattr(live.model.get_base_model().config, "_attn_implementation", None)):
        return False
    reason = _never(live.adapter, live.paths)
    if loss is not answer_loss:
        reason = "the loss is the caller's own, and takes padded rows"
    reason = reason or _mixing(live, rows)
    if reason and options.packing == "on":
        raise BaseModelError(_refusal(reason))
    if reason:
        log.warning("Rows are padded, not packed: %s.", reason)
    return reason is None


def _never(adapter: Adapter, paths: Sequence[str]) -> str | None:
    """Returns why an adapter's rows cannot be packed, whatever the model's weights."""
    task = adapter.config.task_type
    if task not in (None, "CAUSAL_LM"):
        return f"the adapter's task is {task}, whose models take prompt and answer apart"
    return indivisible(adapter, paths)


def _refusal(reason: str) -> str:
    return f"Rows cannot be packed into one sequence ({reason}). Leave out --packing on; rows are then padded."


@torch.no_grad()
def _mixing(live: Live, rows: Tokenized) -> str | None:
    """Returns why the two shortest rows give other logits together than alone, or None where they do not."""
    two = Tokenized(sorted(rows.examples, key=lambda row: len(row.input_ids))[:2], 0)
    (packed,) = packs(two, batch_size=2)
    with live.still():
        apart = [answer_logits(live.model, row.to(live.device))[0][0] for row in batches(two, batch_size=1)]
        packed = packed.to(live.device)
        try:
            with live.probing(probe_of(packed)):
                together = answer_logits(live.model, packed)[0][0]
        except (NotPerExampleError, TypeError) as error:
            return str(error)
    alone = torch.cat(apart)
    moved = float((together - alone).float().norm() / alone.float().norm())
    allowed = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    if moved <= allowed:
        return None
    return f"together two rows' logits differ by {moved:.1e} from theirs alone, where rounding explains {allowed:.1e}"
