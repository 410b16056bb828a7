"""LoRA on parameters (``target_parameters``): stacked experts, one update each, or a single matrix.

For E experts of rank r the rows of ``lora_A`` (E r, in) are expert-major and the columns of ``lora_B`` (out, r E) are
expert-minor: ``dW[e] = s B[:, :, e] A[e]`` after reshaping to (out, r, E) and (E, r, in). Several parameters of one
module are nested in the file as ``base_layer``, the name that sorts first outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.kinds.kind import Kind, Module, Place, Slot, Stored, number_faults
from spectral_surgery.spectrum import LowRank

NEST = ".base_layer"


def claims(config: AdapterConfig, module: Module) -> bool:
    """Returns whether the module's tensors belong to targeted parameters."""
    return bool(_parameters(config, module))


def faults(config: AdapterConfig, module: Module) -> Iterator[str]:
    """Yields what is wrong with the factors."""
    outer, depth, parameters = module.path.split(NEST)[0], module.path.count(NEST), _parameters(config, module)
    if not {"A", "B"} <= module.names.keys():
        yield f"{module.path}: lora_A or lora_B is missing. The file is incomplete; save the adapter again."
    elif sum(path.split(NEST)[0] == outer for path in module.others) != len(parameters):
        yield (
            f"{outer}: the file has other parameters here than target_parameters names ({', '.join(parameters)}), so "
            f"which is which is not known. Save the adapter again, naming exactly what was trained."
        )
    else:
        A, B, rank = module["A"], module["B"], config.rank(f"{outer}.{parameters[depth]}")
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
            yield (
                f"{outer}.{parameters[depth]}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not stacked "
                f"experts of rank {rank}. Add its rank to rank_pattern, or save the adapter again."
            )
        yield from number_faults(module, ("A", "B"))


def read(config: AdapterConfig, module: Module) -> dict[str, Stored]:
    """Returns the update of every expert, by a path such as ``model.layers.0.mlp.experts.7.down_proj``."""
    outer, depth = module.path.split(NEST)[0], module.path.count(NEST)
    parameter = _parameters(config, module)[depth]
    full = f"{outer}.{parameter}"
    A, B, rank = module["A"], module["B"], config.rank(full)
    count, scale = A.shape[0] // rank, config.scale(full, rank)
    found = {}
    for e in range(count):
        columns = _columns(rank, count, e)
        update = LowRank(columns(B), A[e * rank : (e + 1) * rank], scale)
        slots, place = (Slot(module.names["B"], columns),), Place(module.path, "experts", expert=e)
        single = outer if parameter == "weight" else full
        path = single if count == 1 else f"{outer}.{e}.{parameter}"
        found[path] = Stored(update, slots, module.claims, (place,))
    return found


def _columns(rank: int, count: int, e: int) -> Callable[[Tensor], Tensor]:
    """Returns the view of one expert's columns in B."""
    return lambda B: B.view(B.shape[0], rank, count)[:, :, e]


def _parameters(config: AdapterConfig, module: Module) -> list[str]:
    """Returns the targeted parameters of a module, outermost first."""
    outer = module.path.split(NEST)[0]
    found = set()
    for target in config.raw.get("target_parameters") or []:
        owner, _, parameter = target.rpartition(".")
        named = _ends(outer, owner) if owner else not any(_ends(outer, name) for name in _modules(config))
        if named:
            found.add(parameter)
    return sorted(found)


def _modules(config: AdapterConfig) -> list[str]:
    targets = config.raw.get("target_modules") or []
    return [] if isinstance(targets, str) else targets


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


KIND = Kind(
    name="LoRA on parameters (experts)",
    claims=claims,
    read=read,
    faults=faults,
    formula="s B[:, :, e] A[e] for every expert e",
    edits="lora_B, the expert's columns",
    note="measured one example at a time; output energy is that of white inputs",
)
