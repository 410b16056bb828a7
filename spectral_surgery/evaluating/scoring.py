"""Variants scored one after the other in one loaded model.

:func:`score` takes any variants that a loaded model can be switched to: no adapter, one of several adapters, or gates.
lm-evaluation-harness builds prompts, generates and scores (:mod:`.harness`); what is kept of it is one
:class:`~spectral_surgery.evaluating.records.Record` for every document, metric and filter. Generated programs are run
by :mod:`.code_execution`, equal ones once, so that variants that wrote the same get the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from spectral_surgery import processes
from spectral_surgery.evaluating.code_execution import Outcome, Program, check_programs
from spectral_surgery.evaluating.records import Record
from spectral_surgery.evaluating.samples import Sample, from_samples
from spectral_surgery.evaluating.suite import Suite
from spectral_surgery.evaluating.variants import Variants
from spectral_surgery.live import Live

Verdicts = dict[Program, Outcome]
"""What came of programs that ran."""


def score(
    live: Live,
    variants: Variants,
    suite: Suite,
    *,
    batch_size: int | None = None,
    verdicts: Verdicts | None = None,
    done: Callable[[], None] | None = None,
) -> list[Record]:
    """Returns the records of every variant, scored one after the other in one loaded model.

    Args:
        live: The loaded model.
        variants: What to open for each, by name: ``live.base``, ``lambda: live.gated(gates)``, or one of
            :func:`~spectral_surgery.evaluating.variants.load_variants`.
        suite: What is scored, from :func:`~spectral_surgery.evaluating.suite.prepare_suite`.
        batch_size: In place of the suite's.
        verdicts: What came of programs of earlier scorings; those of this one are put in.
        done: Called after every request.

    Raises:
        RunError: If generated programs cannot be run.
    """
    from spectral_surgery.evaluating.harness import LiveModel

    size = batch_size or suite.options.batch_size
    with live.still():
        lm = LiveModel(live.model, live.tokenizer, batch_size=size, max_length=suite.max_length)
        return score_model(lm, variants, suite, verdicts=verdicts, done=done)


def score_model(
    lm: Any,
    variants: Variants,
    suite: Suite,
    *,
    verdicts: Verdicts | None = None,
    done: Callable[[], None] | None = None,
) -> list[Record]:
    """Returns the records of every variant of a language model of lm-evaluation-harness, as :func:`score` does."""
    from spectral_surgery.evaluating.harness import run

    records: list[Record] = []
    verdicts = {} if verdicts is None else verdicts
    for name, open_variant in variants.items():
        with open_variant():
            found, ledger = run(lm, suite.tasks, suite.settings, fewshot_seed=suite.options.fewshot_seed, done=done)
        for task, samples in found.items():
            if task == "humaneval":
                samples = processes.of_first(partial(with_verdicts, samples, verdicts))
            cut = [ledger.truncated(sample) for sample in samples]
            records += from_samples(samples, variant=name, task=task, truncated=cut)
    return records


def with_verdicts(samples: Sequence[Sample], verdicts: Verdicts) -> list[dict[str, Any]]:
    """Returns HumanEval's samples with what came of their programs; runs those that have not run yet.

    Args:
        samples: As lm-evaluation-harness logs them.
        verdicts: Of earlier programs; the new ones are put in.

    Raises:
        RunError: If programs cannot be run.
    """
    programs = [[_program(sample, text) for text in sample["resps"][0]] for sample in samples]
    new = [program for several in programs for program in several if program not in verdicts]
    verdicts |= zip(new, check_programs(new), strict=True)
    return [
        {**sample, "pass@1": sum(verdicts[program].passed for program in several) / len(several)}
        for sample, several in zip(samples, programs, strict=True)
    ]


def _program(sample: Sample, completion: str) -> Program:
    doc = sample["doc"]
    return Program(doc["task_id"], doc["prompt"], completion, doc["test"], doc["entry_point"])
