"""Adapter folders that PEFT wrote: read, edited and written back, with PEFT itself as the judge."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_surgery import Adapter, Live, edit, policies
from spectral_surgery.policies import Gates
from spectral_surgery.selection import Selection
from spectral_surgery.surgery import EditReport, operate

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def as_pickle(folder: Path) -> None:
    """Stores the weights as older PEFT releases did."""
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def with_adapter_name(folder: Path) -> None:
    """Puts the adapter's name into every factor's, as some trainers leave it there."""
    tensors = {
        name.replace(".weight", ".default.weight") if "lora_" in name else name: tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of adapter, and how its file is changed after PEFT wrote it."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: Callable[[], Any] = tiny.llama
    dtype: torch.dtype | None = None
    stored: Callable[[Path], None] = lambda folder: None


VARIANTS = {
    "plain": Variant(),
    "rslora": Variant({"use_rslora": True}),
    "patterns": Variant(
        {
            "rank_pattern": {"o_proj": 6, "layers.1.mlp.down_proj": 1, "^model.layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3, ".*1.self_attn.q_proj": 5, "layers.0": 99, "proj": 77},
        }
    ),
    "rslora_patterns": Variant(
        {"use_rslora": True, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"down_proj": 2.5}}
    ),
    "lora_bias": Variant({"lora_bias": True}, base=functools.partial(tiny.llama, attention_bias=True, mlp_bias=True)),
    "biases": Variant({"bias": "all", "target_modules": ["c_fc"], "fan_in_fan_out": True}, base=tiny.gpt2),
    "conv1d": Variant({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, base=tiny.gpt2),
    "modules_to_save": Variant({"modules_to_save": ["lm_head"]}),
    "trained_tokens": Variant({"trainable_token_indices": [3, 5]}),
    "head": Variant({"target_modules": ["o_proj", "lm_head"]}),
    "bfloat16": Variant(dtype=torch.bfloat16),
    "pickle": Variant(stored=as_pickle),
    "named": Variant(stored=with_adapter_name),
}
BESIDE = {"biases": ".bias", "modules_to_save": "lm_head", "trained_tokens": "trainable_tokens", "lora_bias": ".bias"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant as PEFT saved it."""

    name: str
    variant: Variant
    folder: Path

    @functools.cached_property
    def adapter(self) -> Adapter:
        return Adapter.load(self.folder)

    @property
    def precision(self) -> float:
        return 1e-5 if self.variant.dtype is None else 2e-2

    def model(self, folder: Path | None = None) -> PeftModel:
        """What stock PEFT loads from a folder."""
        return PeftModel.from_pretrained(self.variant.base(), str(folder or self.folder)).eval()

    def edited(self) -> tuple[Adapter, EditReport]:
        updates, report = operate(self.adapter.updates, random_gates(self.adapter))
        return self.adapter.with_updates(updates, report), report


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.lora(variant.base(), dtype=variant.dtype, **variant.settings)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_" not in name:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    variant.stored(folder)
    return Case(request.param, variant, folder)


def random_gates(adapter: Adapter) -> Gates:
    rng = np.random.default_rng(5)
    return {path: rng.uniform(0, 2, update.A.shape[0]) for path, update in adapter.updates.items()}


def lora_layers(model: PeftModel) -> dict[str, Any]:
    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


def delta_by_peft(layer: Any) -> Tensor:
    """What PEFT would add to the weight, in the orientation of nn.Linear."""
    delta = layer.get_delta_weight("default").detach().double()
    return delta.T if layer.fan_in_fan_out else delta


def gated_delta(update: Any, gates: np.ndarray) -> Tensor:
    U, S, Vh = torch.linalg.svd(update.B.double() @ update.A.double(), full_matrices=False)
    k = len(gates)
    return update.scale * (U[:, :k] * (S[:k] * torch.tensor(gates)) @ Vh[:k])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    rows = tiny.batch()
    return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits


