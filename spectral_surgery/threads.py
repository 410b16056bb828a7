"""Linear algebra of many thin factors: one thread a factor, since a second one costs more to wake than it gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs every operation of torch in one thread while open."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Returns the function's results in the order of the items, which are worked on side by side."""
    items = list(items)
    found: dict[int, R] = {}
    places = count()  # its next() is one step of the interpreter, so no two threads get the same

    def work() -> None:
        while (place := next(places)) < len(items):
            found[place] = function(items[place])

    workers = os.cpu_count() or 1
    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return [found[place] for place in range(len(items))]
