"""What the paper found, as differences that can be measured, and whether each holds in the miniature.

A verdict is read off an interval by one rule, :func:`judged`, so that figures and words cannot disagree. The published
figures are those of the paper's tables and of its authors' results file (arXiv 2603.03995; both at 128 rows where the
paper's Table 3 mixes 32 and 128).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spectral_surgery.inspection import Inspection
from spectral_surgery.miniature.effects import AS_TRAINED, Edit, Effect, Scores, crossed, mean, negated, over_adapters
from spectral_surgery.statistics import Interval

Kind = Literal["more", "same"]
Measure = Callable[[Scores, "Cells"], Effect]
Verdict = Literal["holds", "does not hold", "cannot be told"]

MARGIN = 0.02
"""A difference of scores that counts: two points."""
POLICIES = ("random_index", "smooth_abs", "abs_select", "grad_direction")
STRICT, CHOICE = "forms", "choices"
SYNERGY = {"o_proj output", "down_proj output"}
"""The two sides that the paper's Figure 1 (c) compares."""


@dataclass(frozen=True)
class Cells:
    """The edits that findings speak of, at the miniature's numbers of measuring rows."""

    usual: int = 128
    fewest: int = 32
    most: int = 256

    def of(self, policy: str, **changed: object) -> Edit:
        """Returns a policy's edit at the paper's setting, or with something changed."""
        rows = None if policy == "random_index" else self.usual
        return Edit(**{"policy": policy, "rows": rows, "energy": "nuclear", "modules": "residual", **changed})  # type: ignore[arg-type]

    def guided(self, **changed: object) -> Edit:
        """Returns grad_direction's edit."""
        return self.of("grad_direction", **changed)


@dataclass(frozen=True)
class Finding:
    """One claim with what it is measured by."""

    source: str
    """Table or figure; "not in it" for a control that the paper lacks."""
    claim: str
    published: str
    """The paper's own figures."""
    kind: Kind
    """more: the effect is above zero. same: it is smaller than the margin either way."""
    effect: Measure
    measured: str
    """What the effect is a difference of."""
    margin: float = MARGIN
    unit: Literal["points", "cosine"] = "points"


@dataclass(frozen=True)
class Judged:
    """A finding with its figure."""

    finding: Finding
    interval: Interval
    verdict: Verdict


def judged(kind: Kind, found: Interval, margin: float) -> Verdict:
    """Returns what an interval says of a claim.

    more: holds where all of the interval is above zero; does not hold where all of it is at or below zero, or below
    the margin. same: holds where all of it is within the margin; does not hold where all of it is beyond on one side.
    """
    if kind == "more":
        if found.low > 0:
            return "holds"
        return "does not hold" if found.high <= 0 or found.high < margin else "cannot be told"
    if -margin < found.low and found.high < margin:
        return "holds"
    return "does not hold" if found.low >= margin or found.high <= -margin else "cannot be told"


def best_of_four(scores: Scores, cells: Cells) -> Effect:
    """Returns the gain of each family's best policy, chosen on half of the examples and taken on the other half."""
    edits = [cells.of(policy) for policy in POLICIES]
    return mean([crossed(_cross_fitted(scores, family, edits)) for family in scores.families()])


def _cross_fitted(scores: Scores, family: str, edits: Sequence[Edit]) -> np.ndarray:
    gains = np.stack([scores.cells[family, edit] - scores.cells[family, AS_TRAINED] for edit in edits])
    found = np.empty(gains.shape[1:])
    for half in (0, 1):
        choosing, taking = slice(half, None, 2), slice(1 - half, None, 2)
        best = int(gains[:, :, choosing].mean((1, 2)).argmax())
        found[:, taking] = gains[best][:, taking]
    return found


def changed_more(scores: Scores, cells: Cells) -> Effect:
    """Returns how many more answers grad_direction turns right or wrong than the policies by magnitude do."""
    found = []
    for family in scores.families():
        unedited = scores.cells[family, AS_TRAINED]
        turned = {policy: scores.cells[family, cells.of(policy)] != unedited for policy in POLICIES[1:]}
        mild = (turned["smooth_abs"].astype(float) + turned["abs_select"]) / 2
        found.append(crossed(turned["grad_direction"] - mild))
    return mean(found)


def _gain(family: str, policy: str = "grad_direction") -> Measure:
    return lambda scores, cells: scores.gain(family, cells.of(policy))


