"""How much scaling the first k rows of a weight has to do with its top k singular directions.

The paper motivates learnable scales by singular directions and then scales rows. Row order is a choice of coordinates:
the neurons of a feed-forward layer, or the channels inside a head, can be renumbered without changing the function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spectral_surgery.errors import InputError
from spectral_surgery.tables import table

DRAWS = 20
"""Random scales over which a row update's share is averaged."""


def row_shares(
    W: Float[Tensor, "out in"], k: int, generator: torch.Generator
) -> tuple[float, float, float, float, float]:
    """Returns what k rows and k directions of a weight hold, each in [0, 1].

    In this order: the first k rows' share of ``||W||_F^2``; the top k directions'; what a scaling of the first k rows
    by random scales puts into the span of the top k left singular vectors, as a share of its own squared norm; what
    chance would put there, k / out; the largest relative change of the top k singular values under scales of standard
    deviation 0.3.
    """
    W = W.double()
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    inside, moved = [], []
    for _ in range(DRAWS):
        scaled = 0.3 * torch.randn(k, 1, generator=generator, dtype=W.dtype) * W[:k]
        inside.append(float((U[:k, :k].T @ scaled).square().sum() / scaled.square().sum()))
        after = torch.linalg.svdvals(torch.cat([W[:k] + scaled, W[k:]]))
        moved.append(float(((after[:k] - S[:k]).abs() / S[:k]).max()))
    rows = float(W[:k].square().sum() / W.square().sum())
    directions = float(S[:k].square().sum() / S.square().sum())
    return rows, directions, float(np.mean(inside)), k / len(W), float(np.mean(moved))


def row_geometry(base_model: str, target_modules: Sequence[str], counts: Sequence[int]) -> str:
    """Returns a table of :func:`row_shares`, averaged over the modules of a base model that have more rows than k.

    Args:
        base_model: Folder or Hub id.
        target_modules: Module kinds.
        counts: Values of k.

    Raises:
        InputError: If a k is under 1, no module has more rows than the smallest k, or the model cannot be loaded.
    """
    if min(counts, default=0) < 1:
        raise InputError(f"--k is {' '.join(map(str, counts)) or 'empty'}, expected numbers from 1 on.")
    from transformers import AutoModelForCausalLM

    try:
        base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"The base model {base_model} cannot be loaded ({reason}). Pass another.") from error
    weights = [m.weight.detach() for path, m in base.named_modules() if path.rpartition(".")[2] in target_modules]
    header = ["k", "modules", "norm in first rows", "in top directions", "row update in directions", "by chance"]
    lines = []
    for k in counts:
        larger = [W for W in weights if min(W.shape) > k]
        if larger:
            shares = np.mean([row_shares(W, k, torch.Generator().manual_seed(0)) for W in larger], axis=0)
            cells = [f"{100 * share:.1f} %" for share in shares]
            lines.append([str(k), str(len(larger)), *cells])
    if not lines:
        raise InputError(f"No module has more rows than k = {min(counts)}. Pass a smaller --k.")
    return table([*header, "values move at most"], lines)
