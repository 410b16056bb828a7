"""Writing a folder so that after a crash at any point one whole version is there, and the next run says which.

The new folder is written, flushed and verified in a staging folder beside the target, then renamed in. A previous
folder is moved into the staging folder first and deleted last. So the target is either the whole previous version, the
whole new one, or (between two renames) absent with both whole in staging, where the next save puts the previous one
back.

Covered: kill at any point, full disk, power loss on file systems that honour fsync, two savers at once.
Not covered: targets on network file systems without atomic rename.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spectral_surgery.errors import OutputError, RunError, SpectralSurgeryError

MANIFEST = "spectral_surgery.json"
"""Name of our manifest; a folder that carries it is ours to overwrite."""

log = logging.getLogger(__name__)


def check_output(out: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Checks that a folder may be written, and finishes an interrupted save of it first.

    Args:
        out: Folder to write.
        overwrite: Whether a folder that carries our manifest may be replaced.
        sources: Folders that must not be touched: ``out`` may neither be one, nor lie in one, nor hold one.

    Raises:
        OutputError: If it may not be written.
    """
    out = _absolute(out)
    for source in (_absolute(path) for path in sources):
        if out == source or out in source.parents or source in out.parents:
            raise OutputError(
                f"The output {out} and the source {source} are the same or lie in one another. "
                f"Choose an output folder outside the source."
            )
    recover(out)
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise OutputError(f"The output {out} is a file. Choose a folder that does not exist yet.")
    if not any(out.iterdir()):
        return
    if not is_ours(out):
        raise OutputError(
            f"The output folder {out} exists and was not written by spectral-surgery (it has no {MANIFEST}), "
            f"so it is never overwritten. Choose another folder."
        )
    if not overwrite:
        raise OutputError(f"The output folder {out} exists. Pass --overwrite to replace it, or choose another.")


def write_folder(
    out: Path,
    write: Callable[[Path], None],
    *,
    overwrite: bool = False,
    sources: tuple[Path, ...] = (),
) -> None:
    """Writes a folder as one step: after a failure or kill the target is as it was.

    Args:
        out: Folder to write; its parents are made.
        write: Fills and verifies an empty folder that it is given; what it raises ends the save.
        overwrite: See :func:`check_output`.
        sources: See :func:`check_output`.

    Raises:
        OutputError: If the folder may not be written, or another process is writing it.
        RunError: If writing fails midway, such as on a full disk.
    """
    out = _absolute(out)
    check_output(out, overwrite=overwrite, sources=sources)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _staged(out) as staging:
            new = staging / "new"
            new.mkdir()
            write(new)
            _flush(new)
            if out.exists():
                os.rename(out, staging / "old")
            os.rename(new, out)
            _flush_entry(out.parent)
    except SpectralSurgeryError:
        raise
    except Exception as error:  # safetensors reports a full disk with a class of its own
        recover(out)
        raise RunError(
            f"Saving to {out} failed ({type(error).__name__}: {error}). Nothing was changed there; "
            f"check the free space and permissions, and run again."
        ) from error


def recover(out: Path) -> None:
    """Finishes or undoes an interrupted save of ``out``, and says what is there now.

    Raises:
        OutputError: If another process is saving to it.
    """
    staging = _staging(out)
    if not staging.is_dir():
        return
    with _locked(staging, out):
        new, old = staging / "new", staging / "old"
        if old.exists() and not out.exists():
            os.rename(old, out)
            state = "The version from before it was put back"
        elif not out.exists():
            state = "It had not finished, and what it had written is removed"
        elif new.exists():
            state = "The version from before it is in place"
        elif old.exists():
            state = "It had put its version in place, which is whole"
        else:
            state = "It had just begun or just ended, and the version in place is whole"
        log.warning("An earlier save to %s was interrupted. %s.", out, state)
        shutil.rmtree(staging)


def interrupted(out: Path) -> bool:
    """Returns whether an interrupted or running save has left a staging folder beside ``out``."""
    return _staging(_absolute(out)).is_dir()


def is_ours(folder: Path) -> bool:
    """Returns whether a folder carries our manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "spectral_surgery" in manifest


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    staging = _staging(out)
    staging.mkdir(exist_ok=True)
    with _locked(staging, out):
        try:
            yield staging
        finally:
            if out.exists() or not (staging / "old").exists():
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(staging: Path, out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(staging / "lock", timeout=0):
            yield
    except Timeout as error:
        raise OutputError(f"Another process is saving to {out}. Wait for it, or choose another folder.") from error


def _staging(out: Path) -> Path:
    return out.parent / f".{out.name}.saving"


def _absolute(path: Path) -> Path:
    return Path(path).expanduser().resolve()


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
