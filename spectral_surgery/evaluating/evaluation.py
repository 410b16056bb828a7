"""Benchmarks of a base model, an adapter and others of the same base, paired, in one loaded model.

:func:`evaluate` is the whole of it; :func:`score` is its inner part, for any variants that a loaded model can be
switched to: no adapter, one of several adapters, or gates. lm-evaluation-harness builds prompts, generates and scores
(:mod:`.harness`); what is kept of it is one :class:`Record` for every document, metric and filter. Generated programs
are run by :mod:`.code_execution`, equal ones once, so that variants that wrote the same get the same verdict.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spectral_surgery.adapter.saving import MANIFEST, check_output, write_folder
from spectral_surgery.calibration import chat_renderer
from spectral_surgery.errors import InputError, combine
from spectral_surgery.evaluating.code_execution import Outcome, Program, check_programs
from spectral_surgery.evaluating.records import Record, write_records
from spectral_surgery.evaluating.samples import Sample, from_samples
from spectral_surgery.evaluating.standings import Standing, as_data, as_markdown, as_text, standings
from spectral_surgery.evaluating.suite import Suite, SuiteOptions, check_options, prepare_suite
from spectral_surgery.evaluating.variants import Candidates, Variants, load_variants, prepare_adapters
from spectral_surgery.live import Live
from spectral_surgery.manifest import run_record, source_record
from spectral_surgery.options import ModelOptions
from spectral_surgery.tables import table

RECORDS = "records.jsonl"
"""Name of the file of records in an output folder."""

AGAIN = "{name}, again {number}"
"""Name of a re-scoring of the same weights."""

Progress = Callable[[int, int], None]
"""(requests done, requests in all)."""


@dataclass(frozen=True)
class Prepared:
    """Everything that an evaluation needs except the base model's weights."""

    candidates: Candidates
    suite: Suite
    noise_floor: int = 0
    """How often the unedited adapter is scored again."""
    vllm: Mapping[str, Any] | None = None
    """What vLLM's engine takes beside; None for Transformers in this process."""

    @property
    def scorings(self) -> int:
        """How many times the whole suite is scored: the base, every adapter, and the scorings again."""
        return 1 + len(self.candidates.adapters) + self.noise_floor


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    records: Sequence[Record]
    """Of every variant, document, metric and filter; re-scorings of the unedited adapter under names of their own."""
    reference: str
    """Name of the variant that the others are held against: the unedited adapter."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was scored, for the manifest."""

    @property
    def again(self) -> list[str]:
        """Names of the re-scorings of the unedited adapter."""
        names = {record.variant for record in self.records}
        candidates = (AGAIN.format(name=self.reference, number=number) for number in range(1, len(names)))
        return [name for name in candidates if name in names]

    def standings(self) -> list[Standing]:
        """Returns every variant's scores and differences from the unedited adapter, re-scorings left out."""
        again = set(self.again)
        return standings([record for record in self.records if record.variant not in again], self.reference)

    def noise(self) -> list[Standing]:
        """Returns the scores of the unedited adapter, scored once and again."""
        same = {self.reference, *self.again}
        return standings([record for record in self.records if record.variant in same], self.reference)

    def text(self) -> str:
        """Returns what a person reads in a terminal."""
        return "\n\n".join([as_text(self.standings(), self.reference), *self._notes()])

    def markdown(self) -> str:
        """Returns the same as a page."""
        return "\n".join([as_markdown(self.standings(), self.reference), *self._notes(), ""])

    def save(self, out: Path, *, overwrite: bool = False) -> None:
        """Writes records.jsonl, table.md and the manifest as one folder.

        Raises:
            OutputError: If the folder may not be written.
        """
        manifest = run_record() | dict(self.about) | {"reference": self.reference, "scores": as_data(self.standings())}

        def write(folder: Path) -> None:
            write_records(folder / RECORDS, self.records)
            (folder / "table.md").write_text(self.markdown(), encoding="utf-8")
            text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
            (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

        write_folder(out, write, overwrite=overwrite)

    def _notes(self) -> list[str]:
        notes = []
        if self.again:
            notes.append(_noise_text(self.noise(), self.reference, len(self.again)))
        if cut := sum(record.truncated for record in self.records):
            notes.append(
                f"{cut} scores are of answers that ended at the token limit rather than by themselves (cut off); "
                f"--max-gen-toks raises it."
            )
        return notes


def prepare(
    names: Sequence[str],
    options: SuiteOptions | None = None,
    model: ModelOptions | None = None,
    *,
    noise_floor: int = 0,
    vllm: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Prepared:
    """Returns what an evaluation needs, after every check that needs no base model weights.

    Raises:
        InputError: Whatever is wrong with adapters, tasks, rows, consent, or the folder to write; as much of it
            together as can be.
    """
    options = options or SuiteOptions()
    faults: list[str] = []
    checks: list[Callable[[], Any]] = [partial(check_options, options), partial(prepare_adapters, names, model)]
    if output:
        checks.append(partial(check_output, output, overwrite=overwrite, sources=tuple(map(Path, names))))
    found = [_attempt(check, faults) for check in checks]
    if noise_floor < 0:
        faults.append(f"--noise-floor is {noise_floor}; expected how often to score again.")
    if vllm is not None and importlib.util.find_spec("vllm") is None:
        faults.append("vLLM is not installed. Install it in an environment of its own, or use --backend hf.")
    combine(faults)
    candidates: Candidates = found[1]
    render = _lazy_renderer(candidates)
    length = getattr(candidates.config.get_text_config(), "max_position_embeddings", None)
    return Prepared(
        candidates,
        prepare_suite(options, candidates.tokenizer, model_length=length, render=render),
        noise_floor,
        None if vllm is None else _engine_settings(vllm),
    )


def _engine_settings(text: str) -> dict[str, Any]:
    """Returns what ``name=value,name=value`` means, as lm-evaluation-harness reads its model arguments."""
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(text))


def _attempt(check: Callable[[], Any], faults: list[str]) -> Any:
    try:
        return check()
    except InputError as fault:
        several = str(fault).split("\n  - ")[1:]
        faults += several or [str(fault)]


def _lazy_renderer(candidates: Candidates) -> Callable[[Any], tuple[str, str]]:
    """Returns a renderer of conversations that asks for a chat template only when there is a conversation."""
    return lambda turns: chat_renderer(candidates.tokenizer, candidates.first.folder)(turns)


def evaluate(
    adapter: str | Path,
    against: Iterable[str | Path] = (),
    suite: SuiteOptions | None = None,
    *,
    model: ModelOptions | None = None,
    noise_floor: int = 0,
    vllm: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Returns the scores of the base model, an adapter and others of the same base, paired per document.

    Args:
        adapter: Folder or Hub id.
        against: Others.
        suite: What is scored; by default the paper's four benchmarks at its settings.
        model: How the base model is loaded.
        noise_floor: How often the unedited adapter is scored again.
        vllm: Generate with vLLM in place of Transformers, with these arguments of its engine, such as
            ``tensor_parallel_size=2``; may be empty.
        output: Folder to write records, table and manifest to.
        overwrite: Replace a folder that spectral-surgery wrote.
        progress: Called with requests done and requests in all.

    Raises:
        InputError: Whatever can be known to be wrong before the base model loads.
        RunError: If something fails midway.
    """
    names = [str(name) for name in (adapter, *against)]
    folder = Path(output) if output is not None else None
    prepared = prepare(names, suite, model, noise_floor=noise_floor, vllm=vllm, output=folder, overwrite=overwrite)
    found = evaluate_prepared(prepared, progress=progress)
    if folder is not None:
        found.save(folder, overwrite=overwrite)
    return found


def evaluate_prepared(prepared: Prepared, *, progress: Progress | None = None) -> Evaluation:
    """Returns the scores of every variant; loads the base model."""
    candidates, suite = prepared.candidates, prepared.suite
    done = _counted(progress, prepared.scorings * sum(suite.requests.values()))
    scored = _scored if prepared.vllm is None else _served
    records = scored(prepared, done)
    unedited = candidates.unedited
    about = {
        "adapters": {name: source_record(adapter) for name, adapter in candidates.adapters.items()},
        "base_model": candidates.base_model,
        "model": asdict(candidates.model),
        "suite": asdict(suite.options),
        "tasks": {name: _task_record(task) for name, task in suite.tasks.items()},
        "noise_floor": prepared.noise_floor,
        "backend": "hf" if prepared.vllm is None else {"vllm": dict(prepared.vllm)},
    }
    return Evaluation(records, unedited, about)


def _scored(prepared: Prepared, done: Callable[[], None]) -> list[Record]:
    """Returns the records of all scorings by Transformers in this process."""
    suite, unedited = prepared.suite, prepared.candidates.unedited
    live, variants = load_variants(prepared.candidates)
    records = score(live, variants, suite, done=done)
    for number in range(1, prepared.noise_floor + 1):
        again = {AGAIN.format(name=unedited, number=number): variants[unedited]}
        size = another_size(suite.options.batch_size, number)
        records += score(live, again, suite, batch_size=size, done=done)
    return records


def _served(prepared: Prepared, done: Callable[[], None]) -> list[Record]:
    """Returns the records of all scorings by vLLM, after it has shown that it computes what Transformers does."""
    from spectral_surgery.evaluating.serving import probe, serve

    suite, unedited = prepared.suite, prepared.candidates.unedited
    probes = probe(prepared.candidates, suite)
    with TemporaryDirectory() as folder:
        lm, variants = serve(prepared.candidates, suite, Path(folder), prepared.vllm or {}, probes)
        again = [AGAIN.format(name=unedited, number=number) for number in range(1, prepared.noise_floor + 1)]
        return score_model(lm, variants | {name: variants[unedited] for name in again}, suite, done=done)


def another_size(batch_size: int, number: int) -> int:
    """Returns the batch size of a scoring again: another one each time, and none that needs more memory.

    At the same size the same weights give the same numbers, which says nothing; another size rounds differently, as
    another machine or server would. From a size of one it can only grow.
    """
    return batch_size - 1 - (number - 1) % (batch_size - 1) if batch_size > 1 else 1 + number


def score(
    live: Live,
    variants: Variants,
    suite: Suite,
    *,
    batch_size: int | None = None,
    done: Callable[[], None] | None = None,
) -> list[Record]:
    """Returns the records of every variant, scored one after the other in one loaded model.

    Args:
        live: The loaded model.
        variants: What to open for each, by name: ``live.base``, ``lambda: live.gated(gates)``, or one of
            :func:`~spectral_surgery.evaluating.variants.load_variants`.
        suite: What is scored, from :func:`~spectral_surgery.evaluating.suite.prepare_suite`.
        batch_size: In place of the suite's.
        done: Called after every request.

    Raises:
        RunError: If generated programs cannot be run.
    """
    from spectral_surgery.evaluating.harness import LiveModel

    size = batch_size or suite.options.batch_size
    with live.still():
        lm = LiveModel(live.model, live.tokenizer, batch_size=size, max_length=suite.max_length)
        return score_model(lm, variants, suite, done=done)


def score_model(lm: Any, variants: Variants, suite: Suite, *, done: Callable[[], None] | None = None) -> list[Record]:
    """Returns the records of every variant of a language model of lm-evaluation-harness, as :func:`score` does."""
    from spectral_surgery.evaluating.harness import run

    records: list[Record] = []
    verdicts: dict[Program, Outcome] = {}
    for name, open_variant in variants.items():
        with open_variant():
            found, ledger = run(lm, suite.tasks, suite.settings, fewshot_seed=suite.options.fewshot_seed, done=done)
        for task, samples in found.items():
            if task == "humaneval":
                samples = with_verdicts(samples, verdicts)
            cut = [ledger.truncated(sample) for sample in samples]
            records += from_samples(samples, variant=name, task=task, truncated=cut)
    return records


def with_verdicts(samples: Sequence[Sample], verdicts: dict[Program, Outcome]) -> list[dict[str, Any]]:
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


def _counted(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total)

    return count


def _task_record(task: Any) -> dict[str, Any]:
    """Returns what makes a task's scores what they are, as text where it is code."""
    config = task.dump_config()
    config.pop("custom_dataset", None)
    return {"documents": len(task.eval_docs), **json.loads(json.dumps(config, default=str))}


def _noise_text(found: Sequence[Standing], unedited: str, times: int) -> str:
    """Returns the spread between scorings of the same weights, which a difference must beat to mean anything."""
    rows = []
    for name in dict.fromkeys(standing.score for standing in found):
        values = [standing.value for standing in found if standing.score == name]
        changed = max(standing.higher + standing.lower for standing in found if standing.score == name)
        spread = max(values) - min(values)
        rows.append([name, f"{min(values):.4g}", f"{max(values):.4g}", f"{spread:.4f}", str(changed)])
    head = (
        f"Noise floor: {unedited} scored {times + 1} times, each at another batch size. A difference within what one "
        f"and the same adapter shows is no gain."
    )
    return head + "\n\n" + table(["score", "lowest", "highest", "spread", "documents changed"], rows)
