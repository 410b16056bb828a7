"""Rows out of files, folders and the Hub, and the sentences for what cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.utils import are_progress_bars_disabled

from spectral_surgery.errors import DataError
from spectral_surgery.formats import DataOptions
from spectral_surgery.reading import read_rows

ROWS = [{"prompt": "first", "answer": "007"}, {"prompt": "second", "answer": "2020-01-01"}]
OTHER = [{"prompt": "third", "answer": "008"}, {"prompt": "fourth", "answer": "2020-01-02"}]


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return read_rows(str(path), DataOptions(**options))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_split(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"version": 1, "train": rows}), encoding="utf-8")


def write_commas(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ["prompt,answer", *(f"{row['prompt']},{row['answer']}" for row in rows)]
    path.write_text("\r\n".join(lines), encoding="utf-8")


def write_tabs(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ["prompt\tanswer", *(f"{row['prompt']}\t{row['answer']}" for row in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_lines),
        ("a.json", write_lines),
        ("a.json", write_list),
        ("a.json", write_split),
        ("a.CSV", write_commas),
        ("a.tsv", write_tabs),
        ("a [1].parquet", write_parquet),
    ],
)
def test_a_file_gives_its_rows_as_they_now_are_and_every_cell_as_it_is_written(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    path = tmp_path / name
    write(path, ROWS)
    before = path.stat()
    assert read(path) == ROWS
    write(path, OTHER)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(path) == OTHER


def test_a_table_keeps_words_line_breaks_and_a_byte_order_mark_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,answer\r\n"two\r\nlines",None\r\n"a, b",NA\r\n', encoding="utf-8")
    assert read(path) == [
        {"prompt": "two\r\nlines", "answer": "None"},
        {"prompt": "a, b", "answer": "NA"},
    ]


def test_json_keeps_the_digits_of_a_number_and_lines_with_unusual_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"answer": 1.10}\n\n{"answer": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read(path) == [{"answer": "1.10"}, {"answer": "a\u2028b\u0085c"}]


def test_a_folder_gives_the_files_of_the_split_and_all_files_if_none_is_named(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "train-00000-of-00001.jsonl", ROWS)
    write_lines(tmp_path / "test.jsonl", OTHER)
    (tmp_path / "dataset_infos.json").write_text("{}", encoding="utf-8")
    assert read(tmp_path) == ROWS
    assert read(tmp_path, data_split="test") == OTHER
    (tmp_path / "train-00000-of-00001.jsonl").rename(tmp_path / "constrained.jsonl")
    assert read(tmp_path) == ROWS + OTHER


def test_a_folder_is_narrowed_to_the_configuration(tmp_path: Path) -> None:
    for name, rows in (("main", ROWS), ("socratic", OTHER)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", rows)
    assert read(tmp_path, data_name="socratic") == OTHER


def test_a_folder_that_datasets_saved_gives_its_split(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(OTHER)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "both", data_split="test") == OTHER
    with pytest.raises(DataError, match="no split 'dev' among train, test; correct --data-split"):
        read(tmp_path / "both", data_split="dev")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/rows", "~/gone", "a/b/c"])
def test_a_path_to_nothing_is_not_asked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(DataError, match=f"^{name}: no such file or folder; correct the path"):
        read_rows(name, DataOptions())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "there are no rows in it; expected at least one example"),
        ("a.csv", b"prompt,answer\n", "there are no rows in it"),
        ("a.json", b"[]", "there are no rows in it"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON .*; correct or remove it"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2 is of type list; expected an object"),
        ("a.json", b"{broken", "line 1 is not JSON"),
        ("a.json", b"3", "is of type int; expected a list of objects"),
        ("a.json", b"[1]", "entry 0 is of type int; expected an object"),
        ("a.csv", b"prompt,answer\nyes, no, x\n", "line 2 does not have the 2 cells"),
        ("a.csv", b"prompt,answer\nyes\n", "line 2 does not have the 2 cells"),
        ("a.tsv", b'a\tb\n"x\ty', "cannot be read .*; check the file"),
        ("a.jsonl", b'{"a": "\xff"}', "cannot be read .*utf-8.*; check the file"),
        ("a.parquet", b"PAR1", "cannot be read .*Parquet.*; check the file"),
        ("a.txt", b"hello", r"unknown kind of file; expected one of \.jsonl, "),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{sentence}"):
        read(tmp_path / name)


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file in it; expected \.jsonl"):
        read(tmp_path)
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="no data file of 'main' in it"):
        read(tmp_path, data_name="main")
    with pytest.raises(DataError, match="no file named after the split 'test' in it"):
        read(tmp_path, data_split="test")


def test_the_hub_is_asked_for_the_configuration_and_split_without_progress_bars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split, are_progress_bars_disabled()))
        return datasets.Dataset.from_list(ROWS)

    datasets.enable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("someone/rows", DataOptions(data_name="easy", data_split="test")) == ROWS
    assert read_rows("openai/gsm8k", DataOptions()) == ROWS
    assert asked == [
        ("someone/rows", "easy", "test", True),
        ("openai/gsm8k", "main", "train", True),
    ]
    assert not are_progress_bars_disabled()


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach 'someone/rows' on the Hub.\nmore\nlines")

    datasets.enable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_rows("someone/rows", DataOptions())
    assert str(caught.value) == (
        "someone/rows: no local file, and not readable as a data set on the Hub (Couldn't reach "
        "'someone/rows' on the Hub); correct the name, --data-name or --data-split, or give a "
        "local file."
    )
    assert not are_progress_bars_disabled()
