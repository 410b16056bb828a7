"""The texts that rows become, against texts written by hand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import pytest

from spectral_surgery.errors import DataError
from spectral_surgery.formats import FORMATTERS, DataOptions, Example, formatter_for, to_examples

CHOICES = [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]


def texts(row: dict[str, Any], source: str = "", **options: Any) -> tuple[str, str]:
    """Prompt and answer of one row."""
    (example,) = to_examples([row], DataOptions(**options), source=source)
    return example.prompt, example.answer


def rendered(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """A stand-in for a chat template, in which every field of a message can be seen."""
    before = [f"{message['role']}: {message['content']}" for message in messages[:-1]]
    return "|".join(before), messages[-1]["content"]


def conversation(row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """Prompt and answer of one row that holds a conversation."""
    (example,) = to_examples([row], DataOptions(**options), render=rendered)
    assert example.templated
    return example.prompt, example.answer


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        (
            "gsm8k",
            {"question": "Two plus two?", "answer": "It is 4.\n#### 4"},
            "Question: Two plus two?\nAnswer:",
            "It is 4.\n#### 4",
        ),
        (
            "metamath",
            {"query": "What is {x}?", "response": "The answer is: 3", "type": "GSM_SV"},
            "Question: What is {x}?\nAnswer:",
            "The answer is: 3",
        ),
        (
            "magicoder",
            {"instruction": "Write f.", "response": "def f(): ..."},
            "### Instruction:\nWrite f.\n\n### Response:",
            "def f(): ...",
        ),
        (
            "alpaca",
            {"instruction": "Translate.", "input": "chat", "output": "cat", "text": "unused"},
            "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:",
            "cat",
        ),
        (
            "alpaca",
            {"instruction": "Say hi.", "input": "", "output": "hi"},
            "### Instruction:\nSay hi.\n\n### Response:",
            "hi",
        ),
        (
            "commonsense_qa",
            {"question": "Where is money?", "choices": CHOICES, "answerKey": "A"},
            "Question: Where is money?\n\nChoices:\nA. bank\nB. mall\n\n"
            "Answer with a single letter: A, B, C, D, or E.\nAnswer:",
            "A",
        ),
        (
            "commonsense_qa",
            {
                "question": "Where is money?",
                "choices": {"label": ["A", "B"], "text": ["bank", "mall"]},
                "answerKey": "B",
            },
            "Question: Where is money?\n\nChoices:\nA. bank\nB. mall\n\n"
            "Answer with a single letter: A, B, C, D, or E.\nAnswer:",
            "B",
        ),
    ],
)
def test_a_formatter_writes_the_published_text(name: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    assert texts(row, format=name) == (prompt, answer)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("openai/gsm8k", "gsm8k"),
        ("meta-math/MetaMathQA", "metamath"),
        ("ise-uiuc/Magicoder-Evol-Instruct-110K", "magicoder"),
        ("tatsu-lab/alpaca", "alpaca"),
        ("yahma/alpaca-cleaned", "alpaca"),
        ("tau/commonsense_qa", "commonsense_qa"),
        ("someone/gsm8k-variant", None),
    ],
)
def test_a_known_name_on_the_hub_has_its_formatter(source: str, name: str | None) -> None:
    assert formatter_for(source) == name


def test_auto_uses_the_formatter_of_a_known_source_and_else_the_bare_columns() -> None:
    row = {"question": "Two plus two?", "answer": "4"}
    assert texts(row, source="openai/gsm8k")[0] == "Question: Two plus two?\nAnswer:"
    assert texts(row, source="mine.jsonl")[0] == "Two plus two?"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("prompt", "completion"),
        ("prompt", "answer"),
        ("Question", "Answer"),
        ("instruction", "output"),
        ("query", "response"),
        ("input", "output"),
        ("problem", "solution"),
        ("inputs", "targets"),
    ],
)
def test_auto_finds_the_usual_pairs_of_columns(prompt: str, answer: str) -> None:
    assert texts({"id": 3, prompt: "p", answer: "a"}) == ("p", "a")


def test_an_input_or_a_context_follows_the_instruction_and_is_left_out_where_empty() -> None:
    row = {"instruction": "Sum up.", "input": "A text.", "output": "Short."}
    assert texts(row) == ("Sum up.\n\nA text.", "Short.")
    assert texts({**row, "input": " "}) == ("Sum up.", "Short.")
    assert texts({"question": "Who?", "context": "Ann.", "answer": "Ann"})[0] == "Who?\n\nAnn."


def test_named_columns_are_used_alone() -> None:
    row = {"source": "Guten Tag", "goal": "Good day", "input": "unused", "answer": "unused"}
    assert texts(row, prompt_column="source", answer_column="goal") == ("Guten Tag", "Good day")


def test_numbers_are_text_and_truth_values_are_refused() -> None:
    assert texts({"prompt": 12, "answer": 7.5}) == ("12", "7.5")
    with pytest.raises(DataError, match=r"row 0 \(counting from 0\): expected text, found bool"):
        texts({"prompt": "Is it?", "answer": True})


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "One?"},
    {"from": "gpt", "value": "1"},
    {"from": "human", "value": "Two?"},
    {"from": "gpt", "value": "2"},
]
RENDERED = ("system: Be brief.|user: One?|assistant: 1|user: Two?", "2")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": TURNS},
        {"conversations": TURNS[1:], "system": "Be brief."},
        {"conversations": {key: [turn[key] for turn in TURNS] for key in ("from", "value")}},
        {"messages": [{**turn, "from": None, "value": None} for turn in MESSAGES]},
        {"messages": str(TURNS).replace("'", '"')},
        {"messages": [*MESSAGES, {"role": "user", "content": "unanswered"}]},
        {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
        {"prompt": MESSAGES[:-1], "answer": "2"},
    ],
    ids=[
        "messages",
        "sharegpt",
        "system-column",
        "mapping-of-lists",
        "arrow-fill",
        "json-text",
        "unanswered-question",
        "trl-conversational",
        "text-answer",
    ],
)
def test_the_last_assistant_message_is_the_answer_and_all_before_it_the_prompt(
    row: dict[str, Any],
) -> None:
    assert conversation(row) == RENDERED


def test_a_conversation_under_another_name_is_found_by_its_column() -> None:
    assert conversation({"dialogue": TURNS}, text_column="dialogue") == RENDERED


def test_the_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]
    row = {"messages": [{"role": "user", "content": parts}, MESSAGES[2]]}
    assert conversation(row) == ("user: One?", "1")


def test_other_fields_of_a_message_reach_the_template() -> None:
    seen: list[dict[str, Any]] = []

    def render(messages: list[dict[str, Any]]) -> tuple[str, str]:
        seen.extend(messages)
        return "p", "a"

    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    rows = [{"messages": [MESSAGES[1], call]}]
    assert [example.answer for example in to_examples(rows, DataOptions(), render=render)] == ["a"]
    assert seen[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}


def test_a_prompt_of_json_text_is_not_a_conversation() -> None:
    assert texts({"prompt": '[{"a": 1}]', "answer": "1"}) == ('[{"a": 1}]', "1")


LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format


@pytest.mark.parametrize(
    ("prompt", "answer", "rest", "finished"),
    [
        ("### Instruction:\nAdd.\n\n### Response:\n", "4", "\n", False),
        ("<s>[INST] Add. [/INST] ", "4 </s>", "", True),
        (
            "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n",
            "4<|im_end|>",
            "\n",
            True,
        ),
        (
            LLAMA("assistant", "1") + "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "4<|eot_id|>",
            LLAMA("user", "Thanks"),
            True,
        ),
    ],
    ids=["instruction", "mistral", "chatml", "two-turns"],
)
def test_rendered_text_is_cut_at_its_last_response_marker(prompt: str, answer: str, rest: str, finished: bool) -> None:
    (example,) = to_examples([{"text": prompt + answer + rest}], DataOptions())
    assert (example.prompt, example.answer, example.finished) == (prompt, answer, finished)
    assert example.templated is False


def test_two_turns_leave_the_first_answer_in_the_prompt() -> None:
    prompt, answer = texts({"text": "### Response: 1\n### Response: 2"})
    assert (prompt, answer) == ("### Response: 1\n### Response: ", "2")


def test_a_given_marker_wins_over_a_recognised_one() -> None:
    row = {"body": "Q: ### Response: why? A: because"}
    assert texts(row, text_column="body", response_marker="A:")[1] == "because"
    assert texts(row, text_column="body")[1] == "why? A: because"


def test_a_given_chat_marker_with_its_line_break_still_ends_at_the_end_of_the_turn() -> None:
    row = {"text": "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nno<|im_end|>"}
    assert texts(row, response_marker="<|im_start|>assistant\n")[1] == "yes<|im_end|>"


def test_groups_are_the_prompts_whatever_their_case_and_spacing() -> None:
    rows = [{"prompt": "Add  2\n and 3", "answer": "5"}, {"prompt": "add 2 AND 3 ", "answer": "6"}]
    first, second = to_examples(rows, DataOptions())
    assert first.group == second.group == "add 2 and 3"
    assert first.digest != second.digest


def test_a_group_column_gives_the_groups() -> None:
    rows = [{"prompt": "p", "answer": "a", "page": page} for page in (7, "7", 8)]
    examples = to_examples(rows, DataOptions(group_column="page"))
    assert [example.group for example in examples] == ["7", "7", "8"]


def test_the_digest_is_the_hash_of_both_texts_and_not_of_their_concatenation() -> None:
    def digest(prompt: str, answer: str, row: int) -> str:
        return Example(prompt, answer, "", False, row).digest

    assert digest("ab", "ü", 0) == hashlib.sha256(b'["ab", "\\u00fc"]').hexdigest()
    assert digest("ab", "c", 0) == digest("ab", "c", 1) != digest("a", "bc", 0)


def test_rows_keep_their_numbers() -> None:
    rows = [{"prompt": f"p{number}", "answer": "a"} for number in range(3)]
    examples = to_examples(rows, DataOptions())
    assert [(example.row, example.prompt) for example in examples] == [
        (0, "p0"),
        (1, "p1"),
        (2, "p2"),
    ]


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (
            [{"uid": 1, "body": "x"}],
            {},
            r"no prompt and answer found among the columns 'uid', 'body'; name them with "
            r"--prompt-column and --answer-column, or .* --text-column",
        ),
        (
            [{"problem": "p", "solution": "s", "answer": "a"}],
            {},
            "each of 'answer', 'solution' could be the answer; name one with --answer-column",
        ),
        (
            [{"prompt": "p", "answer": "a"}],
            {"prompt_column": "promt"},
            "no column 'promt' among 'prompt', 'answer'; correct --prompt-column",
        ),
        (
            [{"body": "p", "answer": "a"}],
            {"answer_column": "answer"},
            "no prompt among the columns 'body', 'answer'; name it with --prompt-column",
        ),
        (
            [{"prompt": "p", "answer": "a"}],
            {"format": "gsm8k"},
            "the format gsm8k needs the column 'question', found 'prompt', 'answer'; choose another --format",
        ),
        (
            [{"prompt": "p", "answer": "a"}],
            {"group_column": "page"},
            "no column 'page' among 'prompt', 'answer'; correct --group-column",
        ),
        (
            [{"prompt": "p", "answer": "a", "page": 1}, {"prompt": "p", "answer": "b"}],
            {"group_column": "page"},
            r"row 1 \(counting from 0\): column 'page' is empty; fill it",
        ),
        (
            [{"prompt": "p", "answer": text} for text in ("a", "", None, float("nan"), " ")],
            {},
            r"4 of 5 rows have no answer \(counting from 0: 1, 2, 3, 4\); remove them",
        ),
        (
            [{"prompt": "p", "answer": ""}] * 7,
            {},
            r"7 of 7 rows have no answer \(counting from 0: 0, 1, 2, 3, 4, \.\.\.\)",
        ),
        (
            [{"question": "", "answer": "a"}],
            {"format": "gsm8k"},
            r"1 of 1 rows have an empty prompt \(counting from 0: 0\)",
        ),
        (
            [{"text": "no marker here"}],
            {},
            "no known response marker stands in every text of column 'text'; give the words "
            "after which the answer begins with --response-marker",
        ),
        (
            [{"text": "Q A: yes"}, {"text": "Q yes"}],
            {"response_marker": "A:"},
            r"row 1 \(counting from 0\): the text lacks the response marker 'A:'; correct "
            "--response-marker",
        ),
        (
            [{"question": "q", "choices": ["a"], "answerKey": "A"}],
            {"format": "commonsense_qa"},
            "column 'choices' does not hold a label and a text per choice",
        ),
        (
            [{"messages": [{"role": "user", "content": "hi"}]}],
            {},
            "1 of 1 rows have no answer",
        ),
        (
            [{"messages": [{"role": "assistant", "content": "hi"}]}],
            {},
            "1 of 1 rows have an empty prompt",
        ),
        (
            [{"messages": [{"role": "narrator", "content": "hi"}]}],
            {},
            "a message has the role 'narrator'; expected one of user, human, assistant",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
            {},
            "a message holds something other than text, such as an image; remove the row",
        ),
        (
            [{"messages": "hello"}],
            {},
            "expected a list of messages, found str; name another column",
        ),
        (
            [{"messages": MESSAGES}],
            {},
            "the rows are conversations; pass render",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    rows: list[dict[str, Any]], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=f"^mine.jsonl: .*{sentence}"):
        to_examples(rows, DataOptions(**options), source="mine.jsonl")


def test_every_formatter_is_a_format_that_the_options_name() -> None:
    for name, formatter in FORMATTERS.items():
        with pytest.raises(DataError, match=f"the format {name} needs the column"):
            to_examples([{"other": "x"}], DataOptions(format=name))  # type: ignore[arg-type]
        assert all(source == source.casefold() for source in formatter.sources)


def test_the_formats_load_neither_torch_nor_transformers_nor_datasets() -> None:
    script = (
        "import sys, spectral_surgery.formats\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"
