"""The embedded world: a tiny base model, an adapter that works but forgot the rest, and their data.

``tasks`` generates the rows, ``build`` made the shipped files and can make them again.
"""

from __future__ import annotations

import importlib.resources
import pathlib


def world() -> pathlib.Path:
    """Returns the shipped folder: ``base/``, ``adapter/``, ``data/`` and ``figures.json``."""
    return pathlib.Path(str(importlib.resources.files(__name__) / "world"))
