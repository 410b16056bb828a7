"""Which modules are edited: by kind, name, pattern and layer.

The paper edits the modules that write into the residual stream, ``o_proj`` and ``down_proj``; its module study adds
the attention inputs and all modules. Other architectures call the same modules by other names, so each preset is a set
of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spectral_surgery.errors import SelectionError

RESIDUAL = frozenset(
    ["o_proj", "down_proj", "out_proj", "c_proj", "fc2", "fc_out", "wo", "w2", "dense", "dense_4h_to_h"]
)
"""Last names of modules that write into the residual stream."""
ATTENTION_INPUTS = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "c_attn",
        "query_key_value",
        "query",
        "key",
        "value",
        "Wqkv",
        "in_proj",
        "q",
        "k",
        "v",
    ]
)
"""Last names of modules that read it for attention."""
PRESETS = ("auto", "all", "residual", "attention-inputs")


@dataclass(frozen=True)
class Selection:
    """Modules and layers to edit."""

    modules: tuple[str, ...] = ("auto",)
    """auto (o_proj and down_proj or their like; all if there are none), all, residual, attention-inputs, or names
    (q_proj), or patterns over module paths (*.mlp.*)."""
    layers: str = ""
    """Layers such as 0-15,20; all by default."""


def kind(path: str) -> str:
    """Returns the last name of a module path, such as q_proj or to_out.0: what kind of module this is."""
    found = re.search(r"[^.]+(?:\.(?:\d+|\*))*$", path)
    return found[0] if found else path


def layer(path: str) -> int | None:
    """Returns the index of the layer that a module path lies in, or None outside numbered layers."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def block(path: str) -> tuple[str, int] | None:
    """Returns the numbered block that a module path lies in, such as ("unet.input_blocks", 4); None outside of any."""
    found = re.match(r"(?P<family>.*?)\.(?P<number>\d+)(?:\.|$)", path)
    return (found["family"], int(found["number"])) if found else None


def select(paths: Iterable[str], selection: Selection) -> list[str]:
    """Returns the selected module paths, in the given order.

    Raises:
        SelectionError: If a name or pattern, or the layers, match nothing; the message lists what there is.
    """
    paths = list(paths)
    wanted = _layers(selection.layers)
    inside = [path for path in paths if wanted is None or layer(path) in wanted]
    if not inside:
        there = sorted(number for path in paths if (number := layer(path)) is not None)
        raise SelectionError(
            f"No module of this adapter lies in layers {selection.layers}. "
            + (f"It has layers {there[0]} to {there[-1]}." if there else "Its modules have no layer numbers.")
        )
    texts = [selection.modules] if isinstance(selection.modules, str) else selection.modules
    names = [name.strip() for text in texts for name in text.split(",")]
    chosen = [set(_matching(name, inside)) for name in names]
    return [path for path in inside if any(path in part for part in chosen)]


def _matching(name: str, paths: list[str]) -> list[str]:
    if name == "auto":
        return [path for path in paths if kind(path) in RESIDUAL] or paths
    if name == "all":
        return paths
    names = {"residual": RESIDUAL, "attention-inputs": ATTENTION_INPUTS}.get(name)
    if names:
        found = [path for path in paths if kind(path) in names]
    else:
        found = [path for path in paths if _named(name, path)]
    if not found:
        raise SelectionError(
            f"No module of this adapter matches {name!r}. It has: {', '.join(sorted({kind(p) for p in paths}))}. "
            f"Choose from {', '.join(PRESETS)}, one of these names, or a pattern such as '*.mlp.*'."
        )
    return found


def _named(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}") or fnmatchcase(path, name)


def _layers(text: str) -> set[int] | None:
    if not text.strip():
        return None
    wanted: set[int] = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not bounds:
            raise SelectionError(f"Layers {text!r} cannot be read. Write numbers and ranges such as 0-15,20.")
        wanted |= set(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return wanted
