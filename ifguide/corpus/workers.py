"""What the tasks of `pack_corpus` do: count a chunk's rows, tokenise it, pack a shard, train a tokenizer."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish
from ifguide.config import Input
from ifguide.corpus.bad_rows import write_bad_rows
from ifguide.corpus.chunks import KeyedChunk
from ifguide.corpus.inputs import unchanged
from ifguide.corpus.packing import Read, merge_order, pack, running_total, token_tables
from ifguide.corpus.reading import count_rows, read_documents
from ifguide.corpus.stream import TOKENS, PackSettings, StreamShard
from ifguide.records.choice import RowChoice
from ifguide.storage import location, readable
from ifguide.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

TOKENIZER_CHARS = 200_000_000  # what a tokenizer is trained on at most: more changes its merges little

TOKEN_ROWS = 1 << 18  # of a group in a scratch table of tokens: what a shard reads more than its own


class CountRows:
    """Worker of the pass before the first: rows of a chunk, up to as many as its input may give."""

    def __init__(self, settings: TokeniseSettings):
        self.inputs = settings.inputs

    def process(self, shard: KeyedChunk) -> dict[str, Any]:
        source = self.inputs[shard.chunk.input_index]
        with unchanged(shard.files):
            return {"rows": count_rows(shard.chunk, source, limit=RowChoice.of(source.rows).stop)}


@dataclass(frozen=True, kw_only=True)
class TokeniseSettings:
    """What every `TokeniseChunk` needs: the inputs, the tokenizer's source, and the folder of the tables."""

    inputs: tuple[Input, ...]
    tokenizer: str
    folder: str
    special_text: bool = False

    @property
    def annotate(self) -> bool:
        """Whether any document brings spans along."""
        return any(source.spans_column for source in self.inputs)


class TokeniseChunk:
    """Worker of the first pass: one chunk -> a scratch table of its documents, and one of all their tokens, of which a
    shard reads its own; its result has the bad rows."""

    def __init__(self, settings: TokeniseSettings):
        self.settings, self.folder = settings, location(settings.folder)
        self.tokenizer = load_tokenizer(settings.tokenizer, special_text=settings.special_text)

    def process(self, shard: KeyedChunk) -> dict[str, Any]:
        read = Read()
        tables = token_tables(
            shard.chunk,
            self.settings.inputs[shard.chunk.input_index],
            self.tokenizer,
            first_input_row=shard.first_input_row,
            annotate=self.settings.annotate,
            read=read,
        )
        own, its_tokens = self.folder / f"{shard.key}.parquet", self.folder / _tokens_file(shard.key)
        with publish(own) as part, publish(its_tokens) as tokens_part, unchanged(shard.files):
            counts = _write_tables(tables, part, tokens_part)
        if read.bad:
            write_bad_rows(self.folder, shard.key, read.bad)
        return {"rows": read.rows, "bad_rows": len(read.bad), **counts}


class Segment(NamedTuple):
    """Neighbouring documents of a scratch table, by its key."""

    key: str
    documents: pa.Table


