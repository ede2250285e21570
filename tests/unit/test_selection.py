"""Each step of Algorithm 1, by hand-made cases; tests/reference/test_algorithm1.py holds the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ifguide.selection import (
    Documents,
    DocumentStatistics,
    MaskedCounts,
    Ranking,
    ScoreShard,
    fill_mask,
    find_cutoff,
    from_order_preserving_uint32,
    high_histogram,
    low_histogram,
    masked_counts,
    masked_positions,
    merge_statistics,
    order_preserving_uint32,
    piece_statistics,
    quantile_buckets,
    quantile_from_histograms,
    rank_units,
    select_tokens,
    token_budget,
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(1, 200), elements=finite)


def shard_of(rows: list[list[float]], first_block: int = 0) -> ScoreShard:
    block_size = max(map(len, rows))
    scores = np.zeros((len(rows), block_size), dtype=np.float32)
    for row, values in enumerate(rows):
        scores[row, : len(values)] = values
    return ScoreShard(first_block=first_block, scores=scores, lengths=np.array([len(row) for row in rows]))


def documents_of(*sizes: int) -> Documents:
    num_tokens = np.array(sizes, dtype=np.int64)
    return Documents(token_start=np.cumsum(num_tokens) - num_tokens, num_tokens=num_tokens)


@given(arrays)
def test_keys_keep_the_order_of_floats_and_come_back(values: np.ndarray) -> None:
    keys = order_preserving_uint32(values)
    assert keys.dtype == np.uint32
    np.testing.assert_array_equal(keys[:, None] < keys, values[:, None] < values)
    np.testing.assert_array_equal(keys[:, None] == keys, values[:, None] == values)
    back = from_order_preserving_uint32(keys)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, values)


def test_both_zeros_have_one_key() -> None:
    keys = order_preserving_uint32(np.array([-0.0, 0.0], dtype=np.float32))
    assert keys[0] == keys[1]
    assert not np.signbit(from_order_preserving_uint32(keys)).any()


def histogram_quantile(parts: list[np.ndarray], quantile: float) -> float:
    valid = [np.ones(part.shape, dtype=bool) for part in parts]
    high = sum(high_histogram(part, ok) for part, ok in zip(parts, valid, strict=True))
    low = {
        bucket: sum(low_histogram(part, ok, bucket) for part, ok in zip(parts, valid, strict=True))
        for bucket in quantile_buckets(high, quantile)
    }
    return quantile_from_histograms(high, low, quantile)


@settings(max_examples=300, deadline=None)
@given(arrays, st.floats(0, 1), st.integers(0, 200))
def test_quantile_equals_numpy_to_the_last_bit(values: np.ndarray, quantile: float, cut: int) -> None:
    tau = histogram_quantile([values[:cut], values[cut:]], quantile)
    assert tau == np.quantile(values.astype(np.float64), quantile)


def test_quantile_between_two_buckets_needs_both() -> None:
    values = np.array([-3.0, 5.0], dtype=np.float32)
    assert len(quantile_buckets(high_histogram(values, np.ones(2, dtype=bool)), 0.25)) == 2
    assert histogram_quantile([values], 0.25) == -1.0


def test_quantile_does_not_see_invalid_scores() -> None:
    values, valid = np.array([9e9, 1.0, 2.0, np.nan], dtype=np.float32), np.array([False, True, True, False])
    high = high_histogram(values, valid)
    low = {bucket: low_histogram(values, valid, bucket) for bucket in quantile_buckets(high, 1.0)}
    assert high.sum() == 2
    assert quantile_from_histograms(high, low, 1.0) == 2.0


def test_quantile_refuses_passes_over_different_scores() -> None:
    values, valid = np.arange(5, dtype=np.float32), np.ones(5, dtype=bool)
    high = high_histogram(values, valid)
    low = {bucket: low_histogram(values + 100, valid, bucket) for bucket in quantile_buckets(high, 0.5)}
    with pytest.raises(ValueError, match="different scores"):
        quantile_from_histograms(high, low, 0.5)


def test_quantile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        quantile_buckets(np.zeros(1 << 16, dtype=np.int64), 0.99)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_block(bad: float) -> None:
    with pytest.raises(ValueError, match=r"block 18 has score .* at index 2"):
        shard_of([[0, 1, 2], [0, 1, bad]], first_block=17)


def test_index_zero_and_padding_are_not_read() -> None:
    scores = np.array([[np.nan, 1, 2], [np.nan, 1, np.inf]], dtype=np.float32)
    shard = ScoreShard(first_block=0, scores=scores, lengths=np.array([3, 2]))
    np.testing.assert_array_equal(shard.valid, [[False, True, True], [False, True, False]])


def test_only_the_last_block_may_be_short() -> None:
    with pytest.raises(ValueError, match="block 4 has 2 tokens of 3"):
        shard_of([[0, 1], [0, 1, 2]], first_block=4)


@pytest.mark.parametrize(("starts", "sizes"), [([0, 3], [2, 4]), ([0, 1], [2, 4]), ([0, 0], [0, 4])])
def test_documents_with_gap_overlap_or_no_token_are_refused(starts: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="document 0 "):
        Documents(token_start=np.array(starts), num_tokens=np.array(sizes))


def test_meeting_keeps_ids_and_only_documents_in_the_span() -> None:
    part = documents_of(4, 3, 5, 2).meeting(4, 8)
    assert (part.first_id, part.token_start.tolist(), part.num_tokens.tolist()) == (1, [4, 7], [3, 5])


def test_documents_of_another_corpus_are_refused() -> None:
    with pytest.raises(ValueError, match="another corpus"):
        masked_counts(shard_of([[0, 1, 2]]), documents_of(2), tau=0.0, window=1, unit="block")
    with pytest.raises(ValueError, match="must cover one stream"):
        select_tokens([shard_of([[0, 1, 2]])], documents_of(4), quantile=0.5, window=1, max_fraction=1.0, unit="block")
    with pytest.raises(ValueError, match="must cover one stream"):
        select_tokens(
            [shard_of([[0, 1]], first_block=1)], documents_of(2), quantile=0.5, window=1, max_fraction=1.0, unit="block"
        )


def test_pieces_are_counted_by_document_and_block() -> None:
    shard = shard_of([[9, 1, 5, 6], [9, 7, 0, 8], [9, 2]], first_block=2)
    documents = Documents(token_start=np.array([8, 11]), num_tokens=np.array([3, 7]), first_id=5)
    pieces = piece_statistics(shard, documents, tau=1.5, unit="document")
    assert pieces.doc_id.tolist() == [5, 6, 6, 6]
    assert pieces.block_id.tolist() == [2, 2, 3, 4]
    assert pieces.count.tolist() == [1, 1, 2, 1]
    assert pieces.sum.tolist() == [5, 6, 15, 2]
    merged = merge_statistics([pieces])
    assert (merged.doc_id.tolist(), merged.count.tolist(), merged.sum.tolist()) == ([5, 6], [1, 4], [5, 23])
    blocks = merge_statistics([piece_statistics(shard, documents, tau=1.5, unit="block")])
    assert (blocks.doc_id.tolist(), blocks.count.tolist(), blocks.sum.tolist()) == ([2, 3, 4], [2, 2, 1], [11, 15, 2])


def test_merged_sum_adds_pieces_in_block_order_whatever_the_parts() -> None:
    rows = [[0, 2.0**53], [0, 1.0], [0, 1.0], [0, 0.5]]
    expected = ((2.0**53 + 1.0) + 1.0) + 0.5
    assert expected != 2.0**53 + (1.0 + 1.0 + 0.5)  # the order is visible in the result
    shards = [shard_of(rows[:1]), shard_of(rows[1:3], first_block=1), shard_of(rows[3:], first_block=3)]
    parts = [piece_statistics(shard, documents_of(8), tau=0.0, unit="document") for shard in shards]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert merge_statistics([parts[i] for i in order]).sum.tolist() == [expected]


def statistics_of(doc_id: list[int], count: list[int], sums: list[float]) -> DocumentStatistics:
    return DocumentStatistics(doc_id=np.array(doc_id), count=np.array(count), sum=np.array(sums, dtype=np.float64))


def test_rank_is_harmonic_and_units_without_tokens_set_the_minimum() -> None:
    # Of 5 units, 2 have nothing above tau: min is 0 in both, max is 4 and 10.
    ranking = rank_units(statistics_of([0, 2, 3], [4, 1, 2], [5.0, 10.0, 2.5]), num_units=5)
    assert ranking.doc_id.tolist() == [0, 2, 3]
    assert ranking.rank_score.tolist() == [2 * 1 * 0.5 / 1.5, 2 * 0.25 * 1 / 1.25, 2 * 0.5 * 0.25 / 0.75]
    # With no other unit, the least of the three is the minimum, and has rank score 0.
    alone = rank_units(statistics_of([0, 2, 3], [4, 1, 2], [5.0, 10.0, 2.5]), num_units=3)
    assert alone.doc_id.tolist() == [0, 2, 3]
    assert alone.rank_score.tolist()[1:] == [0, 0]


def test_rank_ties_go_by_id_and_equal_units_score_zero() -> None:
    ranking = rank_units(statistics_of([1, 4, 6], [2, 2, 2], [3.0, 3.0, 3.0]), num_units=3)
    assert ranking.doc_id.tolist() == [1, 4, 6]
    assert ranking.rank_score.tolist() == [0, 0, 0]


def test_window_stays_in_document_and_block_and_off_index_zero_and_padding() -> None:
    # Blocks of 4; documents [0, 2) [2, 7) [7, 10).
    shard = shard_of([[0, 1, 0, 0], [0, 1, 0, 1], [0, 1]])
    positions = masked_positions(shard, documents_of(2, 5, 3), tau=0.5, window=1)
    # 1: alone in its document. 5: index 0 is barred, 6 is its own. 7: 6 is another document's. 9: end of stream.
    assert positions.tolist() == [1, 5, 6, 7, 9]
    assert masked_positions(shard, documents_of(10), tau=0.5, window=0).tolist() == [1, 5, 7, 9]
    assert masked_positions(shard, documents_of(10), tau=0.5, window=2).tolist() == [1, 2, 3, 5, 6, 7, 9]


def test_a_token_equal_to_tau_is_not_above_it_in_float64() -> None:
    shard = shard_of([[0, 0.1, 0.2]])
    tau = float(np.float32(0.1))
    assert masked_positions(shard, documents_of(3), tau=tau, window=0).tolist() == [2]
    # In float32 this tau is 0.1 itself; in float64 the score is above it.
    assert masked_positions(shard, documents_of(3), tau=np.nextafter(tau, 0), window=0).tolist() == [1, 2]


def ranking_of(*doc_ids: int) -> Ranking:
    ones = np.ones(len(doc_ids))
    return Ranking(doc_id=np.array(doc_ids), rank_score=ones, count=ones.astype(np.int64), sum=ones)


def test_cut_unit_spends_what_is_left_in_early_shards_first() -> None:
    parts = [
        MaskedCounts(first_block=8, doc_id=np.array([3]), count=np.array([9])),
        MaskedCounts(first_block=0, doc_id=np.array([1, 3]), count=np.array([2, 4])),
        MaskedCounts(first_block=4, doc_id=np.array([3]), count=np.array([5])),
    ]
    cutoff = find_cutoff(ranking_of(1, 3), parts, max_tokens=9)
    assert (cutoff.whole.tolist(), cutoff.cut, cutoff.masked_tokens) == ([1], 3, 9)
    assert cutoff.quota == {0: 4, 4: 3, 8: 0}


@pytest.mark.parametrize(("budget", "whole", "masked"), [(0, [], 0), (6, [7], 6), (8, [2, 7], 8), (50, [2, 7], 8)])
def test_no_unit_is_cut_where_the_budget_ends_with_one(budget: int, whole: list[int], masked: int) -> None:
    parts = [MaskedCounts(first_block=0, doc_id=np.array([2, 7]), count=np.array([2, 6]))]
    cutoff = find_cutoff(ranking_of(7, 2), parts, budget)
    assert (cutoff.whole.tolist(), cutoff.cut, cutoff.masked_tokens) == (whole, None, masked)


def test_counts_of_other_documents_than_the_ranking_are_refused() -> None:
    parts = [MaskedCounts(first_block=0, doc_id=np.array([2]), count=np.array([2]))]
    with pytest.raises(ValueError, match="name different documents"):
        find_cutoff(ranking_of(3), parts, 5)


def test_a_shard_fills_its_mask_alone() -> None:
    documents = documents_of(3, 5, 4)
    shard = shard_of([[0, 0, 5, 5], [0, 5, 0, 0]], first_block=1)
    parts = [masked_counts(shard, documents, tau=1.0, window=0, unit="document")]
    assert (parts[0].doc_id.tolist(), parts[0].count.tolist()) == ([1, 2], [2, 1])
    cutoff = find_cutoff(ranking_of(2, 1), parts, max_tokens=2)
    mask = fill_mask(shard, documents, tau=1.0, window=0, unit="document", cutoff=cutoff)
    np.testing.assert_array_equal(mask, [[False, False, True, False], [False, True, False, False]])


def test_budget_is_rounded_down() -> None:
    assert [token_budget(0.02, n) for n in (0, 49, 50, 149, 150)] == [0, 0, 1, 2, 3]
