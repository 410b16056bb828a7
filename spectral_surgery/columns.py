"""Which column of a data set holds what, and what one of its cells holds.

A cell is a text, a conversation, or a text rendered from one. Conversations come as lists of
``role`` and ``content`` or, from ShareGPT, of ``from`` and ``value``; as mappings of two lists, the
way Arrow stores them; and as JSON text inside a CSV file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from spectral_surgery.errors import DataError

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text",)
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "problem")
EXTRA_COLUMNS = ("input", "context")
INPUT_COLUMNS = ("input", "inputs", "source")
ANSWER_COLUMNS = ("completion", "response", "answer", "output", "solution", "target", "targets")

# What opens an answer in a rendered text, and what closes it where the template has such a text.
# Chat templates come first: a conversation may quote an instruction template, hardly the reverse.
MARKERS: dict[str, str | None] = {
    "<|im_start|>assistant": "<|im_end|>",
    "<|start_header_id|>assistant<|end_header_id|>": "<|eot_id|>",
    "<|header_start|>assistant<|header_end|>": "<|eot|>",
    "<start_of_turn>model": "<end_of_turn>",
    "<|start_of_role|>assistant<|end_of_role|>": "<|end_of_text|>",
    "<|assistant|>": "<|end|>",
    "<\uff5cAssistant\uff5c>": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "GPT4 Correct Assistant:": "<|end_of_turn|>",
    "[/INST]": "</s>",
    "### Response:": None,
    "### Assistant:": None,
    "ASSISTANT:": "</s>",
}

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
}


class RowFault(DataError):
    """What is wrong with one row, for a caller that knows the row's number."""


def text_of(value: object) -> str:
    """A cell as text: empty for a missing value, digits for a number.

    Raises:
        RowFault: For a truth value, a date and anything else whose spelling would be a guess.
    """
    if value is None or value != value:  # only NaN differs from itself
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowFault(f"expected text, found {type(value).__name__}; write the column as text.")


def is_conversation(value: object) -> bool:
    """Whether a cell holds turns rather than text."""
    with suppress(RowFault):
        turns = mappings_of(value)
        return bool(turns) and all("role" in turn or "from" in turn for turn in turns)
    return False


def turns_of(value: object) -> list[dict[str, Any]]:
    """The messages of a conversation, with ``role`` and ``content`` whatever the source calls them.

    Raises:
        RowFault: If the cell holds no list of turns, a role is unknown, or a content is not text.
    """
    return [_message(turn) for turn in mappings_of(value)]


def mappings_of(value: object) -> list[Mapping[str, Any]]:
    """A cell as a list of mappings: such a list, its JSON text, or a mapping of equally long lists.

    Raises:
        RowFault: If the cell holds none of these.
    """
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, Mapping) and _equally_long(list(value.values())):
        names, lists = list(value), list(value.values())
        value = [dict(zip(names, cells, strict=True)) for cells in zip(*lists, strict=True)]
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise RowFault(f"expected a list of messages, found {type(value).__name__}; name another column.")
    return list(value)


def _equally_long(lists: list[object]) -> bool:
    """Whether all are lists, and of one length."""
    lengths = {len(cells) if isinstance(cells, list) else None for cells in lists}
    return len(lengths) == 1 and None not in lengths


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """One turn under the names that chat templates know; tool calls and the like are kept."""
    role = str(turn.get("role") or turn.get("from"))
    if role not in ROLES:
        raise RowFault(f"a message has the role {role!r}; expected one of {', '.join(ROLES)}.")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    kept = {key: value for key, value in turn.items() if value is not None}
    kept.pop("from", None)
    kept.pop("value", None)
    return {**kept, "role": ROLES[role], "content": _content(content)}


def _content(content: object) -> str:
    """A message's content as text; a list of text parts is joined."""
    if not isinstance(content, list):
        return text_of(content)
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise RowFault("a message holds something other than text, such as an image; remove the row.")
    return "".join(text_of(part.get("text")) for part in content)


def recognise_marker(texts: Sequence[str]) -> str | None:
    """The first marker of :data:`MARKERS` that stands in every text."""
    return next((marker for marker in MARKERS if all(marker in text for text in texts)), None)


def cut_at_marker(text: str, marker: str) -> tuple[str, str, bool]:
    """Prompt, answer, and whether the answer ends with its template's own end of turn.

    The last marker counts, so earlier turns belong to the prompt, as does the white space behind
    the marker. What follows the end of the turn is dropped.

    Raises:
        RowFault: If the marker is not in the text.
    """
    before, found, after = text.rpartition(marker)
    if not found:
        raise RowFault(f"the text lacks the response marker {marker!r}; correct --response-marker.")
    answer = after.lstrip()
    prompt = before + marker + after[: len(after) - len(answer)]
    end = next((end for known, end in MARKERS.items() if known in marker), None)
    if end is not None and end in answer:
        return prompt, answer[: answer.index(end) + len(end)], True
    return prompt, answer.rstrip(), False


def prompt_columns(columns: list[str], given: str | None, answer: str) -> list[str]:
    """The given column alone, else the one with a usual name and any input or context beside it."""
    if given is not None:
        return [named_column(columns, given, "--prompt-column")]
    others = [column for column in columns if column != answer]
    found = usual_columns(others, PROMPT_COLUMNS) or usual_columns(others, INPUT_COLUMNS)
    prompt = _only(columns, found, "prompt", "--prompt-column")
    extra = [column for column in usual_columns(others, EXTRA_COLUMNS) if column != prompt]
    return [prompt, *extra]


def answer_column(columns: list[str], given: str | None) -> str:
    """The given column, else the one with a usual name."""
    if given is not None:
        return named_column(columns, given, "--answer-column")
    return _only(columns, usual_columns(columns, ANSWER_COLUMNS), "answer", "--answer-column")


def text_column(columns: list[str], usual: Sequence[str], given: str | None) -> str:
    """The given column, else the first usual one."""
    if given is not None:
        return named_column(columns, given, "--text-column")
    found = usual_columns(columns, usual)[:1]
    return _only(columns, found, "conversation or text", "--text-column")


def named_column(columns: list[str], column: str, option: str) -> str:
    """The column that an option names, which must be there."""
    if column not in columns:
        raise DataError(f"no column {column!r} among {listed(columns)}; correct {option}.")
    return column


def _only(columns: list[str], found: list[str], role: str, option: str) -> str:
    """The one column found for a role."""
    if len(found) > 1:
        raise DataError(f"each of {listed(found)} could be the {role}; name one with {option}.")
    if not found:
        raise DataError(f"no {role} among the columns {listed(columns)}; name it with {option}.")
    return found[0]


def usual_columns(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns with one of the names, whatever their case, in the order of the names."""
    return [column for name in names for column in columns if column.casefold() == name]


def listed(columns: Sequence[str]) -> str:
    """Columns as messages name them."""
    return ", ".join(map(repr, columns)) or "(none)"
