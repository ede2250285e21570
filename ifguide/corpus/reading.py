"""Inputs to documents, in chunks that a task can read alone.

A chunk is a byte range of a JSON-lines file, row groups of a Parquet file, a whole text, JSON, CSV, Arrow or compressed
file, or a shard of a hub dataset. Compressed files are read as streams. Rows keep their number in their file, so that
chunk size changes nothing in the result. Blank lines are no rows. Nothing is deduplicated or filtered.

With `tokens_column` a document is a row's token ids, as they are.

A JSON file is a list of objects, which are rows, one object with the text column, or lists of strings alone, at any
depth of lists and objects, each string a document (BOLD's form). Anything else is an error: what its documents are
cannot be told.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ifguide.config import Input
from ifguide.config.sources import HUB_PREFIX
from ifguide.records.choice import ENDLESS
from ifguide.records.delimited import cell_rows
from ifguide.records.files import DOCUMENTS, TABLES, Kind, holds_json_lines, is_compressed, kind_of, list_files
from ifguide.records.rows import (
    arrow_rows,
    column_names,
    decode_json_line,
    lone_surrogate,
    no_text,
    open_parquet,
    parquet_rows,
    read_json,
    read_lines,
    read_whole,
    require_names,
    value_at,
)
from ifguide.storage import location


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of an input that one task reads. `start` and `stop` are bytes of a JSON-lines file, row groups of a
    Parquet file, and shard index and shard count of a hub dataset; unused for files that are read whole."""

    input_index: int
    kind: Kind | Literal["hub"]
    path: str
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.path if self.kind != "hub" else f"{self.path} (shard {self.start} of {self.stop})"


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """One row of an input: `text`, or `tokens` (n,) int32 in its place, or the `reason` for which it is a bad row."""

    row: int
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    reason: str | None = None
    tokens: NDArray[np.int32] | None = field(default=None, compare=False)

    @property
    def num_chars(self) -> int:
        """Characters of the text; of token ids, one for each but the last, which closes the document."""
        return len(self.text) if self.tokens is None else len(self.tokens) - 1


def list_chunks(
    source: Input, input_index: int, *, chunk_bytes: int, dotted_key: str, apart: Path | None = None
) -> list[Chunk]:
    """Cut an input into chunks, in reading order.

    Raises:
        FileNotFoundError: nothing matches the path; names the config key.
        ValueError: a file of a kind that is not read.
    """
    if source.on_hub:
        count = _hub_shards(source)
        return [Chunk(input_index=input_index, kind="hub", path=source.path, start=i, stop=count) for i in range(count)]
    chunks = []
    for path in document_files(source, dotted_key, apart=apart):
        kind = kind_of(path)
        assert kind is not None
        if kind == "json" and holds_json_lines(path, source.column):
            kind = "jsonl"
        for start, stop in _cut(path, kind, chunk_bytes):
            chunks.append(Chunk(input_index=input_index, kind=kind, path=str(path), start=start, stop=stop))
    return chunks


def document_files(source: Input, dotted_key: str, *, apart: Path | None = None) -> list[Path]:
    """The files of an input that is not on the hub, in reading order; those of token ids are tables.

    Raises:
        FileNotFoundError: nothing matches the path. ValueError: a file of a kind that is not read.
    """
    return list_files(source.path, dotted_key, DOCUMENTS if source.tokens_column is None else TABLES, apart=apart)


def count_rows(chunk: Chunk, source: Input, *, limit: int = ENDLESS) -> int:
    """Rows of a chunk, bad ones included; no more than `limit` are read."""
    if chunk.kind == "parquet":
        metadata = open_parquet(location(chunk.path)).metadata
        return min(limit, sum(metadata.row_group(i).num_rows for i in range(chunk.start, chunk.stop)))
    if chunk.kind == "text":
        return min(limit, 1)
    rows = _read_lines(chunk) if chunk.kind == "jsonl" else raw_rows(chunk, source)
    return sum(1 for _ in itertools.islice(rows, limit))


def read_documents(chunk: Chunk, source: Input, *, first_row: int) -> Iterator[RawDocument]:
    """The rows of a chunk, numbered from `first_row`, each a text or a reason; none is left out."""
    for row, content in enumerate(raw_rows(chunk, source), start=first_row):
        yield check_row(row, content, source)


def raw_rows(chunk: Chunk, source: Input) -> Iterator[Any]:
    """The rows of a chunk as they are: objects, or the reason why a row is none."""
    path, columns = location(chunk.path), [source.column, *([source.spans_column] if source.spans_column else [])]
    if chunk.kind == "jsonl":
        return map(decode_json_line, _read_lines(chunk))
    if chunk.kind == "parquet":
        return parquet_rows(path, columns, range(chunk.start, chunk.stop))
    if chunk.kind == "arrow":
        return arrow_rows(path, columns)
    if chunk.kind == "csv":
        return _csv_rows(path, columns, source)
    if chunk.kind == "hub":
        return _hub_shard(chunk, source)
    if chunk.kind == "json":
        return _json_rows(path, source)
    return iter([_decode_text(read_whole(path), source.text_column)])


def _cut(path: Path, kind: str, chunk_bytes: int) -> list[tuple[int, int]]:
    if kind == "jsonl" and not is_compressed(path):
        size = path.stat().st_size
        return [(start, min(start + chunk_bytes, size)) for start in range(0, size, chunk_bytes)]
    if kind == "parquet":
        metadata = open_parquet(path).metadata
        cuts, size = [0], 0
        for i in range(metadata.num_row_groups):
            size += metadata.row_group(i).total_byte_size
            if size >= chunk_bytes or i + 1 == metadata.num_row_groups:
                cuts.append(i + 1)
                size = 0
        return list(itertools.pairwise(cuts))
    return [(0, 0)]


