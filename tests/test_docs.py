"""The documentation says what the program does."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest

from spectral_surgery import policies
from spectral_surgery.cli import parse
from spectral_surgery.cli.commands import Command

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("spectral-surgery ")})


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_documentation_parses(command: str) -> None:
    assert isinstance(parse(shlex.split(command, comments=True)[1:]), Command)


def test_the_documentation_has_commands() -> None:
    assert len(commands()) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_compiles_and_its_imports_exist(page: pathlib.Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        imports = "\n".join(line for line in block.splitlines() if line.startswith(("from ", "import ")))
        names: dict[str, object] = {}
        exec(imports, names)
        assert None not in names.values()


def test_the_table_of_policies_is_the_registry_s() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- table.*? -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert table
    assert table[1] == policies.markdown_table(), "Run: make docs"


def test_architecture_names_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "spectral_surgery"
    names = [path.name for path in package.glob("*.py") if not path.name.startswith("__")]
    names += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in names if f"`{name}`" not in page] == []