def _between(family: str, first: dict[str, object], second: dict[str, object]) -> Measure:
    return lambda scores, cells: scores.gain(family, cells.guided(**first), cells.guided(**second))


def _over_families(first: Callable[[Cells], Edit], second: Callable[[Cells], Edit]) -> Measure:
    """Returns the mean difference of two edits over the families that both were run on."""

    def effect(scores: Scores, cells: Cells) -> Effect:
        both = (first(cells), second(cells))
        there = [family for family in scores.families() if all((family, edit) in scores.cells for edit in both)]
        return mean([scores.gain(family, *both) for family in there])

    return effect


def _reward(scores: Scores, cells: Cells) -> Effect:
    others = [family for family in scores.families() if family != STRICT]
    return mean([scores.gain(family, cells.guided()) for family in others])


def _rows(scores: Scores, cells: Cells, family: str) -> Effect:
    return scores.gain(family, cells.guided(rows=cells.most), cells.guided(rows=cells.fewest))


def _unedited(_: Cells) -> Edit:
    return AS_TRAINED


def weakened(strength: str) -> Edit:
    """Returns the control that multiplies every singular value of the residual modules alike."""
    return Edit(f"scale:strength={strength}", None, "none", "residual")


def matched(cells: Cells) -> Edit:
    """Returns the random control of grad_direction's own size."""
    return Edit("random:like=grad_direction", cells.usual, "none", "residual")


FINDINGS: tuple[Finding, ...] = (
    Finding(
        "Table 2",
        "Of the four policies, the best for a task makes its adapter better.",
        "7 of 8 cells, +.001 to +.044, chosen on the examples that it is scored on",
        "more",
        best_of_four,
        "best policy, chosen on the other half of the examples, less unedited; mean of four tasks",
    ),
    Finding(
        "Table 2",
        "grad_direction makes the choice task's adapter better.",
        "Llama +.044, Qwen -.002",
        "more",
        _gain(CHOICE),
        "grad_direction less unedited, choices",
    ),
    Finding(
        "Table 2",
        "grad_direction makes the strict-format task's adapter worse.",
        "Llama -.082, Qwen -.417",
        "more",
        lambda scores, cells: negated(scores.gain(STRICT, cells.guided())),
        "unedited less grad_direction, forms",
    ),
    Finding(
        "Table 2",
        "grad_direction makes the maths adapter worse.",
        "Llama -.043, Qwen +.001",
        "more",
        lambda scores, cells: negated(scores.gain("sums", cells.guided())),
        "unedited less grad_direction, sums",
    ),
    Finding(
        "Table 2",
        "grad_direction makes the code adapter better.",
        "Llama -.012, Qwen +.024",
        "more",
        _gain("programs"),
        "grad_direction less unedited, programs",
    ),
    Finding(
        "Table 2",
        "grad_direction changes much more than the policies by magnitude do.",
        "largest change .417, against .055 (abs_select) and .038 (smooth_abs)",
        "more",
        changed_more,
        "answers turned right or wrong by grad_direction, less those by smooth_abs and abs_select; mean of four tasks",
    ),
    Finding(
        "Figure 3",
        "Guided by gradients an edit does better than at random.",
        "4 of 8 points above the diagonal; mean -.063",
        "more",
        _over_families(lambda cells: cells.guided(), lambda cells: cells.of("random_index")),
        "grad_direction less random_index; mean of four tasks",
    ),
    Finding(
        "Figure 3",
        "random_index leaves an adapter's score as it is.",
        "-.005 to +.007",
        "same",
        _over_families(lambda cells: cells.of("random_index"), _unedited),
        "random_index less unedited; mean of four tasks",
    ),
    Finding(
        "Table 3",
        "Without its nuclear norm kept, grad_direction ruins the strict-format task.",
        "Qwen .173 kept, .014 not",
        "more",
        _between(STRICT, {}, {"energy": "none"}),
        "nuclear norm kept less not kept, forms",
    ),
    Finding(
        "Table 3",
        "On the choice task it makes no difference whether the norm is kept.",
        "Llama .784 kept, .782 not",
        "same",
        _between(CHOICE, {}, {"energy": "none"}),
        "nuclear norm kept less not kept, choices",
    ),
    Finding(
        "Table 4",
        "On the choice task the number of measuring rows does not matter.",
        "Llama .785 at 32, .783 at 256",
        "same",
        lambda scores, cells: _rows(scores, cells, CHOICE),
        "most measuring rows less fewest, choices",
    ),
    Finding(
        "Table 4",
        "On the strict-format task the number of measuring rows does not matter.",
        "Qwen .179 at 32, .169 at 256",
        "same",
        lambda scores, cells: _rows(scores, cells, STRICT),
        "most measuring rows less fewest, forms",
    ),
    Finding(
        "Table 5",
        "On the choice task editing all modules does more than o_proj and down_proj alone.",
        "Llama .790 all, .784 residual",
        "more",
        _between(CHOICE, {"modules": "all"}, {}),
        "all modules less residual, choices",
    ),
    Finding(
        "Table 5",
        "On the strict-format task editing all modules loses more than o_proj and down_proj alone.",
        "Qwen .071 all, .173 residual",
        "more",
        _between(STRICT, {}, {"modules": "all"}),
        "residual less all modules, forms",
    ),
    Finding(
        "Table 5",
        "On the strict-format task editing q, k and v loses less than o_proj and down_proj.",
        "Qwen .499 q, k, v, .173 residual",
        "more",
        _between(STRICT, {"modules": "attention-inputs"}, {}),
        "q, k, v less residual, forms",
    ),
    Finding(
        "Figure 4",
        "What grad_direction risks in the strict-format task comes with a reward in the others.",
        "Llama -.0037, Qwen +.0077",
        "more",
        _reward,
        "grad_direction less unedited; mean of the other three tasks",
    ),
    Finding(
        "not in it",
        "grad_direction does better than plain weakening to three quarters.",
        "not run",
        "more",
        _over_families(lambda cells: cells.guided(), lambda _: weakened("0.75")),
        "grad_direction less scale 0.75; mean of four tasks",
    ),
    Finding(
        "not in it",
        "Which components grad_direction changes matters: it does better than its own gates dealt out at random.",
        "not run",
        "more",
        _over_families(lambda cells: cells.guided(), matched),
        "grad_direction less random:like=grad_direction, which is as large; mean of four tasks",
    ),
    Finding(
        "not in it",
        "Measured on rows of its own task, grad_direction does better than on those of the maths task.",
        "not run; the authors' scripts measure every adapter on GSM8K",
        "more",
        _over_families(lambda cells: cells.guided(own=True), lambda cells: cells.guided()),
        "own rows less rows of sums; mean of the other three tasks",
    ),
)


