"""Every kind of adapter: PEFT builds it, the package edits it, stock PEFT loads it, a dense formula is the judge."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from kind_errors import DTYPES, Stored, batch_of, relative, sensitivity_error
from kinds import CASES, of_tokens
from safetensors.torch import load_file

from spectral_surgery import Adapter, Live, edit, policies
from spectral_surgery.adapter.kinds import KINDS, kind_of
from spectral_surgery.adapter.kinds.kind import modules
from spectral_surgery.inspecting import inspect, read
from spectral_surgery.live import check_fits
from spectral_surgery.measuring import measure_live
from spectral_surgery.selection import Selection
from spectral_surgery.surgery import operate

EXACT = 3e-6
"""Relative error of logits between two ways of computing in float32."""
ROUNDED = 4e-2
"""The same where factors were rounded to bfloat16."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory):
    @functools.cache
    def make(name: str, dtype: str) -> Stored:
        return Stored.make(name, dtype, tmp_path_factory.mktemp(f"{name}-{dtype}"))

    return make


def raw(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_file_live_gates_and_dense_formula_agree(name: str, dtype: str, stored) -> None:
    one = stored(name, dtype)
    errors, allowed = one.errors(), EXACT
    if dtype == "bfloat16":  # of the order of what rounding the unedited factors costs
        allowed = 3 * relative(one.by_peft(), stored(name, "float32").by_peft())
    assert errors["effect"] > 0.1
    assert errors["identity"] < EXACT
    assert errors["gates"] < allowed
    assert errors["live"] < allowed


@pytest.mark.parametrize("name", CASES)
def test_sensitivities_equal_central_differences(name: str) -> None:
    assert sensitivity_error(name) < (1e-7 if CASES[name].step < 1e-4 else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_an_identity_edit_is_written_bit_by_bit(name: str, dtype: str, stored, tmp_path: Path) -> None:
    one = stored(name, dtype)
    edited, report = edit(one.adapter, policies.Identity(), selection=Selection(("all",)))
    edited.save(tmp_path / "out")
    assert report.components > 0
    assert report.edited == 0
    assert raw(tmp_path / "out") == raw(one.folder / "adapter")


@pytest.mark.parametrize("name", CASES)
def test_an_edit_changes_the_factors_that_the_kind_says_and_no_other_tensor(name: str, stored) -> None:
    one = stored(name, "bfloat16")
    before, after = raw(one.folder / "adapter"), raw(one.edited)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {slot.name for entry in one.adapter.stored.values() for slot in entry.slots}
    assert {key: value[:2] for key, value in before.items()} == {key: value[:2] for key, value in after.items()}
    roles = {key.rpartition("lora_")[2].removesuffix(".weight") for key in changed}
    allowed = {"mica": {"A", "embedding_A"}, "bdlora": {"A", "B"}, "tied": {"embedding_B", "A", "B"}}
    assert roles <= allowed.get(name, {"B", "embedding_B"})


@pytest.mark.parametrize("name", CASES)
def test_every_module_is_of_the_kind_that_it_is_named_for(name: str, stored) -> None:
    adapter = stored(name, "float32").adapter
    kinds = {kind_of(adapter.config, module).name for module in modules(adapter.tensors).values()}
    assert CASES[name].kind in kinds
    assert kinds <= {CASES[name].kind, "LoRA on linear layers", "LoRA on a tied output head"}


def test_every_kind_in_the_registry_has_a_case() -> None:
    without = {"LoRA on a tied output head", "QALoRA"}
    assert {kind.name for kind in KINDS} == {case.kind for case in CASES.values()} | without


@pytest.mark.parametrize("name", CASES)
def test_measuring_computes_the_same_losses_and_leaves_nothing_behind(
    name: str, stored, caplog: pytest.LogCaptureFixture
) -> None:
    case, one = CASES[name], stored(name, "float32")
    model, batch = case.reloaded(one.folder / "adapter"), batch_of(CASES[name])
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)] if case.alone else [batch]
    with torch.no_grad():
        plain = torch.cat([case.loss(model, row) for row in rows])
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, "spectral_surgery"):
        found = measure_live(Live(model, one.adapter), [batch, batch], loss=case.loss)
    np.testing.assert_array_equal(found.losses, torch.cat([plain, plain]).double().numpy())
    assert caplog.text.count("Measuring one example at a time") == case.alone
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in model.modules())
    used = [np.any(module.gate_gradient) for module in found.modules.values()]
    assert all(used) or (case.kind == "LoRA on parameters (experts)" and np.mean(used) > 0.7)
    assert all((module.output_energy > 0).any() for module in found.modules.values())


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_in_a_loaded_model_is_edited_as_its_file_is(name: str, stored) -> None:
    one = stored(name, "float32")
    model = CASES[name].reloaded(one.folder / "adapter")
    adapter = Adapter.from_model(model)
    assert adapter.updates.keys() == one.adapter.updates.keys()
    adapter.with_updates(*operate(adapter.updates, one.gates)).apply_(model)
    assert (one.logits(model) - one.by_peft(one.edited)).norm() < EXACT * one.logits(model).norm()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.logits is of_tokens])
def test_the_skeleton_of_the_base_expects_these_tensors(name: str, stored) -> None:
    check_fits(stored(name, "float32").adapter, CASES[name].fresh().config)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_inspected(name: str, stored) -> None:
    one = stored(name, "bfloat16")
    (seen,) = inspect([read(str(one.folder / "adapter"))])
    assert list(seen.modules) == list(one.adapter.updates)
    assert seen.other_tensors == len([key for key in one.adapter.tensors if "lora_" not in key])


def test_the_documentation_prints_these_kinds_within_these_bounds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    table = page.split("<!-- table: make docs -->\n")[1].split("\n<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    notes = {kind.name: kind for kind in KINDS}
    known = [[c.kind, c.what, notes[c.kind].formula, notes[c.kind].edits] for c in CASES.values()]
    assert [row[:4] for row in rows] == known, "Run: make docs"
    bounds = [EXACT, EXACT, EXACT, EXACT, ROUNDED]
    for row, case in zip(rows, CASES.values(), strict=True):
        figures = [float(figure) for figure in row[4:]]
        assert all(figure <= 1.05 * bound for figure, bound in zip(figures, bounds, strict=False)), row
        assert figures[5] < (1e-7 if case.step < 1e-4 else 1e-3), row
