"""What SpecLoRA's ablations train and how often. Light: imports no model library, so the command line may read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spectral_surgery.errors import InputError, combine


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is trained and how often."""

    k: tuple[int, ...] = (32, 64, 128, 200)
    """Numbers of scaled rows that are tried; at the second the choices are compared."""
    seeds: int = 3
    """Training runs a variant."""
    steps: int = 60
    """Training steps a run."""
    batch_size: int = 16
    """Rows in a step."""
    rank: int = 8
    """LoRA rank; lora_alpha is twice this."""
    learning_rate: float = 3e-3
    """Of the factors at the first step; it falls linearly to 0."""
    delta_learning_rate: float = 10.0
    """Learning rate of delta as a multiple of that."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Modules that get an adapter."""
    ia3_modules: tuple[str, ...] = ("k_proj", "v_proj", "up_proj")
    """Modules all of whose rows are scaled in the variant that is IA3 beside LoRA."""
    max_new_tokens: int = 16
    """Longest answer that is generated for the exact match."""

    def check(self) -> None:
        """Checks that the numbers make a study.

        Raises:
            InputError: Naming every one that does not.
        """
        combine(list(self._faults()), InputError)

    def _faults(self) -> Iterator[str]:
        least = {"seeds": 2, "steps": 1, "batch_size": 1, "rank": 1, "max_new_tokens": 1}
        for name, smallest in least.items():
            if (given := getattr(self, name)) < smallest:
                yield f"--{name.replace('_', '-')} is {given}, expected {smallest} or more."
        for name in ("learning_rate", "delta_learning_rate"):
            if not (given := getattr(self, name)) > 0:
                yield f"--{name.replace('_', '-')} is {given}, expected more than 0."
        if len(set(self.k)) < 2 or min(self.k, default=0) < 1:
            yield f"--k is {' '.join(map(str, self.k)) or 'empty'}, expected two different numbers or more, from 1 on."
        if not self.target_modules:
            yield "--target-modules is empty, expected the names of modules, such as q_proj v_proj."
