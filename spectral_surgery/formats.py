"""Rows of a data set, whatever their columns, as prompt and answer texts.

A row becomes one :class:`Example` by one of four routes:

- a formatter of :data:`FORMATTERS`: the texts that the authors of the method used (arXiv
  2603.03995), by name;
- ``prompt``: a prompt column and an answer column, under the usual names or under given ones;
- ``chat``: a conversation, rendered by a chat template; the last assistant message is the answer;
- ``text``: an already rendered text, cut at its last response marker, such as ``### Response:``.

``auto`` chooses between them from the columns. Nothing here reads a file, a tokenizer or a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from spectral_surgery.columns import (
    ANSWER_COLUMNS,
    CHAT_COLUMNS,
    INPUT_COLUMNS,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    RowFault,
    answer_column,
    cut_at_marker,
    is_conversation,
    listed,
    mappings_of,
    named_column,
    prompt_columns,
    recognise_marker,
    text_column,
    text_of,
    turns_of,
    usual_columns,
)
from spectral_surgery.errors import DataError

Row = Mapping[str, Any]
Render = Callable[[list[dict[str, Any]]], tuple[str, str]]
Format = Literal["auto", "prompt", "chat", "text", "gsm8k", "metamath", "magicoder", "alpaca", "commonsense_qa"]


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read and turned into prompts and answers."""

    format: Format = "auto"
    """What a row looks like; auto decides by the data set's name and its columns."""
    prompt_column: str | None = None
    """Column with the prompt, where it has no usual name."""
    answer_column: str | None = None
    """Column with the answer, where it has no usual name."""
    text_column: str | None = None
    """Column with the conversation or the rendered text, where it has no usual name."""
    response_marker: str | None = None
    """Text after which the answer begins in a rendered text, such as "### Response:"."""
    group_column: str | None = None
    """Column whose equal values are kept in one split; without it, equal prompts are."""
    data_name: str | None = None
    """Configuration of a data set on the Hub, such as "main"; in a folder, a sub-folder."""
    data_split: str = "train"
    """Split to read; for a folder, the files named after it, or all files if none is."""
    examples: int | Literal["auto"] = 128
    """How many examples are measured; auto measures more, up to 1024, until their standard errors decide a policy."""
    max_length: int = 1024
    """Longest example in tokens; a longer one loses the beginning of its prompt."""
    seed: int = 0
    """Seed of the order in which examples are taken."""

    def count(self, auto: int = 128) -> int:
        """Returns the most examples to take, where auto stands for a number."""
        return auto if self.examples == "auto" else self.examples


@dataclass(frozen=True)
class Example:
    """One prompt with the answer on which the loss is taken."""

    prompt: str
    """What comes before the answer."""
    answer: str
    """What the model should say."""
    group: str
    """Examples with equal groups never stand in different splits."""
    templated: bool
    """Whether a chat template wrote the texts, so that no special token may be added."""
    row: int
    """Row number in the source, counting from 0."""
    finished: bool = False
    """Whether the answer ends with its own end of turn, so that no end of text may be added."""

    @cached_property
    def digest(self) -> str:
        """Content hash, in hexadecimal, of prompt and answer."""
        return digest_of(self.prompt, self.answer)


def digest_of(*parts: str | int) -> str:
    """The SHA-256, in hexadecimal, of the parts; ("ab", "c") and ("a", "bc") differ."""
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Formatter:
    """The published texts of one data set, as ``str.format`` patterns over a row's fields."""

    columns: tuple[str, ...]
    """Columns that must be there."""
    prompt: str
    """Pattern of the prompt."""
    answer: str
    """Pattern of the answer."""
    sources: tuple[str, ...]
    """Names on the Hub, in lower case."""
    configuration: str | None = None
    """Configuration on the Hub, where it has no default."""
    extra: Callable[[Row], dict[str, str]] = lambda row: {}
    """Fields of the prompt that are not a column's text."""


def _input_block(row: Row) -> dict[str, str]:
    """Alpaca's input section, empty for a row without input."""
    given = text_of(row.get("input"))
    return {"input_block": f"\n\n### Input:\n{given}" if given.strip() else ""}


def _choice_lines(row: Row) -> dict[str, str]:
    """One line per choice."""
    try:
        choices = mappings_of(row.get("choices"))
        return {"choice_lines": "\n".join(f"{choice['label']}. {choice['text']}" for choice in choices)}
    except (RowFault, KeyError) as fault:
        raise RowFault("column 'choices' does not hold a label and a text per choice.") from fault


