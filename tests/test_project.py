"""The house rules that a machine can check: sizes, import order, pinned versions."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("spectral_surgery/**/*.py"), *ROOT.glob("tests/**/*.py")])
MOST_LINES_IN_A_FILE = 450
MOST_LINES_IN_A_FUNCTION = 60


def long_functions(source: str, limit: int) -> list[str]:
    """Returns ``name (lines)`` of each function over ``limit`` lines, its docstring included."""
    functions = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [f"{name} ({lines})" for name, lines in functions if lines > limit]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_its_functions_are_short(path: pathlib.Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES_IN_A_FILE
    assert long_functions(source, MOST_LINES_IN_A_FUNCTION) == []


def test_a_function_is_measured_from_def_to_its_last_line() -> None:
    source = "class Shape:\n    def area(self):\n        side = 2\n\n        return side\n"
    assert long_functions(source, limit=4) == []
    assert long_functions(source, limit=3) == ["area (4)"]


def test_files_import_only_from_files_above_them() -> None:
    lint_imports = pathlib.Path(sys.executable).with_name("lint-imports")
    command = [lint_imports, "--no-logo", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_dependency_is_pinned_exactly_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert len(versions) == len(pins)
    for requirement in map(Requirement, wanted):
        pin = versions.get(canonicalize_name(requirement.name), "nothing")
        assert pin.startswith("=="), f"{requirement.name} is pinned to {pin}"
        assert requirement.specifier.contains(pin.removeprefix("==")), f"{requirement} forbids {pin}"
    assert "+" not in versions["torch"], "a local suffix would exclude the other builds of torch"
