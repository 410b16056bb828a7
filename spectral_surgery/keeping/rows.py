"""Rows and prompts of other skills: where they come from, what kind each is, and which part it belongs to."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectral_surgery.calibration import chat_renderer, hash_order, read_rows
from spectral_surgery.columns import (
    ANSWER_COLUMNS,
    CHAT_COLUMNS,
    INPUT_COLUMNS,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    RowFault,
    named_column,
    prompt_columns,
    text_of,
    turns_of,
    usual_columns,
)
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, Example, Render, Row, digest_of, formatter_for, to_examples
from spectral_surgery.keeping.duplicates import near_duplicates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

AUTO = "auto"
"""Source that stands for the shipped prompts with some of random tokens."""
PROMPTS = Path(__file__).with_name("prompts.jsonl")
RANDOM = "random tokens"
"""Category of prompts of random tokens."""
RANDOM_ROWS, RANDOM_LENGTH = 32, 24
"""Prompts of random tokens in ``auto``, and how many tokens each has."""
PLAIN = "other skills"
"""Category of rows whose source names none."""
CATEGORY_COLUMNS = ("category", "task", "subject", "skill", "domain", "source", "dataset")
PLACEHOLDER = "Yes."
"""Stands for an answer where a chat template is asked for the prompt alone."""

Kind = Literal["labelled", "prompts"]


@dataclass(frozen=True)
class KeepRow:
    """One row or prompt of another skill."""

    example: Example
    """Its answer is empty until a model has answered."""
    category: str
    """What kind of skill it is."""


@dataclass(frozen=True)
class Keep:
    """What an adapter must not lose."""

    kind: Kind
    """Whether the rows came with answers, or are prompts that the base model answers."""
    source: str
    """A file's name, or ``auto``."""
    rows: list[KeepRow]
    near_duplicates: int = 0
    """How many were dropped because they resemble a row of the task."""
    duplicates: int = 0
    """How many were dropped because they are there twice."""

    @property
    def examples(self) -> list[Example]:
        """The rows without their categories."""
        return [row.example for row in self.rows]

    @property
    def categories(self) -> list[str]:
        """Every row's category."""
        return [row.category for row in self.rows]


def load_keep(
    source: str,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    adapter_dir: Path | None = None,
    exclude: Sequence[Example] = (),
    *,
    chat: bool = False,
    category_column: str | None = None,
) -> Keep:
    """Returns rows or prompts of other skills, none of which is there twice or resembles a row of the task.

    Args:
        source: ``auto``; a text file with one prompt a line; or rows as :func:`read_rows` takes them. Rows with an
            answer, or conversations in which the assistant speaks, are labelled; others are prompts.
        options: How this source is read (its columns, not those of the task's rows); its seed decides the random
            tokens of ``auto``.
        tokenizer: Of the base model, for chat templates and random tokens.
        adapter_dir: The adapter's folder, whose chat template comes first, or None.
        exclude: Rows of the task.
        chat: Put prompts into the chat template; right where the rows of the task are conversations.
        category_column: Column that says what kind a row is; by default a usual one, such as ``category`` or ``task``.

    Raises:
        DataError: If the source cannot be read, holds neither answers nor prompts, or nothing is left of it.
    """

    @cache
    def renderer() -> Render:
        return chat_renderer(tokenizer, adapter_dir)

    def render(turns: list[dict[str, Any]]) -> tuple[str, str]:
        return renderer()(turns)

    in_chat = render if chat else None
    if source == AUTO:
        kind, rows = _read(str(PROMPTS), DataOptions(), in_chat, render, None)
        rows += random_token_rows(tokenizer, RANDOM_ROWS, RANDOM_LENGTH, options.seed)
    else:
        kind, rows = _read(source, options, in_chat, render, category_column)
    near = near_duplicates([row.example.prompt for row in rows], [example.prompt for example in exclude])
    fresh = [row for row, is_near in zip(rows, near, strict=True) if not is_near]
    once = {row.example.digest: row for row in reversed(fresh)}
    kept = [once[example.digest] for example in hash_order([row.example for row in fresh], options.seed)]
    if not kept:
        raise DataError(f"{source}: all {len(rows)} rows resemble rows of the task; give rows of other skills.")
    return Keep(kind, source, kept, sum(near), len(fresh) - len(kept))


def _read(
    source: str, options: DataOptions, in_chat: Render | None, render: Render, category_column: str | None
) -> tuple[Kind, list[KeepRow]]:
    """Returns what the source holds."""
    if Path(source).suffix.lower() == ".txt":
        return "prompts", _prompt_rows(_lines(source), "prompt", in_chat, render, None)
    rows = read_rows(source, options)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    category = _category_column(rows, columns, category_column)
    try:
        if prompts := _prompt_column(rows, columns, options, source):
            return "prompts", _prompt_rows(rows, prompts, in_chat, render, category)
    except RowFault as fault:
        raise DataError(f"{source}: {fault}") from fault
    examples = to_examples(rows, options, source=source, render=render)
    return "labelled", [KeepRow(example, _category(rows[example.row], category)) for example in examples]


