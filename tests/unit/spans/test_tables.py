"""Spans of a mask over shards, and the mask of the same documents in other tokens, against whole documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide import schemas
from ifguide.artifacts import data_files
from ifguide.spans.mapping import mask_of_spans, spans_of_mask, token_edges
from ifguide.spans.tables import SPANS, PackedCorpus, mask_jobs, write_mask, write_spans
from tests.sharded import write_corpus, write_mask_shards
from tests.tokenizers import WRITTEN, tokenizers


def random_mask(corpus: PackedCorpus, share: float, seed: int) -> np.ndarray:
    """Tokens of the stream; none is the first of its block."""
    masked = np.random.default_rng(seed).random(corpus.num_tokens) < share
    masked[:: corpus.block_size] = False
    return masked


def read_mask(corpus: PackedCorpus, folder: Path) -> np.ndarray:
    return corpus.read(folder, "shard", "masked", 0, corpus.num_tokens)


def masked_again(source: PackedCorpus, masked: np.ndarray, target: PackedCorpus, folder: Path) -> np.ndarray:
    """The target's mask by way of the tables."""
    write_mask_shards(source, folder / "mask", masked)
    counts = [write_spans(source, folder / "mask", shard) for shard in reversed(range(source.num_shards))]
    assert sum(count.tokens for count in counts) == masked.sum()
    (folder / "target_mask").mkdir()
    jobs = list(mask_jobs(target, folder / "mask"))
    results = [write_mask(target, folder / "mask", folder / "target_mask", job) for job in reversed(jobs)]
    found = read_mask(target, folder / "target_mask")
    assert sum(result["masked"] for result in results) == found.sum()
    assert sum(result["predicted"] for result in results) == len(found) - len(found[:: target.block_size])
    return found


@settings(max_examples=60)
@given(
    texts=st.lists(WRITTEN, min_size=1, max_size=12),
    block_size=st.integers(2, 9),
    shards=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    other_size=st.integers(2, 9),
    names=st.tuples(*[st.sampled_from(["bpe", "unigram", "bytes"])] * 2),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_the_mask_of_shards_is_that_of_whole_documents_in_any_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    block_size: int,
    shards: tuple[int, int],
    other_size: int,
    names: tuple[str, str],
    share: float,
) -> None:
    folder = tmp_path_factory.mktemp("spans")
    source, stops = write_corpus(
        folder / "a", texts, tokenizers()[names[0]], block_size=block_size, blocks_per_shard=shards[0]
    )
    target, other_stops = write_corpus(
        folder / "b", texts, tokenizers()[names[1]], block_size=other_size, blocks_per_shard=shards[1]
    )
    masked = random_mask(source, share, seed=len(texts))
    found = masked_again(source, masked, target, folder)
    begins = np.concatenate([[0], np.cumsum([len(each) for each in stops])])
    expected = np.concatenate(
        [
            mask_of_spans(spans_of_mask(masked[begin : begin + len(own)], token_edges(own)), token_edges(other))
            for begin, own, other in zip(begins[:-1], stops, other_stops, strict=True)
        ]
    )
    expected[:: target.block_size] = False
    np.testing.assert_array_equal(found, expected)
    if names[0] == names[1] and block_size == other_size:
        np.testing.assert_array_equal(found, masked)


def test_every_document_has_one_row_of_spans_in_order(tmp_path: Path) -> None:
    texts = ["one two", "", "three " * 30, "four", ""]
    corpus, _ = write_corpus(tmp_path / "a", texts, tokenizers()["bytes"], block_size=8, blocks_per_shard=2)
    write_mask_shards(corpus, tmp_path / "mask", random_mask(corpus, 0.2, 0))
    for shard in range(corpus.num_shards):
        write_spans(corpus, tmp_path / "mask", shard)
    table = pa.concat_tables([schemas.read_table(path, schemas.SPANS) for path in data_files(tmp_path / "mask", SPANS)])
    assert table.column("doc_id").to_pylist() == list(range(len(texts)))
    assert table.column("num_chars").to_pylist() == [len(text) for text in texts]
    for row, text in zip(table.to_pylist(), texts, strict=True):
        assert all(-1 <= span["start"] < span["stop"] <= len(text) + 1 for span in row["spans"])


def test_other_documents_are_refused(tmp_path: Path) -> None:
    texts = ["one two three", "four five", "six"]
    source, _ = write_corpus(tmp_path / "a", texts, tokenizers()["bytes"], block_size=4, blocks_per_shard=2)
    write_mask_shards(source, tmp_path / "mask", random_mask(source, 0.2, 0))
    for shard in range(source.num_shards):
        write_spans(source, tmp_path / "mask", shard)
    fewer, _ = write_corpus(tmp_path / "b", texts[:2], tokenizers()["bpe"], block_size=4, blocks_per_shard=2)
    with pytest.raises(ValueError, match=r"b has 2 documents, .*mask has spans of 3"):
        list(mask_jobs(fewer, tmp_path / "mask"))
    changed, _ = write_corpus(
        tmp_path / "c", ["one two three", "four fiv", "six"], tokenizers()["bpe"], block_size=4, blocks_per_shard=2
    )
    jobs = list(mask_jobs(changed, tmp_path / "mask"))
    with pytest.raises(ValueError, match=r"document 1 has num_chars 8, its spans in .*mask are of 9"):
        write_mask(changed, tmp_path / "mask", tmp_path, jobs[1])


def test_offsets_of_another_version_are_named(tmp_path: Path) -> None:
    corpus, _ = write_corpus(tmp_path / "a", ["some text"], tokenizers()["bytes"], block_size=4, blocks_per_shard=9)
    write_mask_shards(corpus, tmp_path / "mask", random_mask(corpus, 1.0, 0))
    path = tmp_path / "a" / "offsets-00000.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["block_id", "ends"]), path)
    with pytest.raises(ValueError, match=r"offsets-00000\.parquet has no column stops"):
        write_spans(corpus, tmp_path / "mask", 0)
