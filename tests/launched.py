"""Commands and scripts in two processes on the CPU, as users launch them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    *["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
]


def command(arguments: Sequence[str], launcher: Sequence[str] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """Runs the command line in two processes."""
    return _run([*launcher, "--no_python", str(Path(sys.executable).with_name("spectral-surgery")), *arguments])


def script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in two processes."""
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return _run([*TORCHRUN, str(path)])


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=settings, timeout=600, check=False
    )
