"""The paired comparison of two runs, or of two adapters: what differs on the very same examples, and how surely.

Two runs are folders of lm-evaluation-harness's logged samples, or records that spectral-surgery wrote. Nothing is
loaded; the samples say everything. Two adapters of one base are loaded beside one another and scored on rows: the loss
on each answer, and whether the greedy answer is the row's. The base model is scored with them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_surgery.calibration import (
    Tokenized,
    batches,
    data_digest,
    hash_order,
    load_examples,
    split_examples,
    tokenize,
)
from spectral_surgery.errors import DataError, InputError, combine
from spectral_surgery.evaluating.evaluation import RECORDS, Evaluation
from spectral_surgery.evaluating.records import Record, read_records, spell
from spectral_surgery.evaluating.samples import is_run, read_run, read_samples
from spectral_surgery.evaluating.variants import Candidates, load_variants, prepare_adapters, short_names
from spectral_surgery.formats import DataOptions, Example, digest_of
from spectral_surgery.live import Live
from spectral_surgery.manifest import source_record
from spectral_surgery.objective import answer_loss, greedy_answers
from spectral_surgery.options import BatchOptions, ModelOptions

LONGEST_ANSWER = 256
"""Tokens above which exact answers are not generated: nobody writes the same page twice."""

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(variants done, variants in all)."""


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: str | Path | None = None,
    variant_a: str | None = None,
    variant_b: str | None = None,
    rows: DataOptions | None = None,
    model: ModelOptions | None = None,
    batching: BatchOptions | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Returns the paired comparison of two runs, or with ``data`` of two adapters; differences are b minus a.

    Args:
        a: A folder of logged samples, a folder or file of records, or with ``data`` an adapter.
        b: Another of these.
        data: Rows to score two adapters on.
        variant_a: Whose records are meant, where a's are of several variants.
        variant_b: The same for b.
        rows: How the rows are read, and how many are scored.
        model: How the base model is loaded.
        batching: How rows are put into batches.
        progress: Called after each variant of two adapters.

    Raises:
        InputError: If one of the two is nothing that can be compared, or they do not hold the same documents with the
            same prompts.
    """
    if data is None:
        return compare_runs(str(a), str(b), variant_a=variant_a, variant_b=variant_b)
    prepared = prepare_pair(str(a), str(b), str(data), rows=rows, model=model)
    return compare_adapters(prepared, batching, progress=progress)


def compare_runs(a: str, b: str, *, variant_a: str | None = None, variant_b: str | None = None) -> Evaluation:
    """Returns the paired comparison of two runs' records, in the scores that both have.

    Raises:
        InputError: As :func:`compare`.
    """
    first_name, second_name = _labels(a, b, variant_a, variant_b)
    found: list[list[Record]] = []
    faults = []
    for path, chosen, name in ((a, variant_a, first_name), (b, variant_b, second_name)):
        try:
            found.append(_read(path, chosen, name))
        except InputError as fault:
            faults.append(str(fault))
    combine(faults, DataError)
    both = {record.score for record in found[0]} & {record.score for record in found[1]}
    if not both:
        raise DataError(f"{a} and {b} have no task, metric and filter in common. Compare runs of the same tasks.")
    if lone := {record.score for records in found for record in records} - both:
        log.warning("Left out, because only one of the two has it: %s.", ", ".join(sorted(map(spell, lone))))
    records = [record for several in found for record in several if record.score in both]
    evaluation = Evaluation(records, first_name, {"runs": {first_name: a, second_name: b}})
    evaluation.standings()  # refuses different documents and prompts
    return evaluation


def _labels(a: str, b: str, variant_a: str | None, variant_b: str | None) -> tuple[str, str]:
    """Returns what to call the two: their variants where these differ, else their folders."""
    if variant_a and variant_b and variant_a != variant_b:
        return variant_a, variant_b
    short = short_names([a, b])
    return (short[a], short[b]) if a != b else (f"{a} (first)", f"{b} (second)")


def _read(path: str, variant: str | None, name: str) -> list[Record]:
    """Returns the records of a run, under the name it is to have.

    Raises:
        DataError: If it is no run, or does not say which of several variants is meant.
    """
    place = Path(path).expanduser()
    if (place / "adapter_config.json").is_file():
        raise DataError(f"{path} is an adapter. Pass --data ROWS to score two adapters, or give two runs.")
    if place.is_dir() and (place / RECORDS).is_file():
        place = place / RECORDS
    if place.is_dir() and is_run(place):
        return read_run(place, variant=name)
    if not place.is_file():
        found = "holds no samples_*.jsonl and no records.jsonl" if place.is_dir() else "is not there"
        raise DataError(
            f"{path} {found}. Give what lm_eval --log_samples --output_path wrote, a folder of spectral-surgery "
            f"evaluate, or two adapters with --data ROWS."
        )
    if not _holds_records(place):
        return read_samples(place, variant=name)
    records = read_records(place)
    variants = list(dict.fromkeys(record.variant for record in records))
    wanted = variant or (variants[0] if len(variants) == 1 else None)
    if wanted not in variants:
        known = ", ".join(variants) or "none"
        raise DataError(f"{path} has the variants {known}. Say which with --variant-a and --variant-b.")
    return [replace(record, variant=name) for record in records if record.variant == wanted]


def _holds_records(path: Path) -> bool:
    """Returns whether a file's first line is a record rather than a logged sample."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is neither records nor logged samples ({error}).") from error
    return isinstance(first, dict) and "variant" in first


