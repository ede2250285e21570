"""Arrow schema, key and alignment of every table that crosses a stage.

All tables are Parquet. Token-level columns are fixed-size lists of the block size T and label-aligned:
entry j of `token_score` and `masked` speaks of predicting token j of the block. Entry 0 has no prediction
(score 0, never masked), and neither have padded entries j >= `length`; only a corpus' last block is padded.

Documents lie end to end in one token stream cut into blocks: document d covers stream positions
[token_start, token_start + num_tokens), its closing EOS included (of a document that came as token ids the last of
them, which stands for it; its tokens stand for characters); position p is entry p % T of block p // T.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide.config import OWN
from ifguide.storage import readable

OWN_SCORES, SMOOTHED_SCORES = "token_score", "smoothed_score"  # the columns of the run's own query

DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),  # place in the stream: 0, 1, 2, ...
        pa.field(
            "source", pa.string(), nullable=False
        ),  # input file, or hub dataset, `hf://name/subset:split` if of several
        pa.field("row", pa.int64(), nullable=False),  # row in that file
        pa.field("num_chars", pa.int64(), nullable=False),  # of one that came as token ids: num_tokens - 1
        pa.field("num_tokens", pa.int64(), nullable=False),  # with its EOS
        pa.field("token_start", pa.int64(), nullable=False),  # stream position of its first token
        pa.field("block_id", pa.int64(), nullable=False),  # token_start // T
        pa.field("offset", pa.int32(), nullable=False),  # token_start % T
    ]
)

SPAN = pa.struct([pa.field("start", pa.float64(), nullable=False), pa.field("stop", pa.float64(), nullable=False)])

# In the order of `doc_id` over the files `spans-*.parquet` by name, beside a mask: one row for every document.
SPANS = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("num_chars", pa.int64(), nullable=False),
        # characters [start, stop) that are masked, ascending and apart; a fraction where tokens share a character;
        # num_chars to num_chars + 1 is the closing EOS (`ifguide.spans.mapping`)
        pa.field("spans", pa.list_(pa.field("item", SPAN, nullable=False)), nullable=False),
    ]
)

# In the order of selection over the files `ranking-*.parquet` by name; all but the last have as many rows.
RANKING = pa.schema(
    [
        pa.field("unit_id", pa.int64(), nullable=False),  # doc_id, or block_id when unit is block
        pa.field("rank", pa.int64(), nullable=False),  # 0 is first
        pa.field("rank_score", pa.float64(), nullable=False),  # 2sf / (s + f), s and f min-max normalised
        pa.field("tokens_above", pa.int64(), nullable=False),  # s: tokens scoring above tau
        pa.field("score_sum", pa.float64(), nullable=False),  # f: sum of their scores
        pa.field("tokens_masked", pa.int64(), nullable=False),
    ]
)

# In the order of `block_id` over the files `outliers-*.parquet` by name, one for each shard of the corpus.
OUTLIERS = pa.schema(
    [
        pa.field("block_id", pa.int64(), nullable=False),  # blocks that are neither repeated nor of high mass: left out
        pa.field("mass", pa.float32(), nullable=False),  # sum of |score| over predicted tokens
        pa.field("mass_over_median", pa.float64(), nullable=False),  # inf where the median block's mass is 0
        pa.field("distinct_bigram_share", pa.float64(), nullable=False),  # of pairs of neighbouring tokens
        pa.field("repeated", pa.bool_(), nullable=False),
        pa.field("high_mass", pa.bool_(), nullable=False),
    ]
)

# The files `audit-*.parquet` beside scores that a student made: one row for each predicted token of an audited block.
AUDIT = pa.schema(
    [
        pa.field("block_id", pa.int64(), nullable=False),
        pa.field("place", pa.int32(), nullable=False),  # in the block
        pa.field("source", pa.string(), nullable=False),  # of its document, as in `DOCUMENTS`
        pa.field("exact", pa.float32(), nullable=False),
        pa.field("student", pa.float32(), nullable=False),
        pa.field("rechecked", pa.bool_(), nullable=False),  # its block is one that a cascade rechecks
    ]
)

_CONTINUATION = [
    pa.field("model", pa.string(), nullable=False),
    pa.field("prompt_row", pa.int64(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("continuation", pa.string(), nullable=False),
]
CONTINUATIONS = pa.schema(
    [
        *_CONTINUATION,
        pa.field("scores", pa.map_(pa.string(), pa.float32()), nullable=False),  # class -> probability
    ]
)


# What `CONTINUATIONS` are scored from: kept apart, so that other classifiers need no other generation.
GENERATIONS = pa.schema(
    [
        *_CONTINUATION,
        pa.field("tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # before the EOS
    ]
)

HELDOUT = pa.schema(
    [
        pa.field("nll", pa.float64(), nullable=False),  # of each held-out block, in nats
        pa.field("tokens", pa.int64(), nullable=False),  # predicted in it
        pa.field("flagged", pa.bool_(), nullable=False),  # of documents that the classifier flags
    ]
)

ANNOTATED = pa.schema(
    [
        pa.field("tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # of each document
        pa.field("annotated", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
        pa.field("nll", pa.list_(pa.field("item", pa.float64(), nullable=False)), nullable=False),  # in nats
    ]
)

CLOZE = pa.schema([pa.field("word_correct", pa.bool_()), pa.field("token_correct", pa.bool_())])  # null: unusable text


def blocks(block_size: int, *, annotated: bool) -> pa.Schema:
    """Packed blocks, key `block_id`. `annotated[j]`: token j overlaps a span that came with its document."""
    fields = [
        pa.field("block_id", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("tokens", _per_token(pa.int32(), block_size), nullable=False),
    ]
    if annotated:
        fields.append(pa.field("annotated", _per_token(pa.bool_(), block_size), nullable=False))
    return pa.schema(fields)


def offsets(block_size: int) -> pa.Schema:
    """Where each token stops in the text of its document, `ifguide.spans.mapping.token_stops`, key `block_id`: the
    files `offsets-*.parquet` beside the blocks. Not to be confused with a document's `offset` within its block."""
    return pa.schema(
        [
            pa.field("block_id", pa.int64(), nullable=False),
            pa.field("stops", _per_token(pa.int32(), block_size), nullable=False),
        ]
    )


