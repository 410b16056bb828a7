"""A study checked and hashed before a base model's weights load: every run gets a key of all that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spectral_surgery.adapter import Adapter
from spectral_surgery.calibration import chat_renderer, data_digest
from spectral_surgery.errors import InputError, combine
from spectral_surgery.evaluating.keys import asked, digest, loaded
from spectral_surgery.evaluating.suite import Suite, prepare_suite
from spectral_surgery.evaluating.tasks import split_suite
from spectral_surgery.evaluating.variants import Candidates, prepare_adapters
from spectral_surgery.measuring import Prepared, prepare
from spectral_surgery.results.runs import BASE, UNEDITED
from spectral_surgery.selection import Selection, select
from spectral_surgery.sweeping.grid import Item, spell_out
from spectral_surgery.sweeping.study import Study, StudyAdapter, constraint_of


@dataclass(frozen=True)
class Rows:
    """Measuring rows of one adapter at one seed, the most that the study asks for; fewer are their beginning."""

    prepared: Prepared
    key: str
    """Hash of what the sensitivities depend on."""


@dataclass(frozen=True)
class Ready:
    """A study with everything but the base model's weights."""

    study: Study
    items: Sequence[Item]
    candidates: Candidates
    adapters: Mapping[str, Adapter]
    """By path."""
    suites: Mapping[str, Suite]
    rows: Mapping[tuple[str, str, int], Rows]
    """By adapter's path, data and seed."""
    scores: Mapping[Item, str]
    """Hash of everything that an item's scores depend on; items with one hash are scored once."""

    def key(self, item: Item) -> str:
        """Returns the key of an item's line: its scores', and what tables call it."""
        told = [self.scores[item], item.adapter.name, item.rows, self.study.ifeval]
        return digest(told)

    def of(self, item: Item) -> Rows:
        """Returns an item's measuring rows."""
        return self.rows[item.adapter.path, str(item.adapter.data), item.seed]


def prepare_study(study: Study, items: Sequence[Item] | None = None) -> Ready:
    """Returns a study checked.

    Args:
        study: What is varied, and how it is scored.
        items: The runs, in place of every one that the study spells out.

    Raises:
        InputError: Whatever is wrong with adapters, their base, suites, rows, modules or policies; as much of it
            together as can be.
    """
    items = spell_out(study) if items is None else items
    paths = list(dict.fromkeys(adapter.path for adapter in study.adapters))
    candidates = prepare_adapters(paths, study.model)
    adapters = dict(zip(paths, candidates.adapters.values(), strict=True))
    faults: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except InputError as fault:
            faults.extend(str(fault).split("\n  - ")[1:] or [str(fault)])

    attempt(lambda: _check_local(study, items))
    suites = {}
    for entry in dict.fromkeys(item.suite for item in items):
        suites[entry] = attempt(lambda entry=entry: _suite(study, candidates, entry))  # type: ignore[misc]
    for adapter in study.adapters:
        for modules in study.modules:
            attempt(lambda a=adapter, m=modules: select(adapters[a.path].updates, Selection((m,))))  # type: ignore[misc]
    combine(list(dict.fromkeys(faults)))
    rows = {}
    for item in items:
        place = (item.adapter.path, str(item.adapter.data), item.seed)
        if item.rows is not None and place not in rows:
            rows[place] = attempt(lambda i=item: _rows(study, items, candidates, adapters, i.adapter, i.seed))  # type: ignore[misc]
    combine(list(dict.fromkeys(faults)))
    common = loaded(candidates)
    questions = {entry: asked(suite) for entry, suite in suites.items()}
    scores = {item: _score_key(item, adapters, rows, [*common, questions[item.suite]]) for item in items}
    return Ready(study, items, candidates, adapters, suites, rows, scores)


def _suite(study: Study, candidates: Candidates, entry: str) -> Suite:
    length = getattr(candidates.config.get_text_config(), "max_position_embeddings", None)
    local = tuple(text for text in study.suite.local_data if _task(text) in split_suite(entry))
    return prepare_suite(
        replace(study.suite, suite=entry, local_data=local),
        candidates.tokenizer,
        model_length=length,
        render=lambda turns: chat_renderer(candidates.tokenizer, candidates.first.folder)(turns),
    )


def _task(local: str) -> str:
    return local.partition("=")[0].partition(":")[0]


def _check_local(study: Study, items: Sequence[Item]) -> None:
    """Checks that all local rows are of tasks that are scored.

    Raises:
        InputError: If some are not.
    """
    scored = {task for item in items for task in split_suite(item.suite)}
    if lone := [text for text in study.suite.local_data if _task(text) not in scored]:
        raise InputError(
            f"Local rows are given for {_task(lone[0])}, which is in no suite of the study. Leave it out."
        )


def _rows(
    study: Study,
    items: Sequence[Item],
    candidates: Candidates,
    adapters: Mapping[str, Adapter],
    chosen: StudyAdapter,
    seed: int,
) -> Rows:
    """Returns the measuring rows of an adapter at a seed, and the modules that its runs edit.

    Raises:
        InputError: If there are fewer rows than a run asks for, which would make two different runs one.
    """
    own = [item for item in items if item.adapter == chosen and item.rows is not None]
    most = max(item.rows or 0 for item in own)
    adapter = adapters[chosen.path]
    wanted = tuple(dict.fromkeys(str(item.modules) for item in own))
    paths = {path for modules in wanted for path in select(adapter.updates, Selection((modules,)))}
    prepared = prepare(
        adapter,
        str(chosen.data),
        selection=Selection(tuple(path for path in adapter.updates if path in paths)),
        data_options=replace(study.data, examples=most, seed=seed),
        model=study.model,
        batching=study.batching,
    )
    if len(prepared.examples) < most:
        raise InputError(f"{chosen.data} has {len(prepared.examples)} different rows, and the study asks for {most}.")
    told = [*loaded(candidates), adapter.digest, asdict(study.batching), prepared.paths]
    told += [data_digest(prepared.examples), [row.input_ids for row in prepared.tokenized.examples]]
    return Rows(prepared, digest(told))


def _score_key(
    item: Item, adapters: Mapping[str, Adapter], rows: Mapping[tuple[str, str, int], Rows], common: list[Any]
) -> str:
    if item.policy == BASE:
        return digest([*common, BASE])
    adapter = adapters[item.adapter.path]
    if item.policy == UNEDITED:
        return digest([*common, adapter.digest, UNEDITED])
    place = (item.adapter.path, str(item.adapter.data), item.seed)
    measured = rows[place].key if item.rows is not None else None
    paths = select(adapter.updates, Selection((str(item.modules),)))
    constraint = asdict(constraint_of(item.policy, str(item.energy)))
    told = [adapter.digest, item.policy, constraint, paths, item.seed, measured, item.rows]
    return digest([*common, *told])
