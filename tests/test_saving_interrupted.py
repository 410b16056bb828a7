"""What is there after a kill at any step of a save, and on a full disk.

The saves run in processes of their own, made by a fork server that imports torch once for all of them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from test_saving import WRITTEN, made, names, weaker

from spectral_surgery import Adapter
from spectral_surgery.adapter import saving
from spectral_surgery.errors import SpectralSurgeryError

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "safetensors.torch", "spectral_surgery.adapter"])

Action = Callable[[Path, Path], None]
"""Called with the source and the target."""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Audit events that change something, beside an ``open`` for writing."""


@pytest.fixture
def source(tmp_path: Path) -> Adapter:
    return made(tmp_path / "source")


def run(action: Callable[..., None], *arguments: Any) -> tuple[int | None, str]:
    """Exit code of a process that calls this, and the error that it met."""
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_report, args=(theirs, action, arguments))
    process.start()
    theirs.close()
    try:
        message = ours.recv()
    except EOFError:
        message = ""
    process.join()
    return process.exitcode, message


def _report(connection: Connection, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        action(*arguments)
        connection.send("done")
    except SpectralSurgeryError as error:
        connection.send(f"{type(error).__name__}: {error}")


def _killed_while_writing_tensors(source: Path, out: Path) -> None:
    def half(tensors: Any, path: Path, **_: Any) -> None:
        content = safetensors.torch.save(tensors)
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = half
    _new_version(source, out)


def _with_little_space(source: Path, out: Path, limit: int) -> None:
    adapter = weaker(Adapter.load(source), 0.5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    adapter.save(out, overwrite=True)


def _kill_at_step(last: int) -> None:
    """Kills this process before the given one of its changes to the file system."""
    count = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR)):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _kill_at_every_step(prepare: Action, action: Action, source: Path, root: Path) -> None:
    """Kills an action at its first step in one prepared room, at its second in the next, until one gets through."""
    for step in itertools.count():
        room = root / str(step)
        room.mkdir(parents=True)
        prepare(source, room / "out")
        if step == 0:  # import everything that an action needs, so that it takes no step in a later room
            action(source, room / "out")
        elif _status_when_killed(step, action, source, room / "out") == 0:
            return


def _status_when_killed(step: int, action: Action, source: Path, out: Path) -> int:
    if (process := os.fork()) == 0:
        try:
            _kill_at_step(step)
            action(source, out)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status


def _nothing(source: Path, out: Path) -> None:
    pass


def _old_version(source: Path, out: Path) -> None:
    weaker(Adapter.load(source), 0.9).save(out)


def _new_version(source: Path, out: Path) -> None:
    weaker(Adapter.load(source), 0.5).save(out, overwrite=True)


def _between_renames(source: Path, out: Path) -> None:
    staging = saving._staging(out)
    staging.mkdir()
    _old_version(source, staging / "old")
    _new_version(source, staging / "new")


def _recover(source: Path, out: Path) -> None:
    saving.recover(out)


def rooms(root: Path, prepare: Action, action: Action, source: Path) -> list[Path]:
    """The target of every run that was killed."""
    assert run(_kill_at_every_step, prepare, action, source, root) == (0, "done")
    found = sorted((room / "out" for room in root.iterdir()), key=lambda out: int(out.parent.name))
    assert len(found) > 9
    return found[1:-1]


def said_by_the_next_save(out: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    saving.recover(out)
    return "".join(record.getMessage().partition("interrupted. ")[2] for record in caplog.records)


PUT_BACK = "The version from before it was put back."
KEPT = "The version from before it is in place."
DONE = "It had put its version in place, which is whole."
REMOVED = "It had not finished, and what it had written is removed."
EITHER = "It had just begun or just ended, and the version in place is whole."


@pytest.mark.parametrize(
    ("prepare", "sentences"),
    [(_old_version, {PUT_BACK, KEPT, DONE, EITHER, ""}), (_nothing, {REMOVED, EITHER, ""})],
    ids=["over an old version", "to a new folder"],
)
def test_a_kill_at_any_step_leaves_a_whole_version_and_the_next_save_says_which(
    source: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture, prepare: Action, sentences: set[str]
) -> None:
    old = weaker(source, 0.9).digest if prepare is _old_version else None
    new = weaker(source, 0.5).digest
    expected = {PUT_BACK: {old}, KEPT: {old}, DONE: {new}, REMOVED: {None}, EITHER: {old, new}, "": {old, new}}
    said = set()
    for out in rooms(tmp_path / "rooms", prepare, _new_version, source.folder):
        assert not out.exists() or names(out) == WRITTEN, out
        sentence = said_by_the_next_save(out, caplog)
        found = Adapter.load(out).digest if out.exists() else None
        assert found in expected[sentence], (out, sentence)
        assert names(out.parent) == ({"out"} if found else set())
        said.add(sentence)
        _new_version(source.folder, out)
        assert Adapter.load(out).digest == new
        assert names(out.parent) == {"out"}
    assert said == sentences


def test_a_kill_during_recovery_loses_nothing(
    source: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for out in rooms(tmp_path / "rooms", _between_renames, _recover, source.folder):
        assert said_by_the_next_save(out, caplog) in (PUT_BACK, KEPT, EITHER, "")
        assert Adapter.load(out).digest == weaker(source, 0.9).digest, out
        assert names(out.parent) == {"out"}


def test_a_kill_in_the_middle_of_the_tensors_leaves_the_old_version(
    source: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = source.save(tmp_path / "out")
    assert run(_killed_while_writing_tensors, source.folder, out)[0] == -signal.SIGKILL
    assert saving.interrupted(out)
    assert Adapter.load(out).digest == source.digest
    weaker(source, 0.7).save(out, overwrite=True)
    assert "An earlier save to" in caplog.text
    assert "The version from before it is in place" in caplog.text
    assert not saving.interrupted(out)
    assert names(tmp_path) == {"source", "out"}


@pytest.mark.parametrize("limit", [0, 10, 200, 900])
def test_a_full_disk_leaves_the_target_as_it_was(source: Adapter, tmp_path: Path, limit: int) -> None:
    for out in (source.save(tmp_path / "out"), tmp_path / "new"):
        code, message = run(_with_little_space, source.folder, out, limit)
        assert code == 0
        assert message.startswith(f"RunError: Saving to {out} failed (")
        assert "check the free space" in message
    assert Adapter.load(tmp_path / "out").digest == source.digest
    assert names(tmp_path) == {"source", "out"}