FORMATTERS: dict[str, Formatter] = {
    "gsm8k": Formatter(
        columns=("question", "answer"),
        prompt="Question: {question}\nAnswer:",
        answer="{answer}",
        sources=("gsm8k", "openai/gsm8k"),
        configuration="main",
    ),
    "metamath": Formatter(
        columns=("query", "response"),
        prompt="Question: {query}\nAnswer:",
        answer="{response}",
        sources=("meta-math/metamathqa",),
    ),
    "magicoder": Formatter(
        columns=("instruction", "response"),
        prompt="### Instruction:\n{instruction}\n\n### Response:",
        answer="{response}",
        sources=("ise-uiuc/magicoder-evol-instruct-110k",),
    ),
    "alpaca": Formatter(
        columns=("instruction", "output"),
        prompt="### Instruction:\n{instruction}{input_block}\n\n### Response:",
        answer="{output}",
        sources=("tatsu-lab/alpaca", "tatsu-lab/alpaca-cleaned", "yahma/alpaca-cleaned"),
        extra=_input_block,
    ),
    "commonsense_qa": Formatter(
        columns=("question", "choices", "answerKey"),
        prompt="Question: {question}\n\nChoices:\n{choice_lines}\n\n"
        "Answer with a single letter: A, B, C, D, or E.\nAnswer:",
        answer="{answerKey}",
        sources=("commonsense_qa", "tau/commonsense_qa"),
        extra=_choice_lines,
    ),
}


def formatter_for(source: str) -> str | None:
    """The key in :data:`FORMATTERS` of a data set on the Hub, or None for any other name."""
    name = source.casefold()
    return next((key for key, formatter in FORMATTERS.items() if name in formatter.sources), None)


@dataclass(frozen=True)
class _Draft:
    """A row before rendering: its texts and, for a conversation, the messages up to the answer."""

    prompt: str
    answer: str
    finished: bool = False
    messages: tuple[dict[str, Any], ...] = ()


Read = Callable[[Row], _Draft]


def to_examples(
    rows: Sequence[Row], options: DataOptions, *, source: str = "", render: Render | None = None
) -> list[Example]:
    """One example per row, in the order of the rows.

    Args:
        rows: What the data set holds, one mapping from column to value a row.
        options: Format, columns and marker; ``auto`` recognises the usual ones.
        source: Path or Hub name, for the choice of a formatter and for error messages.
        render: From the messages of a conversation, the last of them the assistant's, to the
            rendered prompt and answer; needed for conversations only.

    Raises:
        DataError: If the columns fit no format, a column is missing, or rows lack text.
    """
    try:
        read = _reader(rows, options, source)
        drafts = []
        for number, row in enumerate(rows):
            with _numbered(number):
                drafts.append(read(row))
        _refuse_blank("no answer", [draft.answer for draft in drafts])
        _refuse_blank("an empty prompt", [draft.prompt for draft in drafts])
        examples = []
        for number, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            with _numbered(number):
                examples.append(_example(row, number, draft, options.group_column, render))
        return examples
    except DataError as fault:
        raise DataError(f"{source}: {fault}" if source else str(fault)) from fault


def readable_examples(
    rows: Sequence[Row],
    options: DataOptions,
    *,
    source: str = "",
    render: Render | None = None,
    formatter: Formatter | None = None,
) -> tuple[list[Example], list[str]]:
    """The examples of the rows that hold one, in their order, and what is wrong with each other row.

    Args:
        rows: What the data set holds, one mapping from column to value a row.
        options: As :func:`to_examples` takes them.
        source: Path or Hub name, for the choice of a formatter and for error messages.
        render: As :func:`to_examples` takes it.
        formatter: Texts to use in place of the options' format.

    Raises:
        DataError: If the columns fit no format, or one is missing in every row.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    try:
        read = _formatted(formatter, "of this recipe", columns) if formatter else _reader(rows, options, source)
    except DataError as fault:
        raise DataError(f"{source}: {fault}" if source else str(fault)) from fault
    examples: list[Example] = []
    faults: list[str] = []
    for number, row in enumerate(rows):
        try:
            with _numbered(number):
                draft = read(row)
                for what, text in (("no answer", draft.answer), ("an empty prompt", draft.prompt)):
                    if not text.strip():
                        raise RowFault(f"it has {what}.")
                examples.append(_example(row, number, draft, options.group_column, render))
        except DataError as fault:
            faults.append(str(fault))
    return examples, faults


@contextmanager
def _numbered(number: int) -> Iterator[None]:
    """Raises a fault in a row again, with the row's number."""
    try:
        yield
    except RowFault as fault:
        raise DataError(f"row {number} (counting from 0): {fault}") from fault


def _refuse_blank(what: str, texts: list[str]) -> None:
    """Raises one error that counts the blank texts and names the first five rows that have one."""
    blank = [number for number, text in enumerate(texts) if not text.strip()]
    if blank:
        named = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
        raise DataError(
            f"{len(blank)} of {len(texts)} rows have {what} (counting from 0: {named}); "
            "remove them, or name other columns with --prompt-column, --answer-column or "
            "--text-column."
        )


def _example(row: Row, number: int, draft: _Draft, group_column: str | None, render: Render | None) -> Example:
    """The draft with its conversation rendered and its group found."""
    prompt, answer = draft.prompt, draft.answer
    if draft.messages:
        if render is None:
            raise DataError("the rows are conversations; pass render, such as a chat_renderer.")
        prompt, answer = render(list(draft.messages))
    if group_column is None:
        group = " ".join(prompt.casefold().split())
    elif row.get(group_column) is None:
        raise RowFault(f"column {group_column!r} is empty; fill it, or leave out --group-column.")
    else:
        group = str(row[group_column])
    return Example(prompt, answer, group, bool(draft.messages), number, draft.finished)


