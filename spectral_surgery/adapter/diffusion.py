"""LoRA files of image and video models: one .safetensors file, as kohya's scripts, diffusers and their kin write it.

A module is a pair of factors under one of these endings, with ``delta = scale up down``; convolutions have kernel
axes, which only ``down`` uses and the thin algebra sees as more inputs:

- ``lora_down.weight``, ``lora_up.weight`` and a scalar ``alpha`` (kohya, ComfyUI, OneTrainer): scale = alpha / rank;
- ``lora_A.weight``, ``lora_B.weight`` (diffusers, ai-toolkit): alpha / rank where there is an ``alpha``, else the
  rule of PEFT where the header holds PEFT's configuration (``lora_adapter_metadata``), else 1;
- ``lora.down.weight``, ``to_q_lora.down.weight``, ``lora_linear_layer.down.weight`` and ``up`` (older diffusers).

What is written has the same tensor names, dtypes and metadata. Nothing is known of the model behind a file, so it can
be looked at, edited without data, resized and scaled, but not measured or merged.

Refused by name: LoHa, LoKr, DoRA, a middle factor (LoCon in Tucker form), GLoRA, OFT, IA3. What is no LoRA (``diff``
of norms and biases, bundled embeddings) passes through as it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_surgery.adapter import files, saving
from spectral_surgery.adapter.adapter import Adapter
from spectral_surgery.adapter.block_names import dotted
from spectral_surgery.adapter.config import OF_KINDS, AdapterConfig
from spectral_surgery.adapter.kinds import DTYPES, Slot, Stored
from spectral_surgery.adapter.kinds.convolution import flat
from spectral_surgery.adapter.kohya_header import rehashed, resized_header
from spectral_surgery.adapter.portable import shaped
from spectral_surgery.errors import AdapterError, RunError, combine
from spectral_surgery.manifest import run_record, source_record, with_result
from spectral_surgery.selection import Selection, select
from spectral_surgery.spectrum import LowRank, exact

FACTOR = re.compile(
    r"(?P<stem>.+?)(?P<mark>\.lora_|\.lora\.|_lora\d*\.|\.lora_linear_layer\.)"
    r"(?P<side>down|up|A|B)(?P<rest>(?:\.[^.]+)?\.weight|)"
)
REFUSED = {
    r"\.hada_": "LoHa, whose update is a Hadamard product",
    r"\.lokr_": "LoKr, whose update is a Kronecker product",
    r"\.dora_scale|\.lora_magnitude_vector": "DoRA, which rescales every row of the merged weight",
    r"\.lora_mid": "LoCon with a middle factor (Tucker form)",
    r"\.[ab][12]\.weight": "GLoRA",
    r"\.b?oft_": "OFT, which rotates the weight",
    r"\.on_input": "IA3, which multiplies",
}
"""What is not edited, by a pattern of its tensor names."""
PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration in the header, its fields prefixed by the component."""