def test_factors_and_scales_are_those_that_peft_computes_with(case: Case) -> None:
    layers = lora_layers(case.model())
    assert set(case.adapter.updates) == set(layers)
    for path, update in case.adapter.updates.items():
        assert update.scale == pytest.approx(layers[path].scaling["default"], rel=1e-12), path
        delta = update.scale * (update.B.double() @ update.A.double())
        assert relative(delta, delta_by_peft(layers[path])) < 1e-6, path


def test_the_variants_have_what_they_are_named_for(case: Case) -> None:
    if part := BESIDE.get(case.name):
        assert any(part in name for name in case.adapter.tensors)
    ranks = {update.A.shape[0] for update in case.adapter.updates.values()}
    assert ranks == {"patterns": {1, 2, 4, 6}, "rslora_patterns": {4, 7}}.get(case.name, {4})
    dtypes = {update.B.dtype for update in case.adapter.updates.values()}
    assert dtypes == {case.variant.dtype or torch.float32}


def raw_tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every stored tensor as dtype, shape and bytes."""
    tensors = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else torch.load(folder / PICKLE)
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def test_an_identity_edit_is_written_bit_by_bit(case: Case, tmp_path: Path) -> None:
    edited, report = edit(case.adapter, policies.Identity())
    edited.save(tmp_path / "out")
    assert report.edited == 0
    assert raw_tensors(tmp_path / "out") == raw_tensors(case.folder)
    assert (tmp_path / "out" / CONFIG).read_bytes() == (case.folder / CONFIG).read_bytes()


def test_stock_peft_reads_the_gated_update_from_the_edited_folder(case: Case, tmp_path: Path) -> None:
    edited, report = case.edited()
    edited.save(tmp_path / "out")
    layers = lora_layers(case.model(tmp_path / "out"))
    for path, update in case.adapter.updates.items():
        wanted = gated_delta(update, report.modules[path].gates)
        error = relative(delta_by_peft(layers[path]), wanted)
        assert error < report.modules[path].rounding + 1e-6, path
        assert report.modules[path].size > 0.1


def test_an_edit_changes_one_factor_of_each_module_and_no_other_tensor(case: Case, tmp_path: Path) -> None:
    edited, _ = case.edited()
    edited.save(tmp_path / "out")
    before, after = raw_tensors(case.folder), raw_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {slot.name for stored in case.adapter.stored.values() for slot in stored.slots}
    assert all(before[name][:2] == after[name][:2] for name in before)
    assert (tmp_path / "out" / CONFIG).read_bytes() == (case.folder / CONFIG).read_bytes()


def test_live_gates_equal_the_edited_folder_and_the_merged_model(case: Case, tmp_path: Path) -> None:
    edited, report = case.edited()
    edited.save(tmp_path / "out")
    model = case.model()
    unedited = logits(model)
    with Live(model).gated({path: module.gates for path, module in report.modules.items()}):
        gated = logits(model)
    reloaded = case.model(tmp_path / "out")
    assert relative(unedited, gated) > 0.1
    assert relative(logits(reloaded), gated) < case.precision
    assert relative(logits(reloaded.merge_and_unload()), gated) < case.precision
    assert torch.equal(logits(model), unedited)


def test_a_loaded_model_is_edited_without_a_folder(case: Case) -> None:
    model, other = case.model(), case.model()
    adapter = Adapter.from_model(model)
    for path, update in adapter.updates.items():
        assert torch.equal(update.B, case.adapter.updates[path].B.float())
        assert update.scale == case.adapter.updates[path].scale
    gates = random_gates(adapter)
    edited = adapter.with_updates(*operate(adapter.updates, gates))
    edited.apply_(model)
    with Live(other).gated(gates):
        assert relative(logits(model), logits(other)) < 1e-5
    adapter.apply_(model)
    assert torch.equal(logits(model), logits(other))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny.lora(tiny.llama()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of a plain adapter, to be broken."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def test_an_adapter_taken_from_a_model_is_saved_as_a_folder_that_peft_loads(tmp_path: Path) -> None:
    model = tiny.lora(tiny.llama(), rank_pattern={"o_proj": 2}, modules_to_save=["lm_head"])
    edited, _ = edit(Adapter.from_model(model), policies.Scale(strength=0.5))
    edited.save(tmp_path / "out")
    edited.apply_(model)
    reloaded = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "out")).eval()
    assert torch.equal(logits(reloaded), logits(model))


def test_a_strength_of_zero_is_the_base_model(folder: Path, tmp_path: Path) -> None:
    edited, _ = edit(Adapter.load(folder), policies.Scale(strength=0.0), selection=Selection(("all",)))
    edited.save(tmp_path / "out")
    reloaded = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "out")).eval()
    assert relative(logits(reloaded), logits(tiny.llama())) < 1e-6


def test_companions_and_metadata_go_along_and_training_state_does_not(folder: Path, tmp_path: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "made_by": "me"})
    tiny.tokenizer().save_pretrained(folder)
    companions = {"tokenizer.json", "tokenizer_config.json", "README.md", "chat_template.jinja", "LICENSE.txt"}
    left = {"optimizer.pt", "training_args.bin", "trainer_state.json", PICKLE, "rng_state.pth"}
    for name in (companions | left) - {"tokenizer.json", "tokenizer_config.json"}:
        (folder / name).write_text(name, encoding="utf-8")
    Adapter.load(folder).save(tmp_path / "out")
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert written.keys() == companions | {CONFIG, WEIGHTS, "spectral_surgery.json"}
    assert all(written[name].read_bytes() == (folder / name).read_bytes() for name in companions)
    with safe_open(written[WEIGHTS], framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "me"}


def test_safetensors_wins_over_a_stale_pickle_as_in_peft(folder: Path) -> None:
    expected = Adapter.load(folder).digest
    tensors = load_file(folder / WEIGHTS)
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / PICKLE)
    assert Adapter.load(folder).digest == expected


def test_weights_that_share_memory_in_a_pickle_are_saved(folder: Path, tmp_path: Path) -> None:
    tied = torch.randn(3, 3)
    tensors = {"base_model.model.lm_head.weight": tied, "base_model.model.embed.weight": tied}
    torch.save(load_file(folder / WEIGHTS) | tensors, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    Adapter.load(folder).save(tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_the_digest_is_of_names_dtypes_shapes_and_bytes(folder: Path) -> None:
    adapter = Adapter.load(folder)
    name, tensor = next(iter(adapter.tensors.items()))
    changes = [
        {name: tensor + 1e-6},
        {name: tensor.T.contiguous()},
        {name: tensor.view(torch.int32)},
        {"extra": torch.zeros(0)},
    ]
    digests = {dataclasses.replace(adapter, tensors={**adapter.tensors, **change}).digest for change in changes}
    assert len(digests | {adapter.digest}) == len(changes) + 1
    backwards = dataclasses.replace(adapter, tensors=dict(reversed(adapter.tensors.items())))
    assert backwards.digest == adapter.digest


def test_a_hub_id_is_downloaded_at_its_revision_without_what_is_no_part_of_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.lora(tiny.llama()).save_pretrained(tmp_path / "snapshot" / "sub")
    asked: dict[str, Any] = {}

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    adapter = Adapter.load("someone/adapter", revision="v2", subfolder="sub")
    assert len(adapter.updates) == 8
    assert (asked["repository"], asked["revision"]) == ("someone/adapter", "v2")
    wanted = [
        name
        for name in ("adapter_model.safetensors", "optimizer.pt", "model.safetensors", "checkpoint-9/x.pt")
        if any(Path(name).match(pattern) for pattern in asked["patterns"])
    ]
    assert wanted == ["adapter_model.safetensors"]
