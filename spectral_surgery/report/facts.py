"""What a verdict says: the figures and words that terminal, page, pictures and card share.

A verdict is the plain JSON object that refine writes. Scores are means with standard errors; gains are paired
differences, positive where better, with intervals.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectral_surgery.judging.trials import BASE, UNEDITED

Verdict = Mapping[str, Any]

SURE = 0.05
"""Two-sided p-value from which on a loss by another instrument is warned of."""
Z = 1.96
"""Standard errors on each side of a mean in its 95 % interval."""
STRENGTH, CONTINUE = "strength", "continue"
"""Families of the global strengths and of continued training."""
REFINED, LEAVE_ALONE, NOT_BETTER = "refined", "leave_alone", "not_better_than_base"


@dataclass(frozen=True)
class Outcome:
    """What to do, before anything is read."""

    sign: str
    headline: str
    advice: str


def outcome(verdict: Verdict) -> Outcome:
    """Returns the outcome in words."""
    family = (winner(verdict) or {}).get("family")
    if verdict["outcome"] == REFINED:
        advice = "It is in the folder “adapter” beside this report, and loads wherever yours did."
        if verdict["rule"]["seen_rows_only"]:
            return Outcome("✓", "Refined; task accuracy not tested", advice)
        return Outcome("✓", "A plain strength is enough" if family == STRENGTH else "Use the refined adapter", advice)
    if verdict["outcome"] == LEAVE_ALONE:
        if family == CONTINUE:
            advice = "No adapter was written. Training it further on the same rows does more than any edit."
            return Outcome("=", "Leave it alone and continue training", advice)
        return Outcome("=", "Leave it alone", "No adapter was written. Keep using yours as it is.")
    return Outcome(
        "!",
        "Not better than its base model",
        "No adapter was written. Check the prompt format and the rows before you use this adapter.",
    )


def sentence(verdict: Verdict) -> str:
    """Returns the verdict's sentence without a beginning that only repeats the headline."""
    start, _, rest = verdict["sentence"].partition(": ")
    return rest[:1].upper() + rest[1:] if rest and start == outcome(verdict).headline else verdict["sentence"]


@dataclass(frozen=True)
class Unit:
    """How the figures of one measure are written."""

    name: str
    unit: str
    percent: bool
    lower_is_better: bool

    @property
    def label(self) -> str:
        """Name and unit, such as ``exact answers, %``."""
        return f"{self.name}, {'%' if self.percent else self.unit}"

    @property
    def gains(self) -> str:
        """Unit of a difference."""
        return "points" if self.percent else self.unit

    def number(self, value: float | int | None, signed: bool = False) -> str:
        """Returns a figure without its unit; percentages have one digit after the point, others three."""
        if value is None:
            return "?"
        shown = f"{100 * value:+.1f}" if self.percent else f"{value:+.3f}"
        if not shown.strip("+-0."):
            shown = shown.replace("-", "+")
        return shown if signed else shown.removeprefix("+")

    def score(self, score: Mapping[str, Any] | None) -> str:
        """Returns a mean with its 95 % interval, such as ``95.2 [94.1, 96.3]``."""
        if score is None:
            return "-"
        low, high = self.limits(score)
        return f"{self.number(score['mean'])} [{self.number(low)}, {self.number(high)}]"

    def limits(self, score: Mapping[str, Any]) -> tuple[float, float]:
        """Returns the mean's 95 % interval, within what the measure can be; exact where the verdict has it."""
        if "low" in score:
            return score["low"], score["high"]
        low, high = score["mean"] - Z * score["se"], score["mean"] + Z * score["se"]
        return max(0.0, low), min(1.0, high) if self.percent else high

    def gain(self, interval: Mapping[str, Any] | None) -> str:
        """Returns a paired gain with its interval, such as ``+1.2 [0.4, 2.0]``; ``?`` where there is no limit."""
        if interval is None:
            return "-"
        low, high = self.number(interval["low"]), self.number(interval["high"])
        return f"{self.number(interval['estimate'], signed=True)} [{low}, {high}]"


def unit(verdict: Verdict, key: str) -> Unit:
    """Returns how the figures of ``task`` or ``skills`` are written."""
    measure = verdict["measures"][key]
    return Unit(measure["name"], measure["unit"], measure["unit"].startswith("share"), measure["lower_is_better"])


@dataclass(frozen=True)
class Standing:
    """One candidate beside the others."""

    role: str
    """base, yours, strength, rival or refined; refined is what was written."""
    label: str
    """In a user's words."""
    candidate: Mapping[str, Any]
    gain: Mapping[str, Any] | None
    """Paired gain over the unedited adapter on test rows, where it was tested."""

    def score(self, key: str) -> Mapping[str, Any] | None:
        """Returns mean and standard error on test rows."""
        return (self.candidate["test"] or {}).get(key)


