"""The command ``export``: the same adapter in another form."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_surgery.cli.commands import OfAdapter, together
from spectral_surgery.exporting import destination
from spectral_surgery.options import ModelOptions

if TYPE_CHECKING:
    from spectral_surgery.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class Export(OfAdapter):
    """Writes an adapter in another form, reads it back and verifies it.

    portable: the same update under the rules of PEFT, vLLM, llama.cpp and SGLang. merged: the whole model. rank,
    energy, ratio: smaller. scale, blocks: weaker or stronger. A kohya or diffusers file stays one. Needs no base
    model, except for merged.
    """

    to: str
    """portable, merged, rank=R (R components a module), energy=E (as many as hold this share of sum S^2, such as
    0.95), ratio=Q (those above the largest S over Q), scale=X, or blocks=NAME=X,NAME=X, such as
    blocks=input=0.5,output.3=0."""
    output: Path
    """Folder to write; for a kohya or diffusers file also a path that ends in .safetensors."""
    per_module: bool = False
    """With rank, energy and ratio: each module gets its own rank, in rank_pattern, which few servers read."""
    data: str | None = None
    """With merged: rows to compare merged model and adapter on; by default a few built-in sentences."""
    model: ModelOptions = field(default_factory=ModelOptions)
    overwrite: bool = False
    """Replace an output that spectral-surgery wrote."""
    dry_run: bool = False
    """Check everything that needs no base model's weights, and write nothing."""

    def run(self) -> None:
        """Writes it and says what it loses."""
        from spectral_surgery.adapter.saving import check_output
        from spectral_surgery.exporting.job import check, export
        from spectral_surgery.exporting.text import describe

        wanted, adapter, _ = together(
            lambda: destination.parse(self.to),
            self.load,
            lambda: check_output(self.output, overwrite=self.overwrite, sources=(Path(self.adapter),)),
        )
        check(adapter, wanted)
        if self.dry_run:
            self._say_dry(adapter, wanted)
            return
        exported = export(
            adapter,
            wanted,
            self.output,
            per_module=self.per_module,
            model=self.model,
            data=self.data,
            overwrite=self.overwrite,
            progress=lambda step: print(f"{step} ...", file=sys.stderr),
        )
        print(describe(exported))
        print(f"Wrote {self.output}, read it back and verified it.")

    def _say_dry(self, adapter: Adapter, wanted: destination.Destination) -> None:
        if isinstance(wanted, destination.Merged):
            from spectral_surgery.exporting.merging import prepare

            prepare(adapter, self.model, self.data)
        print(f"Would write {self.output}.")
