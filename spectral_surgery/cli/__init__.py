"""The command line: ``spectral-surgery COMMAND ...``.

Exit status: 0 done, 1 failed midway, 2 bad input (nothing was done), 3 an inspection found what --fail-on names,
130 interrupted.
"""

from __future__ import annotations

import ast
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from spectral_surgery import processes
from spectral_surgery.cli import console
from spectral_surgery.errors import InputError, SpectralSurgeryError

if TYPE_CHECKING:
    from spectral_surgery.cli.commands import Command

COMMANDS = {
    "inspect": "inspect:Inspect",
    "refine": "refine:Refine",
    "compare": "compare:Compare",
    "export": "export:Export",
    "demo": "commands:Demo",
    "estimate": "estimate:Estimate",
    "measure": "commands:Measure",
    "edit": "commands:Edit",
    "restore": "commands:Restore",
    "evaluate": "evaluate:Evaluate",
    "sweep": "sweep:Sweep",
    "report": "report:Report",
    "miniature": "miniature:Miniature",
    "train": "train:Train",
    "speclora": "speclora:SpecLora",
    "weights": "weights:Weights",
    "convert": "convert:Convert",
}
"""File and class of every command, in the order of the help: what most people need first, then for experiments."""
SHARED = ("measure", "refine", "evaluate", "train")
"""Commands whose work several processes can share."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    try:
        return _run(parse(arguments))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(command: Command) -> int:
    console.prepare(command.debug)
    try:
        _check_shared(command)
        with console.first_speaks():
            command.run()
        sys.stdout.flush()
    except SpectralSurgeryError as error:
        return _failed(command, str(error), error.exit_status)
    except KeyboardInterrupt:
        return _failed(command, "Interrupted. Nothing half-written is left behind.", 130)
    except BrokenPipeError:
        raise
    except Exception as error:
        hint = "" if command.debug else " Run again with --debug for the traceback."
        return _failed(command, f"{type(error).__name__}: {error}.{hint}", 1)
    return 0


def _check_shared(command: Command) -> None:
    """Refuses several processes where a command would do in each of them what one does."""
    name = type(command).__name__.lower()
    if processes.count() > 1 and name not in SHARED:
        raise InputError(
            f"{name} works in one process, and {processes.count()} were started. Start it without accelerate launch; "
            f"what can be launched is {', '.join(SHARED)}."
        )


def parse(arguments: Sequence[str] | None) -> Command:
    """Returns the command that the arguments spell; ends the program on ``--help`` and on a misspelling."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    found: Command = tyro.extras.subcommand_cli_from_dict(
        {name: _command(place) if given[:1] == [name] else _described(place) for name, place in COMMANDS.items()},
        args=given,
        prog="spectral-surgery",
        description="Refine a trained LoRA adapter without retraining it, and know whether that helped.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return found


def _command(place: str) -> Any:
    file, _, kind = place.partition(":")
    return getattr(import_module(f"spectral_surgery.cli.{file}"), kind)


def _described(place: str) -> Any:
    """Returns what stands for a command that is not run: its name and docstring, read without importing it."""
    file, _, kind = place.partition(":")
    tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    return dataclass(type(kind, (), {"__doc__": ast.get_docstring(found), "__module__": __name__}))


def _failed(command: Command, message: str, status: int) -> int:
    if command.debug:
        traceback.print_exc()
    who = f"process {processes.rank()}: " if processes.rank() else ""
    print(f"error: {who}{message}", file=sys.stderr)
    return status
