"""Tables as aligned text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spectral_surgery.tables import table

Format = Literal["text", "markdown", "latex", "csv"]


@dataclass(frozen=True)
class Table:
    """A title, cells, and what must be known to read them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 2
    """Columns that hold words."""


def write(tables: Sequence[Table], form: Format) -> str:
    """Returns tables in a format, one below the other."""
    if form == "csv":
        return _csv(tables)
    one = {"text": _text, "markdown": _markdown, "latex": _latex}[form]
    return "\n\n".join(map(one, tables)) + "\n"


def _text(found: Table) -> str:
    parts = [found.title, table(found.header, found.rows, left=found.left), found.note]
    return "\n\n".join(part for part in parts if part)


def _markdown(found: Table) -> str:
    rule = ["---"] * found.left + ["---:"] * (len(found.header) - found.left)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (found.header, rule, *found.rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return "\n\n".join(part for part in (f"### {found.title}", lines, found.note) if part)


def _latex(found: Table) -> str:
    columns = "l" * found.left + "r" * (len(found.header) - found.left)
    body = [" & ".join(map(_escaped, row)) + r" \\" for row in found.rows]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(' '.join(part for part in (found.title + '.', found.note) if part))}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_escaped, found.header)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    plain = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(plain.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _csv(tables: Sequence[Table]) -> str:
    """Returns one block a table, its title in the first column of every row, blocks apart by an empty line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for number, found in enumerate(tables):
        if number:
            file.write("\n")
        writer.writerow(["table", *found.header])
        writer.writerows([found.title, *row] for row in found.rows)
    return file.getvalue()
