"""How long looking into a large adapter takes, and how much memory.

Makes an adapter of the shapes of Llama-3.1-8B (seven kinds, rank 16, bfloat16) with 8, 16 and 32 layers, inspects each
in a process of its own, and prints a table. The results are also written as JSON beside the adapters. Needs Linux,
for the peak of resident memory.

    python benchmarks/inspecting.py --output build/benchmark-inspect
    python benchmarks/inspecting.py --base

The second holds one layer's updates against weights of full size, of a random bulk with leading directions above it,
and says what all 32 layers would take by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
RANK = 16

CHILD = """
import json, sys, time
import torch
# ru_maxrss would start at the size of the process that started this one.
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
from spectral_surgery.cli import main
sys.stdout, told = open("/dev/null", "w"), sys.stdout
assert main(sys.argv[1:]) == 0
print(json.dumps({"inside_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
                  "memory_mib": peak() - before}), file=told)
"""


def make(folder: Path, layers: int) -> float:
    """Writes an adapter of random factors and returns its size in MiB."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(layers)
    tensors = {}
    for layer in range(layers):
        for kind, (out, inside) in KINDS.items():
            path = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{path}.lora_A.weight"] = (0.02 * torch.randn(RANK, inside, generator=generator)).bfloat16()
            tensors[f"{path}.lora_B.weight"] = (0.02 * torch.randn(out, RANK, generator=generator)).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": [kind.split(".")[1] for kind in KINDS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return (folder / "adapter_model.safetensors").stat().st_size / 2**20


def weight(out: int, inside: int, generator: Any) -> Any:
    """Returns a weight with a random bulk, whose largest singular value is about 2, and 48 directions above it."""
    import torch

    bulk = torch.randn(out, inside, generator=generator) / (out**0.5 + inside**0.5) * 2
    U, V = (torch.linalg.qr(torch.randn(size, 48, generator=generator))[0] for size in (out, inside))
    return (bulk + (U * (16 * torch.arange(1, 49) ** -0.5)) @ V.T).bfloat16()


def against_base(output: Path, repeats: int) -> None:
    """Prints how long one layer's updates take beside weights of full size."""
    import torch
    from safetensors.torch import save_file

    folder, base = output / "layers-1", output / "base-1"
    make(folder, 1)
    base.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {f"model.layers.0.{kind}.weight": weight(*shape, generator) for kind, shape in KINDS.items()}
    save_file(weights, base / "model.safetensors")
    without = measure(folder, repeats)
    found = measure(folder, repeats, "--base-weights", str(base))
    wall, cpu = (found[name] - without[name] for name in ("inside_s", "cpu_s"))
    memory = found["memory_mib"]
    print(f"One layer of seven weights: {wall:.1f} s, CPU {cpu:.1f} s, memory {memory:.0f} MiB above torch.")
    print(f"By arithmetic 32 layers: {32 * wall / 60:.0f} minutes, CPU {32 * cpu / 60:.0f} minutes.")


def measure(folder: Path, repeats: int, *options: str) -> dict[str, float]:
    """Returns medians over runs: seconds of the process, of the command in it and of CPU, and MiB above torch."""
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        command = [sys.executable, "-c", CHILD, "inspect", str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append({"process_s": time.perf_counter() - start, **json.loads(done.stdout)})
    return {name: median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/benchmark-inspect"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", action="store_true", help="measure one layer against weights of full size")
    arguments = parser.parse_args()
    if arguments.base:
        against_base(arguments.output, arguments.repeats)
        return
    rows: list[dict[str, Any]] = []
    heads = ("layers", "geometry", "file MiB", "process s", "command s", "CPU s", "MiB", "/ file")
    print(" ".join(f"{head:>9}" for head in heads))
    for layers in (8, 16, 32):
        folder = arguments.output / f"layers-{layers}"
        size = make(folder, layers)
        for geometry in ("no", "yes"):
            found = measure(folder, arguments.repeats, "--geometry", geometry)
            rows.append({"layers": layers, "geometry": geometry, "file_mib": size, **found})
            figures = (size, *found.values(), found["memory_mib"] / size)
            print(f"{layers:>9} {geometry:>9} " + " ".join(f"{figure:>9.2f}" for figure in figures), flush=True)
    for geometry in ("no", "yes"):
        small, middle, large = (row["cpu_s"] for row in rows if row["geometry"] == geometry)
        print(f"geometry {geometry}: a layer more costs {(middle - small) / 8:.3f} s of CPU from 8 to 16 layers and "
              f"{(large - middle) / 16:.3f} s from 16 to 32.")  # fmt: skip
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg(), "rows": rows}
    (arguments.output / "results.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
