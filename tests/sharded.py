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
from ifguide.config import OWN
from ifguide.corpus.packing import pack, tokenise
from ifguide.corpus.reading import RawDocument
from ifguide.selection.distributed import RunTasks
from ifguide.selection.measures import Measure
from ifguide.selection.shards import Rules, ShardFiles
from ifguide.spans.tables import PackedCorpus, shard_name

# Small enough that a few tokens make several chunks, runs, splitters and files.
SMALL = {"chunk_tokens": 8, "run_units": 3, "sample_units": 2, "file_units": 4}


def write_shards(
    folder: Path,
    scores_NT: np.ndarray,
    lengths: np.ndarray,
    documents: Sequence[tuple[int, int]],
    cuts: Iterable[int] = (),
    tokens_NT: np.ndarray | None = None,
    nulls_KNT: Sequence[np.ndarray] = (),
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
        schema = schemas.scores(block_size, nulls={OWN: len(nulls_KNT)})
        columns = [block_ids, schemas.per_token_column(scores_NT[rows], schema, "token_score")]
        for number, nulls_NT in enumerate(nulls_KNT):
            columns.append(schemas.per_token_column(nulls_NT[rows], schema, schemas.null_column(OWN, number)))
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
        "quantile": 0.0, "window": 1, "max_fraction": 1.0, "unit": "document", "prior": None,
        "measure": Measure(column="token_score"), "fdr": None,
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


def write_corpus(
    folder: Path, texts: Sequence[str], tokenizer: Any, *, block_size: int, blocks_per_shard: int
) -> tuple[PackedCorpus, list[np.ndarray]]:
    """Texts packed as `pack_corpus` does, without a cluster; with each document's stops."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = tokenise([RawDocument(row=i, text=text) for i, text in enumerate(texts)], tokenizer, annotate=False)
    sizes = [len(document.tokens) for document in encoded]
    begins = np.concatenate([[0], np.cumsum(sizes)])
    shape = {"skip": 0, "num_tokens": int(begins[-1]), "block_size": block_size}
    tokens_BT, lengths = pack([document.tokens for document in encoded], fill=0, **shape)
    stops_BT, _ = pack([document.stops for document in encoded], fill=0, **shape)
    corpus = PackedCorpus(
        folder=folder, block_size=block_size, blocks_per_shard=blocks_per_shard, num_tokens=int(begins[-1])
    )
    for shard in range(corpus.num_shards):
        rows = slice(shard * blocks_per_shard, (shard + 1) * blocks_per_shard)
        name, block_ids = shard_name(shard), pa.array(np.arange(len(tokens_BT))[rows])
        schema = schemas.blocks(block_size, annotated=False)
        columns = [block_ids, pa.array(lengths[rows]), schemas.per_token_column(tokens_BT[rows], schema, "tokens")]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), folder / f"shard-{name}.parquet")
        schema = schemas.offsets(block_size)
        columns = [block_ids, schemas.per_token_column(stops_BT[rows], schema, "stops")]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), folder / f"offsets-{name}.parquet")
        own = [i for i in range(len(texts)) if corpus.extent(shard)[0] <= begins[i] < corpus.extent(shard)[1]]
        table = documents_table([(i, int(begins[i]), int(begins[i + 1])) for i in own], block_size)
        characters = pa.array([len(texts[i]) for i in own], pa.int64())
        table = table.set_column(
            table.schema.get_field_index("num_chars"), schemas.DOCUMENTS.field("num_chars"), characters
        )
        pq.write_table(table, folder / f"documents-{name}.parquet")
    return corpus, [document.stops for document in encoded]


def write_mask_shards(corpus: PackedCorpus, folder: Path, masked: np.ndarray) -> None:
    """A mask of the whole stream, as `build_mask` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = schemas.mask(corpus.block_size)
    padded = np.zeros(-(-corpus.num_tokens // corpus.block_size) * corpus.block_size, bool)
    padded[: corpus.num_tokens] = masked
    masked_BT = padded.reshape(-1, corpus.block_size)
    for shard in range(corpus.num_shards):
        rows = slice(shard * corpus.blocks_per_shard, (shard + 1) * corpus.blocks_per_shard)
        columns = [
            pa.array(np.arange(len(masked_BT))[rows]),
            schemas.per_token_column(masked_BT[rows], schema, "masked"),
        ]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), folder / f"shard-{shard_name(shard)}.parquet")
