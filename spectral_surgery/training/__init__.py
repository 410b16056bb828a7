"""Training the adapters that are edited: the paper's recipes on TRL, PEFT and accelerate.

``recipes.py`` holds the numbers and texts, ``options.py`` what can be chosen, ``rows.py`` makes labelled tokens,
``methods.py`` the kinds of adapters, ``checkpoints.py`` the folder beside the adapter; ``preparing.py`` checks all
that can be known before the base model loads, ``running.py`` trains, and ``results.py`` writes.

Importing this imports no model library; :func:`train` is in ``running.py``.
"""

from spectral_surgery.training.options import AdapterOptions, BaseOptions, RowOptions, ScheduleOptions, TrainOptions
from spectral_surgery.training.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "AdapterOptions",
    "BaseOptions",
    "Recipe",
    "RowOptions",
    "ScheduleOptions",
    "TrainOptions",
]
