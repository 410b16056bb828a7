"""A fine-tuned model's weights against the pre-trained ones, weight by weight: SpecLoRA's study of any two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spectral_surgery import weight_study
from spectral_surgery.alignment import Group, groups
from spectral_surgery.errors import BaseModelError
from spectral_surgery.inspecting import plain
from spectral_surgery.selection import Selection, select
from spectral_surgery.weight_files import WeightFiles
from spectral_surgery.weight_study import WeightStudy


@dataclass(frozen=True)
class WeightComparison:
    """Every weight matrix of a model after a change against before."""

    after: str
    """Folder of the fine-tuned model."""
    before: str
    """Folder of the pre-trained one."""
    studies: Mapping[str, WeightStudy]
    """By module path."""
    change: Mapping[str, float]
    """||W_after - W_before|| / ||W_before|| in Frobenius norms, by module path."""
    missing: int
    """Matrices that only one of the two has, or has in another shape."""

    @property
    def groups(self) -> list[Group]:
        """The modules by kind."""
        return groups(self.studies)


def compare_weights(
    after: WeightFiles,
    before: WeightFiles,
    *,
    selection: Selection | None = None,
    n: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightComparison:
    """Returns the study of every selected matrix that both folders hold.

    Args:
        after: The fine-tuned weights.
        before: The pre-trained weights.
        selection: Modules and layers; all matrices inside numbered layers by default.
        n: Leading singular directions that are looked at.
        progress: Told how many matrices are done, and of how many.

    Raises:
        BaseModelError: If the two share no matrix.
        SelectionError: If the selection names nothing.
    """
    there, here = after.matrices(), before.matrices()
    shared = [path for path, shape in there.items() if here.get(path) == shape]
    if not shared:
        raise BaseModelError(
            f"{after.folder} and {before.folder} share no weight matrix inside numbered layers. "
            f"Pass the folder of the model that the first was fine-tuned from."
        )
    studies, change = {}, {}
    paths = select(shared, selection or Selection(modules=("all",)))
    for done, path in enumerate(paths, 1):
        old = weight_study.known(before.weight(path, there[path]), n)
        new = weight_study.unchanged(after.weight(path, there[path]))
        studies[path] = weight_study.study(old, new, n)
        norm = float(old.matrix.W.norm())
        change[path] = float((new.W - old.matrix.W).norm()) / norm if norm else float("nan")
        progress(done, len(paths))
    missing = len(set(there) | set(here)) - len(shared)
    return WeightComparison(str(after.folder), str(before.folder), studies, change, missing)


def to_json(found: WeightComparison) -> dict[str, Any]:
    """Returns everything as plain values; NaN becomes null."""
    modules = [
        {"module": path, "change": plain(found.change[path]), **plain(study)} for path, study in found.studies.items()
    ]
    return {"after": found.after, "before": found.before, "missing": found.missing, "modules": modules}
