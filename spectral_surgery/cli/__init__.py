"""The command line: ``spectral-surgery COMMAND ...``.

Exit status: 0 done, 1 failed midway, 2 bad input (nothing was done), 3 an inspection found what --fail-on names,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import tyro

from spectral_surgery import processes
from spectral_surgery.cli import console
from spectral_surgery.cli.commands import Command, Demo, Edit, Measure, Restore
from spectral_surgery.cli.compare import Compare
from spectral_surgery.cli.convert import Convert
from spectral_surgery.cli.estimate import Estimate
from spectral_surgery.cli.evaluate import Evaluate
from spectral_surgery.cli.export import Export
from spectral_surgery.cli.inspect import Inspect
from spectral_surgery.cli.miniature import Miniature
from spectral_surgery.cli.refine import Refine
from spectral_surgery.cli.report import Report
from spectral_surgery.cli.speclora import SpecLora
from spectral_surgery.cli.sweep import Sweep
from spectral_surgery.cli.train import Train
from spectral_surgery.cli.weights import Weights
from spectral_surgery.errors import InputError, SpectralSurgeryError

COMMANDS = (
    Inspect,
    Refine,
    Compare,
    Export,
    Demo,
    Estimate,
    Measure,
    Edit,
    Restore,
    Evaluate,
    Sweep,
    Report,
    Miniature,
    Train,
    SpecLora,
    Weights,
    Convert,
)
"""In the order of the help: what most people need first, then what experiments need."""


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
    if processes.count() > 1 and not command.shared:
        several = ", ".join(kind.__name__.lower() for kind in COMMANDS if kind.shared)
        raise InputError(
            f"{type(command).__name__.lower()} works in one process, and {processes.count()} were started. Start it "
            f"without accelerate launch; what can be launched is {several}."
        )


def parse(arguments: Sequence[str] | None) -> Command:
    """Returns the command that the arguments spell; ends the program on ``--help`` and on a misspelling."""
    return tyro.extras.subcommand_cli_from_dict(
        {command.__name__.lower(): command for command in COMMANDS},
        args=arguments,
        prog="spectral-surgery",
        description="Refine a trained LoRA adapter without retraining it, and know whether that helped.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _failed(command: Command, message: str, status: int) -> int:
    if command.debug:
        traceback.print_exc()
    who = f"process {processes.rank()}: " if processes.rank() else ""
    print(f"error: {who}{message}", file=sys.stderr)
    return status
