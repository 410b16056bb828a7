"""The shipped prompts: varied, well formed, without answers, and part of the package."""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import tiny

from spectral_surgery.formats import DataOptions, Example
from spectral_surgery.keeping import RANDOM, load_keep
from spectral_surgery.keeping.duplicates import WORD
from spectral_surgery.keeping.rows import PROMPTS, RANDOM_ROWS

ROOT = Path(__file__).parents[1]
COUNTS = {
    "advice": 18,
    "careful answers": 15,
    "code: explain": 12,
    "code: fix": 12,
    "code: write": 18,
    "completion": 27,
    "creative": 12,
    "explanation": 18,
    "extraction": 12,
    "facts": 21,
    "formats": 21,
    "languages": 24,
    "maths": 21,
    "reading": 12,
    "reasoning": 15,
    "rewriting": 15,
    "roles": 15,
    "summarising": 12,
    "translation": 12,
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_bytes().decode("utf-8").splitlines()]


def test_every_category_has_its_prompts(rows: list[dict[str, str]]) -> None:
    assert Counter(row["category"] for row in rows) == COUNTS
    assert sum(COUNTS.values()) == 312


def test_no_two_are_alike(rows: list[dict[str, str]]) -> None:
    prompts = [row["prompt"] for row in rows]
    words = [frozenset(WORD.findall(prompt.casefold())) for prompt in prompts]
    overlap = {(a, b): len(words[a] & words[b]) / len(words[a] | words[b]) for a in range(len(rows)) for b in range(a)}
    assert max(overlap.values()) < 0.5
    openings = Counter(" ".join(prompt.split()[:4]) for prompt in prompts if prompt.isascii())
    assert openings.most_common(1)[0][1] <= 4


def test_they_hold_a_prompt_and_no_answer(rows: list[dict[str, str]]) -> None:
    assert all(list(row) == ["category", "prompt"] for row in rows)
    for row in rows:
        assert not re.search(r"(?im)^(answer|solution|correct|label)\s*:\s*\S", row["prompt"]), row["prompt"]


def test_they_are_clean_text(rows: list[dict[str, str]]) -> None:
    for prompt in (row["prompt"] for row in rows):
        assert unicodedata.normalize("NFC", prompt) == prompt
        assert prompt.strip() == prompt.rstrip("\n")
        controls = {sign for sign in prompt if unicodedata.category(sign) in {"Cc", "Cf", "Co", "Cn", "Cs"}}
        assert controls <= {"\n", "\t"}, prompt
        assert "\ufffd" not in prompt


def test_short_and_long_ones_are_mixed(rows: list[dict[str, str]]) -> None:
    lengths = sorted(len(row["prompt"]) for row in rows)
    assert 10 <= lengths[0] <= 20
    assert 70 <= lengths[len(lengths) // 2] <= 150
    assert 1000 <= lengths[-1] <= 2000
    long = [len(row["prompt"]) for row in rows if row["category"] == "reading"]
    assert min(long) > 500


def test_many_scripts_and_programming_languages_are_there(rows: list[dict[str, str]]) -> None:
    texts = [row["prompt"] for row in rows if row["category"] == "languages"]
    names = [unicodedata.name(sign).split()[0] for text in texts for sign in text if sign.isalpha()]
    assert {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI"} <= set(names)
    code = "\n".join(row["prompt"] for row in rows if row["category"].startswith("code"))
    named = [
        "Python",
        "JavaScript",
        "SQL",
        "Bash",
        "Rust",
        "C function",
        "Go",
        "Java ",
        "Haskell",
        "HTML",
        "CSS",
        "R ",
    ]
    assert [name for name in named if name not in code] == []


def test_auto_is_these_prompts_and_some_of_random_tokens(rows: list[dict[str, str]]) -> None:
    asked = "which metal is liquid at ROOM temperature"
    keep = load_keep("auto", DataOptions(), tiny.tokenizer(), exclude=[Example(asked, "mercury", "g", False, 0)])
    assert (keep.kind, keep.source, keep.near_duplicates) == ("prompts", "auto", 1)
    assert Counter(keep.categories) == {**COUNTS, "facts": COUNTS["facts"] - 1, RANDOM: RANDOM_ROWS}
    known = {row["prompt"] for row in rows}
    assert all(row.example.prompt in known for row in keep.rows if row.category != RANDOM)


def test_auto_reads_its_own_columns_whatever_those_of_the_task_are() -> None:
    options = DataOptions(prompt_column="Q", answer_column="A", format="prompt", group_column="id")
    assert len(load_keep("auto", options, tiny.tokenizer()).rows) == 312 + RANDOM_ROWS


def test_the_documentation_counts_them() -> None:
    page = (ROOT / "docs" / "keeping.md").read_text(encoding="utf-8")
    assert f"{sum(COUNTS.values())} prompts" in page
    told = [int(count) for line in re.findall(r"(?m)^\| .*", page) for count in re.findall(r"\| (\d+) (?=\|)", line)]
    code = sum(count for category, count in COUNTS.items() if category.startswith("code"))
    others = [count for category, count in COUNTS.items() if not category.startswith("code")]
    assert sorted(told) == sorted([*others, code, RANDOM_ROWS])


def test_prompts_and_their_licence_are_shipped_with_the_package() -> None:
    folder = resources.files("spectral_surgery.keeping")
    assert "CC0 1.0" in (folder / "PROMPTS-LICENSE").read_text(encoding="utf-8")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert wheel["wheel"] == {"packages": ["spectral_surgery"]}, "nothing in the package folder is left out"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not [pattern for pattern in ignored if Path("keeping/prompts.jsonl").match(pattern)]
