"""What an interrupted run has already worked out, by content: a second run with the same question goes on from there.

Every file is named by a hash of all that its content depends on, so nothing stale can be read; it is written beside
and renamed in, so a file that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cache:
    """A folder of results."""

    folder: Path
    context: str
    """Hash of what everything depends on: adapter, base model, how it is loaded, versions."""

    def key(self, *parts: object) -> str:
        """Returns the hash of the context and these parts."""
        return hashlib.sha256(json.dumps([self.context, *map(str, parts)]).encode()).hexdigest()[:40]

    def arrays(self, parts: tuple[object, ...], compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Returns named arrays, computed once."""
        path = self.folder / f"{self.key(*parts)}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as found:
                return dict(found)
        values = dict(compute())
        self._write(path, lambda new: np.savez(new, **values))  # type: ignore[arg-type]
        return values

    def array(self, parts: tuple[object, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns one array, computed once."""
        return self.arrays(parts, lambda: {"values": compute()})["values"]

    def json(self, parts: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """Returns plain JSON, computed once."""
        path = self.folder / f"{self.key(*parts)}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        self._write(path, lambda new: new.write_text(json.dumps(value), encoding="utf-8"))
        return value

    def file(self, parts: tuple[object, ...], suffix: str, write: Callable[[Path], object]) -> Path:
        """Returns a file with this content, written once."""
        path = self.folder / f"{self.key(*parts)}{suffix}"
        if not path.exists():
            self._write(path, write)
        return path

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"new-{os.getpid()}-{path.name}")
        try:
            write(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
