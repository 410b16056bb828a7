"""From an edited folder back to its source, checked by hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from spectral_surgery import Adapter, edit, policies
from spectral_surgery.adapter import saving
from spectral_surgery.errors import AdapterError, OutputError
from spectral_surgery.restoring import restore

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny.lora(tiny.llama()).save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"state")
    return folder


@pytest.fixture
def source(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "source"))


@pytest.fixture
def edited(source: Path, tmp_path: Path) -> Path:
    return edit(Adapter.load(source), policies.Scale())[0].save(tmp_path / "edited")


def change_one_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_the_source_is_named(edited: Path, source: Path) -> None:
    assert restore(edited) == source.resolve()


def test_the_source_is_named_by_its_full_path_wherever_it_was_loaded_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edit(Adapter.load("source"), policies.Scale())[0].save("edited")
    monkeypatch.chdir("/")
    assert restore(tmp_path / "edited") == source.resolve()


def test_an_edit_of_an_edit_goes_back_to_the_folder_that_it_was_made_from(edited: Path, tmp_path: Path) -> None:
    twice = edit(Adapter.load(edited), policies.Scale())[0].save(tmp_path / "twice")
    assert restore(twice) == edited.resolve()


def test_a_copy_of_the_source_holds_what_belongs_to_the_adapter(edited: Path, source: Path, tmp_path: Path) -> None:
    restore(edited, tmp_path / "back")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"adapter_config.json", WEIGHTS, "README.md"}
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_source_stored_as_a_pickle_is_copied_as_one(source: Path, tmp_path: Path) -> None:
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    edited = edit(Adapter.load(source), policies.Scale())[0].save(tmp_path / "edited")
    restore(edited, tmp_path / "back")
    assert Adapter.load(tmp_path / "back").digest == Adapter.load(source).digest
    assert not (tmp_path / "back" / WEIGHTS).exists()


def test_the_same_tensors_in_another_file_format_are_unchanged(edited: Path, source: Path) -> None:
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    assert restore(edited) == source.resolve()


def test_a_source_that_has_changed_is_detected(edited: Path, source: Path, tmp_path: Path) -> None:
    expected = Adapter.load(source).digest
    change_one_number(source)
    found = Adapter.load(source).digest
    with pytest.raises(AdapterError, match=rf"has changed since .*edited was made .* is {found}, expected {expected}"):
        restore(edited, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_source_that_is_gone_is_named_with_its_hash(edited: Path, source: Path) -> None:
    expected = Adapter.load(source).digest
    shutil.rmtree(source)
    with pytest.raises(AdapterError, match=rf"was made from .*source .*, which is gone\. .* sha256 {expected}"):
        restore(edited)


def test_a_source_without_its_weights_is_refused(edited: Path, source: Path) -> None:
    (source / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="The adapter's weights are missing"):
        restore(edited)


def test_a_folder_that_was_not_written_here_is_refused(source: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no spectral_surgery\.json, so it was not written by"):
        restore(source)


def test_an_edit_of_a_loaded_model_has_no_folder_to_go_back_to(tmp_path: Path) -> None:
    out = edit(Adapter.from_model(tiny.lora(tiny.llama())), policies.Scale())[0].save(tmp_path / "out")
    with pytest.raises(AdapterError, match="was made from a model's adapter 'default', which has no folder"):
        restore(out)


def test_the_copy_goes_to_a_new_folder_only(edited: Path, source: Path, tmp_path: Path) -> None:
    for taken in (source, source / "inside", edited, edited / "inside", tmp_path):
        with pytest.raises(OutputError, match="are the same or lie in one another"):
            restore(edited, taken)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="is never overwritten"):
        restore(edited, tmp_path / "other")
    assert json.loads((edited / saving.MANIFEST).read_text(encoding="utf-8"))["source"]["folder"] == str(source)
