"""What reading, decomposing, editing and writing a large adapter costs beside copying its file.

Makes an adapter of the shapes of Llama-3.1-8B (32 layers, seven kinds, rank 16, bfloat16), and then, in one process
and in turns:

``copy``     the file through safetensors: load_file and save_file
``ours``     ``Adapter.load``, an edit of every component by ``operate``, and ``Adapter.save``

In ours, what makes sure of the result is timed apart: reading it back and its singular values (``verify``), and
flushing to the disk (``fsync``). Prints medians over rounds and writes all rounds as JSON beside the adapter.

    python benchmarks/files.py --output build/benchmark-files

On a CPU that others use as well the clock says little: ``--cpu`` takes the process's own time, which counts every
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from inspecting import RANK, make
from safetensors.torch import load_file, save_file

from spectral_surgery.adapter import Adapter, saving
from spectral_surgery.surgery import operate

LIMIT = 8
"""Times the copy, that ours should stay within."""


class Watch:
    """Adds up seconds by name; what is timed inside of something else is not counted there."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.spent: dict[str, float] = {}
        self.inner = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts the time while open."""
        start, before = self.clock(), self.inner
        self.inner = 0.0
        try:
            yield
        finally:
            took = self.clock() - start
            self.spent[name] = self.spent.get(name, 0.0) + took - self.inner
            self.inner = before + took

    def around(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        """Returns the function with its time counted."""

        def timed(*given: object, **named: object) -> object:
            with self.of(name):
                return function(*given, **named)

        return timed


def ours(folder: Path, out: Path, watch: Watch) -> None:
    """Reads, edits and writes the adapter."""
    with watch.of("read"):
        adapter = Adapter.load(folder)
    gates = {path: np.linspace(0.5, 1.2, RANK) for path in adapter.updates}
    with watch.of("decompose and edit"):
        updates, report = operate(adapter.updates, gates)
        edited = adapter.with_updates(updates, report)
    verify, flush, flush_entry = Adapter._verify, saving._flush, saving._flush_entry
    with (
        patch.object(Adapter, "_verify", watch.around("verify", verify)),
        patch.object(saving, "_flush", watch.around("fsync", flush)),
        patch.object(saving, "_flush_entry", watch.around("fsync", flush_entry)),
        watch.of("write"),
    ):
        edited.save(out)


def copy(folder: Path, out: Path, watch: Watch) -> None:
    """Copies the file through safetensors."""
    name = "adapter_model.safetensors"
    out.mkdir(parents=True)
    with watch.of("copy"):
        save_file(load_file(folder / name), out / name, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/benchmark-files"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="time of the process's CPUs in place of the clock's")
    arguments = parser.parse_args()
    folder = arguments.output / f"layers-{arguments.layers}"
    size = make(folder, arguments.layers)
    rounds = []
    for _ in range(arguments.rounds + 1):
        watch = Watch(time.process_time if arguments.cpu else time.perf_counter)
        for way in (copy, ours):
            out = arguments.output / "out"
            shutil.rmtree(out, ignore_errors=True)
            way(folder, out, watch)
        rounds.append(watch.spent)
    del rounds[0]  # the first fills caches
    counted = ("read", "decompose and edit", "write")
    ratio = median(sum(spent[name] for name in counted) / spent["copy"] for spent in rounds)
    print(f"{arguments.layers} layers, {size:.0f} MiB, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
          f"medians of {arguments.rounds} rounds of {'CPU time' if arguments.cpu else 'the clock'}")  # fmt: skip
    print(f"{'':<20}{'seconds':>9}{'/ copy':>8}")
    for name in ("copy", *counted, "verify", "fsync"):
        seconds = median(spent[name] for spent in rounds)
        times = median(spent[name] / spent["copy"] for spent in rounds)
        print(f"{name:<20}{seconds:>9.3f}{times:>8.2f}")
    print(f"Reading, decomposing, editing and writing take {ratio:.1f} times the copy (limit {LIMIT}).")
    about = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    about |= {"threads": torch.get_num_threads(), "load": os.getloadavg(), "clock": not arguments.cpu}
    text = json.dumps({**about, "mib": size, "ratio": ratio, "rounds": rounds}, indent=1)
    (arguments.output / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
