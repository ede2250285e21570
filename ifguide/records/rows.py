"""The rows of files: lines of JSON, JSON values, separated tables, and batches of Parquet and Arrow tables.

A column may be of nested rows: `a.b` is `b` of the column `a`, unless a column has that very name.

What cannot be a row is not left out: it comes as a `str`, the reason, where a row would be an object.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ifguide.records.delimited import cell_rows
from ifguide.records.files import holds_json_lines, kind_of, open_bytes
from ifguide.storage import readable

BATCH_ROWS = 1024
NOT_AN_OBJECT = "a str, not an object"
FILE_FORMAT = b"ARROW1"  # how Arrow's file format begins; its stream format does not
STREAM_END = (
    b"\xff\xff\xff\xff\0\0\0\0"  # without it a stream that was cut off between two batches would pass for whole
)


def read_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Lines that are not blank and whose first byte lies in [start, stop): every one of the file is in one such range.

    Raises:
        ValueError: a compressed file is damaged; names it.
    """
    with open_bytes(path) as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that began before this range
        while stop is None or file.tell() < stop:
            try:
                line = file.readline()
            except OSError as error:
                raise ValueError(f"{path}: damaged or cut off ({error})") from error
            if not line:
                return
            line = line.removeprefix(codecs.BOM_UTF8)  # files that begin with it may have been put end to end
            if line.strip():
                yield line


def read_whole(path: Path) -> bytes:
    """A file's bytes, decompressed. Raises ValueError, naming it, where it is damaged."""
    try:
        with open_bytes(path) as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path}: damaged or cut off ({error})") from error


def read_json(path: Path) -> Any:
    """The JSON value that a file holds. Raises ValueError, naming it, where it holds none."""
    try:
        return json.loads(read_whole(path))
    except (ValueError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not one JSON value in UTF-8 ({error}); one row per line is .jsonl") from error


def decode_json_line(line: bytes) -> Any:
    """The object of a line, or why it is none."""
    try:
        content = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        return f"not JSON that can be read ({error})"
    return no_text(content)


def no_text(content: Any) -> Any:
    """What JSON gives for a row; a text is none, and would pass for the reason why there is none."""
    return NOT_AN_OBJECT if isinstance(content, str) else content


def lone_surrogate(text: str) -> str | None:
    """Why a text cannot be written as UTF-8, if it cannot: it has half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not UTF-8 (a lone surrogate at character {error.start})"
    return None


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises ValueError, naming the file, where it is none of Parquet."""
    try:
        return pq.ParquetFile(readable(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def parquet_rows(path: Path, columns: Sequence[str] | None, row_groups: Sequence[int] | None = None) -> Iterator[Any]:
    """The rows of some row groups, each with `columns` (None: all). Raises ValueError: it has no such column."""
    file = open_parquet(path)
    _require_columns(path, file.schema_arrow, columns)
    groups = list(range(file.num_row_groups)) if row_groups is None else list(row_groups)
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns) if columns else None):
        yield from _rows(batch)


def arrow_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """The rows of an Arrow file, in its stream format (as `datasets` saves it) or its file format, as `parquet_rows`.

    Raises:
        ValueError: it has no such column, or is damaged; names it.
    """
    try:
        for batch in _arrow_batches(path):
            _require_columns(path, batch.schema, columns)
            yield from _rows(batch.select(_outermost(batch.schema, columns)) if columns else batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Arrow: {error}") from error


def table_rows(path: Path, column: str = "") -> Iterator[Any]:
    """All rows of a table, whatever its format; `column`: what tells JSON lines from one JSON object in a `.json`."""
    kind = kind_of(path)
    if kind == "parquet":
        yield from parquet_rows(path, None)
    elif kind == "arrow":
        yield from arrow_rows(path, None)
    elif kind == "csv":
        yield from cell_rows(path)
    elif kind == "json" and not holds_json_lines(path, column):
        tree = read_json(path)
        yield from map(no_text, tree if isinstance(tree, list) else [tree])
    else:
        yield from map(decode_json_line, read_lines(path))


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as file:
        head = file.read(len(FILE_FORMAT))
        file.seek(0)
        if head == FILE_FORMAT:
            whole = pa.ipc.open_file(file)
            yield from (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(STREAM_END)))
            if file.read() != STREAM_END:
                raise pa.ArrowInvalid("its end is missing")
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column of a row, which may be nested; None where it has none."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    within = row.get(outer)
    return value_at(within, inner) if isinstance(within, Mapping) else None


def column_names(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row as `value_at` takes them, nested ones by what they hold."""
    return [
        name
        for outer, value in row.items()
        for name in ([f"{outer}.{inner}" for inner in column_names(value)] if isinstance(value, Mapping) else [outer])
    ]


def require_names(path: Path | str, names: Collection[str], columns: Sequence[str] | None) -> None:
    """Raises ValueError where a table of these column names lacks one of `columns`."""
    missing = [column for column in columns or () if column not in names]
    if missing:
        near = difflib.get_close_matches(missing[0], names, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(names)}{advice}")


def _require_columns(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> None:
    require_names(path, [*schema.names, *(name for field in schema for name in _nested(field))], columns)


def _nested(field: pa.Field) -> Iterator[str]:
    """The dotted names within a column of rows."""
    if pa.types.is_struct(field.type):
        for inner in field.type:
            yield f"{field.name}.{inner.name}"
            yield from (f"{field.name}.{name}" for name in _nested(inner))


def _outermost(schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    """The columns, or those that they lie in, each once."""
    return list(dict.fromkeys(name if name in schema.names else name.partition(".")[0] for name in columns))


def _rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """One by one: a row that is not UTF-8 must not take the others with it."""
    columns = [(name, batch.column(i)) for i, name in enumerate(batch.schema.names)]
    for row in range(batch.num_rows):
        try:
            yield {name: column[row].as_py() for name, column in columns}
        except UnicodeDecodeError as error:
            yield f"not UTF-8 ({error.reason} at byte {error.start})"