@dataclass(frozen=True)
class DiffusionAdapter(Adapter):
    """An adapter in a file of its own. ``folder`` is the path of that file."""

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Every module's update and the tensors that hold it, by a dotted module path."""
        return _read(self.tensors, self.metadata)

    def select(self, selection: Selection) -> list[str]:
        """Returns the selected module paths; ``auto`` is all: the paper's choice was made for language models."""
        every = selection.modules == ("auto",)
        return select(self.updates, replace(selection, modules=("all",)) if every else selection)

    def scale_at(self, path: str, rank: int) -> float:
        """Returns the scale that new factors of a rank carry: alpha / rank where the file stores an alpha, else one.

        The alpha stays: diffusers (0.42) misreads kohya's alphas where they differ, and so they never begin to.
        """
        alpha = self.stored[path].names.get("alpha")
        return float(self.tensors[alpha]) / rank if alpha else 1.0

    def with_factors(self, updates: Mapping[str, LowRank]) -> DiffusionAdapter:
        """Returns an adapter with other factors, of any rank, in every module; alphas stay, the header follows."""
        changed: dict[str, Tensor] = {}
        for path, update in updates.items():
            pair = self.stored[path]
            for side, factor in (("A", update.A), ("B", update.B)):
                changed[pair.names[side]] = shaped(factor, self.tensors[pair.names[side]], side)
            for name in (name for name in pair.claims if name.endswith(".bias")):
                bias = pair.update.scale / update.scale * exact(self.tensors[name])
                changed[name] = bias.to(self.tensors[name].dtype)
        tensors = {**self.tensors, **changed}
        metadata = resized_header(_peft_resized(self.metadata, self.stored, updates), _sizes(tensors, self.stored))
        origin = self.edited_from or source_record(self)
        return replace(self, tensors=tensors, metadata=metadata, report=None, edited_from=origin)

    def save(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        manifest: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Writes one .safetensors file, or a folder with the file and a manifest, as one step, and verifies it.

        Args:
            out: A path that ends in .safetensors, or a folder.
            overwrite: Replace what spectral-surgery wrote.
            manifest: What to record beside hashes and versions: in full in a folder's manifest, without the numbers of
                every component in the header of a single file.
            check: Looks at the written file or folder before it is put in place.

        Raises:
            OutputError: If it may not be written.
            RunError: If writing or verifying fails; the target is then as it was.
        """
        out = Path(out).expanduser()
        origin = self.edited_from or source_record(self)
        sources = (self.folder,) if self.folder else ()
        header = {key: value for key, value in self.metadata.items() if key != saving.HEADER}
        if origin["tensors_sha256"] != self.digest:
            header = rehashed(header, self.tensors)
        if out.suffix != ".safetensors":
            record = with_result(manifest or {}, source=origin, result=self.digest, edit=self.report)
            name = self.folder.name if self.folder else files.DIFFUSERS

            def write(new: Path) -> None:
                self._write_file(new / name, header)
                saving.write_json(new / saving.MANIFEST, record)
                check(new)

            saving.write_folder(out, write, overwrite=overwrite, sources=sources)
            return out
        brief = {key: value for key, value in (manifest or {}).items() if key != "sensitivities"}
        record = {**run_record(), "source": origin, **brief, "result": {"tensors_sha256": self.digest}}
        metadata = {**header, saving.HEADER: json.dumps(record)}

        def write_one(new: Path) -> None:
            self._write_file(new, metadata)
            check(new)

        saving.write_file(out, write_one, overwrite=overwrite, sources=sources)
        return out

    def _write_file(self, path: Path, metadata: Mapping[str, str]) -> None:
        from safetensors.torch import save_file

        save_file(dict(self.tensors), path, metadata=dict(metadata) or None)
        written = load(path, self.name)
        self._check_tensors(written)
        if written.metadata != metadata:
            raise RunError("The written file does not hold the metadata of its source.")


def load(path: Path, name: str) -> DiffusionAdapter:
    """Returns the adapter in a .safetensors file.

    Raises:
        AdapterError: If it is damaged, holds no LoRA pair, or is of a kind that is not edited.
    """
    tensors, metadata = files.read_safetensors(path)
    origin = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
    raw = {"peft_type": "LORA", "task_type": "DIFFUSION", "base_model_name_or_path": origin}
    adapter = DiffusionAdapter(AdapterConfig(raw), tensors, metadata, path, name)
    adapter.stored  # noqa: B018 (checks every tensor now)
    return adapter


def _read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Stored]:
    combine(list(_foreign(tensors)), AdapterError)
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := FACTOR.fullmatch(name):
            digits = match["mark"].strip("._")[4:] if match["mark"].startswith("_") else ""
            module = found.setdefault(match["stem"] + (f"_lora{digits}" if digits else ""), {})
            module["A" if match["side"] in ("down", "A") else "B"] = name
    for stem, names in found.items():
        if f"{stem}.alpha" in tensors:
            names["alpha"] = f"{stem}.alpha"
    configs = _peft_configs(metadata)
    combine([fault for stem, names in found.items() for fault in _faults(stem, names, tensors)][:20], AdapterError)
    pairs = {stem: _pair(stem, names, tensors, configs) for stem, names in found.items()}
    combine(list(_unclaimed(tensors, pairs)), AdapterError)
    paths = dotted(pairs)
    return {paths[stem]: pair for stem, pair in pairs.items()}


def _pair(
    stem: str, names: dict[str, str], tensors: Mapping[str, Tensor], configs: Mapping[str, AdapterConfig]
) -> Stored:
    down, up = tensors[names["A"]], tensors[names["B"]]
    scale = 1.0
    if "alpha" in names:
        scale = float(tensors[names["alpha"]]) / down.shape[0]
    elif owner := _owner(stem, configs):
        config, inside = configs[owner[0]], owner[1]
        if config.rank(inside) != down.shape[0]:
            raise AdapterError(
                f"{stem}: the factors have rank {down.shape[0]}, and the file's {PEFT_METADATA} says "
                f"{config.rank(inside)}. Save the adapter again."
            )
        scale = config.scale(inside, down.shape[0])
    update = LowRank(B=up.flatten(1), A=down.flatten(1), scale=scale)
    biases = [name for name in [names["B"].removesuffix(".weight") + ".bias"] if name in tensors]
    return Stored(update, (Slot(names["B"], flat),), (*names.values(), *biases), (), names)


def _owner(stem: str, configs: Mapping[str, AdapterConfig]) -> tuple[str, str] | None:
    """The component whose configuration a module falls under, and the module's path inside of it."""
    for prefix in configs:
        if not prefix or stem.startswith(f"{prefix}."):
            return prefix, stem.removeprefix(f"{prefix}.") if prefix else stem
    return None


def _peft_configs(metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """PEFT's configuration of every component, where the header holds it."""
    fields: dict[str, dict[str, Any]] = {}
    for key, value in _peft_metadata(metadata).items():
        prefix, _, name = key.rpartition(".")
        fields.setdefault(prefix, {})[name] = value
    for raw in fields.values():
        if switched_on := [field for field in sorted(OF_KINDS) if raw.get(field)]:
            raise AdapterError(
                f"The file's {PEFT_METADATA} has {switched_on[0]} switched on. Only plain LoRA files are edited."
            )
    return {prefix: AdapterConfig({**raw, "peft_type": "LORA"}) for prefix, raw in fields.items()}


def _peft_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"The file's {PEFT_METADATA} is no JSON ({error}). Save the adapter again.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"The file's {PEFT_METADATA} is no JSON object. Save the adapter again.")
    return found


def _peft_resized(
    metadata: Mapping[str, str], stored: Mapping[str, Stored], updates: Mapping[str, LowRank]
) -> dict[str, str]:
    """The metadata with ranks and scales of new factors where PEFT's configuration decides them."""
    configs, ranks = _peft_configs(metadata), dict[str, dict[str, int]]()
    for path, pair in stored.items():
        match = FACTOR.fullmatch(pair.names["A"])
        if match and "alpha" not in pair.names and (owner := _owner(match["stem"], configs)):
            ranks.setdefault(owner[0], {})[owner[1]] = updates[path].A.shape[0]
    if not ranks:
        return dict(metadata)
    whole = _peft_metadata(metadata)
    for prefix, inside in ranks.items():
        usual = Counter(inside.values()).most_common(1)[0][0]
        own = {path: rank for path, rank in inside.items() if rank != usual}
        new = {"r": usual, "lora_alpha": usual, "rank_pattern": own, "alpha_pattern": own, "use_rslora": False}
        whole |= {f"{prefix}.{field}" if prefix else field: value for field, value in new.items()}
    return {**metadata, PEFT_METADATA: json.dumps(whole, indent=2, sort_keys=True)}


def _sizes(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> list[tuple[bool, int]]:
    """Of every module whether it is a convolution with a kernel, and its rank."""
    downs = [tensors[pair.names["A"]] for pair in stored.values()]
    return [(down[0, 0].numel() > 1, down.shape[0]) for down in downs]


def _foreign(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    if any(name.startswith("base_model.model.") for name in tensors):
        yield "The file is PEFT's, whose scale stands in adapter_config.json. Pass the folder that holds both."
    for pattern, what in REFUSED.items():
        if names := [name for name in tensors if re.search(pattern, name)]:
            yield f"{len(names)} tensors, the first {names[0]}, are {what}. Only plain LoRA files are edited."


def _faults(stem: str, names: dict[str, str], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    if missing := [side for side in "AB" if side not in names]:
        yield f"{stem}: {'the up' if missing == ['B'] else 'the down'} factor is missing. The file is incomplete."
        return
    down, up = tensors[names["A"]], tensors[names["B"]]
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or up[0, 0].numel() != 1:
        yield f"{stem}: down {tuple(down.shape)} and up {tuple(up.shape)} are no pair of LoRA factors."
        return
    for side in "AB":
        factor = tensors[names[side]]
        if factor.dtype not in DTYPES:
            yield f"{names[side]} has dtype {factor.dtype}, expected one of {', '.join(map(str, DTYPES))}."
        elif not factor.isfinite().all():
            yield f"{names[side]} has values that are not finite. Go back to an earlier checkpoint."
    if "alpha" in names and (tensors[names["alpha"]].numel() != 1 or not float(tensors[names["alpha"]]) > 0):
        yield f"{names['alpha']} is {tensors[names['alpha']].tolist()}, expected one positive number."


def _unclaimed(tensors: Mapping[str, Tensor], pairs: Mapping[str, Stored]) -> Iterator[str]:
    if not pairs:
        yield f"The file has {len(tensors)} tensors and none is a LoRA factor. Pass a LoRA file."
    claimed = {name for pair in pairs.values() for name in pair.claims}
    unknown = [name for name in tensors if name not in claimed and (".lora_" in name or name.endswith(".alpha"))]
    if unknown:
        yield f"{len(unknown)} LoRA tensors are of a kind that is not edited, the first is {unknown[0]}."
