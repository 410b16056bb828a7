"""Folders that are no adapter, are damaged, or hold what cannot be edited exactly: each refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_surgery import Adapter, Live, edit, policies
from spectral_surgery.adapter import AdapterConfig
from spectral_surgery.adapter.config import (
    ADALORA,
    ADDITIVE,
    EXCLUSIVE,
    MULTIPLICATIVE,
    NEUTRAL,
    OF_KINDS,
    PROMPTS,
    REFUSED_FIELDS,
    ROUTED,
)
from spectral_surgery.errors import AdapterError, BaseModelError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
O_PROJ = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
A, B = O_PROJ.format("A"), O_PROJ.format("B")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny.lora(tiny.llama(), modules_to_save=["lm_head"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of a plain adapter, to be broken."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def refused(folder: Path | str, sentence: str, **where: str) -> None:
    with pytest.raises(AdapterError, match=sentence):
        Adapter.load(folder, **where)


def configure(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(raw | fields), encoding="utf-8")


def change(folder: Path, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(changed(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def test_what_is_no_adapter_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "gone", r"There is no folder .*gone\. Pass an adapter folder, or a Hub id")
    refused("gone", "There is no folder gone")
    refused(folder / WEIGHTS, r"is a file\. Pass the folder that holds adapter_config\.json")
    refused(folder, "is a local folder, which has no revision 'main'", revision="main")
    (folder / CONFIG).unlink()
    refused(folder, r"holds no adapter_config\.json\. Pass the folder that PEFT's save_pretrained wrote")


def test_a_folder_whose_sub_folders_hold_adapters_names_them(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "first")
    refused(run, r"but its sub-folder first does\. Pass --subfolder first")
    shutil.copytree(folder, run / "second")
    refused(run, r"but its sub-folders first, second do\. Pass --subfolder first")
    refused(run, "has no sub-folder 'third'", subfolder="third")
    assert Adapter.load(run, subfolder="second").folder == run / "second"


def test_a_hub_id_that_cannot_be_fetched_is_refused() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    refused(
        "nobody/no-such-adapter", "is no local folder, and the Hub does not give it .* Check the name, the network"
    )
    refused("no--body/a b", "is no local folder, and the Hub does not give it")


def test_weights_that_are_missing_or_damaged_are_refused(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 100, 4, 0):
        (folder / WEIGHTS).write_bytes(content[:kept])
        refused(folder, r"adapter_model\.safetensors is damaged or incomplete .* Download or save it again")
    (folder / WEIGHTS).unlink()
    refused(folder, r"holds neither adapter_model\.safetensors nor adapter_model\.bin")


class Harmful:
    """An object whose unpickling would make a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_is_read_without_running_code_from_it(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({A: torch.zeros(4, 32), "x": Harmful(tmp_path / "ran")}, folder / PICKLE)
    refused(folder, r"adapter_model\.bin cannot be read as plain tensors .* Save it as safetensors")
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(2)], folder / PICKLE)
    refused(folder, "does not hold a dictionary of tensors")
    (folder / PICKLE).write_bytes(b"PK\x03\x04 cut")
    refused(folder, "cannot be read as plain tensors")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", r"adapter_config\.json cannot be read: Expecting property name"),
        (b"\xff\xfe\x00", r"adapter_config\.json cannot be read: 'utf-8' codec"),
        (b"[1]", "holds list, expected a JSON object"),
        (b"{}", r"is not a PEFT adapter \(it has no peft_type\)"),
        (b'{"fine_tune_type": "lora", "num_layers": 4}', r"is an MLX adapter \(it has fine_tune_type\)\. Convert it"),
    ],
)
def test_a_configuration_that_is_not_pefts_is_refused(folder: Path, content: bytes, sentence: str) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(folder, sentence)


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors[A][1, 2:5] = torch.nan
    tensors[B][0, 0] = torch.inf
    return tensors


