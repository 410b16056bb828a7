"""The update of every kind of adapter, written out densely from its file and put into the base model's weights.

From the definition of each kind; nothing is shared with the package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
RANK, ALPHA = 3, 5
INVOCATION = [7, 9]


def scale(config: dict[str, Any], rank: int = RANK) -> float:
    """lora_alpha / r, or its root for rsLoRA."""
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pairs(
    tensors: dict[str, Tensor], a: str = "A.weight", b: str = "B.weight"
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Module path, A and B of every pair of factors."""
    for name in tensors:
        if name.endswith(f".lora_{a}"):
            path = name.removesuffix(f".lora_{a}")
            yield path.removeprefix(PREFIX), tensors[name], tensors[f"{path}.lora_{b}"]


Deltas = dict[str, Tensor]


def plain(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B A."""
    return {path: scale(config, len(A)) * B.flatten(1) @ A.flatten(1) for path, A, B in pairs(tensors)}


def embedded(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B A of an embedding, over one-hot tokens."""
    return {path: scale(config) * B @ A for path, A, B in pairs(tensors, "embedding_A", "embedding_B")}


def everything(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """Linear layers and embeddings."""
    return plain(tensors, config) | embedded(tensors, config)


def patterned(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B A with alpha of its own on v_proj."""
    own = {path: (7 if path.endswith("v_proj") else ALPHA) / math.sqrt(len(A)) for path, A, _ in pairs(tensors)}
    return {path: own[path] * B @ A for path, A, B in pairs(tensors)}


def kasa(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B diag(d) A."""
    diagonal = {path: tensors[f"{PREFIX}{path}.lora_diag"] for path, _, _ in pairs(tensors)}
    return {path: scale(config) * B @ torch.diag(diagonal[path]) @ A for path, A, B in pairs(tensors)}


def blocked(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B A with q_proj's B and o_proj's A made of two blocks."""
    found = {}
    for path, A, B in pairs(tensors):
        A = torch.block_diag(*A.chunk(2)) if path.endswith("o_proj") else A
        B = torch.block_diag(*B.chunk(2)) if path.endswith("q_proj") else B
        found[path] = scale(config, len(A)) * B @ A
    return found


def adaptive(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """Alpha / (init_r + 1e-5) B (E * A)."""
    s = config["lora_alpha"] / (config["init_r"] + 1e-5)
    E = {path: tensors[f"{PREFIX}{path}.lora_E"] for path, _, _ in pairs(tensors, "A", "B")}
    return {path: s * B @ (E[path] * A) for path, A, B in pairs(tensors, "A", "B")}


def attended(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B A of both projections."""
    names = {"layer": "layer.in_proj", "layer.base_layer.out_proj": "layer.out_proj"}
    return {names[path]: delta for path, delta in plain(tensors, config).items()}


def stacked(tensors: dict[str, Tensor], config: dict[str, Any]) -> Deltas:
    """S B[:, :, e] A[e] of every expert, from rows and columns one by one."""
    found = {}
    for path, A, B in pairs(tensors):
        name = path.removesuffix(".base_layer")
        parameter = "gate_up_proj" if path != name else "down_proj"
        rank = 2 if parameter == "down_proj" else RANK
        for e in range(4):
            rows, columns = [e * rank + k for k in range(rank)], [k * 4 + e for k in range(rank)]
            found[f"{name}.{e}.{parameter}"] = ALPHA / rank * B[:, columns] @ A[rows]
    return found


Put = Callable[[Any, dict[str, Tensor], Deltas, dict[str, Tensor]], None]


def add(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Adds every update to its weight."""
    for path, delta in deltas.items():
        module = base.get_submodule(path)
        turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        module.weight.data += (delta.T if turned else delta).reshape(module.weight.shape)


def add_biases(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Adds updates, and the biases of B scaled."""
    add(base, batch, deltas, tensors)
    for path in deltas:
        base.get_submodule(path).bias.data += ALPHA / RANK * tensors[f"{PREFIX}{path}.lora_B.bias"]


def truncate_and_add(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Drops the smallest r components of every weight, and adds the updates."""
    for path in deltas:
        weight = base.get_submodule(path).weight
        U, S, Vh = torch.linalg.svd(weight.data, full_matrices=False)
        weight.data = (U[:, :-RANK] * S[:-RANK]) @ Vh[:-RANK]
    add(base, batch, deltas, tensors)


def rescale(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Sets every row of W + dW to its magnitude; an embedding's rows are its columns."""
    add(base, batch, deltas, tensors)
    for path in deltas:
        module = base.get_submodule(path)
        turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        W = module.weight.data.T if turned else module.weight.data
        magnitude = tensors[f"{PREFIX}{path}.lora_magnitude_vector"].flatten()
        W = (magnitude / W.flatten(1).norm(dim=1)).view(-1, *[1] * (W.ndim - 1)) * W
        module.weight.data = W.T if turned else W


def repeat_and_add(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Runs both layers twice, each time with updates of its own."""
    base.model.layers = nn.ModuleList([copy.deepcopy(base.model.layers[i]) for i in (0, 1, 0, 1)])
    for i, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = i
    base.config.num_hidden_layers = 4
    add(base, batch, deltas, tensors)


def add_to_experts(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Adds every expert's update to its slice."""
    for path, delta in deltas.items():
        module, e, parameter = path.rsplit(".", 2)
        experts = base.get_submodule(module)
        weight = getattr(experts, parameter).data[int(e)]
        weight += delta if weight.shape == delta.shape and not getattr(experts, "is_transposed", False) else delta.T


def add_twice(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Adds the input projections' update once and the output projection's twice, as PEFT 0.21 does."""
    base.layer.in_proj_weight.data += deltas["layer.in_proj"]
    base.layer.out_proj.weight.data += 2 * deltas["layer.out_proj"]


def from_invocation(base: Any, batch: dict[str, Tensor], deltas: Deltas, tensors: dict[str, Tensor]) -> None:
    """Adds every update to the outputs at and after the invocation tokens."""
    ids = batch["input_ids"]
    start = [next(t for t in range(len(row)) if row[t : t + 2].tolist() == INVOCATION) for row in ids]
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(start)[:, None])[..., None]
    for path, delta in deltas.items():
        base.get_submodule(path).register_forward_hook(
            lambda module, inputs, out, delta=delta: out + mask * (inputs[0] @ delta.T.to(out.dtype))
        )
