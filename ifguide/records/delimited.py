"""The rows of comma- and tab-separated tables (RFC 4180).

The first line names the columns. A quoted cell may hold line ends. Quotes are read strictly, where other readers would
guess. Where they do not fit, what is a row cannot be told, and every line that was read comes as the reason why. Blank
lines are no rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ifguide.records.files import open_bytes

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # that tables are written with, and are not read by
CELL_CHARS = 2**30  # of a cell; Python's own limit of 2**17 is too low for documents


class Cell(str):
    """The text of a cell; a table has no other types."""

    @property
    def value(self) -> Any:
        """The number or bool that it writes, None of an empty one; else the text."""
        if not self:
            return None
        if self.lower() in ("true", "false"):
            return self.lower() == "true"
        try:
            number = float(self)
        except ValueError:
            return str(self)
        return number if math.isfinite(number) else None if math.isnan(number) else str(self)


def cell_rows(path: Path) -> Iterator[dict[str, Cell] | str]:
    """The rows of a table, or why a row is none.

    Raises:
        ValueError: no line names the columns, two have one name, or the file is damaged; names the file.
    """
    csv.field_size_limit(CELL_CHARS)
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which the readers of texts know as such.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if _is_tabbed(path) else ",", strict=True)
        try:
            names = _header(path, reader)
            while True:
                first = reader.line_num + 1
                try:
                    cells = next(reader)
                except csv.Error as error:
                    reason = f"not CSV ({error}){_over(first, reader.line_num)}"
                    yield from itertools.repeat(reason, reader.line_num + 1 - first)
                    continue
                if len(cells) == len(names):
                    yield {name: Cell(cell) for name, cell in zip(names, cells, strict=True)}
                elif cells:
                    over = _over(first, reader.line_num)
                    yield f"has {len(cells)} cells, and the first line names {len(names)} columns{over}"
        except StopIteration:
            return
        except OSError as error:
            raise ValueError(f"{path}: damaged or cut off ({error})") from error


def _over(first: int, last: int) -> str:
    return f"; lines {first} to {last} of the file" if last > first else ""


def _is_tabbed(path: Path) -> bool:
    return ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]


def _header(path: Path, reader: Any) -> list[str]:
    try:
        names: list[str] = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}: its first line, which names the columns, is not CSV ({error})") from error
    if not any(names):
        raise ValueError(f"{path} is empty: its first line must name the columns")
    if any("\0" in name or "\udc80" <= max(name, default="") <= "\udcff" for name in names):
        raise ValueError(f"{path} is not text in UTF-8 (UTF-16?); convert it")
    if len(names) == 1 and (other := next((mark for mark in SEPARATORS if mark in names[0]), None)):
        raise ValueError(
            f"{path}: its first line, {names[0]!r}, is separated by {SEPARATORS[other]}; separate it by commas, or by"
            " tabs in a .tsv"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two columns have the name {twice[0]!r}; rename one")
    return names
