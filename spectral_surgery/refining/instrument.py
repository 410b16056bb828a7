"""Another instrument: benchmarks of the user's choice, scored in the same loaded model once the answer is confirmed.

What was optimised can be gamed, whoever wrote the rule. So tasks of lm-evaluation-harness, or files of rows, which no
step of the search has looked at, are scored for base, unedited and the answer. The rule stays as it was stated: these
scores confirm nothing and undo nothing, but a clear loss is said in the verdict itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_surgery.calibration import chat_renderer
from spectral_surgery.errors import InputError
from spectral_surgery.formats import digest_of
from spectral_surgery.judging.trials import BASE, UNEDITED
from spectral_surgery.refining.bench import Bench, Progress, mean_of
from spectral_surgery.refining.candidates import Candidate
from spectral_surgery.refining.options import RefineOptions
from spectral_surgery.report.facts import SURE

if TYPE_CHECKING:
    from spectral_surgery.adapter import Adapter
    from spectral_surgery.evaluating.records import Paired, Record
    from spectral_surgery.evaluating.suite import Suite

ANSWER = "refined"
"""What the confirmed candidate is called among the scores."""


def prepare_check(
    options: RefineOptions, tokenizer: Any, config: Any, adapter: Adapter, *, chat: bool
) -> Suite | None:
    """Returns the benchmarks that are scored beside, their rows loaded; None where none are asked for.

    Args:
        options: With ``check_suite``, ``check_limit`` and the consent to run generated code.
        tokenizer: The base model's.
        config: The base model's configuration.
        adapter: For its chat template.
        chat: Whether the task's rows are conversations; prompts are then put into the chat template.

    Raises:
        InputError: Whatever is wrong with tasks, rows, consent or the length of prompts.
    """
    if not options.check_suite:
        return None
    from spectral_surgery.evaluating.suite import SuiteOptions, prepare_suite

    wanted = SuiteOptions(
        suite=options.check_suite,
        limit=options.check_limit,
        apply_chat_template=chat,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
    )
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    try:
        return prepare_suite(
            wanted,
            tokenizer,
            model_length=length,
            render=lambda turns: chat_renderer(tokenizer, adapter.folder)(turns),
        )
    except InputError as fault:
        said = str(fault).replace("--suite", "--check-suite")
        raise InputError(
            f"--check-suite: {said} (Other settings of a benchmark than its own are options of spectral-surgery "
            f"evaluate.)"
        ) from fault


def checked(
    suite: Suite, bench: Bench, shown: Mapping[str, Candidate], progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Returns every score of base, unedited and the answer, with paired gains over the unedited adapter.

    Args:
        suite: What :func:`prepare_check` returned.
        bench: The loaded model.
        shown: Candidates by the names that they get: base, unedited and, where one won, the answer.
        progress: Called with requests done.
    """
    from spectral_surgery.evaluating.records import Record, paired

    total = len(shown) * sum(suite.requests.values())
    counted = iter(range(1, total + 1))

    def done() -> None:
        if progress and (number := next(counted, None)):
            progress("another instrument", number, total)

    records = {
        name: [Record(**{**row, "variant": name}) for row in _scored(suite, bench, candidate, done)]
        for name, candidate in shown.items()
    }
    pairs = {name: paired(records[UNEDITED], found) for name, found in records.items()}
    return [
        _score(suite, own, {name: several[i] for name, several in pairs.items()})
        for i, own in enumerate(pairs[UNEDITED])
    ]


def _scored(suite: Suite, bench: Bench, candidate: Candidate, done: Any) -> list[dict[str, Any]]:
    """Returns the records of one candidate, worked out once for the same prompts."""
    from spectral_surgery.evaluating.scoring import score

    def work() -> list[dict[str, Any]]:
        found: Sequence[Record] = score(
            bench.live, {candidate.name: partial(candidate.open, bench.live)}, suite, done=done
        )
        return [asdict(record) for record in found]

    prompts = digest_of(*(repr(request.args) for task in suite.tasks.values() for request in task.instances))
    found: list[dict[str, Any]] = bench.cache.json(("check", prompts, candidate.key), work)
    return found


def _score(suite: Suite, own: Paired, by_name: Mapping[str, Paired]) -> dict[str, Any]:
    """Returns one metric of one task for all variants."""
    from spectral_surgery.evaluating.records import spell

    task, metric, _ = own.score
    lower = suite.tasks[task].higher_is_better().get(metric) is False if task in suite.tasks else False
    values = np.concatenate([pair.b for pair in by_name.values()])
    return {
        "name": spell(own.score),
        "n": len(own.a),
        "lower_is_better": lower,
        "share": bool(not lower and values.min() >= 0 and values.max() <= 1),
        "scores": [_variant(name, pair, -1.0 if lower else 1.0) for name, pair in by_name.items()],
    }


def _variant(name: str, pair: Paired, sign: float) -> dict[str, Any]:
    """Returns one variant's mean and its paired gain over the unedited adapter, positive where better."""
    found: dict[str, Any] = {"name": name, **mean_of(pair.b), "gain": None, "p": None}
    if name != UNEDITED:
        better = pair if sign > 0 else replace(pair, a=pair.b, b=pair.a)
        found |= {"gain": asdict(better.difference()), "p": pair.p_value()}
    return found


def warnings(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for every score on which the answer is significantly worse than the unedited adapter.

    The level is not shared among several scores: a warning too many does less harm than one too few.
    """
    told = []
    for check in checks:
        by_name = {one["name"]: one for one in check["scores"]}
        answer = by_name.get(ANSWER)
        if answer is None or answer["p"] > SURE or answer["gain"]["estimate"] >= 0:
            continue
        factor, unit = (100, " points") if check["share"] else (1, "")
        before, after, gain, low, high = (
            f"{factor * value:.3g}"
            for value in (
                by_name[UNEDITED]["mean"],
                answer["mean"],
                answer["gain"]["estimate"],
                answer["gain"]["low"],
                answer["gain"]["high"],
            )
        )
        base = f"{factor * by_name[BASE]['mean']:.3g}"
        told.append(
            f"Warning: by another instrument, {check['name']}, it is worse than your adapter: {before} -> {after} "
            f"(base {base}; gain {gain}{unit} [{low}, {high}], {check['n']} documents, p = {answer['p']:.2g}). The "
            f"rule did not ask for this; look at it before you use the adapter."
        )
    return told