class PackShard:
    """Worker of the second pass: blocks [first_block, ...) of the stream and the documents that start in them."""

    def __init__(self, settings: PackSettings):
        self.settings, self.folder = settings, location(settings.folder)

    def process(self, shard: StreamShard) -> dict[str, Any]:
        block_size, annotate = self.settings.block_size, self.settings.annotate
        segments = self._segments(shard.ranges)
        table = pa.concat_tables([segment.documents for segment in segments])
        order = np.arange(table.num_rows)
        if self.settings.interleave:
            counts = [self.settings.counts[index] for index, _, _ in shard.ranges]
            order = merge_order([(lo, hi) for _, lo, hi in shard.ranges], counts)
        lengths = table.column("num_tokens").to_numpy()
        starts = shard.first_token_start + running_total(lengths[order])
        skip = shard.first_block * block_size - int(starts[0])
        taken = lengths.copy()  # of each document; the first and the last lie in other shards too
        taken[order[0]] -= skip
        taken[order[-1]] -= taken.sum() - shard.num_tokens
        begins = table.column("token_start").to_numpy().copy()
        begins[order[0]] += skip
        tokens = self._tokens(segments, begins, taken, order)

        def blocks(name: str, fill: int) -> tuple[np.ndarray, np.ndarray]:
            column = [tokens.column(name).to_numpy()]
            return pack(column, skip=0, num_tokens=shard.num_tokens, block_size=block_size, fill=fill)

        blocks_BT, lengths_B = blocks("tokens", self.settings.eos)
        block_ids = pa.array(shard.first_block + np.arange(len(blocks_BT)), type=pa.int64())
        schema = schemas.blocks(block_size, annotated=annotate)
        columns = [block_ids, pa.array(lengths_B, pa.int32()), schemas.per_token_column(blocks_BT, schema, "tokens")]
        if annotate:
            columns.append(schemas.per_token_column(blocks("annotated", 0)[0], schema, "annotated"))
        self._write("shard", shard, pa.Table.from_arrays(columns, schema=schema))
        schema = schemas.offsets(block_size)
        columns = [block_ids, schemas.per_token_column(blocks("stops", 0)[0], schema, "stops")]
        encoding = {"use_dictionary": False, "column_encoding": schemas.OFFSETS_ENCODING}
        self._write("offsets", shard, pa.Table.from_arrays(columns, schema=schema), **encoding)
        documents = self._document_table(table.take(pa.array(order)), starts, shard)
        self._write("documents", shard, documents)
        return {"blocks": len(blocks_BT), "documents": documents.num_rows, "tokens": int(lengths_B.sum())}

    def _write(self, kind: str, shard: StreamShard, table: pa.Table, **options: Any) -> None:
        with publish(self.folder / f"{kind}-{shard.key}.parquet") as part:
            pq.write_table(table, part, **options)

    def _segments(self, ranges: Sequence[tuple[int, int, int]]) -> list[Segment]:
        """The documents `ranges` (input, lo, hi), file by file."""
        segments = []
        for index, lo, hi in ranges:
            first = 0
            for file in self.settings.files[index]:
                start, stop = max(lo - first, 0), min(hi - first, file.documents)
                if start < stop:
                    part = _read_rows(self.folder / TOKENS / f"{file.key}.parquet", start, stop)
                    place = part.schema.get_field_index("row")
                    part = part.set_column(place, "row", pc.add(part.column(place), file.first_row))
                    part = part.append_column("source", pa.array([file.source] * part.num_rows, pa.string()))
                    segments.append(Segment(file.key, part))
                first += file.documents
        return segments

    def _tokens(
        self, segments: Sequence[Segment], begins: np.ndarray, taken: np.ndarray, order: np.ndarray
    ) -> pa.Table:
        """The tokens of the segments' documents in stream order: `taken` of each, from the place `begins` of its
        file."""
        ends = begins + taken
        parts, first = [], 0
        for segment in segments:
            last = first + segment.documents.num_rows - 1
            path = self.folder / TOKENS / _tokens_file(segment.key)
            parts.append(_read_rows(path, int(begins[first]), int(ends[last])))
            first = last + 1
        tokens = pa.concat_tables(parts)
        if not self.settings.interleave:
            return tokens
        shift = running_total(taken)[order] - running_total(taken[order])
        return tokens.take(pa.array(np.arange(tokens.num_rows) + np.repeat(shift, taken[order])))

    def _document_table(self, table: pa.Table, starts: np.ndarray, shard: StreamShard) -> pa.Table:
        block_size = self.settings.block_size
        here = np.flatnonzero(starts >= shard.first_block * block_size)
        kept, starts = table.take(pa.array(here)), starts[here]
        return pa.Table.from_arrays(
            [
                pa.array(shard.first_doc_id + here, pa.int64()),
                *(kept.column(name).combine_chunks() for name in ("source", "row", "num_chars", "num_tokens")),
                pa.array(starts, pa.int64()),
                pa.array(starts // block_size, pa.int64()),
                pa.array(starts % block_size, pa.int32()),
            ],
            schema=schemas.DOCUMENTS,
        )


def train_on_chunks(chunks: Sequence[KeyedChunk], inputs: Sequence[Input], vocab_size: int, folder: str) -> None:
    """Train a tokenizer on up to TOKENIZER_CHARS characters, an equal share of every chunk; publish it in `folder`."""
    share = TOKENIZER_CHARS // max(1, len(chunks))

    def texts() -> Iterator[str]:
        for shard in chunks:
            source = inputs[shard.chunk.input_index]
            choice = RowChoice.of(source.rows)
            left = share
            with unchanged(shard.files):
                documents = read_documents(shard.chunk, source, first_row=shard.first_input_row)
                for document in itertools.islice(documents, choice.rows_from(shard.first_input_row)):
                    if left <= 0:
                        break
                    if document.reason is None and document.row in choice:
                        left -= len(document.text)
                        yield document.text

    save_tokenizer(train_tokenizer(texts(), vocab_size=vocab_size), location(folder))


def _read_rows(path: Path, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of a Parquet file, reading only the row groups that hold them."""
    with pq.ParquetFile(readable(path)) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        bounds = [0, *np.cumsum(sizes).tolist()]
        first = bisect_right(bounds, start) - 1
        last = bisect_right(bounds, stop - 1)
        return file.read_row_groups(list(range(first, last))).slice(start - bounds[first], stop - start)


def _tokens_file(key: str) -> str:
    return f"{key}-tokens.parquet"


def _write_tables(tables: Iterator[pa.Table], documents_file: Path, tokens_file: Path) -> dict[str, int]:
    """Write `token_tables` one behind the other; returns what they count."""
    counts = {"documents": 0, "special_texts": 0}
    num_tokens = 0
    with ExitStack() as stack:
        writers: list[pq.ParquetWriter] = []
        for table in tables:
            documents, tokens = _split(table, num_tokens)
            if not writers:
                files = ((documents_file, documents), (tokens_file, tokens))
                writers = [stack.enter_context(pq.ParquetWriter(file, part.schema)) for file, part in files]
            writers[0].write_table(documents, row_group_size=1 << 16)
            writers[1].write_table(tokens, row_group_size=TOKEN_ROWS)
            num_tokens += tokens.num_rows
            counts["documents"] += table.num_rows
            counts["special_texts"] += pc.sum(table.column("special_texts")).as_py() or 0
    return counts


def _split(table: pa.Table, first_token: int) -> tuple[pa.Table, pa.Table]:
    """A table of `token_tables` as documents, each with the place `token_start` of its first token, and all tokens end
    to end, of which the first is number `first_token` of its file."""
    names = [name for name in ("tokens", "stops", "annotated") if name in table.column_names]
    tokens = pa.table({name: table.column(name).chunk(0).flatten() for name in names})
    starts = pa.array(first_token + running_total(table.column("num_tokens").to_numpy()), pa.int64())
    return table.drop_columns(names).append_column("token_start", starts), tokens
