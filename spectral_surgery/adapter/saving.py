"""Writing a folder, or one file, so that after a crash one whole version is there, and the next run says which.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral_surgery.errors import OutputError, RunError, SpectralSurgeryError

MANIFEST = "spectral_surgery.json"
"""Name of our manifest; a folder that carries it is ours to overwrite."""
HEADER = "spectral_surgery"
"""Key of our record in the header of a single .safetensors file; a file that carries it is ours to overwrite."""

log = logging.getLogger(__name__)


def check_output(out: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Checks that a folder or .safetensors file may be written, and finishes an interrupted save of it first.

    Args:
        out: Folder to write, or a file whose name ends in .safetensors.
        overwrite: Whether a folder or file that carries our record may be replaced.
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
    single = out.suffix == ".safetensors"
    if out.is_dir() == single:
        raise OutputError(
            f"The output {out} is a {'folder' if single else 'file'}. "
            f"Choose a {'file' if single else 'folder'} that does not exist yet."
        )
    if not single and not any(out.iterdir()):
        return
    kind, sign = ("file", f"no {HEADER} in its header") if single else ("folder", f"no {MANIFEST}")
    if not is_ours(out):
        raise OutputError(
            f"The output {kind} {out} exists and was not written by spectral-surgery (it has {sign}), "
            f"so it is never overwritten. Choose another {kind}."
        )
    if not overwrite:
        raise OutputError(f"The output {kind} {out} exists. Pass --overwrite to replace it, or choose another.")


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
    with _failing_whole(out):
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


def write_file(
    out: Path,
    write: Callable[[Path], None],
    *,
    overwrite: bool = False,
    sources: tuple[Path, ...] = (),
) -> None:
    """Writes one .safetensors file as one step; as :func:`write_folder`.

    Args:
        out: File to write; its parents are made.
        write: Writes and verifies a file at the path that it is given.
        overwrite: See :func:`check_output`.
        sources: See :func:`check_output`.

    Raises:
        OutputError: If the file may not be written, or another process is writing it.
        RunError: If writing fails midway.
    """
    out = _absolute(out)
    check_output(out, overwrite=overwrite, sources=sources)
    with _failing_whole(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _staged(out) as staging:
            new = staging / "new"
            write(new)
            _flush(staging)
            os.replace(new, out)
            _flush_entry(out.parent)


@contextmanager
def _failing_whole(out: Path) -> Iterator[None]:
    """Turns a failure of saving into one sentence, after the target is as it was."""
    try:
        yield
    except SpectralSurgeryError:
        raise
    except Exception as error:  # safetensors reports a full disk with a class of its own
        recover(out)
        raise RunError(
            f"Saving to {out} failed ({type(error).__name__}: {error}). Nothing was changed there; "
            f"check the free space and permissions, and run again."
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as readable JSON: two levels of keys a line each, and whatever they hold in their line."""
    path.write_text(_readable(value) + "\n", encoding="utf-8")


def _readable(value: Any, levels: int = 2, indent: str = "") -> str:
    if not (levels and value and isinstance(value, Mapping)):
        return json.dumps(value, ensure_ascii=False)
    inner = f"{indent}  "
    lines = (f"{inner}{json.dumps(key)}: {_readable(each, levels - 1, inner)}" for key, each in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


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


def is_ours(out: Path) -> bool:
    """Returns whether a folder carries our manifest, or a file our record."""
    return record(out) is not None


def record(out: Path) -> dict[str, Any] | None:
    """Returns the manifest in a folder or in the header of a .safetensors file; None where there is none of ours."""
    try:
        if out.is_file():
            from safetensors import safe_open

            with safe_open(out, framework="np") as file:
                text = (file.metadata() or {}).get(HEADER, "")
        else:
            text = (out / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except Exception:  # whatever cannot be read is not ours
        return None
    return manifest if isinstance(manifest, dict) and "spectral_surgery" in manifest else None


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
