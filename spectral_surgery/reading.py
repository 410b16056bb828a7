"""Reads the rows of a data set: a local file, a folder of files, or a data set on the Hub.

JSON, CSV and TSV are read here rather than with ``datasets``, because what its readers guess from
a column changes answers: "007" becomes 7, "2020-01-01" a date, and the word "None" a missing value.
Nothing local is cached, so an edited file is read as it now is.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral_surgery.errors import DataError
from spectral_surgery.formats import FORMATTERS, DataOptions, formatter_for

WRAPPERS = ("data", "rows", "examples")


def read_rows(data: str, options: DataOptions) -> list[dict[str, Any]]:
    """The rows of a data set, in the order of the source.

    Args:
        data: A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, a folder of such files or one
            written by ``datasets``, or the name of a data set on the Hub.
        options: Configuration and split. In a folder, a file belongs to the split whose name is a
            word of its path, as in ``test.jsonl``; where none says "train", every file is read.

    Raises:
        DataError: If nothing is there, it cannot be read or reached, or it holds no rows.
    """
    path = Path(data).expanduser()
    if path.exists():
        rows = _local_rows(path, options)
    elif path.suffix.lower() in READERS or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", data):
        raise DataError(f"{data}: no such file or folder; correct the path.")
    else:
        rows = _hub_rows(data, options)
    if not rows:
        raise DataError(f"{data}: there are no rows in it; expected at least one example.")
    return rows


def _local_rows(path: Path, options: DataOptions) -> list[dict[str, Any]]:
    """The rows of a file, or of all files of a folder that the options choose, by name."""
    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _saved_rows(path, options)
    files = _files(path, options) if path.is_dir() else [path]
    rows: list[dict[str, Any]] = []
    for file in files:
        if file.suffix.lower() not in READERS:
            raise DataError(f"{file}: unknown kind of file; expected one of {', '.join(READERS)}.")
        with _naming(file):
            rows.extend(READERS[file.suffix.lower()](file, options.data_split))
    return rows


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raises whatever a reader raises as one sentence about the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # every reader has its own errors, Arrow's among them
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); check the file.") from error


def _one_line(error: Exception) -> str:
    """The first line of an error, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _files(folder: Path, options: DataOptions) -> list[Path]:
    """The folder's data files, narrowed to the configuration and the split that their paths name.

    Raises:
        DataError: If there is none, or none of the configuration.
    """
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in inside if path.suffix.lower() in READERS and _holds_rows(path)]
    if options.data_name is not None:
        files = [path for path in files if options.data_name in path.parts]
    if not files:
        wanted = f" of {options.data_name!r}" if options.data_name is not None else ""
        raise DataError(f"{folder}: no data file{wanted} in it; expected {', '.join(READERS)}.")
    word = re.compile(rf"(?<![^\W_]){re.escape(options.data_split)}(?![^\W_])")
    named = [path for path in files if word.search(str(path))]
    if not named and options.data_split != "train":
        raise DataError(
            f"{folder}: no file named after the split {options.data_split!r} in it; "
            "correct --data-split, or give the file itself."
        )
    return [folder / path for path in named or files]


def _holds_rows(path: Path) -> bool:
    """Whether a file inside a folder is data: neither hidden nor a description of the data set."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name not in ("dataset_info.json", "dataset_infos.json")


def _json_lines(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """One JSON object a line; blank lines are passed over."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(_parsed(line, f"{path}: line {number}"), f"{path}: line {number}")


def _json_list(path: Path, split: str) -> Iterable[dict[str, Any]]:
    """A JSON list of objects, bare or under the split's name; else one object a line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text, parse_float=str)
    except json.JSONDecodeError:
        return list(_json_lines(path, split))
    if isinstance(value, dict):
        value = next((value[key] for key in (split, *WRAPPERS) if _is_list(value.get(key))), [value])
    if not _is_list(value):
        raise DataError(f"{path} is of type {type(value).__name__}; expected a list of objects.")
    return [_object(row, f"{path}: entry {number}") for number, row in enumerate(value)]


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _parsed(line: str, place: str) -> object:
    """The JSON value of a line; a number with a fraction stays the text that it was."""
    try:
        return json.loads(line, parse_float=str)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error.msg}); correct or remove it.") from error


def _object(value: object, place: str) -> dict[str, Any]:
    """A row, which must be a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{place} is of type {type(value).__name__}; expected an object.")
    return value


def _delimited(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """The rows of a table with a header line; every cell stays the text that it is."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for row in table:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}: the row that ends on line {table.line_num} does not have the "
                    f"{len(table.fieldnames or [])} cells of the header; put quotes around text "
                    "that holds the delimiter."
                )
            yield row


def _comma_rows(path: Path, split: str) -> Iterable[dict[str, Any]]:
    return _delimited(path, ",")


def _tab_rows(path: Path, split: str) -> Iterable[dict[str, Any]]:
    return _delimited(path, "\t")


def _parquet_rows(path: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a Parquet file, streamed, which leaves no cache behind."""
    import datasets

    pattern = glob.escape(str(path))
    return list(datasets.load_dataset("parquet", data_files=pattern, split="train", streaming=True))


READERS: dict[str, Callable[[Path, str], Iterable[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _comma_rows,
    ".tsv": _tab_rows,
    ".parquet": _parquet_rows,
}


def _saved_rows(folder: Path, options: DataOptions) -> list[dict[str, Any]]:
    """The rows of a data set that ``datasets`` saved to disk."""
    import datasets

    with _naming(folder):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            return saved.to_list()
        if options.data_split not in saved:
            raise DataError(
                f"{folder}: no split {options.data_split!r} among {', '.join(saved)}; correct --data-split."
            )
        return saved[options.data_split].to_list()


def _hub_rows(data: str, options: DataOptions) -> list[dict[str, Any]]:
    """The rows of one split of a data set on the Hub; without a network, of the copy in the cache.

    Raises:
        DataError: If it does not exist, is private, or cannot be reached.
    """
    import datasets

    known = formatter_for(data)
    configuration = options.data_name or (FORMATTERS[known].configuration if known else None)
    try:
        with _without_bars():
            return datasets.load_dataset(data, configuration, split=options.data_split).to_list()
    except Exception as error:  # the network, the Hub and the builders each have their own errors
        raise DataError(
            f"{data}: no local file, and not readable as a data set on the Hub "
            f"({_one_line(error)}); correct the name, --data-name or --data-split, "
            "or give a local file."
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switches the progress bars of ``datasets`` off, and on again where they were on."""
    from datasets.utils import are_progress_bars_disabled as hidden
    from datasets.utils import disable_progress_bars, enable_progress_bars

    restore = (lambda: None) if hidden() else enable_progress_bars
    disable_progress_bars()
    try:
        yield
    finally:
        restore()
