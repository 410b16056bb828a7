"""How a verdict was reached, in sentences with the figures of the run: for a paper, a model card or a reader."""

from __future__ import annotations

from collections import Counter

from spectral_surgery.report import facts
from spectral_surgery.report.facts import Unit, Verdict

PAPER = (
    "Tian, Z., Chen, Y., Han, Z., and Liao, L. Spectral Surgery: Training-Free Refinement of LoRA via "
    "Gradient-Guided Singular Value Reweighting. arXiv 2603.03995, 2026."
)
MCNEMAR = (
    "McNemar, Q. Note on the sampling error of the difference between correlated proportions or percentages. "
    "Psychometrika 12, 1947."
)
TANGO = (
    "Tango, T. Equivalence test and confidence interval for the difference in proportions for the paired-sample "
    "design. Statistics in Medicine 17, 1998."
)
BOOTSTRAP = "Efron, B. and Tibshirani, R. An Introduction to the Bootstrap, ch. 12. Chapman and Hall, 1993."
SEQUENCE = (
    "Maurer, W., Hothorn, L., and Lehmacher, W. Multiple comparisons in drug clinical trials and preclinical assays. "
    "In Biometrie in der chemisch-pharmazeutischen Industrie 6, 1995."
)


def paragraph(verdict: Verdict) -> str:
    """Returns a methods paragraph with the figures of this run and the works that it cites."""
    sentences = [_subject(verdict), *_design(verdict), _intervals(verdict), *_result(verdict)]
    return " ".join(sentences) + "\n\n" + "\n".join(references(verdict))


def references(verdict: Verdict) -> list[str]:
    """Returns the works that the paragraph rests on."""
    binary = any(verdict["measures"][key]["binary"] for key in ("task", "skills"))
    return [PAPER, *([MCNEMAR, TANGO] if binary else []), BOOTSTRAP, SEQUENCE]


def _subject(verdict: Verdict) -> str:
    adapter = verdict["adapter"]
    return (
        f"We examined a LoRA adapter (rank {adapter['rank']}, {adapter['modules']} modules, {adapter['components']:,} "
        f"components) of {adapter['base_model']} with spectral-surgery {verdict['version']} (Tian et al., 2026)."
    )


def _design(verdict: Verdict) -> list[str]:
    rows, rule = verdict["rows"], verdict["rule"]
    tried = Counter(c["family"] for c in verdict["candidates"] if c["family"] not in ("base", "unedited"))
    finalists = len(verdict["chain"])
    sentences = []
    if tried:
        sentences.append(
            f"{tried.total()} candidates, {tried[facts.STRENGTH]} of them plain strengths, were compared on "
            f"{rows['validation']} task rows and {rows['keep_validation']} rows of other skills; sensitivities came "
            f"from {rows['measuring']} further rows."
        )
    if finalists:
        sentences.append(
            f"{finalists} {'finalist was' if finalists == 1 else 'finalists, ordered from surest to boldest, were'} "
            f"tested in that order on {rows['test']} and {rows['keep_test']} rows that nothing else had used, each at "
            f"the one-sided level {rule['level']:.3g}, stopping at the first failure (Maurer et al., 1995)."
        )
    if rule["swapped"]:
        sentences.append("Rows being few, the two halves changed places: each chose for the other.")
    if rule["seen_rows_only"]:
        sentences.append("All task rows had been seen in training, so the task's accuracy was not tested.")
    if rows["guess"]:
        sentences.append("Whether the task rows had been seen in training was guessed from the losses on them.")
    if rule["earlier_verdicts"]:
        sentences.append(
            f"The error rate {rule['error_rate']:.3g} was divided for {rule['earlier_verdicts']} earlier verdicts on "
            f"the same rows."
        )
    return [*sentences, requirement(verdict)]


def requirement(verdict: Verdict) -> str:
    """Returns what the answer had to fulfil."""
    task, skills = facts.unit(verdict, "task"), facts.unit(verdict, "skills")
    margins = [verdict["measures"][key].get("margin") for key in ("task", "skills")]
    if verdict["rule"]["may_lose"] == 0:
        kept = "" if margins[1] is None else f" by more than {_amount(skills, margins[1])}"
        return f"Required: a better task, with the other skills not worse{kept}."
    share = f"{100 * verdict['rule']['may_lose']:g} %"
    lost = "" if margins[0] is None else f" ({_amount(task, margins[0])})"
    return f"Required: better other skills, with the task not worse by more than {share}{lost}."


