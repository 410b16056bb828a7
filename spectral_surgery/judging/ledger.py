"""How many verdicts were already made on the same test rows, kept in the user's state folder.

Every further verdict on the same rows is another chance to be fooled by them, so each divides the error rate. Only
hashes are kept, one JSON object a line. The folder is ``$SPECTRAL_SURGERY_STATE``, else ``spectral-surgery`` in
``$XDG_STATE_HOME``, else ``~/.local/state/spectral-surgery``. A ledger that cannot be read or written is a warning,
never a failure.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

NAME = "verdicts.jsonl"
"""Of the file."""
PATIENCE = 10.0
"""Seconds to wait for another run that writes."""

log = logging.getLogger(__name__)


def digest_of(digests: Iterable[str]) -> str:
    """Returns the hash of a set of rows, given the rows' hashes in any order."""
    return sha256("\n".join(sorted(digests)).encode()).hexdigest()


def ledger_path() -> Path:
    """Returns where the ledger is."""
    if folder := os.environ.get("SPECTRAL_SURGERY_STATE"):
        return Path(folder).expanduser() / NAME
    state = os.environ.get("XDG_STATE_HOME")
    home = Path(state) if state and Path(state).is_absolute() else Path("~/.local/state").expanduser()
    return home / "spectral-surgery" / NAME


def earlier(test_digest: str, run_key: str) -> int:
    """Returns how many other runs gave a verdict on these test rows before this one did first.

    Args:
        test_digest: :func:`digest_of` the test rows.
        run_key: Hash of everything that the run depends on: a run that is repeated or resumed is the same run.
    """
    with _warned("read"):
        before: set[str] = set()
        for entry in _entries(ledger_path()):
            if entry["test"] == test_digest:
                if entry["run"] == run_key:  # repeated: what came after its first verdict does not count
                    break
                before.add(entry["run"])
        return len(before)
    return 0


def note(test_digest: str, run_key: str, **details: str | int | float | None) -> None:
    """Writes that this run gives a verdict on these test rows; a run that is there already is not written again.

    Args:
        test_digest: :func:`digest_of` the test rows.
        run_key: As for :func:`earlier`.
        **details: What else to remember, such as the outcome; nothing of the user's text.
    """
    from filelock import FileLock

    entry = {"test": test_digest, "run": run_key, "time": datetime.now(UTC).isoformat(timespec="seconds"), **details}
    with _warned("written"):
        path = ledger_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=PATIENCE):
            if any(found["test"] == test_digest and found["run"] == run_key for found in _entries(path)):
                return
            torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps(entry) + "\n")


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the readable lines; says how many are not."""
    if not path.exists():
        return
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            usable = isinstance(entry["test"], str) and isinstance(entry["run"], str)
        except (ValueError, KeyError, TypeError):
            usable = False
        if usable:
            yield entry
        else:
            broken += bool(line.strip())
    if broken:
        log.warning("%s has %d unreadable lines, which are not counted as earlier verdicts.", path, broken)


@contextmanager
def _warned(done: str) -> Iterator[None]:
    """Turns what may go wrong with the file into a warning."""
    from filelock import Timeout

    try:
        yield
    except (OSError, RuntimeError, Timeout) as error:
        log.warning("The ledger of verdicts %s cannot be %s, so it is left out: %s", _where(), done, error)


def _where() -> str:
    try:
        return str(ledger_path())
    except RuntimeError:
        return NAME
