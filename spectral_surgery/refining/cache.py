"""What an interrupted run has already worked out, by content: a second run with the same question goes on from there.

Every file is named by a hash of all that its content depends on, so nothing stale can be read; it is written beside
and renamed in, so a file that is there is whole. Of several processes only the first reads and writes, and all get
what it read, so no two disagree about what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spectral_surgery import processes

T = TypeVar("T")


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

        def load(path: Path) -> dict[str, Any]:
            with np.load(path, allow_pickle=False) as found:
                return dict(found)

        def save(values: Mapping[str, np.ndarray], path: Path) -> None:
            np.savez(path, **values)  # type: ignore[arg-type]

        return self.file(parts, ".npz", compute, save, load)

    def array(self, parts: tuple[object, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns one array, computed once."""
        return self.arrays(parts, lambda: {"values": compute()})["values"]

    def json(self, parts: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """Returns plain JSON, computed once."""

        def save(value: Any, path: Path) -> None:
            path.write_text(json.dumps(value), encoding="utf-8")

        return self.file(parts, ".json", compute, save, lambda path: json.loads(path.read_text(encoding="utf-8")))

    def file(
        self,
        parts: tuple[object, ...],
        suffix: str,
        compute: Callable[[], Any],
        save: Callable[[Any, Path], object],
        load: Callable[[Path], T],
    ) -> T:
        """Returns what a file holds, computed and saved once; every process computes, the first saves and loads."""
        path = self.folder / f"{self.key(*parts)}{suffix}"
        found = processes.of_first(lambda: [load(path)] if path.exists() else [])
        if found:
            return found[0]
        value = compute()

        def saved() -> T:
            self._write(path, lambda new: save(value, new))
            return load(path)

        return processes.of_first(saved)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"new-{os.getpid()}-{path.name}")
        try:
            write(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
