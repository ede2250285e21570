"""Each step of Algorithm 1, by hand-made cases; tests/reference/test_algorithm1.py holds the whole."""

from dataclasses import replace

import numpy as np
import pytest

from ifguide.selection import (
    Documents,
    DocumentStatistics,
    MaskedCounts,
    Ranking,
    ScoreShard,
    fill_mask,
    find_cutoff,
    masked_counts,
    masked_positions,
    merge_statistics,
    piece_statistics,
    rank_units,
    select_tokens,
    token_budget,
)


def shard_of(rows: list[list[float]], first_block: int = 0) -> ScoreShard:
    block_size = max(map(len, rows))
    scores = np.zeros((len(rows), block_size), dtype=np.float32)
    for row, values in enumerate(rows):
        scores[row, : len(values)] = values
    return ScoreShard(first_block=first_block, scores=scores, lengths=np.array([len(row) for row in rows]))


def documents_of(*sizes: int) -> Documents:
    num_tokens = np.array(sizes, dtype=np.int64)
    return Documents(token_start=np.cumsum(num_tokens) - num_tokens, num_tokens=num_tokens)


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


def test_excluding_a_block_moves_neither_tau_nor_budget_and_frees_its_place() -> None:
    shard = shard_of([[0, 9, 9, 9], [0, 5, 4, 3]])
    options = {"quantile": 0.5, "window": 0, "max_fraction": 0.5, "unit": "document"}
    full = select_tokens([shard], documents_of(4, 4), **options)
    without = select_tokens([replace(shard, excluded=np.array([True, False]))], documents_of(4, 4), **options)
    assert (without.tau, without.max_tokens) == (full.tau, full.max_tokens) == (7.0, 3)
    assert [full.masks[0].sum(axis=1).tolist(), without.masks[0].sum(axis=1).tolist()] == [[3, 0], [0, 0]]
    lower = select_tokens(
        [replace(shard, excluded=np.array([True, False]))], documents_of(4, 4), **{**options, "quantile": 0.1}
    )
    assert lower.ranking.doc_id.tolist() == [1]
    assert lower.masks[0].sum(axis=1).tolist() == [0, 2]
