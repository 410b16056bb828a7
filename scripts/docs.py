"""Writes the generated parts of the documentation: the tables of policies and of adapter kinds."""

from __future__ import annotations

import pathlib
import re
import sys
import tempfile
import warnings

from spectral_surgery import policies
from spectral_surgery.adapter.kinds import KINDS

ROOT = pathlib.Path(__file__).parents[1]


def main() -> None:
    fill(ROOT / "docs" / "policies.md", policies.markdown_table())
    fill(ROOT / "docs" / "adapters.md", kinds_table())


def fill(page: pathlib.Path, table: str) -> None:
    """Puts a table between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    filled = re.sub(
        r"(<!-- table.*? -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )
    page.write_text(filled, encoding="utf-8")


def kinds_table() -> str:
    """Measures every kind as the tests do, and returns what was measured."""
    sys.path.insert(0, str(ROOT / "tests"))
    import kind_errors
    from kinds import CASES

    notes = {kind.name: kind for kind in KINDS}
    lines = [
        "| kind | here on | update | edited | float32: read | edited | live | bfloat16: read | edited | sensitivity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    warnings.simplefilter("ignore")
    for name, case in CASES.items():
        kind, figures = notes[case.kind], []
        for dtype in kind_errors.DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                errors = kind_errors.Stored.make(name, dtype, pathlib.Path(folder)).errors()
            figures += [errors["identity"], errors["gates"]] + [errors["live"]] * (dtype == "float32")
        figures.append(kind_errors.sensitivity_error(name))
        shown = " | ".join(f"{figure:.0e}" for figure in figures)
        lines.append(f"| {case.kind} | {case.what} | {kind.formula} | {kind.edits} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
