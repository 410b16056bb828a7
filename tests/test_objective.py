"""Per-example losses from few logits, and greedy answers in batches, against doing it one by one."""

from __future__ import annotations

import functools

import tiny
import torch

from spectral_surgery.calibration import Batch
from spectral_surgery.objective import answer_loss, greedy_answers


def as_batch(rows: dict[str, torch.Tensor]) -> Batch:
    return Batch(rows["input_ids"], rows["attention_mask"], rows["labels"], tuple(range(len(rows["labels"]))))


def test_answer_loss_is_the_mean_over_each_example_s_own_answer_tokens() -> None:
    model, rows = tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64), tiny.batch(rows=4)
    found = answer_loss(model, as_batch(rows))
    torch.testing.assert_close(found, tiny.loss(model, rows), rtol=1e-6, atol=1e-7, check_dtype=False)


def test_logits_are_computed_only_where_an_example_has_a_label_of_its_own() -> None:
    model, rows = tiny.llama(), tiny.batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    answer_loss(model, as_batch(rows))
    predicting = rows["labels"][:, 1:] != -100
    assert seen == [(1, predicting.sum(), tiny.VOCABULARY)]
    assert predicting.sum() < predicting.any(0).sum() * len(predicting)


def test_a_model_without_logits_to_keep_gives_the_same_loss() -> None:
    model, rows = tiny.llama(), tiny.batch()
    wanted = answer_loss(model, as_batch(rows))
    forward = model.forward

    @functools.wraps(forward)
    def plain(input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> object:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    del plain.__wrapped__
    model.forward = plain
    torch.testing.assert_close(answer_loss(model, as_batch(rows)), wanted)


def test_greedy_answers_in_left_padded_batches_are_those_of_one_prompt_at_a_time() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    prompts = ["a", "double 12:", "some longer prompt here", "x 1"]
    together = greedy_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert len(set(together)) > 1