BROKEN = {
    "nan": (
        with_nan,
        r"2 things are wrong:\n.*layers\.1\.self_attn\.o_proj\.lora_A\.weight has 3 values that are not finite.*\n"
        r".*o_proj\.lora_B\.weight has 1 values",
    ),
    "nan_beside": (
        lambda tensors: {name: t if "lora_" in name else torch.nan * t for name, t in tensors.items()},
        r"base_model\.model\.lm_head\.weight has \d+ values that are not finite\. The training diverged",
    ),
    "no_lora_B": (
        lambda tensors: {name: t for name, t in tensors.items() if name != B},
        r"model\.layers\.1\.self_attn\.o_proj: lora_B is missing\. The file is incomplete",
    ),
    "no_lora_A": (lambda tensors: {name: t for name, t in tensors.items() if name != A}, "o_proj: lora_A is missing"),
    "rank_of_A": (
        lambda tensors: tensors | {A: torch.ones(3, 32)},
        "o_proj: lora_A has 3 rows but lora_B has 4 columns",
    ),
    "rank_of_both": (
        lambda tensors: tensors | {A: torch.ones(3, 32), B: torch.ones(32, 3)},
        r"o_proj: lora_A has 3 rows but adapter_config\.json says r=4\. Add it to rank_pattern",
    ),
    "no_prefix": (without_prefix, r"does not start with base_model\.model\., so PEFT would leave it out silently"),
    "no_suffix": (
        lambda tensors: {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if "lora_" in name},
        r"lora_[AB] does not end in \.weight, so PEFT would leave it out silently",
    ),
    "integers": (lambda tensors: tensors | {A: torch.ones(4, 32, dtype=torch.int8)}, r"lora_A has dtype torch\.int8"),
    "float8": (
        lambda tensors: tensors | {A: torch.ones(4, 32).to(torch.float8_e4m3fn)},
        r"lora_A has dtype torch\.float8_e4m3fn, expected one of torch\.float16",
    ),
    "unknown": (
        lambda tensors: tensors | {"base_model.model.model.layers.0.mlp.down_proj.lora_diag": torch.ones(4)},
        r"1 LoRA tensors are of a kind that is not edited, the first is .*\.lora_diag \(4,\)",
    ),
    "two_adapters": (
        lambda tensors: tensors | {A.replace(".weight", ".other.weight"): torch.ones(4, 32)},
        "LoRA tensors are of a kind that is not edited",
    ),
    "nested": (
        lambda tensors: tensors | {A.replace("o_proj", "experts.base_layer"): torch.ones(8, 32)},
        r"experts\.base_layer: lora_B is missing",
    ),
    "no_factors": (
        lambda tensors: {"base_model.model.lm_head.weight": torch.ones(2, 2)},
        "has 1 tensors and none is a LoRA factor",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_tensors_that_are_inconsistent_or_unknown_are_refused(folder: Path, what: str) -> None:
    changed, sentence = BROKEN[what]
    change(folder, changed)
    refused(folder, sentence)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"new_variant": {"x": 1}}, r"has the unknown field new_variant switched on \(\{'x': 1\}\)"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4': .* relative to a base weight .* Its start was random",
        ),
        ({"init_lora_weights": "pissa"}, "Convert it with spectral-surgery convert"),
        (
            {"init_lora_weights": "corda"},
            r"'corda': .* from data that is not in the file, .*\. Convert it where it was trained",
        ),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga': .* PEFT cannot load it right"),
        ({"init_lora_weights": "newest"}, "'newest', which is not known to leave B A as the update"),
        ({"r": 0}, r"adapter_config\.json: r is 0, expected a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a positive number"),
        ({"use_dora": True}, r"o_proj: lora_magnitude_vector is missing\. The file is incomplete"),
        ({"kasa_config": {"beta": 1}}, r"o_proj: lora_diag is missing\. The file is incomplete"),
        ({"use_dora": True, "kasa_config": {}, "use_qalora": True}, "use_dora and use_qalora switched on, a combina"),
        (
            {"ensure_weight_tying": True, "megatron_config": {"x": 1}, "r": 0},
            r"2 things are wrong:\n(.*\n)?.*Megatron",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS"},
            "This is a TRAINABLE_TOKENS adapter, which has no additive low-rank update",
        ),
        *[({field: True}, f"{field} switched on: {reason}") for field, reason in REFUSED_FIELDS.items()],
    ],
)
def test_a_configuration_that_may_change_the_update_is_refused(
    folder: Path, fields: dict[str, Any], sentence: str
) -> None:
    configure(folder, **fields)
    refused(folder, sentence)


def test_unknown_and_refused_fields_that_are_switched_off_are_no_fault(folder: Path) -> None:
    configure(folder, new_variant=None, another=False, third={}, use_dora=False, arrow_config=None)
    assert Adapter.load(folder).config.raw["third"] == {}


