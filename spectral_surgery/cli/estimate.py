"""``spectral-surgery estimate``: what a measurement will need."""

from __future__ import annotations

from dataclasses import dataclass

from spectral_surgery.cli.commands import Measuring


@dataclass(frozen=True, kw_only=True)
class Estimate(Measuring):
    """Says what measuring an adapter needs in memory, and roughly in time, before any weight is loaded.

    Without --data it counts --examples rows of --max-length tokens that are all answer: the most there can be.
    """

    data: str | None = None
    """Measuring rows, whose lengths are then used."""
    memory: float | None = None
    """GiB of the device, to be told whether it fits; by default those of the first accelerator."""

    def run(self) -> None:
        """Prints the estimate."""
        from spectral_surgery.estimating import estimate

        adapter = self.load()
        prepared = self.prepare(adapter, self.data) if self.data else None
        rows = prepared.tokenized.examples if prepared else None
        print(
            estimate(
                adapter, rows, self.selection, self.rows, self.model, self.batching, memory=self.memory
            ).in_words()
        )