EXACT = Unit("exact answers", "share of rows", percent=True, lower_is_better=False)
"""How shares of exact answers are written."""


@dataclass(frozen=True)
class Exact:
    """Exact answers of one side beside the scores that decided; information, no test."""

    key: str
    """task or skills."""
    title: str
    rows: int
    of: int
    """Test rows there are."""
    by_name: Mapping[str, Mapping[str, Any]]
    """Share with its standard error, and paired gain over the unedited adapter, by candidate."""

    def score(self, name: str) -> str:
        """Returns a candidate's share with its 95 % interval, or a dash."""
        return EXACT.score(self.by_name.get(name))

    def gain(self, name: str) -> str | None:
        """Returns a candidate's gain over the unedited adapter with its 95 % interval, where there is one."""
        found = self.by_name.get(name, {}).get("gain")
        return f"{EXACT.gain(found)} points" if found else None

    @property
    def counted(self) -> str:
        """How many rows they are on."""
        return f"{self.rows} of {self.of}" if self.rows < self.of else f"all {self.rows}"


def exact(verdict: Verdict) -> list[Exact]:
    """Returns what exact answers there are to show: of the task, of other skills."""
    titles = {"task": "task, exact answers", "skills": "other skills, exact answers"}
    return [
        Exact(key, title, found["n"], found["of"], {one["name"]: one for one in found["scores"]})
        for key, title in titles.items()
        if (found := verdict["exact"][key])
    ]


def exact_gains(verdict: Verdict) -> list[str]:
    """Returns, for each side with exact answers, their gains over the unedited adapter in one sentence."""
    told = []
    for one in exact(verdict):
        gains = {
            standing.label: gain
            for standing in standings(verdict)
            if (gain := one.gain(standing.candidate["name"])) and standing.role != "base"
        }
        listed = "; ".join(f"{label} {gain}" for label, gain in gains.items())
        over = f" Gain over your adapter, paired: {listed}." if listed else ""
        told.append(f"{one.title.capitalize()}: greedy answers on {one.counted} test rows; shown, not tested.{over}")
    return told


NAMES = {BASE: "base", UNEDITED: "yours", "refined": "refined"}
"""What a reader calls those that stand side by side."""


@dataclass(frozen=True)
class Check:
    """One score of another instrument, in words."""

    name: str
    rows: int
    scores: dict[str, str]
    """Mean with its 95 % interval, by name."""
    gains: dict[str, str]
    """Paired gain over the unedited adapter with interval and p, by name."""
    worse: bool
    """Whether the answer is significantly worse than the unedited adapter."""


def checks(verdict: Verdict) -> list[Check]:
    """Returns the scores of another instrument; none where none was asked for."""
    found = []
    for check in verdict["checks"]:
        unit = Unit(check["name"], "share" if check["share"] else "", check["share"], check["lower_is_better"])
        by_name = {NAMES.get(one["name"], one["name"]): one for one in check["scores"]}
        gains = {
            name: f"{unit.gain(one['gain'])} (p = {one['p']:.2g})" for name, one in by_name.items() if one["gain"]
        }
        last = by_name.get("refined")
        worse = bool(last and last["p"] <= SURE and last["gain"]["estimate"] < 0)
        title = (
            f"{check['name']}{', %' if check['share'] else ''}{', lower is better' if unit.lower_is_better else ''}"
        )
        found.append(Check(title, check["n"], {name: unit.score(one) for name, one in by_name.items()}, gains, worse))
    return found


