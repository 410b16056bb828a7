"""Other layouts, ranks and strengths of an adapter, as PEFT and the other programs read the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from spectral_surgery import Adapter, export
from spectral_surgery.cli import main
from spectral_surgery.errors import AdapterError, InputError, OutputError, RunError
from spectral_surgery.exporting import destination, job
from spectral_surgery.exporting.resizing import rank_for
from spectral_surgery.exporting.strength import block_strengths

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 5},
}
SOURCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
}


def saved(folder: Path, base: Any = None, dtype: torch.dtype | None = None, **changes: Any) -> Adapter:
    """An adapter that PEFT wrote."""
    tiny.lora(base or tiny.llama(), dtype=dtype, **changes).save_pretrained(folder)
    return Adapter.load(folder)


def deltas(folder: Path, base: Any = None) -> dict[str, torch.Tensor]:
    """What stock PEFT adds to every weight when it merges a folder, in float64."""
    model = (base or tiny.llama()).double()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    for name, weight in merged.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.double()
    after = dict(merged.merge_and_unload().named_parameters())
    found = {name: after[name].detach() - weight for name, weight in before.items()}
    return {name: delta for name, delta in found.items() if delta.abs().max() > 1e-12}


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank, from a dense decomposition."""
    U, S, Vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(delta.shape)


