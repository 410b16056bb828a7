"""What a person sees while something runs: notes and progress; a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from spectral_surgery import processes


def prepare(debug: bool) -> None:
    """Routes the package's own notes to standard error and keeps the libraries' quiet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    own = logging.getLogger("spectral_surgery")
    own.handlers[:] = [_Notes()]
    own.setLevel(logging.INFO if processes.rank() == 0 else logging.CRITICAL)
    own.propagate = False
    if not debug:
        warnings.simplefilter("ignore")


@contextmanager
def first_speaks() -> Iterator[None]:
    """Lets nothing but the first process print while open."""
    if not processes.rank():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        word = "warning" if record.levelno >= logging.WARNING else "note"
        print(f"{word}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def progress(what: str, unit: str = "examples") -> Iterator[Callable[[int, int], None]]:
    """Yields a function ``(done, total)`` that shows how far something is; the first process shows it."""
    if processes.rank():
        yield lambda done, total: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    shown = -1

    def line(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            print(f"{what}: {done} of {total} {unit}".rstrip(), file=sys.stderr)

    yield line


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function ``(what, done, total)`` that shows one kind of work after the other."""
    shown: dict[str, Callable[[int, int], None]] = {}
    with ExitStack() as stack:

        def tell(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown.clear()
                shown[what] = stack.enter_context(progress(what, ""))
            shown[what](done, total)

        yield tell
