"""The command ``convert``: adapters that are relative to a changed base model, as plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spectral_surgery.cli.commands import Command


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Writes a PiSSA or OLoRA adapter as plain LoRA of twice the rank, which every other command takes.

    Exact: what PEFT takes off the base model when it loads such an adapter is computed again and written down.
    """

    adapter: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER")]
    """Adapter folder or Hub id."""
    output: Path
    """Folder to write."""
    base_model: str | None = None
    """Base model folder or Hub id, in place of the one recorded in the adapter."""
    overwrite: bool = False
    """Replace an output folder that spectral-surgery wrote."""

    def run(self) -> None:
        """Writes the converted adapter."""
        from spectral_surgery.adapter.conversion import as_plain_lora

        converted = as_plain_lora(self.adapter, self.base_model, self.output, overwrite=self.overwrite)
        ranks = sorted({update.A.shape[0] for update in converted.updates.values()})
        print(
            f"Wrote {self.output}: {len(converted.updates)} modules as plain LoRA of rank "
            f"{', '.join(map(str, ranks))}, in float32. Keep it in float32: its factors nearly cancel."
        )
