"""Refine a trained LoRA adapter without retraining it, and know whether that helped.

The public names load on first use (PEP 562), so importing the package, its command line or its policies imports
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_surgery import policies as policies
    from spectral_surgery.adapter import Adapter as Adapter
    from spectral_surgery.constraints import Constraint as Constraint
    from spectral_surgery.editing import edit as edit
    from spectral_surgery.errors import SpectralSurgeryError as SpectralSurgeryError
    from spectral_surgery.evaluating.comparing import compare as compare
    from spectral_surgery.evaluating.evaluation import evaluate as evaluate
    from spectral_surgery.exporting.job import export as export
    from spectral_surgery.live import Live as Live
    from spectral_surgery.measurement import Measurement as Measurement
    from spectral_surgery.measuring import measure as measure
    from spectral_surgery.refining.entry import refine as refine
    from spectral_surgery.refining.options import RefineOptions as RefineOptions
    from spectral_surgery.selection import Selection as Selection

_WHERE = {
    "Adapter": "adapter",
    "Measurement": "measurement",
    "Selection": "selection",
    "Live": "live",
    "measure": "measuring",
    "policies": "policies",
    "Constraint": "constraints",
    "edit": "editing",
    "refine": "refining.entry",
    "RefineOptions": "refining.options",
    "export": "exporting.job",
    "compare": "evaluating.comparing",
    "evaluate": "evaluating.evaluation",
    "SpectralSurgeryError": "errors",
}

__all__ = list(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'spectral_surgery' has no attribute {name!r}")
    module = importlib.import_module(f"spectral_surgery.{_WHERE[name]}")
    return module if name == "policies" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