def _reader(rows: Sequence[Row], options: DataOptions, source: str) -> Read:
    """The function from a row to its draft that the options and the columns ask for."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if options.group_column is not None:
        named_column(columns, options.group_column, "--group-column")
    kind = options.format if options.format != "auto" else _detect(rows, columns, options, source)
    if kind in FORMATTERS:
        return _formatted(FORMATTERS[kind], kind, columns)
    if kind == "prompt":
        return _pair_reader(columns, options)
    if kind == "chat":
        return _chat_reader(columns, options)
    return _text_reader(rows, columns, options)


def _detect(rows: Sequence[Row], columns: list[str], options: DataOptions, source: str) -> str:
    """The format that ``auto`` stands for: by the options, else the source, else the columns.

    Raises:
        DataError: If nothing fits; the message lists the columns and the options that name them.
    """
    if options.prompt_column or options.answer_column:
        return "prompt"
    if options.response_marker:
        return "text"
    if options.text_column:
        cells = [row.get(options.text_column) for row in rows]
        return "chat" if any(map(is_conversation, cells)) else "text"
    if (known := formatter_for(source)) is not None:
        return known
    if usual_columns(columns, CHAT_COLUMNS):
        return "chat"
    prompts = usual_columns(columns, PROMPT_COLUMNS + INPUT_COLUMNS)
    if prompts and usual_columns(columns, ANSWER_COLUMNS):
        return "prompt"
    if usual_columns(columns, TEXT_COLUMNS):
        return "text"
    raise DataError(
        f"no prompt and answer found among the columns {listed(columns)}; name them with "
        "--prompt-column and --answer-column, or name a column of conversations or of rendered "
        "text with --text-column."
    )


def _formatted(formatter: Formatter, name: str, columns: list[str]) -> Read:
    """Reads rows with one of the published texts."""
    if missing := [column for column in formatter.columns if column not in columns]:
        raise DataError(
            f"the format {name} needs the column {missing[0]!r}, found {listed(columns)}; choose another --format."
        )
    asked = [name for name in formatter.columns if f"{{{name}}}" in formatter.prompt]
    told = [name for name in formatter.columns if f"{{{name}}}" in formatter.answer]

    def read(row: Row) -> _Draft:
        texts = {name: text_of(row.get(name)) for name in asked + told}
        prompt = formatter.prompt.format(**texts, **formatter.extra(row))
        complete = all(texts[name].strip() for name in asked)
        return _Draft(prompt if complete else "", formatter.answer.format(**texts))

    return read


def _pair_reader(columns: list[str], options: DataOptions) -> Read:
    """Reads an answer column, and a prompt column with any input or context column after it."""
    answer = answer_column(columns, options.answer_column)
    prompts = prompt_columns(columns, options.prompt_column, answer)

    def read(row: Row) -> _Draft:
        if is_conversation(row.get(prompts[0])):
            return _conversation(turns_of(row[prompts[0]]) + _closing_turns(row.get(answer)))
        first, *extra = (text_of(row.get(column)) for column in prompts)
        prompt = "\n\n".join([first, *(text for text in extra if text.strip())])
        return _Draft(prompt if first.strip() else "", text_of(row.get(answer)))

    return read


def _closing_turns(value: object) -> list[dict[str, Any]]:
    """The answer to a conversation: messages again, or the assistant's text."""
    if is_conversation(value):
        return turns_of(value)
    return [{"role": "assistant", "content": text_of(value)}]


def _chat_reader(columns: list[str], options: DataOptions) -> Read:
    """Reads conversations, with the text of a ``system`` column before them where there is one."""
    column = text_column(columns, CHAT_COLUMNS, options.text_column)

    def read(row: Row) -> _Draft:
        turns = turns_of(row.get(column))
        system = text_of(row.get("system"))
        if system.strip() and turns and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        return _conversation(turns)

    return read


def _conversation(messages: list[dict[str, Any]]) -> _Draft:
    """The messages up to the last of the assistant's, which is the answer."""
    spoken = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    kept = messages[: spoken[-1] + 1] if spoken else []
    prompt = "\n".join(message["content"] for message in kept[:-1])
    answer = kept[-1]["content"] or str(kept[-1].get("tool_calls", "")) if kept else ""
    return _Draft(prompt, answer, messages=tuple(kept))


def _text_reader(rows: Sequence[Row], columns: list[str], options: DataOptions) -> Read:
    """Reads rendered text, the answer after the given or the recognised response marker."""
    column = text_column(columns, TEXT_COLUMNS, options.text_column)
    marker = options.response_marker or recognise_marker([text_of(row.get(column)) for row in rows])
    if marker is None:
        raise DataError(
            f"no known response marker stands in every text of column {column!r}; give the words "
            "after which the answer begins with --response-marker."
        )
    return lambda row: _Draft(*cut_at_marker(text_of(row.get(column)), marker))