def _amount(unit: Unit, value: float) -> str:
    return f"{unit.number(value)} {unit.gains}"


def _intervals(verdict: Verdict) -> str:
    binary = any(verdict["measures"][key]["binary"] for key in ("task", "skills"))
    ways = "score tests and Tango's score interval for 0/1 scores of single rows, " if binary else ""
    other = "the studentised bootstrap by group otherwise" if binary else "the studentised bootstrap by group"
    level = f"{100 * (1 - 2 * verdict['rule']['level']):.3g} %"
    return f"Differences are paired by row, with {ways}{other}; intervals of gains are two-sided at {level}."


def _result(verdict: Verdict) -> list[str]:
    sentences = []
    best, edit = facts.winner(verdict), verdict["edit"]
    if best and edit:
        sentences.append(
            f"The answer, {best['name']} ({best['what']}), changes {edit['edited']:,} of {edit['components']:,} "
            f"components, relative size of the edit {edit['size']:.3g}, stored as {edit['dtype']}."
        )
    for key, words in (("task", "Task"), ("skills", "Other skills")):
        unit = facts.unit(verdict, key)
        scores = [f"{one.label} {unit.score(one.score(key))}" for one in facts.standings(verdict)]
        if scores:
            sentences.append(f"{words} ({unit.label}; mean with 95 % interval): {'; '.join(scores)}.")
    if best and (link := next((one for one in verdict["chain"] if one["name"] == best["name"]), None)):
        task, skills = (facts.unit(verdict, key) for key in ("task", "skills"))
        sentences.append(
            f"Paired gain over the unedited adapter, positive is better: task {task.gain(link['task'])} {task.gains}; "
            f"other skills {skills.gain(link['skills'])} {skills.gains}."
        )
    sentences += [claim["sentence"].rstrip(".") + "." for claim in verdict["claims"]]
    if verdict["random"]:
        sentences.append(
            f"Against {verdict['random']['permutations']} permutations of its own gates within modules, rescaled to "
            f"the same size of edit: p = {verdict['random']['p']:.3g}."
        )
    return sentences


def measuring(verdict: Verdict) -> list[tuple[str, str]]:
    """Returns (what, how) of everything a reader needs to judge the verdict."""
    found = [(words, _measure(verdict, key)) for key, words in (("task", "Task"), ("skills", "Other skills"))]
    found.append(("Rule", requirement(verdict)))
    rule = verdict["rule"]
    earlier = rule["earlier_verdicts"]
    counted = f", divided for {earlier} earlier verdicts on the same rows" if earlier else ""
    found.append(
        ("Error rate", f"{100 * rule['error_rate']:g} %{counted}; each test is made at {100 * rule['level']:.3g} %.")
    )
    if rate := verdict["error_rate"]:
        found.append(
            (
                "Error rate, measured",
                f"{100 * rate['estimate']:.2g} % [{100 * rate['low']:.2g}, {100 * rate['high']:.2g}] in "
                f"{rate['replays']:,} replays of choice and confirmation with nothing to be found.",
            )
        )
    found.append(
        (
            "Intervals",
            f"{_intervals(verdict)} Those of single scores are exact for 0/1 scores, otherwise means with 1.96 "
            f"standard errors.",
        )
    )
    if verdict["random"]:
        chance = verdict["random"]
        found.append(
            ("Random control", f"{chance['permutations']} permutations, p = {chance['p']:.3g}: {chance['statistic']}.")
        )
    if told := free_answers(verdict):
        found.append(told)
    return found


def free_answers(verdict: Verdict) -> tuple[str, str] | None:
    """Returns (what, how many of them broke down) of the free answers to prompts of other skills, if there are any."""
    made = verdict["generations"]
    if not made:
        return None
    told = [f"{what} {_counts(made[key])}" for key, what in (("empty", "empty"), ("loops", "looping"))]
    return f"{made['n']} free answers", "; ".join(told) + "."


def _measure(verdict: Verdict, key: str) -> str:
    unit = facts.unit(verdict, key)
    return f"{unit.name} ({unit.unit}), {'lower' if unit.lower_is_better else 'higher'} is better."


def _counts(counts: dict) -> str:
    names = {"base": "base", "unedited": "yours", "refined": "refined"}
    return ", ".join(f"{names[key]} {counts[key]}" for key in names if counts.get(key) is not None)
