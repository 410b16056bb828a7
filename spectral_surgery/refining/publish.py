"""Uploading a refined adapter to the Hub: adapter, card and a manifest without paths or the user's text."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_surgery.adapter.saving import MANIFEST
from spectral_surgery.errors import RunError
from spectral_surgery.report import publishable

if TYPE_CHECKING:
    from spectral_surgery.refining.entry import Refinement
else:
    Refinement = Any


def publish(found: Refinement, repository: str, *, private: bool = False, report: bool = False) -> str:
    """Uploads the adapter and returns its address.

    Args:
        found: With an adapter that won, written to a folder.
        repository: Such as ``name/my-lora-refined``; made if it does not exist.
        private: Whether a new repository is private.
        report: Also the report and its figures, which may show rows.

    Raises:
        RunError: If the Hub refuses or cannot be reached; everything is still in the folder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert found.folder is not None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            package(found, Path(scratch), report=report)
            api = HfApi()
            created = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=created.repo_id, folder_path=scratch, commit_message="Refined adapter")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"Uploading to {repository} failed: {reason}. Everything is in {found.folder}.") from error
    return str(created)


def package(found: Refinement, to: Path, *, report: bool) -> None:
    """Copies what is uploaded: the adapter with its card, and the verdict as far as it may be public."""
    assert found.folder is not None
    shutil.copytree(found.folder / "adapter", to, dirs_exist_ok=True)
    (to / MANIFEST).unlink(missing_ok=True)
    text = json.dumps(publishable(found.verdict), indent=1, ensure_ascii=False)
    (to / "verdict.json").write_text(text + "\n", encoding="utf-8")
    if report and (found.folder / "report.html").exists():
        shutil.copyfile(found.folder / "report.html", to / "report.html")
