"""Each step of Algorithm 1, by hand-made cases; tests/reference/test_algorithm1.py holds the whole."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from ifguide.selection.algorithm import (
    NO_TOKENS,
    Cutoff,
    Documents,
    Extremes,
    Layout,
    ScoreShard,
    UnitTotals,
    check_lengths,
    rank_scores,
    token_budget,
)
from ifguide.selection.distributed import place_shards, select
from ifguide.selection.ranking import Splitter
from ifguide.selection.shards import Extent, ShardFiles
from tests.sharded import in_any_order, read_masks, read_ranking, rules_of, write_shards


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
    assert shard.predicted.tolist() == [1, 2, 1]
    positions, found = shard.tokens_from(1.5)
    assert (positions.tolist(), found.tolist()) == ([2], [2])


def test_only_the_last_block_may_be_short() -> None:
    with pytest.raises(ValueError, match="block 4 has 2 tokens of 3"):
        shard_of([[0, 1], [0, 1, 2]], first_block=4)
    with pytest.raises(ValueError, match="block 9 has 5 tokens of 4"):
        check_lengths(8, np.array([4, 5]), 4)


@pytest.mark.parametrize(("starts", "sizes"), [([0, 3], [2, 4]), ([0, 1], [2, 4]), ([0, 0], [0, 4])])
def test_documents_with_gap_overlap_or_no_token_are_refused(starts: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="document 0 "):
        Documents(token_start=np.array(starts), num_tokens=np.array(sizes))


def layout_of(*sizes: int, block_size: int, unit: str = "document", first_id: int = 0, begin: int = 0) -> Layout:
    documents = documents_of(*sizes)
    documents = Documents(token_start=begin + documents.token_start, num_tokens=documents.num_tokens, first_id=first_id)
    return Layout(documents=documents, block_size=block_size, unit=unit)


def test_totals_are_of_their_units_alone() -> None:
    # Blocks 2 to 4 of 4 tokens; documents 5 [8, 11), 6 [11, 16), 7 [16, 18). Tokens above tau at 10, 11, 13, 15, 17.
    positions, scores = np.array([10, 11, 13, 15, 17]), np.array([5.0, 6.0, 7.0, 8.0, 2.0])
    layout = layout_of(3, 5, 2, block_size=4, first_id=5, begin=8)
    totals = UnitTotals(6, 2)
    totals.add(positions, scores, layout, 0)
    assert (totals.count.tolist(), totals.sum.tolist(), totals.masked.tolist()) == ([3, 1], [21, 2], [3, 1])
    blocks = UnitTotals(2, 3)
    blocks.add(positions, scores, layout_of(3, 5, 2, block_size=4, begin=8, unit="block"), 1)
    assert (blocks.count.tolist(), blocks.sum.tolist()) == ([2, 2, 1], [11, 15, 2])
    assert blocks.masked.tolist() == [3, 3, 1]  # 9 10 11, 13 14 15, 17


def test_a_sum_adds_pieces_in_block_order_and_tokens_within_a_piece_in_order() -> None:
    values = np.array([2.0**53, 1.0, 1.0, 0.5])
    one_by_one = ((2.0**53 + 1.0) + 1.0) + 0.5
    in_pieces = (2.0**53 + (1.0 + 1.0)) + 0.5
    assert one_by_one != in_pieces  # the order is visible in the result
    for positions, expected in (([1, 3, 5, 7], one_by_one), ([1, 4, 5, 7], in_pieces)):
        block_size = 2 if expected == one_by_one else 3
        blocks = np.array(positions) // block_size
        for cut in (0, 1, 3, 4):
            if 0 < cut < 4 and blocks[cut - 1] == blocks[cut]:
                continue
            totals = UnitTotals(0, 1)
            for part in (slice(0, cut), slice(cut, None)):
                layout = layout_of(9, block_size=block_size)
                totals.add(np.array(positions)[part], values[part], layout, 0)
            assert totals.sum.tolist() == [expected]


def test_rank_is_harmonic_and_units_without_tokens_set_the_minimum() -> None:
    count, sums = np.array([4, 1, 2]), np.array([5.0, 10.0, 2.5])
    extremes = Extremes.of(count, sums)
    # With other units, that have nothing above tau, min is 0 in both, max is 4 and 10.
    scores = rank_scores(count, sums, NO_TOKENS.join(extremes))
    assert scores.tolist() == [2 * 1 * 0.5 / 1.5, 2 * 0.25 * 1 / 1.25, 2 * 0.5 * 0.25 / 0.75]
    # With no other unit, the least of the three is the minimum, and has rank score 0.
    assert rank_scores(count, sums, extremes).tolist()[1:] == [0, 0]
    assert (
        Extremes().join(extremes) == extremes == Extremes.of(count[:1], sums[:1]).join(Extremes.of(count[1:], sums[1:]))
    )


def test_equal_units_score_zero() -> None:
    count, sums = np.array([2, 2, 2]), np.array([3.0, 3.0, 3.0])
    assert rank_scores(count, sums, Extremes.of(count, sums)).tolist() == [0, 0, 0]


def test_a_place_in_the_ranking_splits_ties_by_id() -> None:
    scores, ids = np.array([0.75, 0.5, 0.5, 0.5, 0.0]), np.array([9, 1, 4, 6, 2])
    places = [(1.0, 5), (0.75, 9), (0.5, 0), (0.5, 4), (0.5, 5), (0.5, 6), (0.25, 0), (0.0, 1), (0.0, 2)]
    assert [Splitter(*place).up_to(scores, ids) for place in places] == [0, 1, 1, 3, 3, 4, 4, 4, 5]


def test_units_before_the_cut_are_masked_whole() -> None:
    cutoff = Cutoff(rank_score=0.5, unit_id=4, end=7)
    whole = cutoff.whole(np.array([9, 1, 4, 6, 2]), np.array([0.75, 0.5, 0.5, 0.5, 0.0]))
    assert whole.tolist() == [True, True, False, False, False]


def test_window_stays_in_document_and_block_and_off_index_zero() -> None:
    # Blocks of 4; documents [0, 2) [2, 7) [7, 10).
    positions = np.array([1, 5, 7, 9])
    layout = layout_of(2, 5, 3, block_size=4)
    # 1: alone in its document. 5: index 0 is barred, 6 is its own. 7: 6 is another document's. 9: end of stream.
    assert layout.masked(positions, 1).tolist() == [1, 5, 6, 7, 9]
    assert layout_of(10, block_size=4).masked(positions, 0).tolist() == [1, 5, 7, 9]
    assert layout_of(10, block_size=4).masked(positions, 2).tolist() == [1, 2, 3, 5, 6, 7, 9]


def test_a_window_beyond_the_block_takes_no_more_memory() -> None:
    layout = layout_of(3, 300, 4, 300, block_size=128)
    positions = np.array([1, 5, 200, 302, 304, 306, 606])
    whole = layout.masked(positions, 10**12)
    assert whole.tolist() == layout.masked(positions, 128).tolist()
    ones = [layout.masked(positions[i : i + 1], 128) for i in range(len(positions))]
    assert whole.tolist() == np.unique(np.concatenate(ones)).tolist()
    assert layout.masked(positions[:0], 3).tolist() == []


def test_a_token_equal_to_tau_is_not_above_it_in_float64(tmp_path: Path) -> None:
    # The median of an odd number of scores is one of them; just below it, in float32 it would be the same.
    scores = np.array([[0, 0.1, 0.2, 0.3]], dtype=np.float32)
    rules = rules_of(tmp_path, quantile=0.5, window=0)
    files = write_shards(tmp_path, scores, np.array([4]), [(0, 4)])
    assert select(rules, files, in_any_order()).tau == float(np.float32(0.2))
    assert read_masks(rules).tolist() == [[False, False, False, True]]
    below = rules_of(tmp_path / "below", quantile=0.5 - 1e-9, window=0)
    tau = select(below, files, in_any_order()).tau
    assert (tau < float(np.float32(0.2)), np.float32(tau)) == (True, np.float32(0.2))
    assert read_masks(below).tolist() == [[False, False, True, True]]


def test_budget_is_rounded_down() -> None:
    assert [token_budget(0.02, n) for n in (0, 49, 50, 149, 150)] == [0, 0, 1, 2, 3]


def test_the_cut_unit_spends_what_is_left_in_early_shards_first(tmp_path: Path) -> None:
    scores = np.array([[0, 99, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1], [0, -5, -5]], dtype=np.float32)
    # Document 0 ranks first by its high score; document 1 goes over four shards; 2 has nothing above tau.
    files = write_shards(tmp_path, scores, np.full(5, 3), [(0, 2), (2, 12), (12, 15)], cuts=[1, 2, 3, 4])
    for budget, expected in (
        (0, [0, 0, 0, 0, 0]),
        (1, [1, 0, 0, 0, 0]),
        (2, [2, 0, 0, 0, 0]),
        (5, [2, 2, 1, 0, 0]),
        (9, [2, 2, 2, 2, 0]),
    ):
        rules = rules_of(tmp_path / str(budget), max_fraction=budget / 10, window=0)
        selection = select(rules, files, in_any_order(budget))
        assert read_masks(rules).sum(axis=1).tolist() == expected
        assert selection.tokens_masked == min(budget, 8)
        taken = read_ranking(rules).column("tokens_masked").to_pylist()
        assert taken == [min(budget, 1), min(max(budget - 1, 0), 7)]
        assert selection.units_masked == min(budget, 2)


def test_a_long_document_of_ordinary_tokens_ranks_first_by_sum_and_not_by_rate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(100, 64)).astype(np.float32)
    scores[:, 0] = 0
    # 80 blocks of one document, then 38 of half a block, then one of two tokens, of which one scores high, and one of
    # which a third do.
    documents = [(0, 5120), *((begin, begin + 32) for begin in range(5120, 6400, 32))]
    documents[-2:] = [(6336, 6338), (6338, 6400)]
    scores.ravel()[[6337, *range(6338, 6400, 3)]] = 4.0
    files = write_shards(tmp_path, scores, np.full(100, 64), documents, range(0, 100, 7))
    taken = {}
    for name, prior in (("sum", None), ("rate", 50), ("bare rate", 0)):
        rules = rules_of(tmp_path / name, quantile=0.95, max_fraction=0.004, window=0, prior=prior)
        selection = select(rules, files, in_any_order())
        assert selection.budget == selection.tokens_masked == 25
        taken[name] = read_ranking(rules).filter(pc.field("tokens_masked") > 0).select(["unit_id", "tokens_masked"])
        assert selection.largest_unit[1] == max(taken[name].column("tokens_masked").to_pylist())
    assert taken["sum"].column("unit_id").to_pylist() == [0]
    assert taken["rate"].column("unit_id").to_pylist()[0] == len(documents) - 1
    assert 0 not in taken["rate"].column("unit_id").to_pylist()
    assert taken["bare rate"].column("unit_id").to_pylist()[0] == len(documents) - 2  # two tokens win without a prior


def test_excluding_a_block_moves_neither_tau_nor_budget_and_frees_its_place(tmp_path: Path) -> None:
    scores = np.array([[0, 9, 9, 9], [0, 5, 4, 3]], dtype=np.float32)
    tokens = np.array([[1, 1, 1, 1], [1, 2, 3, 4]], dtype=np.int32)
    files = write_shards(tmp_path, scores, np.full(2, 4), [(0, 4), (4, 8)], tokens_NT=tokens)
    options = {"window": 0, "max_fraction": 0.5, "outlier_bigram_share": 0.5}
    for quantile, full, without in ((0.5, [3, 0], [0, 0]), (0.1, [3, 0], [0, 2])):
        selections = []
        for exclude, expected in ((False, full), (True, without)):
            rules = rules_of(tmp_path / f"{quantile}{exclude}", quantile=quantile, exclude_repeated=exclude, **options)
            selections.append(select(rules, files, in_any_order()))
            assert read_masks(rules).sum(axis=1).tolist() == expected
        assert (selections[0].tau, selections[0].budget) == (selections[1].tau, selections[1].budget)
        assert [selection.excluded_blocks for selection in selections] == [0, 1]


def extents(*places: tuple[int, int, list[tuple[int, int, int]]]) -> tuple[list[ShardFiles], list[Extent]]:
    """Of shards [begin, end) in blocks of 2, with their documents (id, begin, end)."""
    found = []
    for begin, end, documents in places:
        of_documents = (0, 0, 0, 0, 0)
        if documents:
            (first, starts, _), (_, last, ends) = documents[0], documents[-1]
            of_documents = (first, len(documents), starts, last, ends)
        found.append(Extent(2, begin // 2, -(-(end - begin) // 2), begin, end, *of_documents))
    files = [ShardFiles(str(i), *(Path(f"{kind}-{i}") for kind in ("c", "d", "s"))) for i in range(len(found))]
    return files, found


def test_a_document_over_several_shards_is_owned_by_the_first() -> None:
    files, found = extents((0, 4, [(0, 0, 3), (1, 3, 9)]), (4, 6, []), (6, 10, [(2, 9, 10)]), (10, 11, [(3, 10, 11)]))
    shards = place_shards(files, found)
    assert [shard.carried and (shard.carried.doc_id, shard.carried.owner) for shard in shards] == [
        None, (1, "0"), (1, "0"), None
    ]  # fmt: skip
    assert [shard.following for shard in shards] == [("1", "2"), (), (), ()]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 3, [(0, 0, 3)]), (4, 6, [(1, 4, 6)])], "c-1 begins at stream position 4, the shard before it ends at 3"),
        ([(2, 4, [(0, 2, 4)])], "c-0 begins at stream position 2"),
        ([(0, 4, [(0, 0, 3)])], "c-0 ends at 4, its documents at 3"),
        ([(0, 4, [(0, 0, 5)])], "the documents end at 5, the corpus at 4"),
        ([(0, 4, [])], "its documents at 0"),
        ([(0, 4, [(0, 0, 4)]), (4, 6, [(2, 4, 6)])], "d-1 begins with document 2 at 4, where 1 at 4 is expected"),
        ([(0, 4, [(0, 0, 5)]), (4, 6, [(1, 4, 6)])], "d-1 begins with document 1 at 4, where 1 at 5 is expected"),
        ([(0, 4, [(0, 0, 3), (1, 3, 6), (2, 6, 7)]), (4, 7, [])], "another corpus"),
    ],
)
def test_shards_and_documents_that_do_not_cover_one_stream_are_refused(places: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_shards(*extents(*places))


def test_scores_of_other_blocks_are_refused_by_file(tmp_path: Path) -> None:
    scores = np.zeros((2, 3), np.float32)
    shard = write_shards(tmp_path / "a", scores, np.full(2, 3), [(0, 6)])[0]
    longer = write_shards(tmp_path / "b", np.zeros((3, 3), np.float32), np.full(3, 3), [(0, 9)])[0]
    with pytest.raises(ValueError, match=rf"{longer.scores} holds other blocks than {shard.corpus}"):
        select(rules_of(tmp_path), [shard._replace(scores=longer.scores)], in_any_order())


def test_a_corpus_without_a_token_above_tau_has_an_empty_ranking(tmp_path: Path) -> None:
    files = write_shards(tmp_path, np.ones((2, 3), np.float32), np.full(2, 3), [(0, 6)], cuts=[1])
    rules = rules_of(tmp_path)
    selection = select(rules, files, in_any_order())
    assert (selection.ranked_units, selection.tokens_masked) == (0, 0)
    assert (len(read_ranking(rules)), read_masks(rules).sum()) == (0, 0)
