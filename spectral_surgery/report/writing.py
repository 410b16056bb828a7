"""Writing the report: everything is rendered first, then each file appears whole or not at all."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from spectral_surgery.errors import OutputError, RunError
from spectral_surgery.report import figures, page
from spectral_surgery.report.facts import Verdict

REPORT = "report.html"
FIGURES = "figures"
NEEDS = ("jinja2", "matplotlib")


def unavailable() -> str | None:
    """Returns one line that says what to install, or None where the report can be written."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"No report page and figures: {' and '.join(missing)} not installed. "
        f"Install with: pip install 'spectral-surgery[report]'."
    )


def write_report(verdict: Verdict, folder: Path, *, examples: bool = True) -> list[Path]:
    """Writes report.html and figures/ and returns the paths.

    An earlier report of ours in this folder is replaced, file by file; each file is whole at any moment.

    Args:
        verdict: What refine wrote as verdict.json.
        folder: Made if it does not exist.
        examples: Whether the page shows prompts and answers.

    Raises:
        InputError: If jinja2 or matplotlib is not installed.
        OutputError: If a file in the way is not a report of ours.
        RunError: If writing fails, such as on a full disk.
    """
    check_folder(folder)
    content = {REPORT: page.render(verdict, examples=examples).encode("utf-8")}
    content |= {f"{FIGURES}/{name}": data for name, data in figures.render(verdict).items()}
    try:
        return [_write(folder / name, data) for name, data in content.items()]
    except OSError as error:
        raise RunError(
            f"Writing the report to {folder} failed: {error}. The verdict itself is not affected."
        ) from error


def check_folder(folder: Path) -> None:
    """Checks that a report may be written into a folder.

    Raises:
        OutputError: If there is a report.html or a figures folder that is not ours.
    """
    report, drawn = folder / REPORT, folder / FIGURES
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Choose a folder for the report.")
    ours = report.is_file() and report.read_bytes()[: len(page.MARK)] == page.MARK.encode()
    if report.exists() and not ours:
        raise OutputError(
            f"{report} exists and is no report of ours, so it is never overwritten. Choose another folder."
        )
    if drawn.exists() and not ours:
        raise OutputError(
            f"{drawn} exists and is not of a report of ours, so nothing is written there. Choose another folder."
        )


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.saving")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path