def raw(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def naive_deltas(folder: Path, scale: float) -> dict[str, torch.Tensor]:
    """B A times one number for all modules: what a program does that reads alpha and r alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        stem.removeprefix("base_model.model.") + ".weight": scale
        * tensors[f"{stem}.lora_B.weight"].double()
        @ tensors[f"{stem}.lora_A.weight"].double()
        for stem in stems
    }


@pytest.mark.parametrize("changes", SOURCES.values(), ids=SOURCES)
def test_a_portable_adapter_is_the_same_update_whatever_rule_reads_it(changes: dict[str, Any], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", **changes)
    exported = export(source, "portable", tmp_path / "out")
    config = raw(tmp_path / "out")
    rank = 6 if "rank_pattern" in changes else 4
    wanted = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert {key: config[key] for key in wanted} == wanted
    assert type(config["lora_alpha"]) is int
    expected = deltas(tmp_path / "source")
    assert len(expected) == 8
    for found in (deltas(tmp_path / "out"), naive_deltas(tmp_path / "out", scale=1.0)):
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-6 * float(delta.abs().max()))
    assert all(after < 1e-6 for _, after in exported.readings.values())
    source_errors = {name: before for name, (before, _) in exported.readings.items()}
    assert source_errors["PEFT, vLLM 0.32"] < 1e-6
    assert (source_errors["SGLang"] > 0.1) == bool(changes)
    assert (source_errors["vLLM to 0.30"] > 0.1) == ("rank_pattern" in changes)


def test_the_reading_of_the_source_is_the_error_that_a_program_makes(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", use_rslora=True, **PATTERNS)
    exported = export(source, "portable", tmp_path / "out")
    config, right = raw(tmp_path / "source"), deltas(tmp_path / "source")
    scales = {"vLLM to 0.30": config["lora_alpha"] / config["r"] ** 0.5, "SGLang": config["lora_alpha"] / config["r"]}
    for name, scale in scales.items():
        wrong = naive_deltas(tmp_path / "source", scale)
        error = sum(float((wrong[key] - right[key]).square().sum()) for key in right) ** 0.5
        norm = sum(float(delta.square().sum()) for delta in right.values()) ** 0.5
        assert exported.readings[name][0] == pytest.approx(error / norm, rel=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": ({"lora_bias": True}, "lora_bias is switched on"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is switched on"),
    "alora": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is switched on: aLoRA acts only from"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "Some modules are no linear layers"),
    "dora": ({"use_dora": True}, "use_dora is switched on"),
}


def test_an_update_that_is_relative_to_loftq_s_base_has_no_portable_form(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    changed = json.dumps({**raw(tmp_path / "source"), "init_lora_weights": "loftq"})
    (tmp_path / "source" / "adapter_config.json").write_text(changed, encoding="utf-8")
    with pytest.raises(AdapterError, match="no portable form: init_lora_weights is 'loftq'"):
        export(Adapter.load(tmp_path / "source"), "portable", tmp_path / "out")


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_servers_do_not_all_read_has_no_portable_form(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", **changes)
    with pytest.raises(AdapterError, match=rf"(?s)has no portable form: .*{reason}.*Export it with --to merged"):
        export(source, "portable", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_is_the_best_update_of_that_rank(changes: dict[str, Any], rank: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", **changes)
    exported = export(source, f"rank={rank}", tmp_path / "out")
    found, expected = deltas(tmp_path / "out"), deltas(tmp_path / "source")
    assert (raw(tmp_path / "out")["r"], raw(tmp_path / "out")["rank_pattern"]) == (rank, {})
    assert exported.losses
    for name, delta in expected.items():
        best = truncated(delta, rank)
        torch.testing.assert_close(found[name], best, rtol=1e-5, atol=2e-6 * float(delta.abs().max()))
        loss = exported.losses.modules[name.removesuffix(".weight")]
        assert loss.error == pytest.approx(float((best - delta).norm()), rel=1e-4, abs=1e-6)
        assert loss.kept**2 + float((best - delta).norm()) ** 2 == pytest.approx(loss.norm**2, rel=1e-6)


def test_in_bfloat16_a_lower_rank_loses_no_more_than_rounding_both_factors_does(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", dtype=torch.bfloat16)
    export(source, "rank=3", tmp_path / "out")
    found, expected = deltas(tmp_path / "out"), deltas(tmp_path / "source")
    assert {tensor.dtype for tensor in Adapter.load(tmp_path / "out").tensors.values()} == {torch.bfloat16}
    for name, delta in expected.items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        B, A = U[:, :3] * S[:3].sqrt(), S[:3].sqrt()[:, None] * Vh[:3]
        plain = (B.bfloat16().double() @ A.bfloat16().double() - B @ A).norm()
        assert float((found[name] - B @ A).norm()) <= 1.5 * float(plain) + 1e-9


def bases() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "Conv1D": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        "embedding": (tiny.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        "head": (tiny.llama, {"target_modules": ["lm_head"]}),
    }


@pytest.mark.parametrize("name", bases())
def test_other_layers_are_resized_in_their_own_layout(name: str, tmp_path: Path) -> None:
    base, changes = bases()[name]
    source = saved(tmp_path / "source", base(), **changes)
    export(source, "rank=2", tmp_path / "out")
    found, expected = deltas(tmp_path / "out", base()), deltas(tmp_path / "source", base())
    assert expected
    for key, delta in expected.items():
        torch.testing.assert_close(found[key], truncated(delta, 2), rtol=1e-5, atol=2e-6 * float(delta.abs().max()))


class Convolutions(nn.Module):
    """A module to adapt that is nothing but two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Conv2d(4, 6, 3), nn.Conv1d(6, 5, 2)


def test_convolutions_are_resized_with_their_kernels(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False)
    get_peft_model(Convolutions(), config).save_pretrained(tmp_path / "source")
    export(Adapter.load(tmp_path / "source"), "rank=2", tmp_path / "out")
    found, expected = (deltas(tmp_path / name, Convolutions()) for name in ("out", "source"))
    assert set(expected) == {"first.weight", "second.weight"}
    for key, delta in expected.items():
        torch.testing.assert_close(found[key], truncated(delta, 2), rtol=1e-5, atol=2e-6 * float(delta.abs().max()))


def test_a_rank_of_its_own_for_every_module_goes_into_the_patterns(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", r=8)
    together = export(source, "energy=0.8", tmp_path / "together")
    alone = export(source, "energy=0.8", tmp_path / "alone", per_module=True)
    assert together.losses
    assert alone.losses
    ranks = {path: loss.after for path, loss in alone.losses.modules.items()}
    assert len(set(ranks.values())) > 1
    assert {loss.after for loss in together.losses.modules.values()} == {max(ranks.values())}
    assert together.per_module == alone.parameters[1] < together.parameters[1]
    config = raw(tmp_path / "alone")
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert {path: config["rank_pattern"].get(path, config["r"]) for path in ranks} == ranks
    expected = deltas(tmp_path / "source")
    for name, delta in deltas(tmp_path / "alone").items():
        best = truncated(expected[name], ranks[name.removesuffix(".weight")])
        torch.testing.assert_close(delta, best, rtol=1e-5, atol=2e-6 * float(best.abs().max()))


def test_energy_and_ratio_keep_what_they_say() -> None:
    S = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64).numpy()
    energies = {0.01: 1, 64 / 85: 1, 0.76: 2, 80 / 85: 2, 0.95: 3, 84 / 85: 3, 0.99: 4, 1.0: 4}
    assert {share: rank_for(S, destination.Resize("energy", share)) for share in energies} == energies
    assert rank_for(0 * S, destination.Resize("energy", 0.9)) == 1
    ratios = {1.0: 1, 2.0: 1, 2.01: 2, 4.1: 3, 8.0: 3, 100.0: 4}
    assert {ratio: rank_for(S, destination.Resize("ratio", ratio)) for ratio in ratios} == ratios


def test_a_module_of_a_lower_rank_is_padded_or_with_its_own_rank_kept(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", **PATTERNS)
    export(source, "rank=3", tmp_path / "padded")
    export(source, "rank=3", tmp_path / "kept", per_module=True)
    name = "model.layers.0.self_attn.q_proj"
    found = [Adapter.load(tmp_path / folder).updates[name] for folder in ("source", "padded", "kept")]
    assert [update.A.shape[0] for update in found] == [2, 3, 2]
    assert torch.equal(found[2].A, found[0].A)
    assert torch.equal(found[1].A, torch.cat([found[0].A, torch.zeros(1, 32)]))
    assert raw(tmp_path / "kept")["rank_pattern"] == {f"model.layers.{i}.self_attn.q_proj": 2 for i in (0, 1)}


def test_a_bias_of_B_keeps_its_size_when_the_scale_goes_into_the_factors(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", lora_bias=True, bias="lora_only", lora_alpha=12)
    export(source, "rank=2", tmp_path / "out")
    for name, tensor in Adapter.load(tmp_path / "out").tensors.items():
        if name.endswith("lora_B.bias"):
            torch.testing.assert_close(tensor, 3 * source.tensors[name])
            assert tensor.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.5, 0.7, -1.0, 0.0])
def test_a_strength_multiplies_one_factor_and_rounds_once(strength: float, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", dtype=dtype, **PATTERNS)
    export(source, f"scale={strength}", tmp_path / "out")
    written = Adapter.load(tmp_path / "out").tensors
    for name, tensor in source.tensors.items():
        wanted = (strength * tensor.double()).to(dtype) if ".lora_B." in name else tensor
        assert torch.equal(written[name], wanted), name
    same = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("source", "out")]
    assert same[0] == same[1]


def test_a_bias_of_B_is_weakened_with_its_factors(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", lora_bias=True)
    export(source, "blocks=layers.0=0.5", tmp_path / "out")
    written = Adapter.load(tmp_path / "out").tensors
    for name, tensor in source.tensors.items():
        assert torch.equal(written[name], tensor / 2 if "layers.0" in name and ".lora_B." in name else tensor), name
        assert tensor.any()


PATHS = [
    "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "unet.input_blocks.5.1.transformer_blocks.0.attn1.to_q",
    "unet.middle_block.1.proj_in",
    "unet.output_blocks.3.0.in_layers.2",
    "unet.output_blocks.30.0.in_layers.2",
    "transformer.single_transformer_blocks.3.attn.to_q",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("input=0.5,middle=1,output_blocks.3=0", {0: 0.5, 1: 0.5, 2: 1.0, 3: 0.0}),
        ("input_blocks.4=2", {0: 2.0}),
        ("to_q=3,input=0.5", {0: 0.5, 1: 0.5, 5: 3.0}),
        ("unet=0.1,*.in_layers.2=-1", {0: 0.1, 1: 0.1, 2: 0.1, 3: -1.0, 4: -1.0}),
        ("single_transformer.3=0", {5: 0.0}),
    ],
)
def test_blocks_are_named_as_people_name_them(text: str, expected: dict[int, float]) -> None:
    wanted = destination.parse(f"blocks={text}")
    assert isinstance(wanted, destination.Blocks)
    assert block_strengths(PATHS, wanted) == {PATHS[i]: strength for i, strength in expected.items()}


def test_a_block_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"no module .* lies in 'down'\. It has: input_blocks\.4 to input_blocks\.5,"):
        block_strengths(PATHS, destination.Blocks({"down": 0.5}))


