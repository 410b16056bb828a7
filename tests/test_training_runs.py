"""A training is what a loop by hand gives, its adapters load in stock PEFT, and it goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectral_surgery.adapter import Adapter
from spectral_surgery.errors import InputError, RunError
from spectral_surgery.training import AdapterOptions, BaseOptions, RowOptions, ScheduleOptions, TrainOptions, running
from spectral_surgery.training.running import train

ROWS = tiny.rows(8)


def slow(method: str) -> Any:
    """A method that is tried where there is time."""
    return pytest.param(method, marks=pytest.mark.slow)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny base model on disk, with eight rows beside it."""
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path / "base"


def options(model: Path, name: str = "out", **changes: Any) -> TrainOptions:
    """Three steps over all rows at once, on the CPU."""
    there = TrainOptions(
        recipe="math",
        model=str(model),
        output=model.parent / name,
        rows=RowOptions(data=str(model.parent / "rows.jsonl"), format="prompt", max_length=32),
        adapter=AdapterOptions(rank=4, lora_alpha=8),
        schedule=ScheduleOptions(global_batch=8, micro_batch=4, epochs=3.0, learning_rate=1e-2, save_every=2),
        base=BaseOptions(cpu=True),
    )
    for field, value in changes.items():
        old = getattr(there, field)
        there = replace(there, **{field: replace(old, **value) if isinstance(value, dict) else value})
    return there


def points(folder: Path) -> list[dict[str, float]]:
    with (folder / "loss.csv").open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def answer_nll(model: Any, row: dict[str, str]) -> tuple[torch.Tensor, int]:
    """The summed loss of one answer with its end of text, and its tokens; characters are tokens here."""
    tokenizer = tiny.tokenizer()
    prompt = ["<s>", *row["prompt"], " "]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids([*prompt, *row["answer"], "</s>"])])
    scores = model(ids).logits[0, :-1].log_softmax(-1)
    chosen = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :]
    return -chosen.sum(), len(chosen)


def by_hand(base: Path, start: Path, steps: int, highest: float) -> tuple[list[tuple[float, float]], Any]:
    """Loss and gradient norm of every step of full-batch training, and the trained model."""
    config = LoraConfig.from_pretrained(start)
    config.inference_mode = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    set_peft_model_state_dict(model, weights(start))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(trained, lr=highest, betas=(0.9, 0.95), weight_decay=0.0)
    warm = math.ceil(0.1 * steps)
    found = []
    for step in range(steps):
        fallen = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        adam.param_groups[0]["lr"] = highest * (step / warm if step < warm else 0.01 + 0.99 * fallen)
        losses, counts = zip(*(answer_nll(model, row) for row in ROWS), strict=True)
        loss = sum(losses) / sum(counts)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        found.append((loss.item(), norm.item()))
        adam.step()
        adam.zero_grad()
    return found, model


def test_the_loss_curve_is_that_of_a_loop_by_hand(base: Path) -> None:
    # The learning rate of the first step is 0, so an adapter of one step is what training starts from.
    (start,) = train(options(base, "start", adapter={"dropout": 0.0}, schedule={"max_steps": 1}))
    (trained,) = train(options(base, adapter={"dropout": 0.0}, schedule={"epochs": 6.0}))
    expected, model = by_hand(base, start.folder, steps=6, highest=1e-2)
    found = points(trained.folder)
    torch.testing.assert_close(
        torch.tensor([[point["loss"], point["gradient_norm"]] for point in found]),
        torch.tensor(expected),
        rtol=1e-4,
        atol=1e-5,
    )
    assert expected[-1][0] < 0.8 * expected[0][0]
    by_name = {name.replace(".default", ""): weight for name, weight in model.named_parameters()}
    for name, weight in weights(trained.folder).items():
        torch.testing.assert_close(weight, by_name[name], rtol=1e-3, atol=1e-5)


def test_how_the_global_batch_is_reached_changes_nothing(base: Path) -> None:
    (together,) = train(options(base, "together", adapter={"dropout": 0.0}, schedule={"micro_batch": 8}))
    (apart,) = train(options(base, "apart", adapter={"dropout": 0.0}, schedule={"micro_batch": 2}))
    found = [[point["loss"] for point in points(each.folder)] for each in (together, apart)]
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-5, atol=1e-6)


