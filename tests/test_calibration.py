"""Order, splits, tokens and batches, shown by what they decode to."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spectral_surgery.calibration import (
    Tokenized,
    TokenizedExample,
    batches,
    data_digest,
    hash_order,
    load_examples,
    preview,
    split_examples,
    tokenize,
)
from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions, Example

CORPUS = ["Question: what is the capital of France?\nAnswer: Paris", "The answer is Paris."]


def bpe(*, bos: bool = True, eos: bool = False, pad: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained here, that adds the asked special tokens itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 20, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token=pad)


def example(prompt: str, answer: str, **changes: Any) -> Example:
    fields = {"group": prompt, "templated": False, "row": 0, **changes}
    return Example(prompt, answer, **fields)


def labelled(
    prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, **changes: Any
) -> tuple[list[str], list[str]]:
    """The tokens without and with a label."""
    (row,) = tokenize([example(prompt, answer, **changes)], tokenizer, 100).examples
    tokens = tokenizer.convert_ids_to_tokens(list(row.input_ids))
    return tokens[: row.answer_start], tokens[row.answer_start :]


def rows_of(lengths: list[int]) -> Tokenized:
    """Tokenized examples of these lengths with ids 5, 6, ... and one prompt token."""
    rows = [TokenizedExample(tuple(range(5, 5 + n)), 1, f"digest {n}") for n in lengths]
    return Tokenized(rows, 0)


def many(count: int, members: int = 1) -> list[Example]:
    """Examples in groups of equal size."""
    return [example(f"p{number}", "a", group=f"g{number // members}", row=number) for number in range(count)]


def test_the_order_depends_on_content_and_seed_and_not_on_the_order_of_the_rows() -> None:
    examples = many(40, members=4)
    shuffled = random.Random(1).sample(examples, 40)
    renumbered = [replace(shuffled[row], row=row) for row in range(40)]
    ordered = hash_order(examples, 3)
    assert [e.digest for e in hash_order(renumbered, 3)] == [e.digest for e in ordered]
    assert sorted(ordered, key=lambda e: e.row) == examples
    assert hash_order(examples, 4) != ordered


def test_exact_duplicates_are_dropped_even_between_groups() -> None:
    twice = [example("p", "a", group="g"), example("p", "a", group="h"), example("p", "b")]
    ordered = hash_order(twice, 0)
    assert [(e.prompt, e.answer) for e in ordered] in (
        [("p", "a"), ("p", "b")],
        [("p", "b"), ("p", "a")],
    )
    assert hash_order(twice[::-1], 0) == ordered
    assert split_examples(twice, (1, 0, 0), 0).duplicates == 1


def test_groups_stay_together_when_a_duplicate_is_dropped() -> None:
    examples = [*many(30, members=3), *[example(f"p{n}", "a", group="extra") for n in range(30)]]
    for seed in range(5):
        groups = [e.group for e in hash_order(examples, seed)]
        changes = sum(first != second for first, second in pairwise(groups))
        assert changes == len(set(groups)) - 1


def test_splits_share_no_group_and_do_not_depend_on_the_order_of_the_rows() -> None:
    examples = many(60, members=3)
    splits = split_examples(examples, (10, 9, 20), 0)
    parts = (splits.calibration, splits.validation, splits.test)
    assert [len(part) for part in parts] == [12, 9, 21]
    groups = [{e.group for e in part} for part in parts]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 14
    assert split_examples(random.Random(1).sample(examples, 60), (10, 9, 20), 0) == splits


def test_the_calibration_part_is_the_same_whatever_else_is_asked_for() -> None:
    examples = many(50)
    alone = split_examples(examples, (20, 0, 0), 7)
    among = split_examples(examples, (20, 10, 20), 7)
    smaller = split_examples(examples, (8, 0, 0), 7)
    assert alone.calibration == among.calibration == hash_order(examples, 7)[:20]
    assert smaller.calibration == alone.calibration[:8]


def test_too_few_examples_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        DataError,
        match=r"10 different examples in 5 groups are too few for 6 \+ 2 \+ 4 \(calibration, "
        r"validation, test\) .*; give more rows, or ask for fewer",
    ):
        split_examples([*many(10, members=2), *many(10, members=2)], (6, 2, 4), 0)
    with pytest.raises(DataError, match=r"sizes \(1, -1, 0\); expected none below 0"):
        split_examples(many(3), (1, -1, 0), 0)


def test_the_data_digest_depends_on_the_contents_alone() -> None:
    examples = many(5)
    tokenized = tokenize(examples, bpe(), 100)
    assert data_digest(examples) == data_digest(examples[::-1]) == data_digest(tokenized.examples)
    assert data_digest(examples) != data_digest(examples[:4])


def test_the_answer_and_the_end_of_text_are_labelled_and_the_prompt_is_not() -> None:
    prompt, answer = labelled("Answer:", "Paris", bpe())
    assert prompt == ["<s>", "Answer", ":"]
    assert answer == ["ĠParis", "</s>"]


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    tokenizer = bpe(bos=False)
    assert tokenizer.tokenize("Question: Pa") == ["Question", ":", "ĠPa"]
    (row,) = tokenize([example("Question: Pa", "ris")], tokenizer, 100, separator="").examples
    tokens = tokenizer.convert_ids_to_tokens(list(row.input_ids))
    assert tokens[row.answer_start :] == ["ĠParis", "</s>"]
    assert tokens[: row.answer_start] == ["Question", ":"]


def test_every_token_of_a_character_of_several_bytes_is_labelled() -> None:
    prompt, answer = labelled("Answer:", "é", bpe())
    assert (prompt, answer) == (["<s>", "Answer", ":", "Ġ"], ["Ã", "©", "</s>"])


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("Answer:", "Paris", "Answer: Paris"),
        ("Answer:\n", "Paris", "Answer:\nParis"),
        ("Answer:", "\nParis", "Answer:\nParis"),
    ],
)
def test_a_space_is_put_between_only_where_there_is_no_white_space(prompt: str, answer: str, text: str) -> None:
    tokenizer = bpe(bos=False)
    (row,) = tokenize([example(prompt, answer)], tokenizer, 100).examples
    assert tokenizer.decode(list(row.input_ids)) == text + "</s>"


@pytest.mark.parametrize("answer", ["Paris", "Paris</s>"])
@pytest.mark.parametrize("prompt", ["Answer:", "<s>Answer:"])
@pytest.mark.parametrize("eos", [False, True])
def test_special_tokens_stand_exactly_once(prompt: str, answer: str, eos: bool) -> None:
    before, after = labelled(prompt, answer, bpe(eos=eos))
    assert before == ["<s>", "Answer", ":"]
    assert after == ["ĠParis", "</s>"]


def test_texts_from_a_template_get_no_special_token_and_no_space() -> None:
    prompt, answer = labelled("<|im_start|>Answer:", "Paris<|im_end|>", bpe(eos=True), templated=True)
    assert prompt == ["<|im_start|>", "Answer", ":"]
    assert answer == ["Pa", "ris", "<|im_end|>"]


def test_a_finished_answer_gets_no_end_of_text_but_the_beginning() -> None:
    prompt, answer = labelled("<|im_start|>", "Paris<|im_end|>", bpe(), finished=True)
    assert prompt[:2] == ["<s>", "<|im_start|>"]
    assert answer[-1] == "<|im_end|>"


def test_a_tokenizer_without_an_end_of_text_adds_none() -> None:
    tokenizer = bpe()
    tokenizer.eos_token = None
    assert labelled("Answer:", "Paris", tokenizer)[1] == ["ĠParis"]


def test_a_tokenizer_written_in_python_finds_the_same_border() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert labelled("to", "be", tokenizer) == (["t", "o", " "], ["b", "e", "</s>"])


def test_a_long_example_loses_the_left_of_its_prompt_after_the_beginning_of_text() -> None:
    tokenizer = bpe()
    examples = [example("The answer is:", "Paris"), example("Answer:", "Paris")]
    whole = tokenize(examples, tokenizer, 100)
    assert whole.truncated == 0
    length = len(whole.examples[0].input_ids)
    assert length > len(whole.examples[1].input_ids) == 5
    cut = tokenize(examples, tokenizer, length - 1)
    assert cut.truncated == 1
    assert cut.examples[1] == whole.examples[1]
    ids, start = whole.examples[0].input_ids, whole.examples[0].answer_start
    assert cut.examples[0].input_ids == (ids[0], *ids[2:])
    assert cut.examples[0].answer_start == start - 1
    assert tokenize(examples[:1], tokenizer, 3).examples[0].input_ids == (0, *ids[start:])


def test_without_a_beginning_of_text_the_prompt_loses_its_first_token() -> None:
    tokenizer = bpe(bos=False)
    (whole,) = tokenize([example("Answer:", "Paris")], tokenizer, 100).examples
    (cut,) = tokenize([example("Answer:", "Paris")], tokenizer, 3).examples
    assert (cut.input_ids, cut.answer_start) == (whole.input_ids[1:], 1)


def test_an_answer_that_is_itself_too_long_keeps_its_head() -> None:
    tokenizer = bpe()
    done = tokenize([example("Answer:", "Paris Paris Paris")], tokenizer, 3)
    assert tokenizer.convert_ids_to_tokens(list(done.examples[0].input_ids)) == [
        "<s>",
        "ĠParis",
        "ĠParis",
    ]
    assert (done.examples[0].answer_start, done.truncated) == (1, 1)


def test_the_first_token_has_no_label_because_nothing_predicts_it() -> None:
    (row,) = tokenize([example("Answer:", "Paris Paris")], bpe(bos=False), 2).examples
    assert (len(row.input_ids), row.answer_start) == (2, 1)


def test_an_answer_without_a_token_to_predict_is_refused_with_its_row() -> None:
    alone = example("", "a", row=6)
    with pytest.raises(DataError, match=r"^row 6 \(counting from 0\): the answer 'a' has no token"):
        tokenize([alone], bpe(bos=False), 10)
    with pytest.raises(DataError, match="longest example has 1 tokens; expected at least 2"):
        tokenize([alone], bpe(), 1)


@pytest.mark.parametrize("pad", [None, "</s>", "<s>"])
def test_masks_come_from_lengths_also_where_the_padding_id_stands_in_the_text(
    pad: str | None,
) -> None:
    tokenizer = bpe(pad=pad)
    examples = [example("one</s> two", "a</s>b"), example("Answer:", "Paris")]
    tokenized = tokenize(examples, tokenizer, 100)
    (batch,) = batches(tokenized)
    lengths = [len(tokenized.examples[index].input_ids) for index in batch.indices]
    assert batch.attention_mask.sum(dim=1).tolist() == lengths
    assert lengths[0] > lengths[1]
    for row, index in enumerate(batch.indices):
        ids = list(tokenized.examples[index].input_ids)
        assert batch.input_ids[row, : lengths[row]].tolist() == ids
        assert batch.attention_mask[row].tolist() == [1] * len(ids) + [0] * (lengths[0] - len(ids))


def test_the_labels_of_a_batch_decode_to_the_answers() -> None:
    tokenizer = bpe(pad="</s>")
    examples = [example("Answer:", "Paris"), example("what is the capital of", "France")]
    tokenized = tokenize(examples, tokenizer, 100)
    (batch,) = batches(tokenized)
    for row, index in enumerate(batch.indices):
        labels = batch.labels[row]
        assert tokenizer.decode(labels[labels != -100]) == f" {examples[index].answer}</s>"
        kept = labels != -100
        assert labels[kept].equal(batch.input_ids[row][kept])
        assert not kept[batch.attention_mask[row] == 0].any()


def test_a_batch_moves_whole_and_names_what_a_model_takes() -> None:
    (batch,) = batches(rows_of([3, 2]))
    moved = batch.to("meta")
    devices = {moved.input_ids.device, moved.attention_mask.device, moved.labels.device}
    assert devices == {torch.device("meta")}
    assert moved.indices == batch.indices
    assert batch.inputs == {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
    }


def test_batches_hold_every_example_once_within_the_token_budget() -> None:
    lengths = [3, 9, 4, 30, 4, 2, 8, 8]
    tokenized = rows_of(lengths)
    made = batches(tokenized, token_budget=20)
    assert [batch.indices for batch in made] == [(3,), (1, 6), (7, 2), (4, 0, 5)]
    widths = [batch.input_ids.shape for batch in made]
    assert widths == [(1, 30), (2, 9), (2, 8), (3, 4)]


def test_a_batch_size_takes_the_place_of_the_budget() -> None:
    made = batches(rows_of([3, 9, 4]), token_budget=1, batch_size=2)
    assert [batch.indices for batch in made] == [(1, 2), (0,)]


def test_a_batch_that_could_hold_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="a batch of 4096 tokens or 0 examples holds nothing"):
        batches(rows_of([3]), batch_size=0)
    with pytest.raises(DataError, match="a batch of 0 tokens or None examples holds nothing"):
        batches(rows_of([3]), token_budget=0)


def test_a_preview_marks_the_labelled_part_and_shows_special_tokens() -> None:
    tokenizer = bpe()
    (row,) = tokenize([example("Answer:", "Paris")], tokenizer, 100).examples
    assert preview(row, tokenizer) == "<s>Answer:[[ Paris</s>]]"


def test_files_of_pairs_need_no_chat_template_and_files_of_conversations_do(
    tmp_path: Path,
) -> None:
    pairs, talks = tmp_path / "pairs.jsonl", tmp_path / "talks.jsonl"
    pairs.write_text('{"prompt": "Answer:", "answer": "Paris"}\n', encoding="utf-8")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Paris"}]
    talks.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    tokenizer = bpe()
    assert load_examples(str(pairs), DataOptions(), tokenizer) == [Example("Answer:", "Paris", "answer:", False, 0)]
    with pytest.raises(DataError, match=r"talks\.jsonl: the rows are conversations, but there is"):
        load_examples(str(talks), DataOptions(), tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        encoding="utf-8",
    )
    assert load_examples(str(talks), DataOptions(), tokenizer, tmp_path) == [
        Example("[user]hi[assistant]", "Paris", "[user]hi[assistant]", True, 0)
    ]
