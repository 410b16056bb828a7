"""A better adapter, or an honest "leave it alone": the whole job, and its parts.

``job`` (rows, checks) -> ``ready`` (loaded, measured) -> ``searching`` (the ladder) -> ``run`` (choice, confirmation)
-> ``record`` (verdict.json) -> ``entry`` (files). ``steps`` and ``descent`` find gates, ``scoring`` and ``bench``
score, ``cache`` remembers. Importing this package imports no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_surgery.refining.entry import Refinement as Refinement
    from spectral_surgery.refining.entry import refine as refine

__all__ = ["Refinement", "refine"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spectral_surgery.refining import entry

    return getattr(entry, name)
