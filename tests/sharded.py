"""A corpus in shards on disk, with its documents and scores as the stages write them, and tasks without a cluster."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import data_files
from ifguide.distributed_selection import RunTasks
from ifguide.selection_passes import Rules, ShardFiles

# Small enough that a few tokens make several chunks, runs, splitters and files.
SMALL = {"chunk_tokens": 8, "run_units": 3, "sample_units": 2, "file_units": 4}


def write_shards(
    folder: Path,
    scores_NT: np.ndarray,
    lengths: np.ndarray,
    documents: Sequence[tuple[int, int]],
    cuts: Iterable[int] = (),
    tokens_NT: np.ndarray | None = None,
) -> list[ShardFiles]:
    """Shards cut before the blocks `cuts`; `documents` are half-open intervals of the stream."""
    num_blocks, block_size = scores_NT.shape
    tokens_NT = np.arange(scores_NT.size, dtype=np.int32).reshape(scores_NT.shape) if tokens_NT is None else tokens_NT
    bounds = sorted({0, *cuts, num_blocks})
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        name, rows = f"{number:05d}", slice(begin, end)
        shard = ShardFiles(name, *(folder / f"{kind}-{name}.parquet" for kind in ("corpus", "documents", "shard")))
        block_ids = pa.array(np.arange(begin, end))
        schema = schemas.blocks(block_size, annotated=False)
        tokens = schemas.per_token_column(tokens_NT[rows], schema, "tokens")
        columns = [block_ids, pa.array(lengths[rows], pa.int32()), tokens]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), shard.corpus)
        schema = schemas.scores(block_size)
        columns = [block_ids, schemas.per_token_column(scores_NT[rows], schema, "token_score")]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), shard.scores)
        inside = range(begin * block_size, end * block_size)
        own = [(doc_id, *span) for doc_id, span in enumerate(documents) if span[0] in inside]
        pq.write_table(documents_table(own, block_size), shard.documents)
        shards.append(shard)
    return shards


def documents_table(documents: Sequence[tuple[int, int, int]], block_size: int) -> pa.Table:
    """A document table of (id, begin, end)."""
    rows = [
        {
            "doc_id": doc_id,
            "source": "test",
            "row": doc_id,
            "num_chars": 1,
            "num_tokens": end - begin,
            "token_start": begin,
            "block_id": begin // block_size,
            "offset": begin % block_size,
        }
        for doc_id, begin, end in documents
    ]
    return pa.Table.from_pylist(rows, schema=schemas.DOCUMENTS)


def rules_of(folder: Path, **changes: Any) -> Rules:
    """Rules that select everything by document, with small limits, into `folder`."""
    options = {
        "quantile": 0.0, "window": 1, "max_fraction": 1.0, "unit": "document", "column": "token_score",
        "outlier_mass_ratio": 10.0, "outlier_bigram_share": 0.0, "exclude_repeated": False,
        "ranking": folder / "ranking", "mask": folder / "mask",
    }  # fmt: skip
    return Rules(**{**options, **SMALL, **changes})


def in_any_order(seed: int = 0) -> RunTasks:
    """Tasks in this process, run and returned in an order drawn from the seed."""

    def run(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        waiting = list(arguments)
        random.Random(seed).shuffle(waiting)
        results = [function(*each) for each in waiting]
        random.Random(seed + 1).shuffle(results)
        yield from results

    return run


def read_masks(rules: Rules) -> np.ndarray:
    """The mask of the corpus, (N, T)."""
    tables = [schemas.read_table(path) for path in data_files(rules.mask)]
    assert np.concatenate([table.column("block_id") for table in tables]).tolist() == list(range(sum(map(len, tables))))
    return np.concatenate([schemas.per_token_array(table, "masked") for table in tables])


def read_ranking(rules: Rules) -> pa.Table:
    """The ranking, in order."""
    files = data_files(rules.ranking, "ranking-*.parquet")
    return pa.concat_tables([schemas.read_table(path, schemas.RANKING) for path in files])