def test_every_field_that_peft_marks_as_a_variant_is_known_to_a_kind_or_refused() -> None:
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert "use_dora" in variants
    assert variants <= OF_KINDS | REFUSED_FIELDS.keys()
    assert variants - REFUSED_FIELDS.keys() == set(EXCLUSIVE) - {"use_qalora"}


def test_every_field_of_pefts_own_configurations_is_known() -> None:
    known = NEUTRAL | OF_KINDS | REFUSED_FIELDS.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set()
    assert {field.name for field in dataclasses.fields(peft.AdaLoraConfig)} - known - ADALORA == set()


def test_every_adapter_type_of_peft_is_named_for_what_it_is() -> None:
    known = ADDITIVE | MULTIPLICATIVE | PROMPTS | ROUTED
    for kind in peft.PeftType:
        if kind.value in ("LORA", "ADALORA"):
            continue
        with pytest.raises(AdapterError, match=f"This is a {kind.value} adapter"):
            AdapterConfig({"peft_type": kind.value})
    assert {kind.value for kind in peft.PeftType} >= known


KINDS = {
    "pissa": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "loha": (
        peft.LoHaConfig(target_modules=["q_proj"]),
        r"This is a LOHA adapter, and only LoRA is edited\. Convert it first with peft\.save_as_lora",
    ),
    "prompt": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "This is a PROMPT_TUNING adapter: it adds tokens or activations",
    ),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "This is a IA3 adapter: it multiplies or replaces weights",
    ),
    "oft": (
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
        "This is a OFT adapter: it multiplies or replaces weights",
    ),
    "vera": (peft.VeraConfig(target_modules=["o_proj"], r=4), r"Convert it first with peft\.save_as_lora"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapter_that_peft_writes_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, sentence = KINDS[kind]
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    refused(tmp_path, sentence)


def test_grouped_convolutions_are_refused_by_their_shapes_and_dilated_ones_when_loaded(tmp_path: Path) -> None:
    for name, options in {"grouped": {"groups": 2}, "dilated": {"dilation": 2}}.items():
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, **options)), LoraConfig(r=2, target_modules=["0"]))
        model.save_pretrained(tmp_path / name)
        if name == "grouped":
            refused(
                tmp_path / name, r"0: lora_A \(2, 4, 3, 3\) and lora_B \(6, 1, 1, 1\) are of a grouped convolution"
            )
        else:
            with pytest.raises(
                BaseModelError, match=r"1 groups and dilation \(2, 2\), and PEFT's LoRA does not compute"
            ):
                Live(model)


def test_an_update_that_cancels_in_16_bits_and_loftq_are_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        start, little = torch.randn(32, 2), 1e-3 * torch.randn(32, 2)
        down = torch.randn(2, 32)
        return tensors | {A: torch.cat([down, down]).half(), B: torch.cat([start + little, -start], 1).half()}

    Adapter.load(folder)
    assert not caplog.text
    change(folder, converted)
    configure(folder, init_lora_weights="loftq")
    Adapter.load(folder)
    assert "layers.1.self_attn.o_proj: the update is less than 0.01 of its 16-bit factors" in caplog.text
    assert "part of its update repairs the rounding of the quantised base" in caplog.text


def test_a_model_without_the_adapter_or_with_another_kind_is_refused() -> None:
    with pytest.raises(AdapterError, match="The model has no adapter 'other', but 'default'"):
        Adapter.from_model(tiny.lora(tiny.llama()), "other")
    with pytest.raises(AdapterError, match="init_lora_weights is 'olora'"):
        Adapter.from_model(tiny.lora(tiny.llama(), init_lora_weights="olora"))


def test_an_adapter_of_another_layout_is_not_loaded_into_a_model() -> None:
    edited, _ = edit(Adapter.from_model(tiny.lora(tiny.llama())), policies.Scale())
    with pytest.raises(AdapterError, match=r"4 tensors differ .* the first is .*k_proj.*lora_A.* Load the adapter"):
        edited.apply_(tiny.lora(tiny.llama(), target_modules=[*tiny.TARGETS, "k_proj"]))
    model = tiny.lora(tiny.llama(), r=3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(AdapterError, match="16 tensors differ"):
        edited.apply_(model)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
