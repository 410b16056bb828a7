"""What is kept: where rows come from, how they are parted, and what a model answers to prompts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from spectral_surgery.calibration import batches, prompt_ids
from spectral_surgery.divergence import Divergence, reference
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, Example
from spectral_surgery.keeping import (
    Keep,
    KeepRow,
    answer_by,
    degenerate,
    load_keep,
    random_token_rows,
    split_keep,
)
from spectral_surgery.keeping.duplicates import WORD, near_duplicates
from spectral_surgery.live import Live

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def example(prompt: str, answer: str = "", group: str | None = None) -> Example:
    return Example(prompt, answer, prompt if group is None else group, False, 0)


def chatty() -> object:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_labelled_rows_keep_their_answers_and_a_usual_column_says_their_kind(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i}", "answer": str(i), "id": str(i), "task": "ab"[i % 2]} for i in range(8)]
    keep = load_keep(written(tmp_path / "k.jsonl", rows), DataOptions(), tiny.tokenizer())
    assert keep.kind == "labelled"
    assert {(row.example.prompt, row.example.answer, row.category) for row in keep.rows} == {
        (row["prompt"], row["answer"], row["task"]) for row in rows
    }


def test_a_column_with_a_value_for_every_row_is_no_kind_and_a_named_one_always_is(tmp_path: Path) -> None:
    path = written(tmp_path / "k.jsonl", [{"prompt": f"p {i}", "answer": "a", "source": f"url {i}"} for i in range(9)])
    assert set(load_keep(path, DataOptions(), tiny.tokenizer()).categories) == {"other skills"}
    named = load_keep(path, DataOptions(), tiny.tokenizer(), category_column="source")
    assert len(set(named.categories)) == 9
    with pytest.raises(DataError, match="no column 'kind' among 'prompt', 'answer', 'source'"):
        load_keep(path, DataOptions(), tiny.tokenizer(), category_column="kind")


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text("\ufefffirst one\n\n  second one \nfirst one\n", encoding="utf-8")
    keep = load_keep(str(tmp_path / "k.txt"), DataOptions(), tiny.tokenizer())
    assert (keep.kind, keep.duplicates) == ("prompts", 1)
    assert {(e.prompt, e.answer, e.templated) for e in keep.examples} == {
        ("first one", "", False),
        ("second one", "", False),
    }


def test_rows_without_an_answer_column_are_prompts(tmp_path: Path) -> None:
    path = written(tmp_path / "k.jsonl", [{"question": f"q {i}", "subject": "xy"[i % 2]} for i in range(6)])
    keep = load_keep(path, DataOptions(), tiny.tokenizer())
    assert (keep.kind, Counter(keep.categories)) == ("prompts", {"x": 3, "y": 3})


def test_prompts_stand_in_the_chat_template_only_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text("hello there", encoding="utf-8")
    for chat, prompt in ((True, "<user>hello there\n<assistant>"), (False, "hello there")):
        kept = load_keep(str(tmp_path / "k.txt"), DataOptions(), chatty(), chat=chat).examples[0]
        assert (kept.prompt, kept.templated) == (prompt, chat)


def test_conversations_without_an_answer_are_prompts_and_with_one_labelled_rows(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    keep = load_keep(written(tmp_path / "a.jsonl", [{"messages": asked}]), DataOptions(), chatty())
    assert keep.kind == "prompts"
    assert keep.examples[0].prompt == "<system>be brief\n<user>hi\n<assistant>"
    told = [*asked, {"role": "assistant", "content": "hello"}]
    keep = load_keep(written(tmp_path / "b.jsonl", [{"messages": told}]), DataOptions(), chatty())
    assert (keep.kind, keep.examples[0].answer) == ("labelled", "hello")


def test_rows_that_resemble_the_task_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text("What is the capital of Peru?\nName three rivers.\n", encoding="utf-8")
    task = [example("  what is THE capital of peru")]
    keep = load_keep(str(tmp_path / "k.txt"), DataOptions(), tiny.tokenizer(), exclude=task)
    assert ([e.prompt for e in keep.examples], keep.near_duplicates) == (["Name three rivers."], 1)
    task.append(example("name three rivers"))
    with pytest.raises(DataError, match="all 2 rows resemble rows of the task"):
        load_keep(str(tmp_path / "k.txt"), DataOptions(), tiny.tokenizer(), exclude=task)


def test_near_duplicates_are_those_of_comparing_every_pair() -> None:
    draw = random.Random(0)
    words = [f"w{i}" for i in range(12)]
    ours, theirs = ([" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(150)] for _ in range(2))

    def alike(a: str, b: str) -> bool:
        x, y = set(WORD.findall(a)), set(WORD.findall(b))
        return len(x & y) >= 0.8 * len(x | y)

    found = near_duplicates(ours, theirs)
    assert found == [any(alike(a, b) for b in theirs) for a in ours]
    assert 20 < sum(found) < 130


def test_words_of_a_template_do_not_make_all_prompts_alike() -> None:
    system = "<|im_start|>system you are a helpful assistant who always answers in one short sentence <|user|> "
    task = [system + text for text in (f"compare {i} {i + 1}" for i in range(20))]
    asked = [system + "where do swallows winter", system + "compare 4 5", "compare 5 4"]
    assert near_duplicates(asked, task) == [False, True, True]


def test_scripts_without_spaces_are_compared_by_character() -> None:
    asked = ["请介绍一下北京的历史。", "请写一首关于秋天的诗"]
    assert near_duplicates(asked, ["请介绍一下北京的历史、吧"]) == [True, False]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a"}, {"prompt": " "}], r"row 1 \(counting from 0\) has an empty prompt"),
        ([{"wav": "a"}], "no prompt and answer found among the columns 'wav'"),
        ([{"prompt": "a", "answer": ""}], "1 of 1 rows have no answer"),
        ([{"messages": [{"role": "poet", "content": "a"}]}], "a message has the role 'poet'"),
    ],
)
def test_a_source_that_is_neither_rows_nor_prompts_is_refused(
    tmp_path: Path, rows: list[dict[str, object]], said: str
) -> None:
    path = written(tmp_path / "k.jsonl", rows)
    with pytest.raises(DataError, match=said) as caught:
        load_keep(path, DataOptions(), tiny.tokenizer())
    assert path in str(caught.value)


def test_a_text_file_without_a_prompt_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="there is no prompt in it"):
        load_keep(str(tmp_path / "k.txt"), DataOptions(), tiny.tokenizer())
    with pytest.raises(DataError, match="cannot be read"):
        load_keep(str(tmp_path / "none.txt"), DataOptions(), tiny.tokenizer())


def some_keep() -> Keep:
    rows = [KeepRow(example(f"{kind} {i}", group=f"{kind} {i // 2}"), kind) for kind in "abc" for i in range(20)]
    return Keep("prompts", "rows", [*rows, KeepRow(example("alone"), "d")])


def test_a_split_has_thirds_of_every_category_without_a_group_in_two_parts() -> None:
    parts = split_keep(some_keep(), seed=3)
    groups = [{e.group for e in part.examples} for part in parts]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert sorted(len(part.rows) for part in parts) == [20, 20, 21]
    for kind in "abc":
        assert sorted(part.categories.count(kind) for part in parts) == [6, 6, 8]


def test_the_first_rows_of_a_part_are_of_all_categories_in_proportion() -> None:
    kinds = ["a"] * 60 + ["b"] * 30 + ["c"] * 9
    rows = [KeepRow(Example(f"p{i}", "x", f"p{i}", False, i), kind) for i, kind in enumerate(kinds)]
    for part in split_keep(Keep("labelled", "keep.jsonl", rows), 0):
        assert len(part.rows) == 33
        first = [part.categories[:11].count(kind) for kind in "abc"]
        assert first == [7, 3, 1]


def test_a_split_depends_on_content_and_seed_but_not_on_the_order_of_the_file() -> None:
    keep = some_keep()
    turned = Keep(keep.kind, keep.source, keep.rows[::-1])
    assert split_keep(keep, 3) == split_keep(turned, 3)
    assert split_keep(keep, 3) != split_keep(keep, 4)


def test_random_tokens_are_ordinary_and_depend_on_the_seed() -> None:
    tokenizer = tiny.tokenizer()
    rows = random_token_rows(tokenizer, 5, 12, seed=1)
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    for row in rows:
        ids = tokenizer(row.example.prompt, add_special_tokens=False)["input_ids"]
        assert (len(ids), set(ids) <= ordinary, row.category) == (12, True, "random tokens")
    assert len({row.example.prompt for row in rows}) == 5
    assert random_token_rows(tokenizer, 5, 12, seed=1) == rows != random_token_rows(tokenizer, 5, 12, seed=2)


def adapted() -> Live:
    return Live(tiny.lora(tiny.llama()), tokenizer=tiny.tokenizer())


def prompts(*texts: str) -> Keep:
    return Keep("prompts", "rows", [KeepRow(example(text), "kind") for text in texts])


def test_the_base_s_answers_are_kept_as_the_tokens_it_generated() -> None:
    live, keep, tokenizer = adapted(), prompts("some longer prompt", "a", "double 12:"), tiny.tokenizer()
    with live.base():
        answered = answer_by(live, keep, tokenizer, max_new_tokens=7, batch_size=2)
    plain = tiny.llama()
    for row, tokens in zip(answered.keep.rows, answered.tokenized.examples, strict=True):
        ids = torch.tensor([tokenizer(row.example.prompt)["input_ids"]])
        out = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
        assert tokens.input_ids == tuple(out[0].tolist())
        assert (tokens.answer_start, tokens.digest) == (ids.shape[1], row.example.digest)
        assert row.example.answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row.category == "kind"


def test_the_base_does_not_diverge_from_its_own_answers_and_the_adapter_does() -> None:
    live = adapted()
    with live.base():
        answered = answer_by(live, prompts("some prompt", "a", "double 12:"), tiny.tokenizer(), max_new_tokens=7)
        score = Divergence(reference(live, answered.tokenized), answered.tokenized)
        batch = batches(answered.tokenized)[0]
        assert score(live.model, batch).abs().max() < 1e-5
    assert score(live.model, batch).min() > 1e-3


def test_an_empty_answer_is_its_end_of_text_and_cut_answers_are_counted() -> None:
    live, tokenizer = adapted(), tiny.tokenizer()
    generate = live.model.generate
    scripted = {4: [2, 0, 0], 5: [9, 2, 0], 6: [9, 9, 9]}
    live.model.generate = lambda input_ids, **kwargs: torch.cat(
        [input_ids, torch.tensor([scripted[int((row != 0).sum())] for row in input_ids])], 1
    )
    answered = answer_by(live, prompts("abc", "abcd", "abcde"), tokenizer, max_new_tokens=3)
    live.model.generate = generate
    assert [row.input_ids[row.answer_start :] for row in answered.tokenized.examples] == [(2,), (9, 2), (9, 9, 9)]
    assert (answered.empty, answered.cut) == (1, 1)


def test_a_long_prompt_loses_its_beginning() -> None:
    live, tokenizer = adapted(), tiny.tokenizer()
    answered = answer_by(live, prompts("abcdefgh", "xyz"), tokenizer, max_new_tokens=4, max_length=9)
    assert tokenizer.decode(answered.tokenized.examples[0].input_ids[:5]) == "<s>efgh"
    assert answered.tokenized.truncated == 1
    with pytest.raises(DataError, match="leave 1 of 5 tokens for the prompt"):
        answer_by(live, prompts("a"), tokenizer, max_new_tokens=4, max_length=5)


def test_prompts_that_do_not_fit_into_memory_together_are_answered_in_halves() -> None:
    live, keep, tokenizer = adapted(), prompts("some longer prompt", "a", "double 12:", "xyz", "b c"), tiny.tokenizer()
    whole = answer_by(live, keep, tokenizer, max_new_tokens=5)
    generate, seen = live.model.generate, []

    def small(input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return generate(input_ids=input_ids, **kwargs)

    live.model.generate = small
    told: list[tuple[int, int]] = []
    assert answer_by(live, keep, tokenizer, max_new_tokens=5, progress=lambda *at: told.append(at)) == whole
    assert (seen, told) == ([5, 3, 2, 1, 2], [(5, 5)])


@pytest.mark.parametrize(
    ("prompt", "templated"), [("ab", False), ("<s>ab", False), ("<s>ab", True), ("ab</s>", False)]
)
def test_a_prompt_has_one_beginning_of_text_and_no_end(prompt: str, templated: bool) -> None:
    ids = prompt_ids(Example(prompt, "", "", templated, 0), tiny.tokenizer())
    assert ids == [1, 4, 5]


LOOPS = [
    "The answer is 4. The answer is 4. The answer is 4. The answer is 4. The ans",
    "Sure! I like tea and I like tea and I like tea and I like tea and I like tea and I like",
    "of the of the of the of the of the of the of the",
    "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "我喜欢你我喜欢你我喜欢你我喜欢你我喜欢你我喜欢你我喜欢你",
    "def f(x):\n    return x\n\ndef f(x):\n    return x\n\ndef f(x):\n    return x\n\ndef f(x):\n",
    "First, wash the rice well until the water runs clear. " * 3,
    "<br>\n<br>\n<br>\n<br>\n<br>\n<br>\n<br>\n<br>",
]
SOUND = [
    "Yes.",
    "no, no, no!",
    "1. Wash the rice.\n2. Boil the water.\n3. Add the rice.\n4. Wait for ten minutes.\n5. Serve the rice.",
    "| name | age |\n| --- | --- |\n| Ann | 31 |\n| Bob | 27 |\n| Cem | 44 |\n| Dee | 19 |",
    "7 x 1 = 7\n7 x 2 = 14\n7 x 3 = 21\n7 x 4 = 28\n7 x 5 = 35\n7 x 6 = 42\n7 x 7 = 49",
    "for i in range(3):\n    for j in range(3):\n        for k in range(3):\n            print(i, j, k)\n",
    '{"a": null, "b": null, "c": null, "d": null, "e": null}',
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
    "Row, row, row your boat,\nGently down the stream,\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
    "RESULTS\n====================\nThe first team won by three points, the second came close behind it.",
    "assert add(1, 1) == 2\nassert add(2, 2) == 4\nassert add(0, 5) == 5\nassert add(-1, 1) == 0",
    "你好。我是一个助手。请问今天有什么可以帮您的吗。我可以回答问题、写文章、也可以聊天。",
]


@pytest.mark.parametrize("text", LOOPS)
def test_a_phrase_over_and_over_is_a_loop(text: str) -> None:
    empty, looping = degenerate([text])
    assert (bool(empty[0]), bool(looping[0])) == (False, True)


@pytest.mark.parametrize("text", SOUND)
def test_lists_tables_code_and_refrains_are_no_loops(text: str) -> None:
    assert [found.tolist() for found in degenerate([text])] == [[False], [False]]


def test_blank_answers_are_empty_and_a_very_long_one_is_judged_quickly() -> None:
    empty, looping = degenerate(["", " \n\t", "a", "word " * 50_000])
    assert empty.tolist() == [True, True, False, False]
    assert looping.tolist() == [False, False, False, True]
    assert [found.shape for found in degenerate([])] == [(0,), (0,)]
    assert not degenerate([" ".join(map(str, np.random.default_rng(0).integers(0, 99, 20_000)))])[1].any()