def _read_lines(chunk: Chunk) -> Iterator[bytes]:
    path = location(chunk.path)
    return read_lines(path) if is_compressed(path) else read_lines(path, chunk.start, chunk.stop)


def _decode_text(content: bytes, column: str) -> Any:
    if b"\0" in content:
        return "not text in UTF-8 (it holds bytes of 0, as UTF-16 does)"
    try:
        return {column: content.removeprefix(codecs.BOM_UTF8).decode("utf-8")}
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"


def _csv_rows(path: Path, columns: Sequence[str], source: Input) -> Iterator[Any]:
    """The rows of a separated table; spans and token ids are lists as JSON writes them."""
    for row in cell_rows(path):
        if isinstance(row, dict):
            require_names(path, list(row), columns)
            lists = {name: _listing(row[name]) for name in (source.spans_column, source.tokens_column) if name}
            yield {**row, **lists}
        else:
            yield row


def _listing(cell: str) -> Any:
    try:
        return json.loads(cell) if cell else None
    except (ValueError, RecursionError):
        return cell


def _json_rows(path: Path, source: Input) -> Iterator[Any]:
    """The rows of a JSON file; see the module."""
    tree = read_json(path)
    if isinstance(tree, dict) and (source.column in tree or source.column in column_names(tree)):
        yield tree
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        yield from map(no_text, tree)
    else:
        texts = list(_listed(tree))
        if source.column != Input.text_column or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}: neither a list of objects, nor one object with {source.column!r}, nor lists of strings alone"
                f" (for `text_column: {Input.text_column}`); write its rows as JSON lines"
            )
        yield from ({source.column: text} for text in texts)


def _listed(tree: Any) -> Iterator[Any]:
    """The items of all lists in `tree`; None for what lies in none."""
    if isinstance(tree, dict):
        for item in tree.values():
            yield from _listed(item)
    elif isinstance(tree, list):
        for item in tree:
            yield from _listed(item) if isinstance(item, dict | list) else [item]
    else:
        yield None


def hub_name(source: Input) -> tuple[str, str]:
    """The name of a hub dataset, and its split."""
    name, _, split = source.path.removeprefix(HUB_PREFIX).partition(":")
    return name, source.split or split or "train"


def _open_hub(source: Input) -> Any:
    from datasets import load_dataset

    name, split = hub_name(source)
    try:
        return load_dataset(name, source.subset, split=split, revision=source.revision, streaming=True)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        advice = "; name one of them as `subset` of the input" if "onfig name is missing" in str(error) else ""
        raise FileNotFoundError(f"{source.path} cannot be opened ({type(error).__name__}: {error}){advice}") from error


def _hub_shards(source: Input) -> int:
    """How many shards a hub dataset has. ValueError where it lacks a column: every row of it would be a bad one."""
    dataset = _open_hub(source)
    names = dataset.column_names
    if names is None:  # then the first row has them
        row = next(iter(dataset), None)
        names = None if row is None else list(row)
    if names is not None:
        columns = [source.column, *([source.spans_column] if source.spans_column else [])]
        outer = [column if column in names else column.partition(".")[0] for column in columns]
        require_names(source.path, names, outer)
    return int(dataset.num_shards)


def _hub_shard(chunk: Chunk, source: Input) -> Iterator[Any]:
    yield from _open_hub(source).shard(num_shards=chunk.stop, index=chunk.start)


def check_row(row: int, content: Any, source: Input) -> RawDocument:
    """A row as a document, or as a bad row."""
    if isinstance(content, str):
        return RawDocument(row=row, reason=content)
    if not isinstance(content, dict):
        return RawDocument(row=row, reason=f"a {type(content).__name__}, not an object")
    if source.tokens_column is not None:
        return _check_tokens(row, value_at(content, source.tokens_column), source.tokens_column)
    text = value_at(content, source.text_column)
    if not isinstance(text, str):
        what = "missing" if text is None else f"a {type(text).__name__}, not a string"
        return RawDocument(row=row, reason=f"column {source.text_column!r} is {what}")
    if reason := lone_surrogate(text):
        return RawDocument(row=row, reason=reason)
    if source.spans_column is None:
        return RawDocument(row=row, text=str(text))
    spans = value_at(content, source.spans_column) or ()
    try:
        pairs = tuple((int(start), int(stop)) for start, stop in spans)
    except (TypeError, ValueError, OverflowError):
        return RawDocument(row=row, reason=f"column {source.spans_column!r} is not a list of [start, end) pairs")
    if any(not 0 <= start <= stop <= len(text) for start, stop in pairs):
        return RawDocument(row=row, reason=f"column {source.spans_column!r} has a span outside the text")
    return RawDocument(row=row, text=str(text), spans=pairs)


def _check_tokens(row: int, value: Any, column: str) -> RawDocument:
    try:
        ids = np.array(value if isinstance(value, list) else None)
    except ValueError:  # lists of lists of several lengths
        ids = np.zeros(0)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind != "i":
        what = "missing" if value is None else "not a list of token ids"
        return RawDocument(row=row, reason=f"column {column!r} is {what}")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        return RawDocument(
            row=row, reason=f"column {column!r} holds {ids.min() if ids.min() < 0 else ids.max()}, which is no token id"
        )
    return RawDocument(row=row, tokens=ids.astype(np.int32))
