"""The mask of a corpus as character spans on disk, and the mask of another tokenizer's corpus from them, by shards.

`write_spans` gives every document that begins in a shard a row of `schemas.SPANS`; `write_mask` reads the rows of the
documents of a shard of the same documents in other tokens, and fills that shard's mask. Both read only the shards that
they need. The first token of a block has no prediction and is never masked, in either corpus.

Cost: the stops of the shard's tokens, half a byte each on disk; memory is one shard and its longest document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import Manifest, data_files, publish, sound
from ifguide.spans.mapping import mask_of_spans, opens_span, spans_of_mask, token_edges

SPANS, DOCUMENTS = "spans-*.parquet", "documents-*.parquet"
READ_TOKENS = 1 << 19  # of a column at a time
EDGES_AT_ONCE = 1 << 16  # tokens whose edges are computed together: in a CPU's cache
CONTEXT = 256  # tokens: more than share a character in any tokenizer


@dataclass(frozen=True, kw_only=True)
class PackedCorpus:
    """A corpus by stream position. All of its shards but the last have as many blocks."""

    folder: Path
    block_size: int
    blocks_per_shard: int
    num_tokens: int

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> PackedCorpus:
        """The corpus that a manifest describes."""
        return cls(
            folder=folder,
            block_size=manifest.summary["block_size"],
            blocks_per_shard=manifest.options["pack_corpus"]["blocks_per_shard"],
            num_tokens=manifest.rows["tokens"],
        )

    @property
    def shard_tokens(self) -> int:
        return self.block_size * self.blocks_per_shard

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    @property
    def num_shards(self) -> int:
        return -(-self.num_tokens // self.shard_tokens)

    def extent(self, shard: int, context: int = 0) -> tuple[int, int]:
        """Stream positions [begin, end) of a shard, with up to `context` more tokens on either side."""
        begin, end = shard * self.shard_tokens, (shard + 1) * self.shard_tokens
        return max(begin - context, 0), min(end + context, self.num_tokens)

    def read(self, folder: Path, kind: str, column: str, begin: int, end: int) -> np.ndarray:
        """A per-token column of the tables `kind` in `folder`, sharded as the corpus is, at positions [begin, end).

        Parquet's own representation is never whole: it takes several times the column."""
        parts = []
        for shard in range(begin // self.shard_tokens, -(-end // self.shard_tokens)):
            path = sound(folder, f"{kind}-{shard_name(shard)}.parquet")
            first, _ = self.extent(shard)
            for table in schemas.read_batches(path, column, max(1, READ_TOKENS // self.block_size)):
                values = schemas.per_token_array(table, column).reshape(-1)
                if first < end and first + len(values) > begin:
                    parts.append(values[max(begin - first, 0) : end - first])
                first += len(values)
        return np.concatenate(parts)


def shard_name(shard: int) -> str:
    """What a shard's files are called by."""
    return f"{shard:05d}"


class SpanCounts(NamedTuple):
    """What `write_spans` wrote."""

    documents: int
    spans: int
    tokens: int


def write_spans(
    corpus: PackedCorpus, mask: Path, shard: int, *, column: str = "masked", folder: Path | None = None
) -> SpanCounts:
    """Write `spans-<shard>` in the folder of a mask: the documents that begin in the shard, however far they reach.

    Of another per-token `column` than the mask's, of tables that are sharded alike, where named; in `folder` then."""
    documents = read_documents(corpus, shard)
    begins, sizes = (documents.column(key).to_numpy() for key in ("token_start", "num_tokens"))
    spans, counts, tokens = [np.zeros((0, 2))], [np.zeros(0, np.int64)], 0
    if len(begins):
        first, end = int(begins[0]), int(begins[-1] + sizes[-1])
        masked = corpus.read(mask, "shard", column, first, end)
        stops = corpus.read(corpus.folder, "offsets", "stops", first, end)
        tokens = int(np.count_nonzero(masked))
        for some in _document_groups(sizes):
            begin, stop = int(begins[some][0]) - first, int(begins[some][-1] + sizes[some][-1]) - first
            own = begins[some] - first - begin
            counts.append(np.add.reduceat(opens_span(masked[begin:stop], own), own, dtype=np.int64))
            if counts[-1].any():
                spans.append(spans_of_mask(masked[begin:stop], token_edges(stops[begin:stop], own), own))
    return write_found_spans(folder or mask, shard, documents, np.concatenate(spans), np.concatenate(counts), tokens)


def _document_groups(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive documents of about `EDGES_AT_ONCE` tokens, or one that has more."""
    groups = np.cumsum(sizes) // EDGES_AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(groups)) + 1), len(sizes)]
    return (slice(start, stop) for start, stop in itertools.pairwise(cuts) if stop > start)


def read_documents(corpus: PackedCorpus, shard: int) -> pa.Table:
    """The documents that begin in a shard, as `schemas.DOCUMENTS`."""
    return schemas.read_table(sound(corpus.folder, f"documents-{shard_name(shard)}.parquet"), schemas.DOCUMENTS)


def document_starts(corpus: PackedCorpus, begin: int, end: int) -> np.ndarray:
    """Stream positions of the first tokens of the documents that begin in [begin, end), int64."""
    shards = range(begin // corpus.shard_tokens, -(-end // corpus.shard_tokens))
    starts = np.concatenate([read_documents(corpus, i).column("token_start").to_numpy() for i in shards])
    return starts[(starts >= begin) & (starts < end)]


def document_numbers(corpus: PackedCorpus, shard: int) -> np.ndarray:
    """The number (n,) of the document of each token of a shard, int64."""
    begin, end = corpus.extent(shard)
    starts = read_documents(corpus, shard).column("token_start").to_numpy()
    rows = np.searchsorted(starts, np.arange(begin, end), side="right")  # 0: of the document that the shard begins in
    return _documents_before(corpus, shard) - 1 + rows


def in_blocks(values: np.ndarray, like_BT: np.ndarray) -> np.ndarray:
    """One value for each token of a shard, (n,), as (B, T). Beyond them the last one is repeated."""
    blocks = np.full(like_BT.shape, values[-1], values.dtype)
    blocks.reshape(-1)[: len(values)] = values
    return blocks


def _documents_before(corpus: PackedCorpus, shard: int) -> int:
    """How many documents begin before a shard."""
    for earlier in range(shard - 1, -1, -1):
        ids = read_documents(corpus, earlier).column("doc_id")
        if len(ids):
            return int(ids[-1].as_py()) + 1
    return 0


def write_found_spans(
    folder: Path, shard: int, documents: pa.Table, spans: np.ndarray, counts: np.ndarray, tokens: int
) -> SpanCounts:
    """Write `spans-<shard>` in `folder`: the (K, 2) `spans` of all `documents`, of each one as many as `counts` says,
    ascending and apart."""
    pairs = pa.StructArray.from_arrays([pa.array(spans[:, 0]), pa.array(spans[:, 1])], fields=list(schemas.SPAN))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    ids, num_chars = (documents.column(name).combine_chunks() for name in ("doc_id", "num_chars"))
    columns = [ids, num_chars, pa.ListArray.from_arrays(offsets, pairs)]
    with publish(folder / f"spans-{shard_name(shard)}.parquet") as part:
        pq.write_table(pa.Table.from_arrays(columns, schema=schemas.SPANS), part)
    return SpanCounts(len(counts), int(counts.sum()), tokens)


class MaskJob(NamedTuple):
    """One shard of a mask to fill: the first of its documents, and which files hold them and their spans."""

    shard: int
    first_document: int
    documents: list[str]
    spans: list[str]

    @property
    def key(self) -> str:
        """Of the work on it."""
        return f"mask-{shard_name(self.shard)}"


def mask_jobs(corpus: PackedCorpus, source_mask: Path) -> Iterator[MaskJob]:
    """A job for each shard of `corpus`, whose documents are those of `source_mask`.

    Raises:
        ValueError: they have other numbers of documents.
    """
    documents, spans = data_files(corpus.folder, DOCUMENTS), data_files(source_mask, SPANS)
    bounds, source_bounds = _bounds(documents), _bounds(spans)
    if bounds[-1] != source_bounds[-1]:
        raise ValueError(
            f"{corpus.folder} has {bounds[-1]} documents, {source_mask} has spans of {source_bounds[-1]}:"
            " they are of other documents"
        )
    for shard in range(corpus.num_shards):
        # The document before the first that begins here may reach into the shard.
        first, stop = max(int(bounds[shard]) - 1, 0), int(bounds[shard + 1])
        named, span_files = (
            [path.name for path in _holding(files, counted, first, stop)]
            for files, counted in ((documents, bounds), (spans, source_bounds))
        )
        yield MaskJob(shard, first, named, span_files)


def _bounds(files: Sequence[Path]) -> np.ndarray:
    """The first row of each file among all rows, and their number."""
    return np.cumsum(
        [0, *(schemas.read_table(sound(path.parent, path.name), columns=["doc_id"]).num_rows for path in files)]
    )


def _holding(files: Sequence[Path], bounds: np.ndarray, first: int, stop: int) -> list[Path]:
    return [path for path, low, high in zip(files, bounds[:-1], bounds[1:], strict=True) if low < stop and high > first]


def write_mask(corpus: PackedCorpus, source_mask: Path, folder: Path, job: MaskJob) -> dict[str, Any]:
    """Write a shard of the mask in `folder`: the tokens of `corpus` that overlap a span. Returns counts of `blocks`,
    `masked` and `predicted` tokens.

    Raises:
        ValueError: a document has another number of characters here than where its spans are from.
    """
    begin, end = corpus.extent(job.shard)
    documents = _rows(corpus.folder, job.documents, schemas.DOCUMENTS, job.first_document)
    spans = _rows(source_mask, job.spans, schemas.SPANS, job.first_document).slice(0, documents.num_rows)
    _require_same_documents(corpus.folder, source_mask, documents, spans)
    # More on either side, so that a character that tokens of two shards share is divided as in both.
    low, high = corpus.extent(job.shard, CONTEXT)
    stops = corpus.read(corpus.folder, "offsets", "stops", low, high)
    begins, sizes = (documents.column(name).to_numpy() for name in ("token_start", "num_tokens"))
    pairs = spans.column("spans").combine_chunks()
    bounds, flat = pairs.offsets.to_numpy(), pairs.flatten()
    starts_stops = np.stack([flat.field(i).to_numpy(zero_copy_only=False) for i in (0, 1)], axis=1)
    masked = np.zeros(high - low, bool)
    for i in np.flatnonzero(np.diff(bounds)):
        own = slice(max(begins[i] - low, 0), max(begins[i] + sizes[i] - low, 0))
        if own.stop > own.start:
            of_document = slice(bounds[i] - bounds[0], bounds[i + 1] - bounds[0])
            masked[own] = mask_of_spans(starts_stops[of_document], token_edges(stops[own]))
    return write_mask_shard(corpus, folder, job.shard, masked[begin - low : end - low])


def write_mask_shard(corpus: PackedCorpus, folder: Path, shard: int, masked: np.ndarray) -> dict[str, Any]:
    """Write a shard of a mask from its tokens' flags (n,), each block's first unmasked; counts as `write_mask`."""
    num_blocks = -(-len(masked) // corpus.block_size)
    masked_BT = np.zeros((num_blocks, corpus.block_size), bool)
    masked_BT.reshape(-1)[: len(masked)] = masked
    masked_BT[:, 0] = False
    block_ids = pa.array(shard * corpus.blocks_per_shard + np.arange(num_blocks), pa.int64())
    schema = schemas.mask(corpus.block_size)
    columns = [block_ids, schemas.per_token_column(masked_BT, schema, "masked")]
    with publish(folder / f"shard-{shard_name(shard)}.parquet") as part:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), part)
    return {"blocks": num_blocks, "masked": int(masked_BT.sum()), "predicted": len(masked) - num_blocks}


def _rows(folder: Path, names: Sequence[str], schema: pa.Schema, first: int) -> pa.Table:
    """The rows from document `first` on of some files."""
    table = pa.concat_tables([schemas.read_table(sound(folder, name), schema) for name in names])
    return table.slice(first - table.column("doc_id")[0].as_py())


def _require_same_documents(folder: Path, source_mask: Path, documents: pa.Table, spans: pa.Table) -> None:
    for name in ("doc_id", "num_chars"):
        ours, theirs = documents.column(name).to_numpy(), spans.column(name).to_numpy()
        if len(ours) != len(theirs) or (ours != theirs).any():
            row = int(np.argmax(ours != theirs)) if len(ours) == len(theirs) else 0
            raise ValueError(
                f"{folder}: document {documents.column('doc_id')[row]} has {name} {ours[row]}, its spans in"
                f" {source_mask} are of {theirs[row]}: the inputs have changed since the corpus was scored"
            )
