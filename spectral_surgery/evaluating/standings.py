"""Several variants' records as one table: every score of every variant, and its paired difference from one of them.

Differences are paired: on the very same documents with the very same prompts, or not at all. Intervals and p values
are of one difference each; whoever looks at twenty finds one below .05 by luck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from spectral_surgery.evaluating.records import Record, paired, spell
from spectral_surgery.statistics import Interval
from spectral_surgery.tables import table


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One variant's score, and how it differs from the reference's."""

    score: str
    """Task, metric and filter in words."""
    variant: str
    value: float
    """Mean over examples."""
    examples: int
    difference: Interval | None
    """From the reference, with 95 % limits; None for the reference itself."""
    higher: int
    """Examples with a higher value than the reference's; of a loss, lower is better."""
    lower: int
    p: float | None
    """Two-sided p value of no difference."""
    truncated: int
    """Answers that ended at the token limit."""


def standings(records: Sequence[Record], reference: str) -> list[Standing]:
    """Returns every variant's standing in every score, tasks in the order of the records.

    Args:
        records: Of any number of variants on the same documents and prompts.
        reference: The variant that the others are held against.

    Raises:
        DataError: If two variants were not scored on the same documents with the same prompts.
    """
    own = [record for record in records if record.variant == reference]
    rows: dict[str, list[Standing]] = {}
    for variant in dict.fromkeys(record.variant for record in records):
        theirs = [record for record in records if record.variant == variant]
        for pair in paired(own, theirs):
            same = variant == reference
            standing = Standing(
                score=spell(pair.score),
                variant=variant,
                value=float(pair.b.mean()),
                examples=len(pair.b),
                difference=None if same else pair.difference(),
                higher=pair.wins,
                lower=pair.losses,
                p=None if same else pair.p_value(),
                truncated=pair.truncated[1],
            )
            rows.setdefault(standing.score, []).append(standing)
    return [standing for score in rows.values() for standing in score]


def as_rows(found: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells of a table; a score's name stands in its first row."""
    header = ["score", "variant", "mean", "difference", "95 % interval", "higher", "lower", "p", "n"]
    cut = any(standing.truncated for standing in found)
    rows, last = [], ""
    for standing in found:
        row = [standing.score if standing.score != last else "", standing.variant, f"{standing.value:.4g}"]
        last = standing.score
        if standing.difference is None or standing.p is None:
            row += ["", "", "", "", "", str(standing.examples)]
        else:
            gap = standing.difference
            row += [f"{gap.estimate:+.4f}", f"[{gap.low:+.4f}, {gap.high:+.4f}]"]
            row += [str(standing.higher), str(standing.lower), f"{standing.p:.2g}", str(standing.examples)]
        rows.append([*row, str(standing.truncated)] if cut else row)
    return [*header, "cut off"] if cut else header, rows


def as_text(found: Sequence[Standing], reference: str) -> str:
    """Returns the standings as aligned text."""
    return _legend(reference) + "\n\n" + table(*as_rows(found), left=2)


def as_markdown(found: Sequence[Standing], reference: str) -> str:
    """Returns the standings as a Markdown table."""
    header, rows = as_rows(found)
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]]
    return "\n".join([_legend(reference), "", *lines, ""])


def _legend(reference: str) -> str:
    return (
        f"Differences, higher and lower are against {reference}, paired document by document; a p value is of that "
        f"one difference."
    )


def as_data(found: Sequence[Standing]) -> list[dict[str, object]]:
    """Returns the standings as plain values for JSON, which knows no infinite limits: None stands for them."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: plain(value) for key, value in asdict(standing).items()} for standing in found]
