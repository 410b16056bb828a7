"""LoRA files of image models: read, edited, resized and written back in their own format."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import image_lora
import pytest
import safetensors.torch
import torch
from image_lora import BLOCKS, KOHYA_HEADER, deltas, kohya, older, saved
from safetensors import safe_open
from safetensors.torch import load_file

from spectral_surgery import Adapter, Selection, edit, export, policies
from spectral_surgery.adapter.block_names import dotted
from spectral_surgery.cli import main
from spectral_surgery.errors import AdapterError, OutputError, RunError
from spectral_surgery.inspecting import inspect, read, to_json
from spectral_surgery.terminal import render


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "style.safetensors", kohya(), KOHYA_HEADER)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_kohya_file_s_updates_are_alpha_over_rank_times_up_down(source: Path) -> None:
    adapter = Adapter.load(source)
    expected = deltas(load_file(source))
    assert [adapter.config.base_model, len(adapter.updates)] == ["sd_xl_base_1.0.safetensors", len(BLOCKS)]
    paths = dotted(expected)
    for stem, delta in expected.items():
        update = adapter.updates[paths[stem]]
        dense = update.scale * update.B.double() @ update.A.double()
        torch.testing.assert_close(dense, delta.flatten(1), rtol=1e-12, atol=1e-12)


def test_flat_names_become_paths_with_their_blocks() -> None:
    names = {
        BLOCKS[0]: "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        BLOCKS[2]: "unet.input_blocks.7.1.transformer_blocks.0.attn1.to_out.0",
        BLOCKS[3]: "unet.middle_block.1.proj_in",
        BLOCKS[6]: "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
        "lora_unet_double_blocks_7_img_attn_qkv": "unet.double_blocks.7.img_attn.qkv",
        "lora_unet_single_blocks_30_linear1": "unet.single_blocks.30.linear1",
        "lora_transformer_single_transformer_blocks_3_attn_to_k": "transformer.single_transformer_blocks.3.attn.to_k",
        "transformer.transformer_blocks.3.attn.to_k": "transformer.transformer_blocks.3.attn.to_k",
        "unet.down_blocks.0.attn1.processor.to_q": "unet.down_blocks.0.attn1.processor.to_q",
    }
    assert dotted(names) == names
    assert dotted(["lora_te_a_b", "lora_te1_a_b"]) == {name: name for name in ("lora_te_a_b", "lora_te1_a_b")}


@pytest.mark.parametrize(
    ("down", "up", "path"),
    [
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "unet.a.to_q"),
        ("unet.a.to_q.lora_A.default.weight", "unet.a.to_q.lora_B.default.weight", "unet.a.to_q"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight", "unet.a.to_q"),
        ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight", "unet.a.processor.to_q"),
        ("te.q_proj.lora_linear_layer.down.weight", "te.q_proj.lora_linear_layer.up.weight", "te.q_proj"),
        ("diffusion_model.x.lora_down.weight", "diffusion_model.x.lora_up.weight", "diffusion_model.x"),
        ("d.processor.proj_lora2.down.weight", "d.processor.proj_lora2.up.weight", "d.processor.proj_lora2"),
    ],
)
def test_every_spelling_of_a_pair_is_read_with_scale_one_where_no_alpha_is(
    down: str, up: str, path: str, tmp_path: Path
) -> None:
    tensors = older(down, up)
    adapter = Adapter.load(saved(tmp_path / "a.safetensors", tensors))
    assert list(adapter.updates) == [path]
    update = adapter.updates[path]
    assert (update.scale, update.A.shape, update.B.shape) == (1.0, (4, 12), (20, 4))
    export(adapter, "rank=2", tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {down: (2, 12), up: (20, 2)}
    U, S, Vh = torch.linalg.svd(tensors[up].double() @ tensors[down].double(), full_matrices=False)
    torch.testing.assert_close(
        written[up].double() @ written[down].double(), (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-5, atol=1e-5
    )


def test_an_identity_edit_writes_the_same_tensors_and_header(source: Path, tmp_path: Path) -> None:
    edited, _ = edit(Adapter.load(source), policies.Identity())
    edited.save(tmp_path / "out.safetensors")
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = json.loads(header(tmp_path / "out.safetensors").pop("spectral_surgery"))
    assert added["source"]["folder"] == str(source)
    assert {**header(tmp_path / "out.safetensors"), "spectral_surgery": ""} == {**KOHYA_HEADER, "spectral_surgery": ""}
    edited.save(tmp_path / "folder")
    assert header(tmp_path / "folder" / "style.safetensors") == KOHYA_HEADER
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"style.safetensors", "spectral_surgery.json"}
    again = Adapter.load(tmp_path / "folder")
    assert again.digest == Adapter.load(source).digest
    again.save(tmp_path / "third")
    assert header(tmp_path / "third" / "style.safetensors") == KOHYA_HEADER


def test_an_edit_changes_what_was_selected_and_by_default_everything(source: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(source)
    some, _ = edit(adapter, policies.Scale(strength=0.5), selection=Selection(modules=("*.input_blocks.4.*",)))
    some.save(tmp_path / "some.safetensors")
    before, after = load_file(source), load_file(tmp_path / "some.safetensors")
    for name, tensor in before.items():
        if "input_blocks_4" in name and "lora_up" in name:
            torch.testing.assert_close(after[name], tensor / 2, rtol=2e-3, atol=0)
        else:
            assert torch.equal(after[name], tensor), name
    every, report = edit(adapter, policies.Flat())
    assert len(report.modules) == len(BLOCKS)
    every.save(tmp_path / "every.safetensors")
    for name, delta in deltas(load_file(tmp_path / "every.safetensors")).items():
        S = torch.linalg.svdvals(delta.flatten(1))[: 4 if "in_layers" in name else 8]
        torch.testing.assert_close(S, S.mean().expand_as(S), rtol=5e-3, atol=0)


def test_the_hashes_in_the_header_are_those_of_the_new_content(source: Path, tmp_path: Path) -> None:
    edited, _ = edit(Adapter.load(source), policies.Scale(strength=0.5))
    edited.save(tmp_path / "out.safetensors")
    written = header(tmp_path / "out.safetensors")
    training = {key: value for key, value in written.items() if key.startswith("ss_")}
    content = safetensors.torch.save(load_file(tmp_path / "out.safetensors"), training)
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert written["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert written["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [2, 4])
def test_a_resized_file_is_the_best_of_its_rank_and_its_header_says_so(
    rank: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = saved(tmp_path / "style.safetensors", kohya(dtype), KOHYA_HEADER)
    exported = export(Adapter.load(source), f"rank={rank}", tmp_path / "out.safetensors")
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert list(before) == list(after)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    found = deltas(after)
    for name, delta in deltas(before).items():
        U, S, Vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        best = ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(delta.shape)
        assert float((found[name] - best).norm() / best.norm()) < tolerance
        assert after[f"{name}.lora_down.weight"].shape[0] == rank
        assert torch.equal(after[f"{name}.alpha"], before[f"{name}.alpha"])
    written = header(tmp_path / "out.safetensors")
    assert (written["ss_network_dim"], written["ss_network_alpha"]) == (str(rank), "4.0")
    assert json.loads(written["ss_network_args"]) == {"conv_dim": str(rank), "conv_alpha": "1"}
    assert written["ss_tag_frequency"] == KOHYA_HEADER["ss_tag_frequency"]
    if rank == 4:
        unchanged = "lora_unet_output_blocks_3_0_in_layers_2.lora_up.weight"
        assert torch.equal(before[unchanged], after[unchanged])
    assert exported.losses


def test_energy_gives_every_module_of_a_file_its_own_rank(source: Path, tmp_path: Path) -> None:
    exported = export(Adapter.load(source), "energy=0.7", tmp_path / "out.safetensors")
    assert exported.losses
    assert len({loss.after for loss in exported.losses.modules.values()}) > 1
    assert all(loss.kept**2 >= 0.7 * loss.norm**2 for loss in exported.losses.modules.values())
    assert header(tmp_path / "out.safetensors")["ss_network_dim"] == "Dynamic"


def test_block_strengths_are_baked_in_and_other_blocks_are_the_same(source: Path, tmp_path: Path) -> None:
    export(Adapter.load(source), "blocks=input=0.5,middle=1,output_blocks.3=0", tmp_path / "out.safetensors")
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    for name, tensor in before.items():
        factor = 0.5 if "input" in name else 0.0 if "output" in name else 1.0
        assert torch.equal(after[name], tensor * factor if "lora_up" in name else tensor), name


PEFT_HEADER = {
    "lora_adapter_metadata": json.dumps(
        {
            "transformer.r": 4,
            "transformer.lora_alpha": 6,
            "transformer.alpha_pattern": {"x": 2},
            "transformer.bias": "none",
        }
    )
}


def test_peft_s_configuration_in_the_header_decides_the_scale_and_follows_a_resize(tmp_path: Path) -> None:
    tensors = {
        **older("transformer.x.lora_A.weight", "transformer.x.lora_B.weight"),
        **older("transformer.y.lora_A.weight", "transformer.y.lora_B.weight"),
    }
    source = Adapter.load(saved(tmp_path / "a.safetensors", tensors, PEFT_HEADER))
    assert {path: update.scale for path, update in source.updates.items()} == {
        "transformer.x": 0.5,
        "transformer.y": 1.5,
    }
    export(source, "rank=3", tmp_path / "out.safetensors")
    changed = json.loads(header(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    assert (changed["transformer.r"], changed["transformer.lora_alpha"], changed["transformer.bias"]) == (3, 3, "none")
    assert (changed["transformer.rank_pattern"], changed["transformer.alpha_pattern"]) == ({}, {})
    for path, update in Adapter.load(tmp_path / "out.safetensors").updates.items():
        old = source.updates[path]
        U, S, Vh = torch.linalg.svd(old.scale * old.B.double() @ old.A.double(), full_matrices=False)
        torch.testing.assert_close(
            update.scale * update.B.double() @ update.A.double(), (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-5, atol=1e-5
        )


def test_a_variant_that_only_the_header_tells_of_is_refused(tmp_path: Path) -> None:
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.kasa_config": {"beta": 1}})}
    tensors = older("unet.x.lora_A.weight", "unet.x.lora_B.weight")
    with pytest.raises(AdapterError, match="lora_adapter_metadata has kasa_config switched on"):
        Adapter.load(saved(tmp_path / "a.safetensors", tensors, about))


def test_an_inspection_shows_the_blocks(source: Path) -> None:
    (view,) = inspect([read(str(source))])
    text = render([view])
    assert re.search(r"^unet\.input_blocks +4-7 +\S+ +\d+\.\d+ +\d+ %$", text, re.MULTILINE)
    (found,) = to_json([view])
    delta = sum(float(d.square().sum()) for n, d in deltas(load_file(source)).items() if "input_blocks_4" in n) ** 0.5
    assert found["blocks"]["unet.input_blocks.4"]["delta_norm"] == pytest.approx(delta, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_unet_a.hada_w1_a", "LoHa, whose update is a Hadamard product"),
        ("lora_unet_a.lokr_w1", "LoKr"),
        (f"{BLOCKS[0]}.dora_scale", "DoRA"),
        (f"{BLOCKS[4]}.lora_mid.weight", "LoCon with a middle factor"),
        ("lora_unet_a.oft_blocks", "OFT"),
        ("lora_unet_a.alpha", "of a kind that is not edited"),
        ("lora_unet_a.lora_down.weight", "the up factor is missing"),
    ],
)
def test_other_methods_are_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {**kohya(), name: torch.ones(3, 3)})
    with pytest.raises(AdapterError, match=reason):
        Adapter.load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{BLOCKS[0]}.alpha": torch.tensor(0.0)}, r"alpha is 0\.0, expected one positive number"),
        ({f"{BLOCKS[0]}.lora_up.weight": torch.ones(20, 3)}, r"up \(20, 3\) are no pair of LoRA factors"),
        ({f"{BLOCKS[0]}.lora_up.weight": torch.full((20, 8), float("nan"))}, "values that are not finite"),
        ({f"{BLOCKS[0]}.lora_up.weight": torch.ones(20, 8).to(torch.float8_e4m3fn)}, "has dtype torch.float8_e4m3fn"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, torch.Tensor], reason: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=reason):
        Adapter.load(saved(tmp_path / "a.safetensors", {**kohya(), **change}))


def test_what_is_no_lora_passes_through(tmp_path: Path) -> None:
    extra = {"lora_unet_norm.diff": torch.ones(5), "lora_unet_a.diff_b": torch.ones(2)}
    bias = f"{BLOCKS[0]}.lora_up.bias"
    path = saved(tmp_path / "a.safetensors", {**kohya(), **extra, bias: torch.ones(20)})
    export(Adapter.load(path), "rank=2", tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    assert torch.equal(written[bias], torch.full((20,), 2 / 8)), "alpha / rank grew by 8 / 2"


def test_a_file_is_overwritten_only_if_it_is_ours_and_the_source_never(source: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(source)
    other = saved(tmp_path / "other.safetensors", kohya())
    for path, reason in ((other, "was not written by spectral-surgery"), (source, "are the same")):
        before = path.read_bytes()
        with pytest.raises(OutputError, match=reason):
            export(adapter, "rank=2", path, overwrite=True)
        assert path.read_bytes() == before
    out = tmp_path / "out.safetensors"
    export(adapter, "rank=2", out)
    with pytest.raises(OutputError, match="Pass --overwrite"):
        export(adapter, "rank=3", out)
    export(adapter, "rank=3", out, overwrite=True)
    assert header(out)["ss_network_dim"] == "3"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, other.name, out.name}


def test_a_failure_while_a_file_is_written_leaves_the_old_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    export(Adapter.load(source), "rank=2", out)
    before = out.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(RunError, match=r"No space left on device\)\. Nothing was changed there"):
        export(Adapter.load(source), "rank=3", out, overwrite=True)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


def test_a_file_is_as_good_as_a_folder_on_the_command_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "diffusers"
    folder.mkdir()
    saved(folder / "pytorch_lora_weights.safetensors", older("unet.x.lora_A.weight", "unet.x.lora_B.weight"))
    assert main(["inspect", "style.safetensors", "diffusers"]) == 0
    assert main(["edit", "style.safetensors", "--policy", "scale:strength=0.5", "--output", "weak.safetensors"]) == 0
    assert main(["edit", "diffusers", "--policy", "flat", "--output", "flat"]) == 0
    assert main(["inspect", "weak.safetensors", "flat", "--fail-on", "error"]) == 0
    assert main(["restore", "weak.safetensors", "--output", "back.safetensors"]) == 0
    assert Path("back.safetensors").read_bytes() == source.read_bytes()
    for to, reason in (("portable", "a file for image tools"), ("merged", "base model is not loaded here")):
        assert main(["export", "style.safetensors", "--to", to, "--output", "x"]) == 2
        assert reason in capsys.readouterr().err
    Path("rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    assert main(["measure", "style.safetensors", "--data", "rows.jsonl"]) == 2


def test_a_file_that_holds_no_lora_says_what_to_pass(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", {"model.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match=r"none is a LoRA factor\. Pass a LoRA file"):
        Adapter.load(path)
    peft = {"base_model.model.x.lora_A.weight": torch.ones(2, 3), "base_model.model.x.lora_B.weight": torch.ones(3, 2)}
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}', encoding="utf-8")
    with pytest.raises(AdapterError, match=r"Pass the folder that holds adapter_config\.json"):
        Adapter.load(saved(folder / "adapter_model.safetensors", peft))
    with pytest.raises(AdapterError, match=r"The file is PEFT's, whose scale stands in adapter_config\.json"):
        Adapter.load(saved(tmp_path / "alone.safetensors", peft))


def test_the_builders_of_these_files_agree_with_einsum() -> None:
    tensors = image_lora.kohya(torch.float32)
    name = BLOCKS[4]
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    x = torch.randn(1, 12, 6, 6, generator=torch.Generator().manual_seed(2))
    apart = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)
    whole = torch.nn.functional.conv2d(x, deltas(tensors)[name].float() * 4, padding=1)
    torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-4)
