"""Writes the generated parts of the documentation: the table of policies."""

from __future__ import annotations

import pathlib
import re

from spectral_surgery import policies

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "policies.md"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = policies.markdown_table()
    filled = re.sub(
        r"(<!-- table.*? -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )
    PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