@dataclass(frozen=True)
class Pair:
    """Two adapters and the rows to score them on, before the base model's weights load."""

    candidates: Candidates
    data: str
    examples: Sequence[Example]
    tokenized: Tokenized
    available: int
    """Different examples in the data."""

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, its end included."""
        return max(len(example.input_ids) - example.answer_start for example in self.tokenized.examples)


def prepare_pair(
    a: str, b: str, data: str, *, rows: DataOptions | None = None, model: ModelOptions | None = None
) -> Pair:
    """Returns two adapters with the rows to score them on, after every check that needs no base model weights.

    Raises:
        InputError: Whatever is wrong with the adapters, their base, or the rows.
    """
    rows = rows or DataOptions(examples=1000)
    candidates = prepare_adapters([a, b], model)
    found = load_examples(data, rows, candidates.tokenizer, candidates.first.folder)
    available = len(hash_order(found, rows.seed))
    examples = split_examples(found, (min(rows.count(1000), available), 0, 0), rows.seed).calibration
    return Pair(candidates, data, examples, tokenize(examples, candidates.tokenizer, rows.max_length), available)


def compare_adapters(
    pair: Pair, batching: BatchOptions | None = None, *, progress: Progress | None = None
) -> Evaluation:
    """Returns the base model's and both adapters' scores on rows, paired; loads the base model.

    Raises:
        RunError: If something fails midway.
    """
    live, variants = load_variants(pair.candidates)
    records: list[Record] = []
    with live.still():
        for done, (name, open_variant) in enumerate(variants.items(), 1):
            with open_variant():
                records += score_rows(live, pair, name, batching or BatchOptions())
            if progress:
                progress(done, len(variants))
    about = {
        "adapters": {name: source_record(adapter) for name, adapter in pair.candidates.adapters.items()},
        "base_model": pair.candidates.base_model,
        "data": pair.data,
        "data_sha256": data_digest(pair.examples),
        "rows": len(pair.examples),
    }
    return Evaluation(records, next(iter(pair.candidates.adapters)), about)


def score_rows(live: Live, pair: Pair, name: str, batching: BatchOptions) -> list[Record]:
    """Returns what the live model, as it now computes, scores on every row: answer loss, and exact answers."""
    scores = {"answer_loss": _losses(live, pair.tokenized, batching)}
    if pair.longest_answer <= LONGEST_ANSWER:
        scores["exact_answer"] = _exact(live, pair, batching)
    return [
        Record(
            variant=name,
            task=Path(pair.data).stem,
            metric=metric,
            doc_hash=example.digest,
            prompt_hash=digest_of(*tokens.input_ids),
            value=value,
            cluster=digest_of(example.group),
        )
        for metric, values in scores.items()
        for example, tokens, value in zip(pair.examples, pair.tokenized.examples, values, strict=True)
    ]


def _losses(live: Live, tokenized: Tokenized, batching: BatchOptions) -> list[float]:
    """Returns each row's mean negative log-likelihood of its answer's tokens, in nats per token."""
    import torch

    size = None if batching.batch_size == "auto" else batching.batch_size
    losses = [0.0] * len(tokenized.examples)
    for batch in batches(tokenized, token_budget=batching.tokens, batch_size=size):
        with torch.no_grad():
            found = answer_loss(live.model, batch.to(live.device)).tolist()
        for index, loss in zip(batch.indices, found, strict=True):
            losses[index] = loss
    return losses


def _exact(live: Live, pair: Pair, batching: BatchOptions) -> list[float]:
    """Returns for each row 1 where the greedy answer is its own, but for special tokens and white space around it."""
    rows = pair.tokenized.examples
    prompts: Any = [row.input_ids[: row.answer_start] for row in rows]
    wanted = [
        live.tokenizer.decode(list(row.input_ids[row.answer_start :]), skip_special_tokens=True).strip()
        for row in rows
    ]
    size = 32 if batching.batch_size == "auto" else batching.batch_size
    answers = greedy_answers(
        live.model, live.tokenizer, prompts, max_new_tokens=pair.longest_answer + 1, batch_size=size
    )
    return [float(answer == right) for answer, right in zip(answers, wanted, strict=True)]
