"""What a user may choose about refine. Light: imports no model library."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from spectral_surgery.errors import InputError, combine

SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class RefineOptions:
    """How an adapter is refined and judged."""

    may_lose: str = "2%"
    """How much of the task's score may be lost for other skills, such as 2% or 0.02; 0 asks for a better task with the
    other skills not worse."""
    objective: str = "loss"
    """What the task is scored by: loss (of the answers), exact (greedy answers), choice (among the rows' answers, by
    likelihood), or your own module:function of (prompts, answers, references)."""
    normalise: Literal["strip", "lower", "words", "number"] = "strip"
    """How exact answers are compared: as they are, without case, by words, or by their last number."""
    keep: str = "auto"
    """What must not be lost: rows of other skills with answers, or prompts (one a line), which the base model answers;
    auto is a set of varied prompts that comes with this program."""
    keep_category_column: str | None = None
    """Column of --keep that says what kind of skill a row is."""
    keep_tokens: int = 64
    """Longest answer of the base model to a prompt of --keep, in tokens."""
    ladder: Literal["default", "paper", "controls"] = "default"
    """What is tried: everything; also the paper's four policies; or only the cheap controls."""
    also: tuple[str, ...] = ()
    """Further adapters of the same layout to try, such as earlier checkpoints."""
    steps: int = 100
    """Steps of few-step tuning, and of the continued training it is held against; 0 leaves both out."""
    error_rate: float = 0.05
    """Probability of confirming anything wrongly."""
    permutations: int = 199
    """Random orders of the winner's own gates that it is held against."""
    replays: int = 2000
    """Replays that measure the error rate of this very run."""
    budget: str | None = None
    """Most time to spend, such as 90s, 10m or 2h; the ladder shrinks to fit."""
    exact_rows: int = 128
    """Test rows whose greedy answers are shown beside the scores that decide, of the task and of other skills with
    answers; 0 shows none."""
    check_suite: str | None = None
    """Another instrument, scored once the answer is confirmed: tasks of lm-evaluation-harness, YAML files of tasks or
    files of rows, with commas between them. A clear loss there is said in the verdict."""
    check_limit: int = 100
    """Most documents of each task of --check-suite."""
    confirm_run_unsafe_code: bool = False
    """Agree that humaneval in --check-suite runs the code that the model writes, on this machine."""
    few_rows: bool = False
    """Also tune and continue training on the first 16, the first 32 and all measuring rows, and show both."""
    no_examples: bool = False
    """Leave prompts and answers out of report and verdict."""

    @property
    def share(self) -> float:
        """``may_lose`` as a number in [0, 1).

        Raises:
            InputError: If it is none.
        """
        text = self.may_lose.strip()
        try:
            value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < 1:
            raise InputError(f"--may-lose is {self.may_lose!r}, expected a share such as 2% or 0.02, below 100%.")
        return value

    @property
    def seconds(self) -> float | None:
        """``budget`` in seconds.

        Raises:
            InputError: If it is no time.
        """
        if self.budget is None:
            return None
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", self.budget)
        if not found or not float(found[1]):
            raise InputError(f"--budget is {self.budget!r}, expected a time such as 90s, 10m or 2h.")
        return float(found[1]) * SECONDS[found[2] or "s"]

    def check(self) -> None:
        """Checks every value.

        Raises:
            InputError: All faults together.
        """
        combine(list(self._faults()))

    def _faults(self) -> Iterable[str]:
        for value in ("share", "seconds"):
            try:
                getattr(self, value)
            except InputError as error:
                yield str(error)
        if not 0 < self.error_rate < 0.5:
            yield f"--error-rate is {self.error_rate}, expected a probability above 0 and below 0.5, such as 0.05."
        limits = {"steps": 0, "permutations": 0, "replays": 0, "exact_rows": 0, "keep_tokens": 1, "check_limit": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                yield f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least {least}."
        if self.objective not in ("loss", "exact", "choice") and ":" not in self.objective:
            yield f"--objective is {self.objective!r}, expected loss, exact, choice, or module:function."