def _lines(path: str) -> list[dict[str, str]]:
    """Returns the lines of a text file that are not blank.

    Raises:
        DataError: If the file cannot be read, or has none.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a UTF-8 text with one prompt a line.") from error
    lines = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: there is no prompt in it; expected one a line.")
    return lines


def _prompt_column(rows: Sequence[Row], columns: list[str], options: DataOptions, source: str) -> str | None:
    """Returns the column of prompts without answers, or None where rows have answers."""
    told = options.format != "auto" or options.answer_column or options.text_column or options.response_marker
    if told or formatter_for(source) or usual_columns(columns, ANSWER_COLUMNS):
        return None
    if options.prompt_column:
        return named_column(columns, options.prompt_column, "--prompt-column")
    if found := usual_columns(columns, CHAT_COLUMNS):
        return None if any(_is_answered(row.get(found[0])) for row in rows) else found[0]
    if usual_columns(columns, TEXT_COLUMNS) or not usual_columns(columns, PROMPT_COLUMNS + INPUT_COLUMNS):
        return None
    return prompt_columns(columns, None, "")[0]


def _is_answered(cell: object) -> bool:
    return any(turn["role"] == "assistant" for turn in turns_of(cell))


def _prompt_rows(
    rows: Sequence[Row], column: str, in_chat: Render | None, render: Render, category: str | None
) -> list[KeepRow]:
    """Returns prompts, in a chat template where they are conversations or it is asked for.

    Raises:
        RowFault: If a prompt is blank.
    """
    found = []
    for number, row in enumerate(rows):
        cell = row.get(column)
        turns = turns_of(cell) if column in CHAT_COLUMNS else None
        text = "\n".join(turn["content"] for turn in turns) if turns else text_of(cell)
        if not text.strip():
            raise RowFault(f"row {number} (counting from 0) has an empty prompt; remove it.")
        renderer = render if turns else in_chat
        prompt = _asked(renderer, turns or [{"role": "user", "content": text}]) if renderer else text
        example = Example(prompt, "", " ".join(text.casefold().split()), renderer is not None, number)
        found.append(KeepRow(example, _category(row, category)))
    return found


def _asked(render: Render, turns: list[dict[str, Any]]) -> str:
    """Returns the turns with the opening of the assistant's answer."""
    return render([*turns, {"role": "assistant", "content": PLACEHOLDER}])[0]


def _category_column(rows: Sequence[Row], columns: list[str], given: str | None) -> str | None:
    """Returns the column given, else a usual one with at most a third as many values as rows."""
    if given is not None:
        return named_column(columns, given, "--keep-category-column")
    for column in usual_columns(columns, CATEGORY_COLUMNS):
        values = {_category(row, column) for row in rows}
        if 1 < len(values) <= max(1, len(rows) // 3):
            return column
    return None


def _category(row: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else row.get(column)
    return str(value) if isinstance(value, str | int) and str(value).strip() else PLAIN


def random_token_rows(tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> list[KeepRow]:
    """Returns prompts of ordinary tokens drawn at random: none special, none that is half a character.

    Args:
        tokenizer: Whose tokens are drawn.
        count: Number of prompts.
        length: Tokens drawn for each. Put together they may be read as others.
        seed: Of the draws.

    Raises:
        DataError: If the tokenizer has hardly any ordinary token.
    """
    draw = random.Random(digest_of(RANDOM, seed))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pieces: list[int] = []
    for _ in range(200 * count * length):
        if len(pieces) == count * length:
            break
        token = draw.randrange(len(tokenizer))
        if token not in special and _is_ordinary(tokenizer.decode([token])):
            pieces.append(token)
    else:
        raise DataError(f"the tokenizer has too few ordinary tokens among its {len(tokenizer)}; use another --keep.")
    prompts = [tokenizer.decode(pieces[start : start + length]) for start in range(0, len(pieces), length)]
    return [KeepRow(Example(prompt, "", prompt, False, row), RANDOM) for row, prompt in enumerate(prompts)]


def _is_ordinary(text: str) -> bool:
    return bool(text.strip()) and "\ufffd" not in text and text.strip().isprintable()


def split_keep(keep: Keep, seed: int) -> tuple[Keep, Keep, Keep]:
    """Returns a third each to measure on, to choose on and to test on, as equal as groups allow within a category.

    The order in which rows are dealt depends on their content and the seed, never on the order of the file. Groups
    stay together; one with rows of several categories counts as the first of them by name. Within a part categories
    alternate, so that its first rows are a sample of it.
    """
    by_example = {row.example.digest: row for row in keep.rows}
    ordered = [by_example[example.digest] for example in hash_order(keep.examples, seed)]
    groups = [list(rows) for _, rows in groupby(ordered, key=lambda row: row.example.group)]
    kinds: dict[str, list[list[KeepRow]]] = defaultdict(list)
    for group in groups:
        kinds[min(row.category for row in group)].append(group)
    parts: tuple[list[KeepRow], ...] = ([], [], [])
    for category in sorted(kinds):
        _deal(kinds[category], parts)
    measuring, validation, test = (replace(keep, rows=_mixed(part)) for part in parts)
    return measuring, validation, test


def _mixed(rows: Sequence[KeepRow]) -> list[KeepRow]:
    """Returns the rows with their categories spread evenly, so that any first few are of all in proportion."""
    sizes, before = Counter(row.category for row in rows), Counter[str]()
    places = []
    for row in rows:
        places.append((before[row.category] + 0.5) / sizes[row.category])
        before[row.category] += 1
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: places[i])]


def _deal(groups: Sequence[list[KeepRow]], parts: Sequence[list[KeepRow]]) -> None:
    """Adds each group to the part with the fewest of these rows so far, and of all rows where these are equal."""
    dealt = [0] * len(parts)
    for group in groups:
        chosen = min(range(len(parts)), key=lambda part: (dealt[part], len(parts[part])))
        parts[chosen].extend(group)
        dealt[chosen] += len(group)