def judge(scores: Scores, cells: Cells) -> list[Judged]:
    """Returns every finding with its figure and verdict."""
    found = []
    for finding in FINDINGS:
        interval = finding.effect(scores, cells).interval()
        found.append(Judged(finding, interval, judged(finding.kind, interval, finding.margin)))
    return found


def _defined_mean(values: np.ndarray) -> float:
    """Returns the mean of the layers in which both have a leading direction; NaN where none has."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def judge_directions(adapters: Sequence[Inspection]) -> list[Judged]:
    """Returns what Figure 1 claims, from every adapter's leading directions: mean less what chance gives."""
    matrices = [next(m for m in one.matrices if (m.group, m.side) == ("o_proj", "output")) for one in adapters]
    pairs = [next(c for c in one.curves if {c.first, c.second} == SYNERGY) for one in adapters]
    k = matrices[0].k
    values = {
        "o_proj's leading output directions are alike in all layers.": (
            "mean |cos| over pairs of layers, less chance",
            [one.cosine_mean - one.cosine_by_chance.mean for one in matrices],
        ),
        f"o_proj's leading {k} output directions span like subspaces in all layers (Eq. 3).": (
            "mean overlap over pairs of layers, less chance",
            [one.overlap_mean - one.overlap_by_chance.mean for one in matrices],
        ),
        "o_proj and down_proj of a layer write in like directions.": (
            "mean |cos| over layers, less chance",
            [_defined_mean(one.cosine) - one.cosine_by_chance.mean for one in pairs],
        ),
    }
    found = []
    for claim, (measured, each) in values.items():
        effect = over_adapters(np.array(each))
        finding = Finding(
            "Figure 1", claim, "figures without numbers", "more", lambda *_, e=effect: e, measured, 0.0, "cosine"
        )
        interval = effect.interval()
        found.append(Judged(finding, interval, judged("more", interval, 0.0)))
    return found
