"""The ablation command: variants at equal footing, intervals against scipy, and a whole tiny run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from peft import IA3Config, get_peft_model
from test_speclora import config, layers, logits

from spectral_surgery.ablation import Ablation
from spectral_surgery.cli import main, parse
from spectral_surgery.errors import InputError
from spectral_surgery.formats import DataOptions, Example, to_examples
from spectral_surgery.speclora.geometry import row_shares
from spectral_surgery.speclora.study import (
    ALL_ROWS,
    paired_interval,
    pairs,
    raised_ranks,
    study,
    variants,
)


def examples(first: int, count: int) -> list[Example]:
    rows = [{"prompt": f"double {i}:", "answer": str(2 * i)} for i in range(first, first + count)]
    return to_examples(rows, DataOptions())


def test_the_interval_is_that_of_a_paired_t_test_over_seeds() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 4, 50))
    mean, half = paired_interval(ours - theirs)
    there = scipy.stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((there.low, there.high), rel=1e-4)


def test_ranks_are_raised_until_the_parameters_are_spent() -> None:
    shapes = {"a": (10, 10), "b": (20, 20), "c": (5, 5)}
    pattern = raised_ranks(shapes, rank=4, extra=95)
    spent = sum((pattern.get(path, 4) - 4) * sum(shape) for path, shape in shapes.items())
    assert 95 - spent < 10
    assert spent <= 95
    assert raised_ranks(shapes, rank=4, extra=9) == {}


def test_every_comparison_is_of_variants_that_are_trained() -> None:
    options = Ablation()
    assert {name for pair in pairs(options) for name in pair} <= set(variants(options))


def test_ia3_is_all_rows_of_keys_values_and_the_up_projection() -> None:
    there = get_peft_model(
        tiny.llama(),
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ).eval()
    names = ["k_proj", "v_proj", "up_proj"]
    ours = get_peft_model(tiny.llama(), config(k=0, k_pattern=dict.fromkeys(names, ALL_ROWS), target_modules=names))
    generator = torch.Generator().manual_seed(0)
    for path, layer in layers(ours.eval()).items():
        delta = layer.lora_spec["default"].delta
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)
        twin = there.get_base_model().get_submodule(path.replace("up_proj", "down_proj"))
        learnt = twin.ia3_l["default"]
        learnt.data = (1 + delta).detach().reshape(learnt.shape)
    assert not torch.allclose(logits(ours), logits(tiny.llama()), atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(there), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "1"], r"--seeds is 1, expected 2 or more"),
        (["--k", "4"], r"--k is 4, expected two different numbers"),
        (["--k", "4", "4"], r"--k is 4 4, expected two different numbers"),
        (["--steps", "0", "--learning-rate", "-1"], r"--steps is 0.*--learning-rate is -1\.0"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_one_clear_error_and_never_one_of_the_parser(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speclora", *arguments]) == 2
    assert re.match(f"error: .*{sentence}", capsys.readouterr().err, re.DOTALL)


def test_rows_to_learn_from_may_not_be_scored() -> None:
    with pytest.raises(InputError, match=r"2 rows are in both"):
        study("anything", examples(0, 5), examples(3, 5), Ablation())


def test_a_base_model_needs_data_of_its_own() -> None:
    with pytest.raises(InputError, match=r"go together"):
        parse(["speclora", "--base-model", "somewhere"]).run()


def test_a_row_update_lies_wholly_in_the_top_directions_exactly_where_rows_are_directions() -> None:
    W = torch.diag(torch.tensor([9.0, 7.0, 2.0, 1.0]))
    rows, directions, inside, chance, _ = row_shares(W, 2, torch.Generator().manual_seed(0))
    assert rows == pytest.approx(130 / 135)
    assert directions == pytest.approx(130 / 135)
    assert (inside, chance) == (pytest.approx(1.0), 0.5)
    assert row_shares(W.flip(0), 2, torch.Generator().manual_seed(0))[2] == pytest.approx(0.0)


@pytest.mark.slow
def test_a_whole_study_prints_every_variant_and_every_comparison(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    options = Ablation(k=(2, 4), seeds=2, steps=2, batch_size=4, rank=2)
    seen: list[tuple[int, int]] = []
    text = study(str(tmp_path), examples(0, 8), examples(20, 5), options, lambda *step: seen.append(step))
    lines = text.splitlines()
    for name in variants(options):
        assert any(line.startswith(name) for line in lines)
    assert sum("±" in line and line.startswith(tuple(variants(options))) for line in lines) == len(pairs(options))
    assert seen[-1] == (len(variants(options)) * 2, len(variants(options)) * 2)
    trained = {line.split("  ")[0].strip(): line for line in lines[2:13]}
    assert trained["lora"].split()[1] == "1,280"
