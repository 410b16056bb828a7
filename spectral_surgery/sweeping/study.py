"""A study: what is varied over which adapters, from a TOML file; all that is wrong with it is named at once."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from spectral_surgery import policies
from spectral_surgery.constraints import Constraint, Energy
from spectral_surgery.errors import InputError, PolicyError, combine
from spectral_surgery.evaluating.suite import SuiteOptions
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions

Level = Literal["prompt", "instruction"]


@dataclass(frozen=True)
class StudyAdapter:
    """One adapter of a study."""

    path: str
    """Folder or Hub id."""
    name: str
    """What tables call it. Adapters of several tasks may share a name, as the paper's do a model's."""
    suites: tuple[str, ...]
    """What it is scored in; each is a text of tasks with commas, and scored as a whole."""
    data: str | None
    """Measuring rows."""


@dataclass(frozen=True)
class Study:
    """What is varied, and over which adapters."""

    adapters: tuple[StudyAdapter, ...]
    policies: tuple[str, ...]
    """As the command line spells them, hyperparameters spelled out."""
    rows: tuple[int, ...] = (128,)
    energy: tuple[str, ...] = ("auto",)
    modules: tuple[str, ...] = ("auto",)
    seeds: tuple[int, ...] = (0,)
    suite: SuiteOptions = field(default_factory=SuiteOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    batching: BatchOptions = field(default_factory=BatchOptions)
    ifeval: Level = "prompt"
    """Which of IFEval's two strict scores tables call IFEval: the paper says prompt and prints instruction."""


