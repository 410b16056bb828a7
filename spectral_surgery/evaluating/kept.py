"""Scores that are there already, one file a scoring, named by a hash of everything that they depend on.

A file is written beside and renamed in, so one that is there is whole, and nothing stale can be read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from spectral_surgery.evaluating.records import Record, read_records, write_records

NAME = re.compile(r"(\.\d+-)?[0-9a-f]{40}\.jsonl")
"""Of a finished scoring's file, or of one that was being written."""


@dataclass(frozen=True)
class Kept:
    """A folder of finished scorings."""

    folder: Path

    def has(self, key: str) -> bool:
        """Returns whether a scoring is there."""
        return self._path(key).exists()

    def read(self, key: str, variant: str) -> list[Record]:
        """Returns a scoring's records under a variant's name.

        Raises:
            DataError: If it is not there, or is not what was written.
        """
        return [replace(record, variant=variant) for record in read_records(self._path(key))]

    def write(self, key: str, records: Iterable[Record]) -> None:
        """Keeps a scoring's records."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{os.getpid()}-{key}.jsonl"
        write_records(new, records)
        os.replace(new, self._path(key))

    def clear(self) -> None:
        """Deletes all scorings, and the folder if it holds nothing else."""
        for path in self.folder.glob("*.jsonl"):
            if NAME.fullmatch(path.name):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"
