"""Conversations through chat templates of the kinds in use, against renderings written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from spectral_surgery.chat import chat_renderer
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, to_examples

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Opens a thinking block in the generation prompt, but renders answers without their thinking.
STRIPS_THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|A|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
# Renders an empty thinking block before an answer that came without one, and asks for none.
EMPTY_THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last "
    "and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As above, and the generation prompt opens the block.
OPENS_THINKING = EMPTY_THINKING.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")

QUESTION = {"role": "user", "content": "Two?"}
ANSWER = {"role": "assistant", "content": "2"}
THOUGHT = {"role": "assistant", "content": "<think>\none and one\n</think>\n\n2"}


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that is asked only for its template and its special tokens."""
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def test_chatml_gives_the_answer_up_to_its_end_of_turn() -> None:
    earlier = [{"role": "system", "content": "Brief."}, QUESTION, ANSWER, QUESTION]
    assert chat_renderer(tokenizer(CHATML), None)([*earlier, ANSWER]) == (
        "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "2<|im_end|>",
    )


def test_a_llama_template_gives_one_beginning_of_text() -> None:
    assert chat_renderer(tokenizer(LLAMA), None)([QUESTION, ANSWER]) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "2<|eot_id|>",
    )


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (STRIPS_THINKING, ANSWER, ("<|U|>Two?<|A|>", "2<|end|>")),
        (STRIPS_THINKING, THOUGHT, ("<|U|>Two?<|A|>", "\n\n2<|end|>")),
        (
            EMPTY_THINKING,
            ANSWER,
            ("<|user|>Two?<|end|>\n<|assistant|><think>\n\n</think>\n\n", "2<|end|>"),
        ),
        (
            EMPTY_THINKING,
            THOUGHT,
            ("<|user|>Two?<|end|>\n<|assistant|>", THOUGHT["content"] + "<|end|>"),
        ),
        (
            OPENS_THINKING,
            ANSWER,
            ("<|user|>Two?<|end|>\n<|assistant|><think>\n\n</think>\n\n", "2<|end|>"),
        ),
        (
            OPENS_THINKING,
            THOUGHT,
            (
                "<|user|>Two?<|end|>\n<|assistant|><think>\n",
                "one and one\n</think>\n\n2<|end|>",
            ),
        ),
    ],
    ids=[
        "stripped-without",
        "stripped-with",
        "empty-without",
        "empty-with",
        "opened-without",
        "opened-with",
    ],
)
def test_thinking_is_labelled_only_where_there_is_some(
    template: str, answer: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert chat_renderer(tokenizer(template), None)([QUESTION, answer]) == expected


def test_the_template_beside_the_adapter_comes_before_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert chat_renderer(tokenizer(LLAMA), tmp_path)([QUESTION, ANSWER])[1] == "2<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        [{"name": "rag", "template": LLAMA}, {"name": "default", "template": CHATML}],
    ],
    ids=["one", "several"],
)
def test_a_template_in_the_adapters_tokenizer_config_is_found(tmp_path: Path, template: object) -> None:
    config = json.dumps({"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    assert chat_renderer(tokenizer(), tmp_path)([QUESTION, ANSWER])[1] == "2<|im_end|>"


def test_an_adapter_without_a_template_leaves_it_to_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert chat_renderer(tokenizer(LLAMA), tmp_path)([QUESTION, ANSWER])[1] == "2<|eot_id|>"


def test_no_template_anywhere_says_where_to_put_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template in the tokenizer; put chat_template"):
        chat_renderer(tokenizer(), None)
    with pytest.raises(DataError, match=rf"beside the adapter in {tmp_path} or in the tokenizer"):
        chat_renderer(tokenizer(), tmp_path)


def test_a_broken_tokenizer_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON .*; save the tok"):
        chat_renderer(tokenizer(LLAMA), tmp_path)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            r"the chat template refuses the conversation \(roles must alternate\); correct it",
        ),
        (
            "{% if add_generation_prompt %}Q: {{ messages[0].content }} A: {% else %}"
            "{{ messages | length }}{% endif %}",
            "the chat template renders the answered conversation without 'Q: Two. A: ', which it "
            "asks for an answer with; give rendered text with --response-marker",
        ),
        (
            "{{ messages[0].content }}",
            "the chat template renders nothing of the answer; correct the template",
        ),
    ],
    ids=["refuses", "does-not-extend", "drops-the-answer"],
)
def test_a_template_that_fails_names_the_row(template: str, sentence: str) -> None:
    rows = [{"messages": [QUESTION, ANSWER]}]
    render = chat_renderer(tokenizer(template), None)
    with pytest.raises(DataError, match=rf"^row 0 \(counting from 0\): {sentence}"):
        to_examples(rows, DataOptions(), render=render)


def test_nothing_after_the_end_of_the_turn_is_taken() -> None:
    closes_twice = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert chat_renderer(tokenizer(closes_twice), None)([QUESTION, ANSWER])[1] == "2<|im_end|>"


def test_a_call_without_text_is_an_answer() -> None:
    calls = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    call = {"role": "assistant", "content": "", "tool_calls": "clock() now"}
    assert chat_renderer(tokenizer(calls), None)([QUESTION, call])[1] == "clock() now<|im_end|>"


def test_a_template_that_passes_over_plain_text_is_refused() -> None:
    for_images = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(DataError, match="renders nothing of the answer; correct the template"):
        chat_renderer(tokenizer(for_images), None)([QUESTION, ANSWER])
