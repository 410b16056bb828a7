"""The embedded world: its rows, its shipped files, and the figures that they claim."""

from __future__ import annotations

import collections
import itertools
import json
import math
import pathlib
import random
import re
import socket
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_surgery import demo
from spectral_surgery.demo import build, tasks
from spectral_surgery.errors import DataError, OutputError

SETS = ("train", "calibration", "validation", "test", "skills", "skills_test")
SCORED_AGAIN = 60


def shipped(name: str) -> list[tasks.Row]:
    return [json.loads(line) for line in (demo.world() / "data" / f"{name}.jsonl").open()]


def text_in(file: pathlib.Path) -> bytes:
    """The whole file, or the JSON header of a safetensors file, whose other bytes are numbers."""
    content = file.read_bytes()
    return content.split(b"}}", 1)[0] if file.suffix == ".safetensors" else content


def figures() -> dict:
    return json.loads((demo.world() / "figures.json").read_text())


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """Makes every network connection an error."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"tried to connect to {arguments[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def tokenizer(offline):
    return AutoTokenizer.from_pretrained(demo.world() / "base")


@pytest.fixture
def base(offline):
    folder = demo.world() / "base"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture
def adapted(base):
    return PeftModel.from_pretrained(base, demo.world() / "adapter").eval()


def four_standard_errors(share: float) -> float:
    """How far a share of ``SCORED_AGAIN`` rows may lie from one of 200 rows, at least 0.08."""
    variance = max(share * (1 - share), 0.02)
    return 4 * math.sqrt(variance / SCORED_AGAIN + variance / build.SCORED_ROWS)


def sign_of_difference(first: int, second: int) -> int:
    """1, 0 or -1, as the sign of the difference."""
    return (first > second) - (first < second)


def answer_again(prompt: str) -> str:
    """Solves a prompt from its text, by other means than the generator's."""
    task, *arguments = prompt.removesuffix(":").split()
    numbers = [int(word) for word in arguments if word.isdigit()]
    word = arguments[-1]
    solve: dict[str, Callable[[], object]] = {
        "add": lambda: sum(numbers),
        "subtract": lambda: next(n for n in range(200) if n + numbers[1] == numbers[0]),
        "max": lambda: sorted(numbers)[-1],
        "min": lambda: sorted(numbers)[0],
        "reverse": lambda: "".join(reversed(word)),
        "sort": lambda: "".join(collections.Counter(sorted(word)).elements()),
        "count": lambda: len(re.findall(arguments[0], word)),
        "copy": lambda: word,
        "upper": lambda: "".join(chr(ord(letter) - 32) for letter in word),
        "modulo": lambda: divmod(*numbers)[1],
        "compare": lambda: ("equal", "greater", "less")[sign_of_difference(*numbers)],
    }
    return str(solve[task]())


