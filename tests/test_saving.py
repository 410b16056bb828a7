"""Saving as one step: what it refuses, what it records and checks, and what a failure leaves."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from spectral_surgery import Adapter, edit, policies
from spectral_surgery.adapter import saving
from spectral_surgery.errors import OutputError, RunError
from spectral_surgery.selection import Selection

PATHS = ["layers.0.o_proj", "layers.1.o_proj"]
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "some/base"}
WRITTEN = {"adapter_config.json", "adapter_model.safetensors", "spectral_surgery.json", "README.md"}


def made(folder: Path, seed: int = 0) -> Adapter:
    """An adapter read from a folder that holds it and a README."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in PATHS:
        for side, shape in (("A", (3, 16)), ("B", (20, 3))):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = torch.randn(shape, generator=generator)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "README.md").write_text("a card", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return Adapter.load(folder)


def weaker(adapter: Adapter, strength: float) -> Adapter:
    return edit(adapter, policies.Scale(strength=strength))[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Adapter:
    return made(tmp_path / "source")


def test_a_manifest_says_what_was_done_to_what(source: Adapter, tmp_path: Path) -> None:
    edited, report = edit(source, policies.RandomIndex())
    edited.save(tmp_path / "out", manifest={"policy": "random_index", "seed": 0})
    manifest = json.loads((tmp_path / "out" / saving.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["policy"] == "random_index"
    assert manifest["source"] == {
        "name": str(source.folder),
        "folder": str(source.folder),
        "tensors_sha256": source.digest,
        "recorded_base_model": "some/base",
        "recorded_base_revision": None,
    }
    assert manifest["result"]["tensors_sha256"] == Adapter.load(tmp_path / "out").digest == edited.digest
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["command"] == sys.argv
    assert list(manifest["modules"]) == PATHS
    for path, module in manifest["modules"].items():
        np.testing.assert_allclose(module["gates"], report.modules[path].gates, rtol=1e-8)
        np.testing.assert_allclose(module["S"], report.modules[path].S, rtol=1e-8)
        assert module["edit_size"] == report.modules[path].size


def test_a_new_or_empty_folder_is_written_and_its_parents_are_made(source: Adapter, tmp_path: Path) -> None:
    assert source.save(tmp_path / "a" / "b" / "out") == tmp_path / "a" / "b" / "out"
    (tmp_path / "empty").mkdir()
    source.save(tmp_path / "empty")
    assert names(tmp_path / "a" / "b" / "out") == names(tmp_path / "empty") == WRITTEN
    assert names(tmp_path) == {"source", "a", "empty"}


def test_a_folder_of_ours_is_replaced_only_when_asked_and_as_a_whole(source: Adapter, tmp_path: Path) -> None:
    out = source.save(tmp_path / "out")
    (out / "stale.txt").write_text("from before", encoding="utf-8")
    with pytest.raises(OutputError, match=r"The output folder .*out exists\. Pass --overwrite"):
        weaker(source, 0.5).save(out)
    assert Adapter.load(out).digest == source.digest
    weaker(source, 0.5).save(out, overwrite=True)
    assert Adapter.load(out).digest == weaker(source, 0.5).digest
    assert names(out) == WRITTEN
    assert names(tmp_path) == {"source", "out"}


@pytest.mark.parametrize("manifest", [None, "{}", "{", "5", '["spectral_surgery"]'])
def test_a_folder_without_our_manifest_is_never_overwritten(
    source: Adapter, tmp_path: Path, manifest: str | None
) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    if manifest:
        (foreign / saving.MANIFEST).write_text(manifest, encoding="utf-8")
    before = names(foreign)
    with pytest.raises(OutputError, match=r"was not written by spectral-surgery .* so it is never overwritten"):
        source.save(foreign, overwrite=True)
    assert names(foreign) == before
    with pytest.raises(OutputError, match=r"cat\.jpg is a file\. Choose a folder"):
        source.save(foreign / "cat.jpg", overwrite=True)
    assert (foreign / "cat.jpg").read_bytes() == b"cat"


def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "link").symlink_to(tmp_path / "source", target_is_directory=True)
    (tmp_path / "inner").symlink_to(tmp_path / "source" / "new", target_is_directory=True)
    return {
        "same": tmp_path / "source",
        "inside": tmp_path / "source" / "deep" / "out",
        "around": tmp_path,
        "dotted": tmp_path / "source" / ".." / "source",
        "linked": tmp_path / "link",
        "inside a link": tmp_path / "link" / "out",
        "a dead link into it": tmp_path / "inner",
    }


@pytest.mark.parametrize(
    "where", ["same", "inside", "around", "dotted", "linked", "inside a link", "a dead link into it"]
)
def test_the_source_is_never_touched(source: Adapter, tmp_path: Path, where: str) -> None:
    source.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / saving.MANIFEST, source.folder)
    before = names(source.folder)
    with pytest.raises(OutputError, match=r"are the same or lie in one another\. Choose an output folder outside"):
        weaker(source, 0.5).save(places(tmp_path)[where], overwrite=True)
    assert names(source.folder) == before
    assert Adapter.load(source.folder).digest == source.digest


def test_a_link_to_a_folder_of_ours_stays_a_link(source: Adapter, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    source.save(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    with pytest.raises(OutputError, match="Pass --overwrite"):
        source.save(tmp_path / "out")
    weaker(source, 0.5).save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert Adapter.load(tmp_path / "disk" / "real").digest == weaker(source, 0.5).digest
    assert names(tmp_path / "disk") == {"real"}


def test_a_path_below_a_file_ends_the_save_with_a_sentence(source: Adapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match=r"Saving to .*file/out failed .* Nothing was changed there"):
        source.save(tmp_path / "file" / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_target_as_it_was(
    source: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = source.save(tmp_path / "out")

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fails)
    expected = RunError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is RunError else None):
        weaker(source, 0.5).save(out, overwrite=True)
    assert Adapter.load(out).digest == source.digest
    assert names(tmp_path) == {"source", "out"}


def test_a_failure_between_the_renames_puts_the_old_version_back(
    source: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = source.save(tmp_path / "out"), os.rename

    def fails_once(old: Path, new: Path) -> None:
        if old.name == "new":
            raise PermissionError("not now")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(RunError, match=r"PermissionError: not now\)\. Nothing was changed there"):
        weaker(source, 0.5).save(out, overwrite=True)
    assert Adapter.load(out).digest == source.digest
    assert names(tmp_path) == {"source", "out"}


def spoiled(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    name = list(tensors)[-1]
    if change == "one bit":
        bits = tensors[name].clone().view(torch.int32)
        bits[0, 0] ^= 1
        return tensors | {name: bits.view(torch.float32)}
    return {key: tensor for key, tensor in tensors.items() if PATHS[0] not in key}


@pytest.mark.parametrize("change", ["one bit", "a module less"])
def test_a_written_file_that_does_not_hold_what_was_edited_ends_the_save(
    source: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    save_file = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda t, *a, **k: save_file(spoiled(t, change), *a, **k))
    with pytest.raises(RunError, match="The written file does not hold what was edited"):
        weaker(source, 0.5).save(tmp_path / "out")
    assert names(tmp_path) == {"source"}


def test_an_update_that_misses_its_gates_ends_the_save(source: Adapter, tmp_path: Path) -> None:
    edited, report = edit(source, policies.Scale(strength=0.5))
    other, _ = edit(source, policies.Scale(strength=0.5001))
    path = PATHS[0]
    mixed = edited.with_updates({path: other.updates[path]}, report)
    with pytest.raises(RunError, match=rf"{path}: the written update misses the intended singular values"):
        mixed.save(tmp_path / "out")
    assert names(tmp_path) == {"source"}


@pytest.mark.parametrize("strength", [0.0, 1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_strength_can_be_saved(source: Adapter, tmp_path: Path, strength: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in source.tensors.items()}
    stored = Adapter(source.config, tensors)
    edited, _ = edit(stored, policies.Scale(strength=strength), selection=Selection(("all",)))
    edited.save(tmp_path / "out")
    before, after = (adapter.updates[PATHS[0]] for adapter in (stored, Adapter.load(tmp_path / "out")))
    wanted = strength * before.B.double() @ before.A.double()
    error = (after.B.double() @ after.A.double() - wanted).norm()
    assert error <= torch.finfo(dtype).eps * wanted.norm() + 1e-12 * before.B.double().norm()


def test_two_savers_do_not_mix(source: Adapter, tmp_path: Path) -> None:
    refusals = []

    def second() -> None:
        with pytest.raises(OutputError, match=r"Another process is saving to .*out\. Wait for it") as caught:
            source.save(tmp_path / "out", overwrite=True)
        refusals.append(caught)

    def write(new: Path) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        (new / "file").write_text("first", encoding="utf-8")

    saving.write_folder(tmp_path / "out", write)
    assert len(refusals) == 1
    assert names(tmp_path) == {"source", "out"}
    assert names(tmp_path / "out") == {"file"}
