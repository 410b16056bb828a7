"""The ledger counts other runs on the same rows, and never stops a run."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spectral_surgery.judging.ledger import NAME, digest_of, earlier, ledger_path, note
from spectral_surgery.judging.rule import Rule

ROWS = digest_of(["a", "b"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECTRAL_SURGERY_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_the_hash_of_rows_does_not_depend_on_their_order() -> None:
    assert digest_of(["b", "a"]) == ROWS
    assert digest_of(["a", "c"]) != ROWS


def test_other_runs_on_the_same_rows_count_and_the_same_run_does_not(folder: Path) -> None:
    assert earlier(ROWS, "one") == 0
    assert not folder.exists(), "reading leaves nothing behind"
    note(ROWS, "one", outcome="refined", level=0.05)
    note(ROWS, "one", outcome="refined")
    assert (earlier(ROWS, "one"), earlier(ROWS, "two"), earlier(digest_of(["c"]), "two")) == (0, 1, 0)
    note(ROWS, "two")
    assert (earlier(ROWS, "one"), earlier(ROWS, "two"), earlier(ROWS, "three")) == (0, 1, 2), "the first stays first"
    lines = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    assert [line["run"] for line in lines] == ["one", "two"]
    assert lines[0]["outcome"] == "refined"


def test_the_error_rate_is_divided_by_all_verdicts() -> None:
    assert Rule(error_rate=0.06).level(2) == pytest.approx(0.02)
    assert Rule().level() == 0.05


def test_the_folder_is_the_users_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRAL_SURGERY_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert ledger_path() == tmp_path / "spectral-surgery" / NAME
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ledger_path() == tmp_path / "home" / ".local" / "state" / "spectral-surgery" / NAME


def test_broken_lines_are_a_warning_and_the_rest_still_counts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    note(ROWS, "one")
    torn = '{"test": "half a li'
    (folder / NAME).open("a").write('[]\n{"test": 3, "run": "x"}\n\n' + torn)
    note(ROWS, "two")
    with caplog.at_level(logging.WARNING):
        assert earlier(ROWS, "three") == 2
    assert "3 unreadable lines" in caplog.text
    assert (folder / NAME).read_text().count(torn + "\n") == 1, "what was torn is left as it is, on its own line"


@pytest.mark.parametrize("what", ["a file in place of the folder", "a folder in place of the file"])
def test_a_ledger_that_cannot_be_used_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    if what.startswith("a file"):
        folder.write_text("")
    else:
        (folder / NAME).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        note(ROWS, "one")
        assert earlier(ROWS, "two") == 0
    assert "cannot be written" in caplog.text
    assert "left out" in caplog.text


def test_no_home_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPECTRAL_SURGERY_STATE", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with caplog.at_level(logging.WARNING):
        note(ROWS, "one")
        assert earlier(ROWS, "one") == 0
    assert "Could not determine home directory" in caplog.text


def test_runs_at_the_same_time_all_count(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: note(ROWS, f"run {i}"), range(24)))
    assert earlier(ROWS, "another") == 24