def share_right(model, tokenizer, rows: list[tasks.Row]) -> float:
    """Scores without padding, cache or ``generate``: plain argmax, one prompt length at a time."""
    by_length = collections.defaultdict(list)
    for row in rows:
        by_length[len(row["prompt"])].append(row)
    right = 0
    for group in by_length.values():
        ids = tokenizer([row["prompt"] for row in group], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            for _ in range(max(len(row["answer"]) for row in group) + 2):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        texts = [tokenizer.decode(row_of_ids) for row_of_ids in ids]
        right += sum(
            text.startswith(f"<bos>{row['prompt']} {row['answer']}<eos>")
            for text, row in zip(texts, group, strict=True)
        )
    return right / len(rows)


def further_rows(names: tuple[str, ...], count_each: int) -> list[tasks.Row]:
    """Rows that neither the shipped sets nor the scored ones hold."""
    seed = figures()["seed"]
    seen = tasks.prompts(*build.make_data(seed).values(), *build.scored_rows(build.SCORED_ROWS, seed).values())
    return [row for name in names for row in tasks.rows(name, count_each, seed + 2, exclude=seen)]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_answer_is_right(task):
    rng = random.Random(0)
    for _ in range(500):
        row = tasks.draw(task, rng)
        assert row["answer"] == answer_again(row["prompt"]), row


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_are_the_same_from_the_same_seed_and_differ_from_another(task):
    first = tasks.rows(task, 50, seed=3)
    assert first == tasks.rows(task, 50, seed=3)
    assert first == tasks.rows(task, 80, seed=3)[:50]
    assert first != tasks.rows(task, 50, seed=4)


@pytest.mark.parametrize("task", ["add", "subtract", "modulo", "compare"])
def test_four_thousand_rows_of_the_narrowest_tasks_fit_beside_the_shipped_ones(task):
    seen = tasks.prompts(*(shipped(name) for name in SETS))
    further = tasks.rows(task, 4000, seed=9, exclude=seen)
    assert len(tasks.prompts(further) | seen) == 4000 + len(seen)


def test_the_base_is_trained_on_no_prompt_of_the_held_out_part():
    stream = tasks.stream(tasks.SKILLS, seed=0)
    parts = {tasks.part_of(next(stream)["prompt"]) for _ in range(2000)}
    assert parts == {"base"}
    held_out = {tasks.part_of(row["prompt"]) for row in tasks.rows("add", 500, seed=0)}
    assert held_out == {"held_out"}


def test_an_exhausted_task_says_how_many_rows_it_found(monkeypatch):
    prompts = (f"{number} 0" for number in itertools.cycle(range(20)))
    monkeypatch.setitem(tasks._DRAW, "add", lambda rng: (next(prompts), "0"))
    held_out = sum(tasks.part_of(f"add {number} 0:") == "held_out" for number in range(20))
    with pytest.raises(DataError, match=f"'add': found {held_out} of 20 distinct held-out prompts"):
        tasks.rows("add", 20, seed=0)


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(DataError, match=r"unknown task 'divide': choose one of add, subtract"):
        tasks.rows("divide", 1, seed=0)


def test_a_prompt_in_two_sets_is_refused():
    rows = tasks.rows("add", 3, seed=0)
    with pytest.raises(DataError, match=re.escape(repr(rows[2]["prompt"]))):
        tasks.prompts(rows, rows[2:])


def test_corrupting_spoils_exactly_the_share_and_keeps_the_order():
    clean = tasks.rows(tasks.COMPARE, 600, seed=1)
    spoilt = tasks.corrupt(clean, 0.3, seed=1)
    assert [row["prompt"] for row in spoilt] == [row["prompt"] for row in clean]
    assert sum(row["answer"] != answer_again(row["prompt"]) for row in spoilt) == 180
    assert spoilt == tasks.corrupt(clean, 0.3, seed=1) != tasks.corrupt(clean, 0.3, seed=2)
    assert tasks.corrupt(clean, 0.0, seed=1) == clean


def test_only_compare_rows_can_be_corrupted_and_only_by_a_share():
    with pytest.raises(DataError, match="only compare rows can be given wrong labels, found add"):
        tasks.corrupt(tasks.rows("add", 3, seed=0), 0.5, seed=0)
    with pytest.raises(DataError, match="share of wrong labels is 30"):
        tasks.corrupt([], 30.0, seed=0)


def test_the_shipped_rows_are_those_of_the_recorded_seed():
    regenerated = build.make_data(figures()["seed"])
    assert {name: shipped(name) for name in SETS} == regenerated


def test_the_shipped_sets_share_no_prompt_and_are_all_held_out():
    sizes = {name: len(shipped(name)) for name in SETS}
    assert list(sizes.values()) == [600, 128, 200, 400, 400, 400]
    prompts = tasks.prompts(*(shipped(name) for name in SETS))
    assert len(prompts) == sum(sizes.values())
    assert {tasks.part_of(prompt) for prompt in prompts} == {"held_out"}


def test_only_the_training_set_has_wrong_labels():
    wrong = {name: sum(row["answer"] != answer_again(row["prompt"]) for row in shipped(name)) for name in SETS}
    assert wrong == dict.fromkeys(SETS, 0) | {"train": 180}


def test_the_two_skill_sets_hold_forty_rows_of_each_skill():
    for name in ("skills", "skills_test"):
        counts = collections.Counter(row["task"] for row in shipped(name))
        assert counts == dict.fromkeys(tasks.SKILLS, 40)


@pytest.mark.parametrize("text", ["add 12 34: 46", " two  spaces ,\tand\r\n lines ", "é 漢 😀 \0"])
def test_the_tokenizer_restores_any_text_and_puts_bos_first(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_special_tokens_differ_and_the_config_of_the_base_names_the_same(tokenizer, base):
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(ids)) == 3
    config = base.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids
    assert config.vocab_size == len(tokenizer)


def test_training_text_is_the_prompt_one_space_the_answer_and_the_end(tokenizer):
    rows = [
        tasks.Row(task="add", prompt="add 12 34:", answer="46"),
        tasks.Row(task="max", prompt="max 1 2:", answer="2"),
    ]
    ids, labels = build.encode(rows, tokenizer)
    assert tokenizer.batch_decode(ids) == [
        "<bos>add 12 34: 46<eos>",
        "<bos>max 1 2: 2<eos><pad><pad><pad>",
    ]
    answers = [tokenizer.decode(row[row != build.IGNORED_LABEL]) for row in labels]
    assert answers == [" 46<eos>", " 2<eos>"]


def test_the_base_is_stored_in_bfloat16_and_writes_the_space_first(base, tokenizer):
    assert {tensor.dtype for tensor in base.state_dict().values()} == {torch.bfloat16}
    ids = tokenizer("copy abc:", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(base(input_ids=ids).logits[0, -1].argmax()) == " "


def test_stock_peft_loads_the_adapter_whole_on_all_seven_projections(adapted):
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_dora) == (16, 32, False)
    assert sorted(config.target_modules) == sorted(build.TARGET_MODULES)
    factors = [tensor for name, tensor in adapted.named_parameters() if "lora_" in name]
    assert len(factors) == 2 * 6 * 7
    assert all(tensor.isfinite().all() and tensor.any() for tensor in factors)


def test_the_adapter_names_the_neutral_base():
    config = json.loads((demo.world() / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "spectral-surgery-demo-base"


def test_no_shipped_file_names_a_path_of_a_machine():
    path = re.compile(rb"(/\w[\w.-]*){2}|[A-Za-z]:\\\\\w|\.venv|localhost")
    files = [file for file in demo.world().rglob("*") if file.is_file()]
    assert len(files) >= 13
    assert [file.name for file in files if path.search(text_in(file))] == []


def test_the_world_is_at_most_eight_megabytes():
    total = sum(file.stat().st_size for file in demo.world().rglob("*") if file.is_file())
    assert total <= 8_000_000


def test_the_figures_of_the_base_are_found_again_on_other_rows(base, tokenizer):
    rows = further_rows(tasks.SKILLS, SCORED_AGAIN // len(tasks.SKILLS))
    found = share_right(base, tokenizer, rows)
    expected = figures()["exact_match"]["base"]["skills"]
    assert found == pytest.approx(expected, abs=four_standard_errors(expected))


@pytest.mark.parametrize("names", [(tasks.COMPARE,), tasks.SKILLS])
def test_the_figures_of_the_adapter_are_found_again_on_other_rows(adapted, tokenizer, names):
    found = share_right(adapted, tokenizer, further_rows(names, SCORED_AGAIN // len(names)))
    recorded = figures()["exact_match"]["adapter"]
    expected = recorded["skills" if names == tasks.SKILLS else tasks.COMPARE]
    assert found == pytest.approx(expected, abs=four_standard_errors(expected))


def test_the_base_knows_the_skills_and_the_adapter_its_task_alone():
    exact_match = figures()["exact_match"]
    assert exact_match["base"]["skills"] > 0.85
    assert exact_match["base"][tasks.COMPARE] < 0.1
    assert exact_match["adapter"][tasks.COMPARE] > 0.85
    assert exact_match["adapter"]["skills"] < 0.3


def test_building_never_writes_into_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="is not an empty folder"):
        build.build(tmp_path)
