"""The composition of per-shard functions equals the literal loop bit for bit, however the corpus is sharded."""

import itertools
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.selection import Documents, ScoreShard, Selection, select_tokens
from tests.reference import algorithm1


def shards_of(
    scores: np.ndarray, lengths: np.ndarray, cuts: list[int], excluded: Collection[int] = ()
) -> list[ScoreShard]:
    bounds = [0, *sorted(set(cuts)), len(lengths)]
    out = np.isin(np.arange(len(lengths)), list(excluded)) if excluded else None
    return [
        ScoreShard(
            first_block=begin,
            scores=scores[begin:end],
            lengths=lengths[begin:end],
            excluded=None if out is None else out[begin:end],
        )
        for begin, end in itertools.pairwise(bounds)
        if begin < end
    ]


def assert_equal_to_loop(
    selection: Selection,
    shards: list[ScoreShard],
    scores: np.ndarray,
    lengths: np.ndarray,
    documents: list[tuple[int, int]],
    **options,
) -> None:
    blocks = [row[:length].astype(np.float64).tolist() for row, length in zip(scores, lengths, strict=True)]
    tau, rank_score, masked = algorithm1.select(blocks, documents, scores.shape[1], **options)
    assert selection.tau == tau
    ranks = dict(zip(selection.ranking.doc_id.tolist(), selection.ranking.rank_score.tolist(), strict=True))
    assert all(rank_score[unit] == score for unit, score in ranks.items())
    assert all(rank_score[unit] == 0 for unit in set(range(len(rank_score))) - set(ranks))
    found = {
        (shard.first_block + int(row), int(index))
        for shard, mask in zip(shards, selection.masks, strict=True)
        for row, index in np.argwhere(mask)
    }
    assert found == masked
    assert len(masked) == selection.cutoff.masked_tokens <= selection.max_tokens


# Few distinct values make ties in tau, in sums and in ranks; the inexact ones make sums depend on their order.
tied = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.1, 0.3, 1.0, 1e-8, 1e8, -1e-40, 3.0])
free = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@st.composite
def corpora(draw):
    block_size = draw(st.integers(2, 7))
    num_blocks = draw(st.integers(1, 8))
    last = draw(st.integers(2 if num_blocks == 1 else 1, block_size))
    lengths = np.full(num_blocks, block_size, dtype=np.int64)
    lengths[-1] = last
    total = int(lengths.sum())
    values = draw(st.lists(draw(st.sampled_from([tied, free])), min_size=total, max_size=total))
    scores = np.full((num_blocks, block_size), np.nan, dtype=np.float32)  # padding must never be read
    scores.ravel()[:total] = values
    ends = sorted(draw(st.sets(st.integers(1, total - 1), max_size=12))) if total > 1 else []
    documents = list(zip([0, *ends], [*ends, total], strict=True))
    cuts = draw(st.lists(st.integers(1, num_blocks), max_size=5))
    excluded = draw(st.sets(st.integers(0, num_blocks - 1), max_size=3))
    return scores, lengths, documents, cuts, excluded


@settings(max_examples=600, deadline=None)
@given(
    corpus=corpora(),
    quantile=st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.9, 0.99, 1.0]),
    window=st.integers(0, 2),
    max_fraction=st.floats(0, 1),
    unit=st.sampled_from(["document", "block"]),
    data=st.data(),
)
def test_any_sharding_equals_the_literal_loop(corpus, quantile, window, max_fraction, unit, data) -> None:
    scores, lengths, intervals, cuts, excluded = corpus
    starts = np.array([begin for begin, _ in intervals], dtype=np.int64)
    sizes = np.array([end - begin for begin, end in intervals], dtype=np.int64)
    options = {"quantile": quantile, "window": window, "max_fraction": max_fraction, "unit": unit}
    shards = data.draw(st.permutations(shards_of(scores, lengths, cuts, excluded)))
    selection = select_tokens(shards, Documents(token_start=starts, num_tokens=sizes), **options)
    assert_equal_to_loop(selection, shards, scores, lengths, intervals, excluded=excluded, **options)


@pytest.mark.parametrize("unit", ["document", "block"])
@pytest.mark.parametrize("num_shards", [1, 3, 40])
def test_heavy_tailed_corpus_equals_the_literal_loop(unit: str, num_shards: int) -> None:
    rng = np.random.default_rng(7)
    scores = (rng.standard_t(2, size=(40, 64)) * rng.choice([1e-3, 1, 1e3], size=(40, 64))).astype(np.float32)
    lengths = np.full(40, 64, dtype=np.int64)
    lengths[-1] = 17
    total = int(lengths.sum())
    # From one token to several blocks, so that some units span shards and one of them is cut.
    ends = np.unique(np.minimum(np.cumsum(rng.choice([1, 5, 30, 300], size=200)), total))
    intervals = list(zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True))
    assert ends[-1] == total
    starts = np.array([begin for begin, _ in intervals], dtype=np.int64)
    shards = shards_of(scores, lengths, list(range(0, 40, 40 // num_shards))[1:])
    for max_fraction in (0.005, 0.02, 0.07):
        options = {"quantile": 0.9, "window": 1, "max_fraction": max_fraction, "unit": unit}
        documents = Documents(token_start=starts, num_tokens=ends - starts)
        selection = select_tokens(shards, documents, **options)
        assert selection.cutoff.masked_tokens == selection.max_tokens > 0
        assert_equal_to_loop(selection, shards, scores, lengths, intervals, **options)