@pytest.fixture
def before_saving(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits of every trained model as it is when it is saved."""
    seen: list[torch.Tensor] = []
    write = running.write_adapter

    def watched(prepared: Any, seed: int, model: Any, *rest: Any) -> None:
        seen.append(logits(model))
        write(prepared, seed, model, *rest)

    monkeypatch.setattr(running, "write_adapter", watched)
    return seen


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny.batch()["input_ids"]).logits


@pytest.mark.parametrize("method", ["lora", "pissa", *map(slow, ("rslora", "dora", "loraplus", "speclora"))])
def test_an_adapter_loads_in_stock_peft_and_computes_what_was_trained(
    method: Any, base: Path, before_saving: list[torch.Tensor]
) -> None:
    (trained,) = train(options(base, adapter={"method": method}))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untouched = logits(plain)
    found = logits(PeftModel.from_pretrained(plain, str(trained.folder)))
    torch.testing.assert_close(found, before_saving[0], rtol=1e-4, atol=1e-4)
    assert (found - untouched).abs().max() > 0.1
    curve = points(trained.folder)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert all(weight.dtype == torch.float32 for weight in weights(trained.folder).values())


def test_pissa_is_saved_as_lora_of_twice_the_rank(base: Path) -> None:
    (trained,) = train(options(base, adapter={"method": "pissa"}))
    config = json.loads((trained.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert {len(weight) for name, weight in weights(trained.folder).items() if "lora_A" in name} == {8}
    assert len(Adapter.load(trained.folder).updates) == 14


def test_pissa_on_a_16_bit_base_says_what_is_lost(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(options(base, adapter={"method": "pissa"}, base={"dtype": "bfloat16"}, schedule={"max_steps": 1}))
    assert "differs from what was trained by their rounding" in caplog.text


@pytest.mark.parametrize(
    ("method", "name", "ratio"), [("loraplus", "lora_B", 20.0), ("speclora", "lora_spec", 10.0), ("lora", "none", 1.0)]
)
def test_a_method_s_own_learning_rate_reaches_its_parameters(
    method: Any, name: str, ratio: float, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, float] = {}

    class Stop(Exception):
        pass

    def look(progress: Any) -> Any:
        from transformers import TrainerCallback

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                names = {id(weight): key for key, weight in model.named_parameters()}
                groups = kwargs["optimizer"].param_groups
                seen.update({names[id(w)]: group["initial_lr"] for group in groups for w in group["params"]})
                raise Stop

        return Look()

    monkeypatch.setattr(running, "_watch", look)
    with pytest.raises(Stop):
        train(options(base, adapter={"method": method}))
    rates = {key: rate / 1e-2 for key, rate in seen.items()}
    assert rates == pytest.approx({key: ratio if name in key else 1.0 for key in rates})
    assert name == "none" or any(name in key for key in rates)


def stopped_after(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("method", ["lora", *map(slow, ("pissa", "speclora"))])
def test_a_resumed_training_ends_where_one_without_a_break_does(method: Any, base: Path) -> None:
    schedule = {"global_batch": 4}
    (whole,) = train(options(base, "whole", adapter={"method": method}, schedule=schedule))
    broken = options(base, "broken", adapter={"method": method}, schedule=schedule)
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=stopped_after(5))
    assert not broken.output.exists()
    # The start of a checkpoint that was cut off.
    (base.parent / "broken.training" / "checkpoint-6").mkdir()
    (resumed,) = train(replace(broken, resume=True))
    assert points(resumed.folder) == points(whole.folder)
    expected = weights(whole.folder)
    for name, weight in weights(resumed.folder).items():
        assert torch.equal(weight, expected[name]), name


def test_several_seeds_give_several_adapters_and_resume_leaves_the_finished_ones(base: Path) -> None:
    chosen = options(base, schedule={"seeds": (0, 1), "max_steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train(chosen, progress=stopped_after(3))
    first = (chosen.output / "seed-0" / "adapter_model.safetensors").stat().st_mtime_ns
    trained = train(replace(chosen, resume=True))
    assert [each.seed for each in trained] == [1]
    assert (chosen.output / "seed-0" / "adapter_model.safetensors").stat().st_mtime_ns == first
    one, other = (weights(chosen.output / f"seed-{seed}") for seed in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_folder_says_how_it_was_made_and_no_checkpoint_is_left(base: Path) -> None:
    (trained,) = train(options(base))
    record = json.loads((trained.folder / "spectral_surgery.json").read_text(encoding="utf-8"))
    assert record["training"]["recipe"] == "math"
    assert (record["training"]["steps"], record["training"]["accumulation"], record["training"]["rows"]) == (3, 2, 8)
    assert record["result"]["tensors_sha256"] == Adapter.load(trained.folder).digest
    assert record["final_loss"] == points(trained.folder)[-1]["loss"]
    assert (trained.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(base.parent.iterdir())] == ["base", "out", "rows.jsonl"]
    assert Adapter.load(trained.folder).config.base_model == str(base)


def test_checkpoints_are_kept_where_that_is_asked_for(base: Path) -> None:
    (trained,) = train(options(base, schedule={"max_steps": 2}, keep_checkpoints=True))
    assert trained.work == base.parent / "out.training"
    assert (trained.work / "checkpoint-2").is_dir()


def test_a_loss_that_is_not_finite_ends_the_training_and_writes_nothing(base: Path) -> None:
    with pytest.raises(RunError, match="loss is nan at step"):
        train(options(base, schedule={"learning_rate": 1e30}))
    assert not (base.parent / "out").exists()


def test_an_unfinished_training_is_not_begun_anew_unasked(base: Path) -> None:
    chosen = options(base)
    with pytest.raises(KeyboardInterrupt):
        train(chosen, progress=stopped_after(2))
    with pytest.raises(InputError, match=r"out.training holds checkpoints of an unfinished training. Pass --resume"):
        train(chosen)
    train(replace(chosen, overwrite=True))
    with pytest.raises(InputError, match=r"exists\. Pass --overwrite"):
        train(chosen)
