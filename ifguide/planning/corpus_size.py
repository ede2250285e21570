"""How many tokens inputs hold, estimated from their bytes before anything is packed.

A token is taken for `BYTES_PER_TOKEN` bytes of text. How much of a file is text is known from the footer of Parquet
files and from the first lines of JSON lines; of other kinds all of it is. So is how many rows there are, of which an
input's `rows` may take some. The tokenizer is not asked, and only small JSON files are
read to their end: expect the estimate to be within a factor of two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from ifguide.config import Input
from ifguide.corpus.reading import Chunk, count_rows
from ifguide.records.choice import RowChoice
from ifguide.records.files import is_compressed, kind_of, list_files, open_bytes
from ifguide.storage import readable

BYTES_PER_TOKEN = 4.2  # English in vocabularies of 8,000 to 150,000: 3.8 to 4.6
COMPRESSION = 3.0  # of text by gzip, zstd or bz2
SAMPLE_BYTES = 1 << 18  # of the first lines of a file
READ_BYTES = 1 << 25  # of a JSON file that is read for its rows


class InputSize(NamedTuple):
    """What inputs hold: `tokens` are an estimate, `bytes` the files' own. `whole`: an input's `rows` take a part of it,
    and all of it is counted, for its files do not tell how many rows they have."""

    files: int
    bytes: int
    tokens: float
    whole: bool = False


class Content(NamedTuple):
    """Tokens of a file, and its rows; None where only reading all of it would tell."""

    tokens: float
    rows: float | None


def input_size(inputs: Sequence[Input], *, apart: Path | None = None) -> InputSize | None:
    """The size of all inputs but files below `apart`, the run's own; None where one is of the hub, or not there yet."""
    files, size, tokens, whole = 0, 0, 0.0, False
    for i, source in enumerate(inputs):
        if source.on_hub:
            return None
        try:
            paths = list_files(source.path, f"pack_corpus.inputs[{i}].path", apart=apart)
        except FileNotFoundError:
            return None
        sizes = [path.stat().st_size for path in paths]
        held = [file_content(path, source, size) for path, size in zip(paths, sizes, strict=True)]
        share = _taken_share(source, held)
        files, size, whole = files + len(paths), size + sum(sizes), whole or share is None
        tokens += sum(content.tokens for content in held) * (1.0 if share is None else share)
    return InputSize(files, size, tokens, whole) if files else None


def _taken_share(source: Input, held: Sequence[Content]) -> float | None:
    """The share of an input's rows that its `rows` take; None where it is not known how many there are."""
    if source.rows is None:
        return 1.0
    rows = [content.rows for content in held]
    try:
        wanted = RowChoice.of(source.rows).count
    except (FileNotFoundError, ValueError):  # the stage says what is wrong
        return None
    counted = sum(each for each in rows if each is not None)
    return None if None in rows or not counted else min(1.0, wanted / counted)


def file_content(path: Path, source: Input, size: int) -> Content:
    """What one file of `size` bytes holds, estimated. A file that cannot be read counts as if it were all text."""
    kind, column = kind_of(path), source.column
    if kind == "parquet":
        held, counted = _columnar(path, column, size)
        return Content(held / (BYTES_PER_TOKEN if source.tokens_column is None else 4), counted)
    plain = size * (COMPRESSION if is_compressed(path) else 1.0)
    if kind == "text":
        return Content(plain / BYTES_PER_TOKEN, 1)
    if kind not in ("jsonl", "json"):
        return Content(plain / BYTES_PER_TOKEN, None)
    tokens, rows = _by_byte(path, column)
    if rows is not None:
        return Content(plain * tokens, plain * rows)
    return Content(plain * tokens, _rows_of_json(path, source) if kind == "json" and plain <= READ_BYTES else None)


def _rows_of_json(path: Path, source: Input) -> int | None:
    try:
        return count_rows(Chunk(input_index=0, kind="json", path=str(path)), source)
    except (OSError, ValueError):
        return None


def _columnar(path: Path, column: str, size: int) -> tuple[float, int | None]:
    """Bytes of a column, not compressed, and rows."""
    try:
        with pq.ParquetFile(readable(path)) as file:
            rows = file.metadata.num_rows
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            parts = [
                chunk.total_uncompressed_size
                for chunk in chunks
                if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
            ]
    except (OSError, ValueError):
        return float(size), None
    return float(sum(parts) if parts else size), rows


def _by_byte(path: Path, column: str) -> tuple[float, float | None]:
    """Tokens and rows in a byte of the first lines of JSON, by what their column holds; None where a line is no row."""
    tokens, total, rows = 0.0, 0, 0
    try:
        with open_bytes(path) as file:
            while total < SAMPLE_BYTES and (line := file.readline(SAMPLE_BYTES)):
                value, total, rows = json.loads(line)[column], total + len(line), rows + 1
                tokens += len(value) if isinstance(value, list) else len(value.encode()) / BYTES_PER_TOKEN
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # the stage says what is wrong
        pass
    return (tokens / total, rows / total) if total and tokens else (1 / BYTES_PER_TOKEN, None)