def few_rows(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells of the table of few-step tuning and continued training by number of rows."""
    units = [unit(verdict, key) for key in ("task", "skills")]
    header = ["rows", "", "task", "other skills", "tuning ahead: task", "tuning ahead: others"]
    cells, last = [], None
    for one in verdict["few_rows"]:
        ahead = one["ahead"] or {}
        cells.append(
            [
                str(one["rows"]) if one["rows"] != last else "",
                one["name"],
                *(own.score(one[key]) for own, key in zip(units, ("task", "skills"), strict=True)),
                *(own.gain(ahead.get(key)) for own, key in zip(units, ("task", "skills"), strict=True)),
            ]
        )
        last = one["rows"]
    return header, cells


def standings(verdict: Verdict) -> list[Standing]:
    """Returns base, yours, the best strength, the best of each kind of rival and the answer, on test rows."""
    tested = [c for c in verdict["candidates"] if c["test"]]
    references = {"base": ("base", "base model, no adapter"), "unedited": ("yours", "your adapter")}
    found = [(*references[c["family"]], c) for c in tested if c["family"] in references]
    rivals: dict[str, list[Mapping[str, Any]]] = {}
    for c in tested:
        if (
            c["family"] not in references
            and c["stage"] != "winner"
            and (c["family"] == STRENGTH or c["stage"] == "rival")
        ):
            rivals.setdefault(c["family"], []).append(c)
    for family, several in sorted(rivals.items(), key=lambda item: item[0] != STRENGTH):
        best = _best(verdict, several)
        title = "strength" if (winner(verdict) or {}).get("family") == STRENGTH else "best strength"
        name = f"{title}: {best['name'].removeprefix('strength ')}"
        found.append(("strength", name, best) if family == STRENGTH else ("rival", best["name"], best))
    won = ("refined", "refined: ") if verdict["outcome"] == REFINED else ("rival", "")
    found += [(won[0], won[1] + c["name"], c) for c in tested if c["stage"] == "winner"]
    gains = {link["name"]: link for link in verdict["chain"]}
    return [Standing(role, label, c, gains.get(c["name"])) for role, label, c in found]


def _best(verdict: Verdict, several: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the one that does most of what was asked for, of those within the other's margin if there are any.

    Rivals are preferred to others: they are what the answer was held against.
    """
    yours = named(verdict, UNEDITED)
    wanted, kept = ("skills", "task") if verdict["rule"]["may_lose"] else ("task", "skills")

    def gain(c: Mapping[str, Any], key: str) -> float:
        sign = -1 if verdict["measures"][key]["lower_is_better"] else 1
        return sign * (c["test"][key]["mean"] - (yours["test"][key]["mean"] if yours and yours["test"] else 0.0))

    several = [c for c in several if c["stage"] == "rival"] or several
    margin = verdict["measures"][kept].get("margin") or 0.0
    within = [c for c in several if gain(c, kept) >= -margin]
    return max(within, key=lambda c: gain(c, wanted)) if within else max(several, key=lambda c: gain(c, kept))


def winner(verdict: Verdict) -> Mapping[str, Any] | None:
    """Returns the candidate that won, if one did."""
    return next((c for c in verdict["candidates"] if c["stage"] == "winner"), None)


def named(verdict: Verdict, name: str) -> Mapping[str, Any] | None:
    """Returns the candidate of this name."""
    return next((c for c in verdict["candidates"] if c["name"] == name), None)


def recovered(verdict: Verdict) -> float | None:
    """Returns which share of the other skills' loss the answer gives back; None where nothing clear was lost."""
    best, base, yours = winner(verdict), named(verdict, BASE), named(verdict, UNEDITED)
    interval = (verdict["question_zero"] or {}).get("skills")
    if not (best and base and yours and interval and interval["high"] is not None and interval["high"] < 0):
        return None
    means = [c["test"]["skills"]["mean"] if c["test"] else math.nan for c in (best, yours, base)]
    share = (means[0] - means[1]) / (means[2] - means[1])
    return share if math.isfinite(share) else None


def duration(seconds: float | int) -> str:
    """Returns seconds as people say them."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def visible(text: str) -> str:
    r"""Returns text in which nothing is invisible or changes what stands around it.

    Control characters (a terminal's escape among them), lone surrogates, marks that turn the direction of text and
    other format characters are spelt out; line ends, tabs and joiners, which languages and emoji need, stay.
    """
    return "".join(c if _shown(c) else f"\\u{ord(c):04x}" for c in text.replace("\r\n", "\n"))


def _shown(character: str) -> bool:
    if character in "\n\t\u200c\u200d":
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def shortened(text: str, most: int) -> str:
    """Returns at most so many characters, from the end, where a prompt's question stands."""
    return text if len(text) <= most else f"… {text[len(text) - most + 2 :].lstrip()}"


def examples(verdict: Verdict) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the examples by what the answer did to them: fixed, broken, same."""
    return {
        change: [one for one in verdict["examples"] if one["change"] == change]
        for change in ("fixed", "broken", "same")
    }


def equivalent(verdict: Verdict) -> str | None:
    """Returns how to have the answer without a new file, where it is a plain strength."""
    found = (winner(verdict) or {}).get("equivalent")
    return found.removeprefix("the same as ") if found and verdict["outcome"] == REFINED else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested options in one level, with dots; what is null or empty is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            found[f"{prefix}{key}"] = value
    return found


def fields(values: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns (words, figure) of the fields that are known."""
    return [(words, f"{values[key]:,}") for key, words in names if values.get(key) is not None]
