"""Rows packed into one sequence give what they give padded, or are refused."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from kinds import CASES
from transformers import MambaConfig, MambaForCausalLM, modeling_flash_attention_utils
from transformers.integrations import flash_attention

from spectral_surgery import Live, batching
from spectral_surgery.batching import check_packing, packing
from spectral_surgery.calibration import Tokenized, TokenizedExample, batches
from spectral_surgery.cli import main
from spectral_surgery.errors import BaseModelError, DataError
from spectral_surgery.measurement import Measurement
from spectral_surgery.measuring import measure_live
from spectral_surgery.objective import answer_loss
from spectral_surgery.options import BatchOptions
from spectral_surgery.packing import Packed, formed, is_wanted, packs
from spectral_surgery.sensitivity_file import load_measurement

ON = BatchOptions(packing="on")
SEATS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 6}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def rows(count: int = 7, longest: int = 12, seed: int = 0) -> Tokenized:
    """Random rows of different lengths; some of one token of answer."""
    rng = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(rng.integers(2, longest, count)):
        ids = tuple(int(token) for token in rng.integers(3, tiny.VOCABULARY, length))
        found.append(TokenizedExample(ids, int(rng.integers(1, length)), str(number)))
    return Tokenized(found, 0)


def assert_equal(found: Measurement, wanted: Measurement, tolerance: float) -> None:
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=tolerance)
    assert found.modules.keys() == wanted.modules.keys()
    for path, module in wanted.modules.items():
        for name in ("gate_gradient", "output_energy"):
            ours, theirs = getattr(found.modules[path], name), getattr(module, name)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=path)


def exact_live(**settings: Any) -> Live:
    return Live(tiny.lora(tiny.llama(dtype=torch.float64), dtype=torch.float64, **settings))


def test_packs_hold_every_row_once_within_the_budget_and_restart_positions() -> None:
    tokenized = rows(9)
    made = packs(tokenized, token_budget=20)
    assert sorted(index for pack in made for index in pack.indices) == list(range(9))
    assert all(pack.input_ids.numel() <= 20 for pack in made)
    assert len(made) < 9
    for pack in made:
        for i, index in enumerate(pack.indices):
            row, own = tokenized.examples[index], pack.segments == i
            assert tuple(pack.input_ids[0, own].tolist()) == row.input_ids
            assert pack.position_ids[0, own].tolist() == list(range(len(row.input_ids)))
            labelled = [-100] * row.answer_start + list(row.input_ids[row.answer_start :])
            assert pack.labels[0, own].tolist() == labelled


def test_a_row_longer_than_the_budget_is_alone_and_a_number_of_rows_takes_the_budgets_place() -> None:
    assert [len(pack) for pack in packs(rows(5), token_budget=1)] == [1] * 5
    assert [len(pack) for pack in packs(rows(5), batch_size=2)] == [2, 2, 1]
    with pytest.raises(DataError, match="holds nothing"):
        packs(rows(5), batch_size=0)


def test_a_slice_of_a_pack_is_the_pack_of_those_rows() -> None:
    tokenized = rows(5)
    (whole,) = packs(tokenized, batch_size=5)
    part = whole[1:3]
    (wanted,) = packs(Tokenized([tokenized.examples[i] for i in whole.indices[1:3]], 0), batch_size=2)
    assert part.indices == whole.indices[1:3]
    for name in ("input_ids", "position_ids", "labels", "segments"):
        assert torch.equal(getattr(part, name), getattr(wanted, name))


@pytest.mark.parametrize("seat", SEATS)
@pytest.mark.parametrize("budget", [15, 30, 1000])
def test_packed_rows_measure_as_padded_ones(seat: str, budget: int) -> None:
    live, tokenized = exact_live(**SEATS[seat]), rows()
    padded = measure_live(live, batches(tokenized, token_budget=30))
    assert_equal(measure_live(live, packs(tokenized, token_budget=budget)), padded, 1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_measure_as_padded_ones_in_float32(attention: str) -> None:
    live, tokenized = Live(tiny.lora(tiny.llama())), rows()
    live.model.get_base_model().set_attn_implementation(attention)
    padded = measure_live(live, batches(tokenized, token_budget=30))
    assert packing(live, tokenized, ON)
    assert_equal(measure_live(live, packs(tokenized)), padded, 2e-5)


def test_packed_rows_measure_as_padded_ones_where_layers_are_conv1d() -> None:
    live, tokenized = Live(tiny.lora(tiny.gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)), rows()
    assert packing(live, tokenized, ON)
    assert_equal(measure_live(live, packs(tokenized)), measure_live(live, batches(tokenized)), 2e-5)


@pytest.mark.parametrize("seat", ["linear", "dora"])
def test_recomputed_activations_of_packed_rows_change_nothing(seat: str) -> None:
    live, made = exact_live(**SEATS[seat]), packs(rows(), token_budget=30)
    assert_equal(measure_live(live, made, checkpointing=True), measure_live(live, made), 1e-14)


def test_memory_that_runs_out_in_the_middle_loses_no_packed_row() -> None:
    live, tokenized, refused = exact_live(), rows(), []

    def hungry(model: Any, batch: Packed) -> torch.Tensor:
        losses = answer_loss(model, batch)
        if len(batch) > 2:
            refused.append(len(batch))
            raise torch.OutOfMemoryError
        return losses

    found = measure_live(live, packs(tokenized, token_budget=1000), loss=hungry)
    assert refused[0] == 7
    assert_equal(found, measure_live(live, batches(tokenized)), 1e-12)


def test_a_candidates_gates_give_packed_rows_the_losses_of_padded_ones() -> None:
    live, tokenized = exact_live(), rows()
    gates = {path: np.linspace(0.3, 1.7, len(live.spectra[path].S)) for path in live.paths}
    (pack,), (batch,) = packs(tokenized), batches(tokenized)
    assert pack.indices == batch.indices
    with live.gated(gates), torch.no_grad():
        torch.testing.assert_close(answer_loss(live.model, pack), answer_loss(live.model, batch), rtol=1e-12, atol=0)


def test_rows_are_padded_unless_the_base_runs_flash_attention() -> None:
    assert not packing(exact_live(), rows(), BatchOptions())
    for name, wanted in (("flash_attention_2", True), ("kernels-community/flash-attn3", True), ("sdpa", False)):
        assert is_wanted(BatchOptions(), name) is wanted
        assert is_wanted(ON, name)
        assert not is_wanted(BatchOptions(packing="off"), name)
    assert not is_wanted(BatchOptions(), None)


def varlen(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, **settings: Any) -> torch.Tensor:
    """What flash attention's kernel for sequences of different lengths computes, one after another."""
    ends = cu_seqlens_q.tolist()
    assert ends == cu_seqlens_k.tolist()
    assert settings["causal"]
    parts = []
    for start, end in pairwise(ends):
        one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def test_flash_attention_gets_the_rows_lengths_and_packs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    live, tokenized, seen = exact_live(), rows(), []
    padded = measure_live(live, batches(tokenized))

    def kernel(*args: Any, cu_seqlens_q: Any, **settings: Any) -> torch.Tensor:
        seen.append(cu_seqlens_q.diff().tolist())
        return varlen(*args, cu_seqlens_q=cu_seqlens_q, **settings)

    def whole(q: Any, k: Any, v: Any, **settings: Any) -> torch.Tensor:
        ends = torch.arange(len(q) + 1) * q.shape[1]
        return varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=ends, cu_seqlens_k=ends, **settings).view_as(
            q
        )

    def settings_of(**settings: Any) -> dict[str, Any]:
        return {"causal": settings["is_causal"]}

    functions = ((whole, kernel, None, None, None), (settings_of, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _: functions)
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
    live.model.get_base_model().config._attn_implementation = "flash_attention_2"
    assert packing(live, tokenized, BatchOptions())
    seen.clear()
    made = formed(tokenized, 1000, BatchOptions(), packed=True)
    assert_equal(measure_live(live, made), padded, 1e-12)
    lengths = sorted((len(row.input_ids) for row in tokenized.examples), reverse=True)
    assert seen == [lengths] * 2  # layers


def test_a_model_that_lets_packed_rows_see_each_other_is_refused_or_padded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live = exact_live()
    model = live.model.get_base_model().model
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(BaseModelError, match=r"together two rows' logits differ by .* Leave out --packing on"):
        packing(live, rows(), ON)
    monkeypatch.setattr(batching, "is_wanted", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        assert not packing(live, rows(), BatchOptions())
    assert "Rows are padded, not packed: together two rows' logits differ" in caplog.text


def test_a_recurrent_model_is_refused() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    live = Live(tiny.lora(MambaForCausalLM(config).eval(), target_modules=["in_proj"]))
    with pytest.raises(BaseModelError, match="Rows cannot be packed into one sequence"):
        packing(live, rows(), ON)


@pytest.mark.parametrize(
    ("case", "reason"),
    [("experts", "works on weights"), ("attention", "works on weights"), ("alora", "an aLoRA takes the tokens")],
)
def test_kinds_whose_examples_share_a_weight_are_refused_before_a_model_is_needed(case: str, reason: str) -> None:
    adapter = Live(CASES[case].adapted()).adapter
    check_packing(adapter, list(adapter.updates), BatchOptions())
    with pytest.raises(BaseModelError, match=rf"{reason}.*Leave out --packing on"):
        check_packing(adapter, list(adapter.updates), ON)


def test_an_adapted_head_and_a_loss_of_ones_own_are_refused() -> None:
    with pytest.raises(BaseModelError, match=r"lm_head: input of shape .* in a packed batch of 2"):
        packing(exact_live(target_modules=["lm_head", "q_proj"]), rows(), ON)
    with pytest.raises(BaseModelError, match="the loss is the caller's own"):
        packing(exact_live(), rows(), ON, tiny.loss)


def test_the_command_packs_on_request_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world, found = tiny.world(tmp_path), {}
    for how, budget, more in (("auto", "512", []), ("on", "60", ["--gradient-checkpointing"])):
        output = tmp_path / f"{how}.safetensors"
        options = ["--device", "cpu", "--examples", "12", "--packing", how, "--token-budget", budget, *more]
        data = ["--data", str(world.data), "--output", str(output)]
        assert main(["measure", str(world.adapter), *options, *data]) == 0
        found[how] = load_measurement(output)
    assert (found["auto"].about["packed"], found["on"].about["packed"]) == ("no", "yes")
    assert found["on"].digests == found["auto"].digests
    assert_equal(found["on"], found["auto"], 2e-5)


def test_the_command_refuses_what_cannot_be_packed_before_it_loads_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tiny.world(tmp_path, alora_invocation_tokens=[5, 6])
    (world.base / "model.safetensors").unlink()
    assert main(["measure", str(world.adapter), "--data", str(world.data), "--packing", "on", "--device", "cpu"]) == 2
    assert "an aLoRA takes the tokens of all examples together" in capsys.readouterr().err


@pytest.mark.parametrize("make", [batches, packs])
def test_memory_that_runs_out_in_a_later_batchs_backward_pass_loses_nothing(make: Any) -> None:
    live, tokenized, tried = exact_live(), rows(8), []
    layer = live.model.get_base_model().model.layers[0]

    def fails(grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError

    def hungry(model: Any, batch: Any) -> torch.Tensor:
        tried.append(len(batch))
        with ExitStack() as stack:
            if len(tried) == 2:
                hook = layer.register_forward_hook(lambda _, __, out: out.register_hook(fails) and None)
                stack.callback(hook.remove)
            return answer_loss(model, batch)

    made = make(tokenized, batch_size=4)
    found = measure_live(live, made, loss=hungry, checkpointing=True)
    assert tried[:2] == [4, 4]
    assert sum(tried[2:]) == 4
    assert_equal(found, measure_live(live, batches(tokenized)), 1e-12)