def read_study(path: Path) -> Study:
    """Returns the study in a TOML file; relative paths in it are from its own folder.

    Raises:
        InputError: If it cannot be read; or everything that is wrong with it, together.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no study ({error}). Give a TOML file; docs/experiments.md has one.") from error
    try:
        return study_from(found, path.parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


SECTIONS = {"suite": SuiteOptions, "data": DataOptions, "model": ModelOptions, "batching": BatchOptions}
"""Tables of a study file that hold the options of other commands."""
GRID = ("policies", "rows", "energy", "modules", "seeds", "suites")
TAKEN = {"suite": ("suite",), "data": ("examples", "seed")}
"""Options that the grid sets."""


def study_from(found: Mapping[str, Any], folder: Path = Path()) -> Study:
    """Returns the study that nested tables say.

    Raises:
        InputError: Everything that is wrong with them, together.
    """
    reader = _Reader([], folder)
    reader.known("", found, ("adapters", "grid", "hyperparameters", "measuring_rows", "ifeval", *SECTIONS))
    grid, hyper = reader.table("grid", found), reader.table("hyperparameters", found)
    reader.known("grid.", grid, GRID)
    options: dict[str, Any] = {name: reader.options(name, kind, found) for name, kind in SECTIONS.items()}
    study = Study(
        adapters=reader.adapters(found, reader.texts("grid.suites", grid.get("suites", []))),
        policies=reader.policies(reader.texts("grid.policies", grid.get("policies", [])), hyper),
        rows=reader.numbers("grid.rows", grid.get("rows", [128]), 1),
        energy=reader.chosen("grid.energy", grid.get("energy", ["auto"]), ("auto", *get_args(Energy))),
        modules=reader.texts("grid.modules", grid.get("modules", ["auto"])),
        seeds=reader.numbers("grid.seeds", grid.get("seeds", [0]), 0),
        ifeval=reader.level(found.get("ifeval", "prompt")),
        **options,
    )
    for name in GRID[:-1]:
        if name in grid and grid[name] == []:
            reader.faults.append(f"grid.{name} is empty, so there is nothing to run. Give at least one.")
    if "policies" not in grid:
        reader.faults.append("grid.policies is missing, so there is nothing to run. Give at least one policy.")
    combine(list(dict.fromkeys(reader.faults)))
    return study


@dataclass(frozen=True)
class _Reader:
    """Reads values, and writes down what is wrong with them instead of stopping."""

    faults: list[str]
    folder: Path

    def known(self, place: str, found: Mapping[str, Any], names: tuple[str, ...]) -> None:
        for name in found:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                advice = f"Did you mean {close[0]}?" if close else f"Choose from {', '.join(names)}."
                self.faults.append(f"{place}{name} is unknown. {advice}")

    def table(self, name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
        value = found.get(name, {})
        if isinstance(value, dict):
            return value
        self.faults.append(f"{name} is {value!r}, expected a table [{name}].")
        return {}

    def texts(self, name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(dict.fromkeys(value))
        self.faults.append(f"{name} is {value!r}, expected a list of texts.")
        return ()

    def numbers(self, name: str, value: Any, least: int) -> tuple[int, ...]:
        if isinstance(value, list) and all(type(one) is int and one >= least for one in value):
            return tuple(dict.fromkeys(value))
        self.faults.append(f"{name} is {value!r}, expected a list of whole numbers of at least {least}.")
        return ()

    def chosen(self, name: str, value: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
        texts = self.texts(name, value)
        for one in texts:
            if one not in choices:
                self.faults.append(f"{name} has {one!r}. Choose from {', '.join(choices)}.")
        return texts

    def level(self, value: Any) -> Level:
        if value not in get_args(Level):
            self.faults.append(f"ifeval is {value!r}. Choose from {', '.join(get_args(Level))}.")
        return "instruction" if value == "instruction" else "prompt"

    def options(self, name: str, kind: type, found: Mapping[str, Any]) -> Any:
        """Returns a section's options; those that the grid sets are refused."""
        given = self.table(name, found)
        taken = TAKEN.get(name, ())
        types = get_type_hints(kind)
        self.known(f"{name}.", given, tuple(one.name for one in fields(kind) if one.name not in taken))
        values = {}
        for key, value in given.items():
            if key in types and key not in taken:
                values[key] = tuple(value) if isinstance(value, list) else value
                if not _fits(values[key], types[key]):
                    del values[key]
                    self.faults.append(f"{name}.{key} is {value!r}, expected {_words(types[key])}.")
        if name == "suite" and _fits(local := values.get("local_data", ()), tuple[str, ...]):
            pairs = [text.partition("=") for text in local]
            values["local_data"] = tuple(f"{task}{equals}{self._local(path)}" for task, equals, path in pairs)
        if name == "model" and isinstance(base := values.get("base_model"), str):
            values["base_model"] = self._local(base)
        return kind(**values)

    def policies(self, spelled: tuple[str, ...], hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns every policy with every combination of the hyperparameters that it has."""
        found: list[str] = []
        used: set[str] = set()
        for text in spelled:
            try:
                policy = policies.parse(text)
            except PolicyError as error:
                self.faults.append(f"grid.policies: {error}")
                continue
            own = {one.name for one in dataclasses.fields(policy)}  # type: ignore[arg-type]
            mine = {name: values for name, values in hyper.items() if name in own and isinstance(values, list)}
            used |= set(mine)
            name, _, rest = policies.spell(policy).partition(":")
            for values in itertools.product(*mine.values()):
                chosen = [f"{key}={str(value).lower()}" for key, value in zip(mine, values, strict=True)]
                try:
                    found.append(policies.spell(policies.parse(f"{name}:{','.join([*chosen, rest])}")))
                except PolicyError as error:
                    self.faults.append(f"hyperparameters: {error}")
        for name in hyper:
            if name not in used:
                self.faults.append(f"hyperparameters.{name} is no list of values of a field that these policies have.")
        return tuple(dict.fromkeys(found))

    def adapters(self, found: Mapping[str, Any], suites: tuple[str, ...]) -> tuple[StudyAdapter, ...]:
        rows = found.get("adapters", [])
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            self.faults.append("There are no adapters. Give a table [[adapters]] with a path for each.")
            return ()
        made = [self._adapter(row, f"adapters[{number}].", found, suites) for number, row in enumerate(rows)]
        pairs = [(adapter.name, suite) for adapter in made for suite in adapter.suites]
        for name, suite in dict.fromkeys(pair for pair in pairs if pairs.count(pair) > 1):
            self.faults.append(f"Two adapters called {name} are scored in {suite}. Give each a name of its own.")
        return tuple(made)

    def _adapter(
        self, row: Mapping[str, Any], place: str, found: Mapping[str, Any], suites: tuple[str, ...]
    ) -> StudyAdapter:
        self.known(place, row, ("path", "name", "suites", "measuring_rows"))
        path, data = row.get("path"), row.get("measuring_rows", found.get("measuring_rows"))
        own = self.texts(f"{place}suites", row["suites"]) if "suites" in row else suites
        if not isinstance(path, str) or not path:
            self.faults.append(f"{place}path is {path!r}, expected an adapter's folder or Hub id.")
            path = ""
        if data is not None and not isinstance(data, str):
            self.faults.append(f"{place}measuring_rows is {data!r}, expected a file or Hub id.")
            data = None
        if not own:
            self.faults.append(f"{place[:-1]} is scored in nothing. Give grid.suites, or suites of its own.")
        name = row.get("name", Path(path).name)
        here = tuple(",".join(self._local(entry) for entry in suite.split(",")) for suite in own)
        return StudyAdapter(self._local(path), str(name), here, data and self._local(data))

    def _local(self, text: str) -> str:
        """Returns a path from the study's own folder where there is such a file, and anything else as it is."""
        beside = self.folder / Path(text.strip()).expanduser()
        return str(beside) if text.strip() and beside.exists() else text.strip()


def _fits(value: Any, kind: Any) -> bool:
    choices = get_args(kind)
    if str(kind).startswith("tuple"):
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    if str(kind).startswith("typing.Literal"):
        return value in choices
    if choices:
        return any(_fits(value, choice) for choice in choices)
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _words(kind: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if str(kind).startswith("typing.Literal"):
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_args(kind) and not str(kind).startswith("tuple"):
        return " or ".join(_words(choice) for choice in get_args(kind) if choice is not type(None))
    return words.get(kind, "a list of texts")


def constraint_of(policy: str, energy: str) -> Constraint:
    """Returns the constraint of a policy at a level of the grid; auto is the policy's own."""
    row = policies.row(policies.parse(policy))
    return Constraint(energy=row.energy if energy == "auto" else energy)  # type: ignore[arg-type]
