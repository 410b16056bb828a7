"""How the leading directions of an adapter's modules lie to each other, across layers, kinds and adapters.

Directions can only be compared where they live in one space. What a module writes to or reads from the residual stream
of a transformer is comparable over all layers; the outputs of ``q_proj`` in two layers have the same number of
coordinates, which mean something else in each. Every figure therefore says in which space it was taken, and
:attr:`Matrix.shared` says whether that space is the same in all layers.

The pairs of a layer are all sides of its modules that share a space: the paper's module synergy (Section 3.2, Fig. 1c
of arXiv 2603.03995) is the pair o_proj output with down_proj output, in the residual stream.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from spectral_surgery import geometry
from spectral_surgery.anatomy import Leading
from spectral_surgery.geometry import Baseline
from spectral_surgery.selection import ATTENTION_INPUTS, RESIDUAL, kind, layer

HIDDEN = frozenset(
    ["gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "w1", "w3", "wi", "wi_0", "wi_1", "dense_h_to_4h"]
)
"""Last names of modules that read the residual stream into the hidden layer of an MLP."""
RESIDUAL_STREAM = "residual stream"
MLP_HIDDEN = "MLP hidden layer"
HEADS = "attention heads"
QUERIES = "queries and keys"

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Group:
    """Modules of one kind in all layers, such as every o_proj."""

    name: str
    """Shortest end of the module path that no other kind shares."""
    paths: tuple[str, ...]
    """Module paths by layer."""
    layers: tuple[int, ...]
    """Their layer numbers; -1 outside numbered layers."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One side of one kind: every layer against every other."""

    group: str
    side: str
    """output or input."""
    space: str
    """The space that the directions live in."""
    shared: bool
    """Whether it is the same space in every layer."""
    dimension: int
    layers: tuple[int, ...]
    k: int
    """Dimension of the subspaces."""
    overlap: Float[np.ndarray, "n n"]
    """Subspace overlap at k (Eq. 3); NaN where a subspace is not well defined."""
    cosine: Float[np.ndarray, "n n"]
    """|cos| of leading directions."""
    angles: Float[np.ndarray, "n n k"]
    """Principal angles, ascending, in degrees."""
    overlap_mean: float
    """Mean off the diagonal."""
    overlap_by_chance: Baseline
    """For that mean."""
    cosine_mean: float
    cosine_by_chance: Baseline
    angle_by_chance: Baseline
    """For the smallest angle of one pair, degrees."""

    @property
    def times_chance(self) -> float:
        """Mean overlap over what chance gives."""
        return self.overlap_mean * self.dimension / self.k


@dataclass(frozen=True, eq=False)
class Curve:
    """Two sides that share a space, layer by layer."""

    first: str
    """Such as "o_proj output"."""
    second: str
    space: str
    dimension: int
    layers: tuple[int, ...]
    k: int
    overlap: Float[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]
    angle: Float[np.ndarray, " n"]
    """Smallest principal angle in degrees."""
    overlap_by_chance: Baseline
    """For one layer."""
    cosine_by_chance: Baseline
    angle_by_chance: Baseline

    @property
    def name(self) -> str:
        """Both sides, or the one that both adapters share."""
        return self.first if self.first == self.second else f"{self.first} with {self.second}"

    @property
    def times_chance(self) -> float:
        """Mean overlap over what chance gives; NaN where no layer has one."""
        values = self.overlap[~np.isnan(self.overlap)]
        return float(values.mean()) * self.dimension / self.k if len(values) else math.nan


def groups(paths: Iterable[str]) -> list[Group]:
    """Returns the modules by kind, transformer kinds in the order in which data flows, then the rest by name."""
    templates: dict[str, list[str]] = {}
    for path in paths:
        templates.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1), []).append(path)
    names = _short_names(list(templates))
    found = [_group(names[template], inside) for template, inside in templates.items()]
    return sorted(found, key=lambda group: (_place(group.name), group.name))


def _group(name: str, paths: list[str]) -> Group:
    numbers = {path: -1 if (number := layer(path)) is None else number for path in paths}
    ordered = sorted(paths, key=numbers.__getitem__)
    return Group(name, tuple(ordered), tuple(numbers[path] for path in ordered))


def _short_names(templates: list[str]) -> dict[str, str]:
    names = {template: kind(template) for template in templates}
    parts = 1
    while clashes := {name for name, count in Counter(names.values()).items() if count > 1}:
        parts += 1
        for template, name in names.items():
            if name in clashes:
                names[template] = ".".join(template.split(".")[-parts:])
    return names


def _place(name: str) -> int:
    return ORDER.index(kind(name)) if kind(name) in ORDER else len(ORDER)


def space(name: str, side: str) -> str:
    """Returns the space that a side of a kind lives in.

    Args:
        name: A kind such as o_proj, or a module path.
        side: output or input.
    """
    last = kind(name)
    if side == "output":
        if last in RESIDUAL:
            return RESIDUAL_STREAM
        if last in HIDDEN:
            return MLP_HIDDEN
        return {"q_proj": QUERIES, "k_proj": QUERIES, "v_proj": HEADS}.get(last, f"{name} output")
    if last in ATTENTION_INPUTS or last in HIDDEN:
        return RESIDUAL_STREAM
    return {"o_proj": HEADS, "down_proj": MLP_HIDDEN}.get(last, f"{name} input")


def matrices(found: Mapping[str, Leading], k: int) -> list[Matrix]:
    """Returns every layer against every other, for both sides of every kind with two layers or more.

    Args:
        found: Leading directions by module path.
        k: Dimension of the subspaces; a kind whose modules all have fewer components takes what they have.
    """
    result = []
    for group in groups(found):
        for side in ("output", "input"):
            inside, stack = _stack(group, found, side, k)
            if len(inside) > 1:
                result.append(_matrix(group, side, inside, stack, [found[path] for path in inside]))
    return result


