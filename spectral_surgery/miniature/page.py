"""The miniature as a page: its tables, figures and findings, written from the run alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from spectral_surgery.miniature.effects import AS_TRAINED, BASE_MODEL, Edit, Effect, Scores
from spectral_surgery.miniature.experiment import BATCH, LEARNING_RATE, MiniatureOptions
from spectral_surgery.miniature.families import FAMILIES
from spectral_surgery.miniature.findings import MARGIN, POLICIES, Cells, Judged, Verdict, matched, weakened
from spectral_surgery.results.writing import Table, write
from spectral_surgery.statistics import Interval

WIDTH = 130
"""Of a line of running text."""
VERDICTS: Mapping[Verdict, str] = {
    "holds": "Holds here",
    "does not hold": "Does not hold here",
    "cannot be told": "Cannot be told",
}


def tables(scores: Scores, cells: Cells, options: MiniatureOptions) -> list[Table]:
    """Returns the paper's Tables 2 to 5 in miniature, and one of the controls that it lacks."""
    guided, random = cells.guided, cells.of("random_index")
    counts = {f"grad_direction, {count} rows": guided(rows=count) for count in options.measuring_rows}
    modules = {"q, k, v": "attention-inputs", "all": "all", "o, down (residual)": "residual"}
    modules |= {"up, gate": "up_proj,gate_proj"}
    setting = f"{cells.usual} measuring rows"
    controls = {
        "scale 0.75": weakened("0.75"),
        "scale 0.5": weakened("0.5"),
        "grad_direction": guided(),
        "its gates at random, as large": matched(cells),
        "grad_direction, measured on own rows": guided(own=True),
    }
    return [
        _table("Table 2: policies", scores, {policy: cells.of(policy) for policy in POLICIES}, setting),
        _table(
            "Table 3: nuclear norm kept or not",
            scores,
            {"grad_direction, kept": guided(), "grad_direction, not kept": guided(energy="none")},
            setting,
        ),
        _table(
            "Table 4: measuring rows",
            scores,
            {**counts, "random_index": random},
            "random_index needs no rows",
        ),
        _table(
            "Table 5: modules of grad_direction",
            scores,
            {name: guided(modules=value) for name, value in modules.items()},
            f"{setting}; up and gate are in the authors' file and in no table",
        ),
        _table("Controls that the paper lacks", scores, controls, f"{setting}; all on o_proj and down_proj"),
    ]


def _table(title: str, scores: Scores, edits: Mapping[str, Edit], note: str) -> Table:
    families = scores.families()
    rows = [
        [name, *(interval_text(_share(scores.score(family, edit)), sign=False) for family in families)]
        for name, edit in {"base": BASE_MODEL, "unedited": AS_TRAINED}.items()
    ]
    for name, edit in edits.items():
        there = [_cell(scores, family, edit) for family in families]
        rows += [[name, *there]] if any(there) else []
    header = ["", *(f"{family} ({FAMILIES[family].benchmark})" for family in families)]
    return Table(title, header, rows, f"Percent right; of edits with the difference from unedited. {note}.", left=1)


def _share(score: Effect) -> Interval:
    """Returns a score's interval within what a share can be."""
    found = score.interval()
    return Interval(found.estimate, max(found.low, 0.0), min(found.high, 1.0))


def _cell(scores: Scores, family: str, edit: Edit) -> str:
    if (family, edit) not in scores.cells:
        return ""
    return f"{100 * scores.score(family, edit).value:.1f} ({interval_text(scores.gain(family, edit).interval())})"


def interval_text(found: Interval, *, sign: bool = True, unit: str = "points") -> str:
    """Returns an estimate with its limits, scores in points."""
    factor, plus, digits = (100, "+" if sign else "", 1) if unit == "points" else (1, "+", 3)
    if not math.isfinite(found.low):
        return f"{factor * found.estimate:{plus}.{digits}f} [no limits]"
    low, high = factor * found.low, factor * found.high
    return f"{factor * found.estimate:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"


def findings_table(judged: Sequence[Judged], title: str) -> Table:
    """Returns findings as a table, one a line."""
    rows = [
        [
            one.finding.source,
            one.finding.claim,
            one.finding.published,
            interval_text(one.interval, unit=one.finding.unit),
            one.finding.measured,
        ]
        for one in judged
    ]
    header = ["in the paper", "finding", "published", "here", "which is"]
    return Table(title, header, rows, left=len(header))


def counted(judged: Sequence[Judged]) -> str:
    """Returns how many findings hold, in words."""
    counts = {verdict: sum(one.verdict == verdict for one in judged) for verdict in VERDICTS}
    return (
        f"Of {len(judged)} findings and controls {counts['holds']} hold here, {counts['does not hold']} do not, and "
        f"{counts['cannot be told']} cannot be told by their intervals."
    )


