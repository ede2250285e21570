"""Inputs to documents, in chunks that a task can read alone.

A chunk is a byte range of a JSONL file, row groups of a Parquet file, a whole text or JSON file, or a shard of a hub
dataset. Rows keep their number in their file, so that chunk size changes nothing in the result. Nothing is
deduplicated or filtered.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ifguide.config import Input
from ifguide.storage import location, matching, readable

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf://"
SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text", ".json": "json"}
SHOWN_OTHERS = 10  # names of files that a folder holds besides documents


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of an input that one task reads. `start` and `stop` are bytes of a JSONL file, row groups of a
    Parquet file, and shard index and shard count of a hub dataset; unused for text and JSON files."""

    input_index: int
    kind: Literal["jsonl", "parquet", "text", "json", "hub"]
    path: str
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.path if self.kind != "hub" else f"{self.path} (shard {self.start} of {self.stop})"


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """One row of an input: `text`, or the `reason` for which it is a bad row."""

    row: int
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    reason: str | None = None


def list_chunks(source: Input, input_index: int, *, chunk_bytes: int, dotted_key: str) -> list[Chunk]:
    """Cut an input into chunks, in reading order.

    Raises:
        FileNotFoundError: nothing matches the path; names the config key.
        ValueError: a file of a kind that is not read.
    """
    if source.path.startswith(HUB_PREFIX):
        count = _open_hub(source.path).num_shards
        return [Chunk(input_index=input_index, kind="hub", path=source.path, start=i, stop=count) for i in range(count)]
    chunks = []
    for path in _list_files(source.path, dotted_key):
        kind = SUFFIXES.get(path.suffix)
        if kind is None:
            raise ValueError(f"{dotted_key}: {path} is none of {', '.join(SUFFIXES)}; convert it or name other files")
        for start, stop in _cut(path, kind, chunk_bytes):
            chunks.append(Chunk(input_index=input_index, kind=kind, path=str(path), start=start, stop=stop))  # type: ignore[arg-type]
    return chunks


def count_rows(chunk: Chunk) -> int:
    """Rows of a chunk, bad ones included."""
    if chunk.kind == "jsonl":
        return sum(1 for _ in _read_lines(chunk))
    if chunk.kind == "parquet":
        metadata = _parquet(chunk.path).metadata
        return sum(metadata.row_group(i).num_rows for i in range(chunk.start, chunk.stop))
    if chunk.kind == "text":
        return 1
    if chunk.kind == "json":
        return sum(1 for _ in _string_leaves(_load_json(chunk.path)))
    return sum(1 for _ in _hub_shard(chunk))


def read_documents(chunk: Chunk, source: Input, *, first_row: int) -> Iterator[RawDocument]:
    """The rows of a chunk, numbered from `first_row`, each a text or a reason; none is left out."""
    rows: Iterator[Any]
    if chunk.kind == "jsonl":
        rows = (_decode_json_line(line) for line in _read_lines(chunk))
    elif chunk.kind == "parquet":
        rows = _parquet_rows(chunk, source)
    elif chunk.kind == "hub":
        rows = _hub_shard(chunk)
    elif chunk.kind == "json":
        rows = ({source.text_column: text} for text in _string_leaves(_load_json(chunk.path)))
    else:
        rows = iter([_decode_text(location(chunk.path).read_bytes(), source.text_column)])
    for row, content in enumerate(rows, start=first_row):
        yield _check_row(row, content, source)