def _stack(
    group: Group, found: Mapping[str, Leading], side: str, k: int
) -> tuple[list[str], Float[np.ndarray, "n d k"]]:
    """The group's modules that have the usual shape, and their directions."""
    k = min(k, max(found[path].U.shape[1] for path in group.paths))
    bases = {path: _side(found[path], side) for path in group.paths}
    bases = {path: basis[:, :k] for path, basis in bases.items() if basis.shape[1] >= k}
    usual = Counter(len(basis) for basis in bases.values()).most_common(1)[0][0]
    inside = [path for path, basis in bases.items() if len(basis) == usual]
    return inside, np.stack([bases[path] for path in inside])


def _side(directions: Leading, side: str) -> Float[np.ndarray, "d k"]:
    return directions.U if side == "output" else directions.V


def _matrix(
    group: Group, side: str, inside: list[str], stack: Float[np.ndarray, "n d k"], sides: list[Leading]
) -> Matrix:
    numbers = dict(zip(group.paths, group.layers, strict=True))
    dimension, k = stack.shape[1:]
    between = geometry.blocks(stack, stack)
    overlap = _masked(geometry.overlaps(between), sides, sides, "closed")
    cosine = _masked(geometry.cosines(between), sides, sides, "separate")
    pairs = len(geometry.off_diagonal(overlap))
    lines = len(geometry.off_diagonal(cosine))
    where = space(group.name, side)
    return Matrix(
        group=group.name,
        side=side,
        space=where,
        shared=where == RESIDUAL_STREAM,
        dimension=dimension,
        layers=tuple(numbers[path] for path in inside),
        k=k,
        overlap=overlap,
        cosine=cosine,
        angles=np.where(np.isnan(overlap)[..., None], np.nan, geometry.angles(between)),
        overlap_mean=geometry.off_diagonal_mean(overlap),
        overlap_by_chance=geometry.overlap_baseline(k, dimension, max(pairs, 1)),
        cosine_mean=geometry.off_diagonal_mean(cosine),
        cosine_by_chance=geometry.cosine_baseline(dimension, max(lines, 1)),
        angle_by_chance=geometry.angle_baseline(k, dimension),
    )


def _masked(
    values: Float[np.ndarray, "n m"], rows: list[Leading], columns: list[Leading], mark: str
) -> Float[np.ndarray, "n m"]:
    """NaN where either direction or subspace is not well defined."""
    ok = np.outer([getattr(one, mark) for one in rows], [getattr(one, mark) for one in columns])
    return np.where(ok, values, np.nan)


def synergy(found: Mapping[str, Leading], k: int) -> list[Curve]:
    """Returns the layer-by-layer curve of every two sides of a layer's modules that share a space."""
    sides = [(group, side) for group in groups(found) for side in ("output", "input")]
    curves = []
    for (first, one), (second, other) in combinations(sides, 2):
        if first is not second and space(first.name, one) == space(second.name, other):
            pair = _common(first, second)
            curve = _curve(
                (f"{first.name} {one}", f"{second.name} {other}", space(first.name, one)),
                [(number, found[a], found[b]) for number, a, b in pair],
                (one, other),
                k,
            )
            curves += [curve] if curve else []
    return curves


def _common(first: Group, second: Group) -> list[tuple[int, str, str]]:
    there = dict(zip(second.layers, second.paths, strict=True))
    pairs = zip(first.layers, first.paths, strict=True)
    return [(number, path, there[number]) for number, path in pairs if number in there]


def _curve(
    names: tuple[str, str, str], pairs: list[tuple[int, Leading, Leading]], sides: tuple[str, str], k: int
) -> Curve | None:
    """One curve; None where no layer has both sides in the same number of dimensions."""
    pairs = [(n, a, b) for n, a, b in pairs if len(_side(a, sides[0])) == len(_side(b, sides[1]))]
    if not pairs:
        return None
    k = min([k, *(one.U.shape[1] for pair in pairs for one in pair[1:])])
    between = np.stack([_side(a, sides[0])[:, :k].T.astype(float) @ _side(b, sides[1])[:, :k] for _, a, b in pairs])
    closed = np.array([a.closed and b.closed for _, a, b in pairs])
    separate = np.array([a.separate and b.separate for _, a, b in pairs])
    dimension = len(_side(pairs[0][1], sides[0]))
    return Curve(
        *names,
        dimension=dimension,
        layers=tuple(number for number, _, _ in pairs),
        k=k,
        overlap=np.where(closed, geometry.overlaps(between), np.nan),
        cosine=np.where(separate, geometry.cosines(between), np.nan),
        angle=np.where(closed, geometry.angles(between)[:, 0], np.nan),
        overlap_by_chance=geometry.overlap_baseline(k, dimension),
        cosine_by_chance=geometry.cosine_baseline(dimension),
        angle_by_chance=geometry.angle_baseline(k, dimension),
    )


def between(first: Mapping[str, Leading], second: Mapping[str, Leading], k: int) -> list[Curve]:
    """Returns, for every kind and side, the curve of two adapters' directions in the same module, over layers."""
    shared = [path for path in first if path in second]
    curves = []
    for group in groups(shared):
        for side in ("output", "input"):
            curve = _curve(
                (f"{group.name} {side}", f"{group.name} {side}", space(group.name, side)),
                [(n, first[path], second[path]) for n, path in zip(group.layers, group.paths, strict=True)],
                (side, side),
                k,
            )
            curves += [curve] if curve else []
    return curves
