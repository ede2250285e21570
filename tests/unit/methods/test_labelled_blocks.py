"""ifguide.methods.labelled_blocks: whose tokens they are, over edges of shards, and a sample with people's labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.methods.labelled_blocks import labelled_blocks
from ifguide.spans.tables import PackedCorpus, document_numbers, shard_name
from tests.sharded import documents_table

SIZES = (3, 30, 1, 6, 8, 2)  # of documents; the second one covers whole shards in which none begins
BLOCK, PER_SHARD = 4, 2


def packed(folder: Path, annotated: np.ndarray) -> PackedCorpus:
    """Tokens 0, 1, 2, ... with these annotations."""
    corpus = PackedCorpus(folder=folder, block_size=BLOCK, blocks_per_shard=PER_SHARD, num_tokens=sum(SIZES))
    starts = np.cumsum(SIZES) - SIZES
    schema = schemas.blocks(BLOCK, annotated=True)
    for shard in range(corpus.num_shards):
        begin, end = corpus.extent(shard)
        blocks = -(-(end - begin) // BLOCK)
        own = np.minimum(begin + np.arange(blocks * BLOCK), len(annotated) - 1).reshape(blocks, BLOCK)
        lengths = np.minimum(BLOCK, end - begin - BLOCK * np.arange(blocks))
        columns = [
            pa.array(begin // BLOCK + np.arange(blocks)),
            pa.array(lengths, pa.int32()),
            schemas.per_token_column(own.astype(np.int32), schema, "tokens"),
            schemas.per_token_column(annotated[own], schema, "annotated"),
        ]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), folder / f"shard-{shard_name(shard)}.parquet")
        rows = [(i, int(start), int(start) + SIZES[i]) for i, start in enumerate(starts) if begin <= start < end]
        pq.write_table(documents_table(rows, BLOCK), folder / f"documents-{shard_name(shard)}.parquet")
    return corpus


def test_each_token_has_the_number_of_its_document(tmp_path: Path) -> None:
    corpus = packed(tmp_path, np.zeros(sum(SIZES), bool))
    numbers = np.concatenate([document_numbers(corpus, shard) for shard in range(corpus.num_shards)])
    np.testing.assert_array_equal(numbers, np.repeat(np.arange(len(SIZES)), SIZES))


def test_blocks_with_labels_and_as_many_without(tmp_path: Path) -> None:
    annotated = np.zeros(sum(SIZES), bool)
    annotated[[5, 6, 21, 41, 42, 43]] = True
    corpus = packed(tmp_path, annotated)
    blocks, labels, documents = labelled_blocks(corpus, 100, seed=0)
    held = [any(flags) for flags in labels]
    assert (held.count(True), held.count(False)) == (3, 3)
    numbers = np.repeat(np.arange(len(SIZES)), SIZES)
    for block, flags, of_block in zip(blocks, labels, documents, strict=True):
        assert block == list(range(block[0], block[0] + len(flags)))  # its tokens are their own positions
        np.testing.assert_array_equal(flags, annotated[block])
        np.testing.assert_array_equal(of_block, numbers[block])
    assert [block[0] for block in blocks] == [block[0] for block in labelled_blocks(corpus, 100, seed=0)[0]]
    few = labelled_blocks(corpus, 1, seed=0)[1]
    assert sum(map(any, few)) == 1
    assert len(few) <= 2


def test_a_corpus_without_an_annotated_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no annotated token"):
        labelled_blocks(packed(tmp_path, np.zeros(sum(SIZES), bool)), 10, seed=0)