def _list_files(path: str, dotted_key: str) -> list[Path]:
    remote = "://" in path
    expanded = location(path) if remote else Path(path).expanduser()
    if expanded.is_dir():
        every = sorted(p for p in expanded.rglob("*") if p.is_file())
        files = [p for p in every if p.suffix in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{dotted_key}: folder {path} holds no {', '.join(SUFFIXES)} file")
        others = [p.name for p in every if p.suffix not in SUFFIXES and not p.name.startswith(".")]
        if others:
            logger.warning(
                "%s: of folder %s, %d files are none of %s and left out: %s",
                dotted_key, path, len(others), ", ".join(SUFFIXES), ", ".join(others[:SHOWN_OTHERS]),
            )  # fmt: skip
        return files
    if expanded.is_file():
        return [expanded]
    files = matching(expanded) if remote else sorted(Path(p) for p in glob.glob(str(expanded), recursive=True))
    if not files:
        raise FileNotFoundError(f"{dotted_key}: no file matches {path}")
    return files


def _cut(path: Path, kind: str, chunk_bytes: int) -> list[tuple[int, int]]:
    if kind == "jsonl":
        size = path.stat().st_size
        return [(start, min(start + chunk_bytes, size)) for start in range(0, size, chunk_bytes)]
    if kind == "parquet":
        metadata = _parquet(str(path)).metadata
        cuts, size = [0], 0
        for i in range(metadata.num_row_groups):
            size += metadata.row_group(i).total_byte_size
            if size >= chunk_bytes or i + 1 == metadata.num_row_groups:
                cuts.append(i + 1)
                size = 0
        return list(itertools.pairwise(cuts))
    return [(0, 0)]


def _read_lines(chunk: Chunk) -> Iterator[bytes]:
    """Lines whose first byte lies in [start, stop): every line of the file is in exactly one chunk."""
    with location(chunk.path).open("rb") as file:
        if chunk.start:
            file.seek(chunk.start - 1)
            file.readline()  # the rest of a line that began before this chunk
        while file.tell() < chunk.stop:
            line = file.readline()
            if not line:
                return
            yield line


def _decode_json_line(line: bytes) -> Any:
    try:
        content = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})" if line.strip() else "empty line"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        return f"not JSON that can be read ({error})"
    return "a str, not an object" if isinstance(content, str) else content


def _decode_text(content: bytes, column: str) -> Any:
    try:
        return {column: content.decode("utf-8")}
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(readable(location(path)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _parquet_rows(chunk: Chunk, source: Input) -> Iterator[Any]:
    file = _parquet(chunk.path)
    columns = [source.text_column] + ([source.spans_column] if source.spans_column else [])
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{chunk.path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(1024, row_groups=list(range(chunk.start, chunk.stop)), columns=columns):
        for i in range(batch.num_rows):
            try:
                yield {column: batch.column(column)[i].as_py() for column in columns}
            except UnicodeDecodeError as error:
                yield f"not UTF-8 ({error.reason} at byte {error.start})"


def _load_json(path: str) -> Any:
    try:
        return json.loads(location(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not one JSON value in UTF-8 ({error}); one row per line is .jsonl") from error


def _string_leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _string_leaves(item)


def _open_hub(path: str) -> Any:
    from datasets import load_dataset

    name, _, split = path.removeprefix(HUB_PREFIX).partition(":")
    try:
        return load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise FileNotFoundError(f"{path} cannot be opened ({type(error).__name__}: {error})") from error


def _hub_shard(chunk: Chunk) -> Iterator[Any]:
    yield from _open_hub(chunk.path).shard(num_shards=chunk.stop, index=chunk.start)


def _check_row(row: int, content: Any, source: Input) -> RawDocument:
    if isinstance(content, str):
        return RawDocument(row=row, reason=content)
    if not isinstance(content, dict):
        return RawDocument(row=row, reason=f"a {type(content).__name__}, not an object")
    text = content.get(source.text_column)
    if not isinstance(text, str):
        what = "missing" if text is None else f"a {type(text).__name__}, not a string"
        return RawDocument(row=row, reason=f"column {source.text_column!r} is {what}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return RawDocument(row=row, reason=f"not UTF-8 (a lone surrogate at character {error.start})")
    if source.spans_column is None:
        return RawDocument(row=row, text=text)
    spans = content.get(source.spans_column) or ()
    try:
        pairs = tuple((int(start), int(stop)) for start, stop in spans)
    except (TypeError, ValueError, OverflowError):
        return RawDocument(row=row, reason=f"column {source.spans_column!r} is not a list of [start, end) pairs")
    if any(not 0 <= start <= stop <= len(text) for start, stop in pairs):
        return RawDocument(row=row, reason=f"column {source.spans_column!r} has a span outside the text")
    return RawDocument(row=row, text=text, spans=pairs)