def test_blocks_of_a_language_model_are_scaled_and_the_rest_is_the_same(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    export(source, "blocks=layers.0=0.5,layers.0.mlp=0", tmp_path / "out")
    written = Adapter.load(tmp_path / "out").tensors
    for name, tensor in source.tensors.items():
        factor = 0.0 if "layers.0.mlp" in name else 0.5 if "layers.0" in name else 1.0
        assert torch.equal(written[name], factor * tensor if ".lora_B." in name else tensor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gguf", "gguf is not known. Choose from portable, merged, rank=R"),
        ("rank", "rank is not known"),
        ("rank=0", "the rank is 0, expected a whole number of at least 1"),
        ("rank=2.5", "expected a whole number"),
        ("energy=95", "expected a share of sum S"),
        ("ratio=0.5", "expected at least 1"),
        ("scale=half", "'half' is not a number"),
        ("scale=nan", "nan is not a finite number"),
        ("blocks=input", "'input' cannot be read. Write NAME=STRENGTH"),
    ],
)
def test_a_destination_that_means_nothing_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        destination.parse(text)


def test_more_rank_than_there_is_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", **PATTERNS)
    with pytest.raises(InputError, match=r"--to rank=7: the adapter's largest rank is 6"):
        export(source, "rank=7", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "lora_magnitude_vector belongs to its factors, so their rank"),
        (
            {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
            "not stored as one A and one B",
        ),
    ],
)
def test_factors_that_are_not_their_own_keep_their_rank(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = tiny.llama(tie_word_embeddings=bool(changes.get("ensure_weight_tying")))
    source = saved(tmp_path / "source", base, **changes)
    with pytest.raises(
        AdapterError,
        match=rf"{reason}.*Merge it with --to merged, or keep its rank.*policy\.( So it is with \d more modules\.)?$",
    ):
        export(source, "rank=2", tmp_path / "out")
    export(source, "scale=0.5", tmp_path / "weaker")
    assert (tmp_path / "weaker").is_dir()


def test_the_output_is_checked_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x", encoding="utf-8")
    monkeypatch.setattr(job, "refitted", None)
    with pytest.raises(OutputError, match="was not written by spectral-surgery"):
        export(source, "portable", tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="is a file, and this adapter is a folder"):
        export(source, "rank=2", tmp_path / "out.safetensors")


def test_a_program_that_would_misread_the_written_file_ends_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "source")
    monkeypatch.setattr(job, "readings_of", lambda folder, meant: {"PEFT": 0.0, "vLLM": 0.25})
    with pytest.raises(RunError, match=r"vLLM would read the written adapter with a relative error of 0\.25"):
        export(source, "portable", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command_says_what_an_export_loses_and_restore_leads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "adapter", **PATTERNS)
    common = ["export", "adapter", "--output", "out"]
    assert main([*common, "--to", "rank=2", "--dry-run"]) == 0
    assert not Path("out").exists()
    assert main([*common, "--to", "portable"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^llama.cpp +0\.\d+ +\d.*e-\d+$", text, re.MULTILINE)
    assert main([*common, "--to", "energy=0.5", "--overwrite"]) == 0
    assert re.search(r"^all +8 +2-6 +\d +\d+\.\d+ % +0\.\d+$", capsys.readouterr().out, re.MULTILINE)
    manifest = json.loads(Path("out/spectral_surgery.json").read_text(encoding="utf-8"))
    assert manifest["export"] == {"to": "resize", "rule": "energy", "value": 0.5}
    assert 0.5 < manifest["losses"]["energy_kept"] < 1
    assert main(["restore", "out"]) == 0
    assert main([*common, "--to", "rank=9"]) == 2
    assert main([*common, "--to", "nonsense"]) == 2
    assert "error: 2 things are wrong" in capsys.readouterr().err
