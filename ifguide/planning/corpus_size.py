"""How many tokens inputs hold, estimated from their bytes before anything is packed.

A token is taken for `BYTES_PER_TOKEN` bytes of text. How much of a file is text is known from the footer of Parquet
files and from the first lines of JSON lines; of other kinds all of it is. The tokenizer is not asked, and files are not
read to their end: expect the estimate to be within a factor of two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from ifguide.config import Input
from ifguide.records.files import is_compressed, kind_of, list_files, open_bytes
from ifguide.storage import readable

BYTES_PER_TOKEN = 4.2  # English in vocabularies of 8,000 to 150,000: 3.8 to 4.6
COMPRESSION = 3.0  # of text by gzip, zstd or bz2
SAMPLE_BYTES = 1 << 18  # of the first lines of a file


class InputSize(NamedTuple):
    """What inputs hold: `tokens` are an estimate, `bytes` the files' own."""

    files: int
    bytes: int
    tokens: float


def input_size(inputs: Sequence[Input], *, apart: Path | None = None) -> InputSize | None:
    """The size of all inputs but files below `apart`, the run's own; None where one is of the hub, or not there yet."""
    files, size, tokens = 0, 0, 0.0
    for i, source in enumerate(inputs):
        if source.on_hub:
            return None
        try:
            paths = list_files(source.path, f"pack_corpus.inputs[{i}].path", apart=apart)
        except FileNotFoundError:
            return None
        sizes = [path.stat().st_size for path in paths]
        held = [file_tokens(path, source, size) for path, size in zip(paths, sizes, strict=True)]
        files, size, tokens = files + len(paths), size + sum(sizes), tokens + sum(held)
    return InputSize(files, size, tokens) if files else None


def file_tokens(path: Path, source: Input, size: int) -> float:
    """The tokens of one file of `size` bytes, estimated. A file that cannot be read counts as if it were all text."""
    kind, column = kind_of(path), source.column
    if kind == "parquet":
        return _columnar(path, column, size) / (BYTES_PER_TOKEN if source.tokens_column is None else 4)
    plain = size * (COMPRESSION if is_compressed(path) else 1.0)
    if kind not in ("jsonl", "json"):
        return plain / BYTES_PER_TOKEN
    return plain * _tokens_per_byte(path, column)


def _columnar(path: Path, column: str, size: int) -> float:
    """Bytes of a column, not compressed."""
    try:
        with pq.ParquetFile(readable(path)) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            parts = [
                chunk.total_uncompressed_size
                for chunk in chunks
                if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
            ]
    except (OSError, ValueError):
        return float(size)
    return float(sum(parts) if parts else size)


def _tokens_per_byte(path: Path, column: str) -> float:
    """Of the first lines of JSON, by what their column holds."""
    tokens, total = 0.0, 0
    try:
        with open_bytes(path) as file:
            while total < SAMPLE_BYTES and (line := file.readline(SAMPLE_BYTES)):
                value, total = json.loads(line)[column], total + len(line)
                tokens += len(value) if isinstance(value, list) else len(value.encode()) / BYTES_PER_TOKEN
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # the stage says what is wrong
        pass
    return tokens / total if total and tokens else 1 / BYTES_PER_TOKEN
