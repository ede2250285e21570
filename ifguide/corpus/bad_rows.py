"""Rows that cannot be used: kept by each task beside its table, then listed for the user, every one of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish

SCHEMA = pa.schema([("source", pa.string()), ("row", pa.int64()), ("reason", pa.string())])


class BadRow(NamedTuple):
    """A row that cannot be used: its file, its number in it from 0, and why."""

    source: str
    row: int
    reason: str


def write_bad_rows(folder: Path, key: str, rows: list[dict[str, Any]]) -> None:
    """Keep the bad rows of the chunk `key`, which count from its first row."""
    with publish(_path(folder, key)) as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part)


def read_bad_rows(folder: Path, first_rows: Mapping[str, int]) -> Iterator[BadRow]:
    """The bad rows of the chunks that have some, in order; `first_rows` has the number of each chunk's first row."""
    for key, first_row in first_rows.items():
        for row in schemas.read_table(_path(folder, key), SCHEMA).to_pylist():
            yield BadRow(row["source"], row["row"] + first_row, row["reason"])


def list_bad_rows(rows: Iterable[BadRow], listing: Path) -> None:
    """Write them as CSV, quoted where a name or a reason needs it."""
    with publish(listing) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(BadRow._fields)
        writer.writerows(rows)


def _path(folder: Path, key: str) -> Path:
    return folder / f"bad-{key}.parquet"