OFFSETS_ENCODING = {"stops.list.element": "DELTA_BINARY_PACKED"}  # differences of neighbours: half a byte a token


def scores(
    block_size: int, behaviours: Sequence[str] = (OWN,), nulls: Mapping[str, int] = {}, *, smoothed: bool = False
) -> pa.Schema:
    """Token scores, key `block_id`: one column for each behaviour, that of the run's own query first; then one of the
    `smoothed` scores of each; then those of the `nulls` that each has.

    A positive score: training on the token makes the behaviour likelier."""
    columns = [score_column(behaviour) for behaviour in behaviours]
    columns += [smoothed_column(behaviour) for behaviour in behaviours if smoothed]
    columns += [null_column(behaviour, number) for behaviour in nulls for number in range(nulls[behaviour])]
    fields = [pa.field(name, _per_token(pa.float32(), block_size), nullable=False) for name in columns]
    return pa.schema([pa.field("block_id", pa.int64(), nullable=False), *fields])


def score_column(behaviour: str) -> str:
    """The column of `scores` that speaks of a behaviour; `OWN` is the run's own query."""
    return OWN_SCORES if behaviour == OWN else f"{OWN_SCORES}.{behaviour}"


def smoothed_column(behaviour: str) -> str:
    """The column of `scores` that holds a behaviour's smoothed scores, where there are any."""
    return SMOOTHED_SCORES if behaviour == OWN else f"{SMOOTHED_SCORES}.{behaviour}"


def scored_behaviours(schema: pa.Schema) -> tuple[str, ...]:
    """The behaviours that a table of scores holds, in its order: `OWN` first."""
    columns = [name for name in schema.names if name == OWN_SCORES or name.startswith(f"{OWN_SCORES}.")]
    return tuple(OWN if name == OWN_SCORES else name.removeprefix(f"{OWN_SCORES}.") for name in columns)


def null_column(behaviour: str, number: int) -> str:
    """The column of `scores` along the behaviour's null direction `number`."""
    return f"null_score.{behaviour}.{number}"


def null_columns(schema: pa.Schema, behaviour: str) -> tuple[str, ...]:
    """The columns of a behaviour's nulls that a table of scores holds, in order."""
    numbers = itertools.takewhile(lambda number: null_column(behaviour, number) in schema.names, itertools.count())
    return tuple(null_column(behaviour, number) for number in numbers)


def mask(block_size: int) -> pa.Schema:
    """Token mask, key `block_id`: the loss of predicting a masked token is penalised."""
    return pa.schema(
        [
            pa.field("block_id", pa.int64(), nullable=False),
            pa.field("masked", _per_token(pa.bool_(), block_size), nullable=False),
        ]
    )


def _per_token(kind: pa.DataType, block_size: int) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False), block_size)


def per_token_column(values_BT: np.ndarray, schema: pa.Schema, name: str) -> pa.Array:
    """A (B, T) array as the fixed-size-list column `name` of `schema`."""
    kind = schema.field(name).type
    assert values_BT.shape[1] == kind.list_size, (values_BT.shape, kind)
    flat = pa.array(np.ascontiguousarray(values_BT).reshape(-1), type=kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def per_token_array(table: pa.Table, name: str) -> np.ndarray:
    """The fixed-size-list column `name` as a (B, T) array."""
    column = table.column(name).combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), table.schema.field(name).type.list_size)


def read_table(path: Path, schema: pa.Schema | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, or some of its columns, checking them.

    Raises:
        ValueError: the file is truncated or not Parquet, or has other columns than `schema`; names it.
    """
    try:
        present = pq.read_schema(readable(path)).names
        wanted = None if columns is None else [name for name in columns if name in present]
        table = pq.read_table(readable(path), columns=wanted, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error
    _require_columns(path, columns or (), present)
    if schema is not None and not table.schema.equals(schema, check_metadata=False):
        raise ValueError(f"{path} has columns\n{table.schema}\nwhere\n{schema}\nis expected; another version made it")
    return table


def read_schema(path: Path) -> pa.Schema:
    """The columns of one Parquet file.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated or not Parquet; names it.
    """
    try:
        return pq.read_schema(readable(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> Exception:
    if not path.exists():
        return FileNotFoundError(f"{path} does not exist")
    return ValueError(f"{path} cannot be read as Parquet ({error}); delete it and run its stage again")


def _require_columns(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    missing = sorted(set(columns) - set(present))
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}, only {', '.join(present)}; another version made it")


def read_batches(path: Path, column: str, rows: int) -> Iterator[pa.Table]:
    """One column of a Parquet file, `rows` rows at a time (the last may be shorter): for a file too large to hold.

    Raises:
        ValueError: the file is truncated or not Parquet, or lacks the column; names it.
    """
    try:
        with pq.ParquetFile(readable(path)) as file:
            _require_columns(path, [column], file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=rows, columns=[column], use_threads=False):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error
    finally:
        pa.default_memory_pool().release_unused()  # or a worker keeps twice what it ever held at once