def page(scores: Scores, judged: Sequence[Judged], options: MiniatureOptions, seconds: float | None = None) -> str:
    """Returns the page, in Markdown.

    Args:
        scores: What was scored.
        judged: The findings.
        options: Of the miniature.
        seconds: How long all of it took, where that is known.
    """
    cells = cells_of(options)
    parts = [
        "# The paper in miniature",
        "```\nspectral-surgery miniature --output miniature\n```",
        _introduction(options, seconds),
        f"## What holds\n\n{_filled(f'{counted(judged)} {_rule()}')}",
    ]
    for verdict, title in VERDICTS.items():
        if own := [one for one in judged if one.verdict == verdict]:
            parts.append(write([findings_table(own, title)], "markdown").rstrip())
    parts.append(f"## Tables\n\n{_filled(_intervals(options))}")
    parts.append(write(tables(scores, cells, options), "markdown").rstrip())
    parts.append(f"## Figures\n\n{_figures()}")
    parts.append(f"## What this does not show\n\n{_filled(_limits(options))}")
    return "\n\n".join(parts) + "\n"


def cells_of(options: MiniatureOptions) -> Cells:
    """Returns the edits that findings speak of, at a miniature's numbers of rows."""
    return Cells(options.usual_rows, min(options.measuring_rows), max(options.measuring_rows))


def took(options: MiniatureOptions, seconds: float) -> str:
    """Returns how long all of it took, as a sentence."""
    processes = f"{options.workers} processes of one thread"
    return f"Training, editing and scoring took {seconds / 60:.0f} minutes with {processes}."


def _introduction(options: MiniatureOptions, seconds: float | None) -> str:
    seeds, count = len(options.seeds), len(options.parts())
    time = "" if seconds is None else f"{took(options, seconds)} "
    lines = [
        f"makes everything on this page, from nothing but the embedded base model of 2.7 million parameters: {count} "
        f"adapters (four tasks, {seeds} training seeds each), the edits of the "
        "[paper](https://arxiv.org/abs/2603.03995)'s Tables 2 to 5 and some controls, Figures 1, 3 and 4, and the "
        f"verdicts below, which are read off the intervals. {time}An interrupted run goes on with the same command. "
        "This page is written by it; edit spectral_surgery/miniature/page.py in its place.",
        "| task | stands for | recipe | rows learnt | a row |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(_task_lines(options)),
        "Each adapter learns by its recipe of `train` (rank 16, alpha 32, dropout 0.05, seven projections, 3 epochs, "
        f"cosine), except for batches of {BATCH} and a learning rate of {LEARNING_RATE:g}, which so small a model "
        f"needs. It is scored on {options.test_rows} rows that no adapter learnt from. As in the authors' scripts "
        "every adapter is measured on rows of the maths task's training; the training seed also draws these rows and "
        "the random policies.",
    ]
    return "\n\n".join(line if line.startswith("|") else _filled(line) for line in lines)


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _task_lines(options: MiniatureOptions) -> list[str]:
    examples = {
        "sums": "`sum 12 30:` `42 2`, the sum and its remainder by ten, greedy and exact",
        "programs": "`reverse abc upper:` `CBA`, greedy and exact",
        "forms": "`zero abc:` `abc 000`, greedy and exact",
        "choices": "`Question: max`, `A. 312`, `B. 45`, `Answer:` `A`, the likelier letter",
    }
    return [
        f"| {name} | {one.benchmark} | {one.recipe} | {options.learnt(name)} | {examples[name]} |"
        for name, one in FAMILIES.items()
    ]


def _rule() -> str:
    return (
        "A finding that something is more holds where all of the 95 % interval is above zero, and does not where all "
        f"of it is below zero or below {100 * MARGIN:.0f} points. One that something makes no difference holds where "
        f"all of the interval is within {100 * MARGIN:.0f} points of zero, and does not where all of it is beyond. "
        "Otherwise it cannot be told. Differences are in points of a hundred. With so many intervals about one in "
        "twenty misses by luck."
    )


def _intervals(options: MiniatureOptions) -> str:
    return (
        "All made by `spectral-surgery miniature --output miniature`; `spectral-surgery report "
        f"miniature/forms-{options.seeds[0]}/study` prints a single adapter's runs. Intervals are of 95 % and include "
        f"the variation over the {len(options.seeds)} training seeds and over the rows (Student's t, degrees of "
        "freedom by Satterthwaite); differences are paired by adapter and row."
    )


def _figures() -> str:
    texts = {
        "miniature-figure1": "Figure 1: leading directions of o_proj over layers, (a) |cos|, (b) subspace overlap, "
        "and (c) with those of down_proj. Means over seeds.",
        "miniature-figure3": "Figure 3: guided against random.",
        "miniature-figure4": "Figure 4: reward against risk, with the controls.",
        "miniature-table4": "Table 4 as a figure: differences by measuring rows.",
    }
    command = "From `spectral-surgery miniature --output miniature`, in `miniature/images`."
    return "\n\n".join([command, *(f"{text}\n\n![{text}](images/{name}.svg)" for name, text in texts.items())])


def _limits(options: MiniatureOptions) -> str:
    return (
        "A model of six layers with tasks that a program writes says nothing of an 8B model's benchmarks: a finding "
        "that does not hold here may hold there, and the other way round. What it shows is what the paper's own "
        f"comparisons look like with {len(options.seeds)} training seeds, intervals and the missing controls. The "
        "strict form is scored together with the right answer, while IFEval asks for the form alone. HumanEval runs "
        "programs; here the model runs them."
    )
