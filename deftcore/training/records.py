"""Records from JSONL, CSV and plain text: the values that pyarrow reads, or an error with file and line.

Python's own readers do it. Of the libraries, pyarrow (and so `datasets`) turns the string "2020-01-01" in JSONL into a
date and counts rows of a block instead of lines; pandas shifts the cells of a row that is too long and fills one that
is too short; each would add 100 MB or more to `deftcore[train]`. The tests compare with pyarrow.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Record(dict[str, Any]):
    """The fields of one record, and `where` it stands: "file:line"."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where


def read_records(path: str | Path) -> list[Record]:
    """Records of a .jsonl, .csv or text file (one record, `text`, for a whole text file), in UTF-8.

    Cells of a CSV are strings as written, an empty cell is "". Blank lines are no records.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: naming file and line, for lines that are not records or not UTF-8, unknown endings and empty files.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    ending = path.suffix.lower()
    if ending == ".csv":
        records = list(_csv(path))
    elif ending == ".jsonl":
        records = list(_jsonl(path))
    elif ending in (".txt", ".md", ""):
        text = "".join(line for _, line in _lines(path, newline=None))
        records = [Record({"text": text}, f"{path}:1")] if text else []
    else:
        raise ValueError(f"data: {path} must end in .jsonl, .csv or .txt")
    if not records:
        raise ValueError(f"data: {path} is empty")
    return records


def _lines(path: Path, newline: str | None) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, which are those that `newline` says and no others (U+2028 is text)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError as error:  # the reader left a lone surrogate for what is not UTF-8
                byte = ord(line[error.start]) - 0xDC00
                raise ValueError(
                    f"data: {path}:{number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
                ) from None
            yield number, line


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path, newline="\n"):
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            text = "" if line.lstrip().startswith("{") else "; a file of plain text must end in .txt"
            raise ValueError(f"data: {path}:{number} is not JSON: {reason}{text}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"data: {path}:{number} must be an object, got {type(fields).__name__}")
        yield Record(fields, f"{path}:{number}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"`{_repeated([name for name, _ in pairs])}` stands twice in one object")
    return fields


def _csv(path: Path) -> Iterator[Record]:
    reader = csv.reader((line for _, line in _lines(path, newline="")), strict=True)
    header: list[str] = []
    limit = csv.field_size_limit(sys.maxsize)
    try:
        while True:
            number = reader.line_num + 1  # where the row begins; a quoted cell may hold line ends
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"data: {path}:{number} is not CSV: {error}") from error
            if not row:
                continue
            if not header:
                header = row
                if len(set(header)) < len(header):
                    raise ValueError(f"data: {path}:{number} names the column `{_repeated(header)}` twice")
            elif len(row) != len(header):
                raise ValueError(
                    f"data: {path}:{number} must have {len(header)} cells ({', '.join(header)}), got {len(row)}"
                )
            else:
                yield Record(dict(zip(header, row, strict=True)), f"{path}:{number}")
    finally:
        csv.field_size_limit(limit)


def _repeated(names: list[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])
