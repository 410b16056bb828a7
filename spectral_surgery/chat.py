"""Conversations as prompt and answer texts, by a chat template.

The prompt is the template's rendering of everything before the answer, with the opening of the
assistant's turn; the answer is what the rendering of the whole conversation adds to it, up to the
end of the turn. A template that opens a thinking block is followed as far as the whole conversation
follows it: an empty block belongs to the prompt, since the model has nothing to learn from it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_surgery.columns import RowFault
from spectral_surgery.errors import DataError
from spectral_surgery.formats import Render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_OPENED = re.compile(r"<think>\s*(</think>\s*)?$")
THINKING_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")


def chat_renderer(tokenizer: PreTrainedTokenizerBase, adapter_dir: Path | None) -> Render:
    """The function from messages to prompt and answer that :func:`to_examples` takes.

    Args:
        tokenizer: Gives the special tokens, and the template where the adapter has none.
        adapter_dir: The adapter's folder, or None; the template in its ``chat_template.jinja`` or
            ``tokenizer_config.json`` comes first.

    Raises:
        DataError: If there is no chat template. The function itself raises a fault of the row, if
            the template refuses the conversation or does not continue its own opening of the turn.
    """
    template = None if adapter_dir is None else _saved_template(adapter_dir)
    if template is None and not tokenizer.chat_template:
        beside = "" if adapter_dir is None else f" beside the adapter in {adapter_dir} or"
        raise DataError(
            f"the rows are conversations, but there is no chat template{beside} in the tokenizer; "
            "put chat_template.jinja into the adapter's folder, or give rendered text with "
            "--response-marker."
        )

    def render(messages: list[dict[str, Any]]) -> tuple[str, str]:
        opened = _apply(tokenizer, template, messages[:-1], add_generation_prompt=True)
        whole = _apply(tokenizer, template, messages, add_generation_prompt=False)
        end = _end_of_prompt(opened, whole)
        return whole[:end], _one_turn(whole[end:], messages[-1]["content"])

    return render


def _saved_template(folder: Path) -> str | None:
    """The chat template that was saved with the adapter, or None.

    Raises:
        DataError: If ``tokenizer_config.json`` is not JSON.
    """
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    if not config.is_file():
        return None
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except json.JSONDecodeError as error:
        raise DataError(f"{config} is not JSON ({error.msg}); save the tokenizer again.") from error
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
) -> str:
    """The messages as one text."""
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template may raise anything, by itself or through Jinja
        said = str(error) or type(error).__name__
        raise RowFault(f"the chat template refuses the conversation ({said}); correct it.") from error
    return str(text)


def _end_of_prompt(opened: str, whole: str) -> int:
    """Where the prompt ends in the whole rendering: after the opening of the assistant's turn."""
    stem = THINKING_OPENED.sub("", opened)
    if not whole.startswith(stem):
        raise RowFault(
            f"the chat template renders the answered conversation without {opened[-40:]!r}, which "
            "it asks for an answer with; give rendered text with --response-marker."
        )
    empty = THINKING_EMPTY.match(whole, len(stem))
    if empty is not None:
        return empty.end()
    return len(opened) if whole.startswith(opened) else len(stem)


def _one_turn(answer: str, content: str) -> str:
    """The rendered answer up to its end of turn, without what some templates put after that.

    Templates for images pass over plain text without a word, hence the search for the content.
    """
    said = content.split("</think>")[-1].strip()
    place = answer.rfind(said)
    if place < 0 or not answer.strip():
        raise RowFault("the chat template renders nothing of the answer; correct the template.")
    closing = re.compile(r"\s*\S*").match(answer, place + len(said))
    return answer[: closing.end() if said and closing else None].rstrip()
