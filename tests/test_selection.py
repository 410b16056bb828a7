"""Which modules a selection names, and what it says when it names none."""

from __future__ import annotations

import pytest

from spectral_surgery.errors import SelectionError
from spectral_surgery.selection import Selection, kind, layer, select

LLAMA = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 2, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
GPT2 = [f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]


def names(paths: list[str], *modules: str, layers: str = "") -> list[str]:
    return select(paths, Selection(modules or ("auto",), layers))


def kinds(*modules: str, paths: list[str] = LLAMA) -> set[str]:
    return {kind(path) for path in names(paths, *modules)}


def test_by_default_the_modules_that_write_into_the_residual_stream_are_chosen() -> None:
    assert kinds() == {"o_proj", "down_proj"}
    assert kinds(paths=GPT2) == {"c_proj"}
    assert len(names(LLAMA)) == 8


def test_by_default_all_are_chosen_where_none_writes_into_the_residual_stream() -> None:
    paths = [path for path in LLAMA if kind(path) in ("q_proj", "k_proj")]
    assert names(paths) == paths


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (("all",), {"q_proj", "k_proj", "o_proj", "up_proj", "down_proj"}),
        (("residual",), {"o_proj", "down_proj"}),
        (("attention-inputs",), {"q_proj", "k_proj"}),
        (("up_proj",), {"up_proj"}),
        (("mlp.up_proj",), {"up_proj"}),
        (("*.mlp.*",), {"up_proj", "down_proj"}),
        (("q_proj,up_proj",), {"q_proj", "up_proj"}),
        (("q_proj", " residual "), {"q_proj", "o_proj", "down_proj"}),
    ],
)
def test_modules_are_chosen_by_preset_name_or_pattern(chosen: tuple[str, ...], expected: set[str]) -> None:
    assert kinds(*chosen) == expected


def test_a_name_matches_whole_parts_of_a_path() -> None:
    assert names(LLAMA, "model.layers.1.mlp.down_proj") == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(SelectionError):
        names(LLAMA, "proj")
    with pytest.raises(SelectionError):
        names(LLAMA, "1.mlp")


def test_the_order_is_that_of_the_adapter_and_no_module_comes_twice() -> None:
    assert names(LLAMA, "down_proj", "all", "q_proj") == LLAMA
    backwards = LLAMA[::-1]
    assert names(backwards, "q_proj", "o_proj") == [p for p in backwards if kind(p) in ("q_proj", "o_proj")]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0", {0}), ("1-2", {1, 2}), ("0, 2-20", {0, 2, 11}), (" 11 ", {11}), ("", {0, 1, 2, 11})],
)
def test_layers_are_numbers_and_inclusive_ranges(layers: str, expected: set[int]) -> None:
    assert {layer(path) for path in names(LLAMA, layers=layers)} == expected


def test_a_layer_is_a_whole_number_in_a_path() -> None:
    assert layer("model.layers.11.mlp.experts.3.down_proj") == 11
    assert layer("transformer.h.7") == 7
    assert layer("11.attention") == 11
    assert layer("lm_head") is None
    assert layer("conv2d.block1") is None


@pytest.mark.parametrize(
    ("modules", "layers", "sentence"),
    [
        ("o_prj", "", r"No module of this adapter matches 'o_prj'\. It has: down_proj, k_proj, .*pattern"),
        ("q_proj,o_prj", "", "matches 'o_prj'"),
        ("*.attn.*", "", r"matches '\*\.attn\.\*'"),
        ("auto", "3-9", r"No module of this adapter lies in layers 3-9\. It has layers 0 to 11\."),
        ("auto", "2-1", "lies in layers 2-1"),
        ("auto", "first", "Layers 'first' cannot be read. Write numbers and ranges such as 0-15,20"),
        ("auto", "1-", "Layers '1-' cannot be read"),
    ],
)
def test_a_selection_of_nothing_is_refused_and_lists_what_there_is(modules: str, layers: str, sentence: str) -> None:
    with pytest.raises(SelectionError, match=sentence):
        names(LLAMA, modules, layers=layers)


def test_a_preset_without_members_and_layers_without_numbers_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"matches 'attention-inputs'\. It has: c_proj"):
        names(["h.0.c_proj"], "attention-inputs")
    with pytest.raises(SelectionError, match="Its modules have no layer numbers"):
        names(["lm_head"], layers="0")
