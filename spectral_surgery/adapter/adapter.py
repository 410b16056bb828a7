"""The adapter: a PEFT LoRA folder as one immutable value.

Files are edited as files, not through a loaded model: PEFT re-saves a bfloat16 adapter as float32, changes the order
of its configuration and may convert its layout. Here the configuration is copied byte for byte, only tensors that an
edit changes change, and each keeps its dtype.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.adapter import files, kinds, portable, saving
from spectral_surgery.adapter.config import AdapterConfig
from spectral_surgery.adapter.doubts import doubts
from spectral_surgery.errors import AdapterError, OutputError, RunError
from spectral_surgery.manifest import source_record, with_result
from spectral_surgery.measurement import Measurement
from spectral_surgery.selection import Selection, select
from spectral_surgery.spectrum import LowRank, singular_values
from spectral_surgery.surgery import EditReport, spectra, unmeasured
from spectral_surgery.threads import each

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: configuration, tensors as stored, and the low-rank update of every module."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    """Every tensor of the file by name, on the CPU in its stored dtype."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The safetensors header's metadata."""
    folder: Path | None = None
    """Where it was read from; None for an adapter taken from a model."""
    name: str = ""
    """The folder or Hub id as the user gave it."""
    report: EditReport | None = None
    """What an edit did, on an edited adapter."""
    edited_from: Mapping[str, Any] | None = None
    """Name, folder and hash of the unedited adapter, on an edited one."""

    @classmethod
    def load(cls, name: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Adapter:
        """Returns the adapter in a folder or Hub repository.

        Args:
            name: A folder, a Hub id, or a .safetensors file as image tools write it (see :mod:`.diffusion`).
            revision: Branch, tag or commit of a Hub repository.
            subfolder: Where inside of it the adapter lies.

        Raises:
            AdapterError: If there is none, it is damaged, or of a kind that cannot be edited exactly.
        """
        folder = files.locate(str(name), revision=revision, subfolder=subfolder)
        if folder.is_file():
            from spectral_surgery.adapter import diffusion

            return diffusion.load(folder, str(name))
        adapter = cls._read(folder, str(name))
        for doubt in doubts(adapter.config, adapter.stored):
            log.warning("%s: %s", name, doubt)
        return adapter

    @classmethod
    def _read(cls, folder: Path, name: str) -> Adapter:
        config = AdapterConfig(files.read_config(folder))
        tensors, metadata = files.read_tensors(folder)
        adapter = cls(config, tensors, metadata, folder, name)
        adapter.stored  # noqa: B018 (checks every tensor now)
        return adapter

    @classmethod
    def from_model(cls, model: PeftModel, adapter_name: str = "default") -> Adapter:
        """Returns an adapter of a loaded PEFT model, as PEFT would save it, without a folder.

        Raises:
            AdapterError: If it is of a kind that cannot be edited exactly, or the model has no such adapter.
        """
        from peft import get_peft_model_state_dict

        if adapter_name not in model.peft_config:
            raise AdapterError(
                f"The model has no adapter {adapter_name!r}, but {', '.join(map(repr, model.peft_config))}."
            )
        config = AdapterConfig({k: _plain(v) for k, v in model.peft_config[adapter_name].to_dict().items()})
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        adapter = cls(config, tensors, {"format": "pt"}, None, f"a model's adapter {adapter_name!r}")
        adapter.stored  # noqa: B018
        return adapter

    def apply_(self, model: PeftModel, adapter_name: str = "default") -> None:
        """Loads this adapter's tensors into a PEFT model that has one of the same layout, in place.

        Raises:
            AdapterError: If the model's adapter has other tensors.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        # "auto" would ask the Hub for the base's configuration each time.
        embedded = any(name.endswith((".base_layer.weight", "embed_tokens.weight")) for name in self.tensors)
        there = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers="auto" if embedded else False
        )
        different = sorted(set(there) ^ set(self.tensors)) or [
            name for name in there if there[name].shape != self.tensors[name].shape
        ]
        if different:
            raise AdapterError(
                f"{len(different)} tensors differ between this adapter and the model's {adapter_name!r}, "
                f"the first is {different[0]}. Load the adapter that was edited."
            )
        set_peft_model_state_dict(model, dict(self.tensors), adapter_name=adapter_name)

    @cached_property
    def stored(self) -> Mapping[str, kinds.Stored]:
        """Every module's update and the tensors that hold it, by module path."""
        return kinds.read(self.config, self.tensors)

    @cached_property
    def updates(self) -> dict[str, LowRank]:
        """The low-rank update of every module, by module path."""
        return {path: stored.update for path, stored in self.stored.items()}

    @cached_property
    def digest(self) -> str:
        """sha256 of all tensors; the same for .bin and safetensors."""
        return files.digest(self.tensors)

    def spectrum_only(self, paths: Iterable[str] | None = None) -> Measurement:
        """Returns the modules' spectra as a Measurement of no examples, for policies that need no data."""
        updates = self.updates
        return unmeasured(spectra({path: updates[path] for path in (paths or updates)}))

    def with_updates(self, updates: Mapping[str, LowRank], report: EditReport) -> Adapter:
        """Returns an adapter with these modules' updates replaced; every other tensor is the same object."""
        changed: dict[str, Tensor] = {}
        for path, update in updates.items():
            stored = self.stored[path]
            if update.stored is not stored.update.stored:
                stored.write(update, self.tensors, changed)
        tensors = {**self.tensors, **changed}
        origin = self.edited_from or source_record(self)
        return replace(self, tensors=tensors, report=report, edited_from=origin)

    def scale_at(self, path: str, rank: int) -> float:
        """Returns the scale that new factors of a rank carry: one, which every program reads alike."""
        return 1.0

    def with_factors(self, updates: Mapping[str, LowRank]) -> Adapter:
        """Returns an adapter with other factors, of any rank and scale one, in every module.

        Raises:
            AdapterError: If a module's factors are not stored as one A and one B.
        """
        raw, tensors = portable.with_factors(self.config.raw, self.stored, self.tensors, updates)
        origin = self.edited_from or source_record(self)
        return replace(self, config=AdapterConfig(raw), tensors=tensors, report=None, edited_from=origin)

    def select(self, selection: Selection) -> list[str]:
        """Returns the selected module paths.

        Raises:
            SelectionError: If the selection names nothing.
        """
        return select(self.updates, selection)

    def save(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        manifest: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Writes a PEFT adapter folder as one step, reads it back and verifies it.

        Args:
            out: Folder to write; never the source, nor inside of it.
            overwrite: Replace a folder that carries our manifest.
            manifest: What to record beside hashes and versions.
            check: Looks at the written folder before it is put in place; what it raises ends the save.

        Returns:
            The folder written.

        Raises:
            OutputError: If the folder may not be written.
            RunError: If writing or verifying fails; the target is then as it was.
        """
        out = Path(out).expanduser()
        if out.suffix == ".safetensors":
            raise OutputError(f"The output {out} is a file, and this adapter is a folder. Choose a folder.")
        sources = (self.folder,) if self.folder else ()

        def write(new: Path) -> None:
            self._write(new, manifest or {})
            check(new)

        saving.write_folder(out, write, overwrite=overwrite, sources=sources)
        return out

    def _write(self, new: Path, manifest: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        if self.folder:
            for path in files.companions(self.folder):
                shutil.copyfile(path, new / path.name)
        if self.folder and files.read_config(self.folder) == self.config.raw:
            shutil.copyfile(self.folder / files.CONFIG, new / files.CONFIG)
        else:
            saving.write_json(new / files.CONFIG, self.config.raw)
        metadata = {**self.metadata, "format": "pt"}
        with ThreadPoolExecutor(1) as pool:  # hashed while the disk works
            written = pool.submit(save_file, dict(self.tensors), new / files.WEIGHTS, metadata=metadata)
            origin = self.edited_from or source_record(self)
            record = with_result(manifest, source=origin, result=self.digest, edit=self.report)
            written.result()
        saving.write_json(new / saving.MANIFEST, record)
        self._verify(new)

    def _verify(self, folder: Path) -> None:
        """Checks a written folder: it reads as an adapter, holds these tensors, and reaches the intended update."""
        self._check_tensors(Adapter._read(folder, self.name))

    def _check_tensors(self, written: Adapter) -> None:
        different = sorted(set(written.tensors) ^ set(self.tensors)) or [
            name for name, tensor in self.tensors.items() if not torch.equal(written.tensors[name], tensor)
        ]
        if different:
            raise RunError(f"The written file does not hold what was edited: {different[0]} differs.")
        edits = self.report.modules if self.report else {}
        values = each(lambda path: singular_values(written.updates[path]).numpy(), edits)
        for (path, edit), found in zip(edits.items(), values, strict=True):
            wanted = np.sort(np.abs(edit.S * edit.gates))[::-1]
            error = float(np.linalg.norm(found - wanted))
            # Weakened to almost nothing, an update keeps the float64 residue of what was taken away.
            allowed = 1.001 * edit.rounding * float(np.linalg.norm(wanted)) + 1e-9 * float(np.linalg.norm(edit.S))
            if error > allowed:
                raise RunError(
                    f"{path}: the written update misses the intended singular values by {error:.2e}, "
                    f"expected at most its rounding, {allowed:.2e}."
                )


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value.value if isinstance(value, Enum) else value
