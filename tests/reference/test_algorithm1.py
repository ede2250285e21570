"""The passes over shards equal the literal loop bit for bit, for any sharding and any order of tasks."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.artifacts import data_files
from ifguide.config import OWN
from ifguide.schemas import null_column
from ifguide.selection.algorithm import Documents
from ifguide.selection.distributed import Selection, select
from ifguide.selection.fdr import discoveries, fit_spread, null_variance, standardise
from ifguide.selection.measures import Measure
from ifguide.selection.quantiles import high_histogram
from ifguide.selection.shards import Rules
from ifguide.selection.whole import select_tokens
from tests.reference import algorithm1
from tests.sharded import in_any_order, read_masks, read_ranking, rules_of, write_shards

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where publishing a file waits for no disk


def assert_equal_to_loop(
    selection: Selection, rules: Rules, scores: np.ndarray, lengths: np.ndarray, documents, excluded=(), tau=None
) -> None:
    blocks = [row[:length].astype(np.float64).tolist() for row, length in zip(scores, lengths, strict=True)]
    options = {name: getattr(rules, name) for name in ("quantile", "window", "max_fraction", "unit", "prior")}
    tau, rank_score, masked = algorithm1.select(
        blocks, documents, scores.shape[1], excluded=excluded, tau=tau, **options
    )
    assert selection.tau == tau
    masks = read_masks(rules)
    assert set(map(tuple, np.argwhere(masks).tolist())) == masked
    assert selection.tokens_masked == len(masked) <= selection.budget

    ranking = read_ranking(rules).to_pydict()
    ids, found = ranking["unit_id"], ranking["rank_score"]
    assert found == [rank_score[unit] for unit in ids]
    assert ids == sorted(ids, key=lambda unit: (-rank_score[unit], unit))
    assert ranking["rank"] == list(range(len(ids)))
    assert all(rank_score[unit] == 0 for unit in set(range(len(rank_score))) - set(ids))
    taken = {unit: count for unit, count in zip(ids, ranking["tokens_masked"], strict=True) if count}
    assert taken == tokens_of_units(masks, documents, rules.unit)
    largest = max(ids, key=lambda unit: taken.get(unit, 0), default=-1)  # of those that tie the first in the ranking
    assert selection.largest_unit == (largest if taken else ids[0] if ids else -1, taken.get(largest, 0))
    assert selection.units_masked == len(taken)


def tokens_of_units(masks: np.ndarray, documents: Sequence[tuple[int, int]], unit: str) -> dict[int, int]:
    flat = masks.ravel()
    spans = (
        documents if unit == "document" else [(b * masks.shape[1], (b + 1) * masks.shape[1]) for b in range(len(masks))]
    )
    counts = [int(flat[begin:end].sum()) for begin, end in spans]
    return {number: count for number, count in enumerate(counts) if count}


# Few distinct values make ties in tau, in sums and in ranks; the inexact ones make sums depend on their order.
tied = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.1, 0.3, 1.0, 1e-8, 1e8, -1e-40, 3.0])
constant = st.sampled_from([0.25, 0.5])  # nearly all units tie
free = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@st.composite
def corpora(draw):
    block_size = draw(st.integers(2, 7))
    num_blocks = draw(st.integers(1, 10))
    last = draw(st.integers(2 if num_blocks == 1 else 1, block_size))
    lengths = np.full(num_blocks, block_size, dtype=np.int64)
    lengths[-1] = last
    total = int(lengths.sum())
    values = draw(st.lists(draw(st.sampled_from([tied, constant, free])), min_size=total, max_size=total))
    scores = np.full((num_blocks, block_size), np.nan, dtype=np.float32)  # padding must never be read
    scores.ravel()[:total] = values
    ends = sorted(draw(st.sets(st.integers(1, total - 1), max_size=25))) if total > 1 else []
    documents = list(zip([0, *ends], [*ends, total], strict=True))
    cuts = draw(st.lists(st.integers(1, num_blocks), max_size=8))
    excluded = draw(st.sets(st.integers(0, num_blocks - 1), max_size=3))
    return scores, lengths, documents, cuts, excluded


@settings(max_examples=150, deadline=None)
@given(
    corpus=corpora(),
    quantile=st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.9, 0.99, 1.0]),
    window=st.integers(0, 2),
    max_fraction=st.floats(0, 1),
    unit=st.sampled_from(["document", "block"]),
    prior=st.sampled_from([None, 0, 1, 7]),
    seed=st.integers(0, 9),
)
def test_any_sharding_equals_the_literal_loop(corpus, quantile, window, max_fraction, unit, prior, seed) -> None:
    scores, lengths, documents, cuts, excluded = corpus
    # The one pair of a block of two tokens is distinct, whatever it is.
    excluded = {block for block in excluded if lengths[block] > 2}
    tokens = np.arange(scores.size, dtype=np.int32).reshape(scores.shape)
    tokens[list(excluded)] = 1
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        rules = rules_of(
            Path(folder), quantile=quantile, window=window, max_fraction=max_fraction, unit=unit, prior=prior,
            outlier_bigram_share=0.6, exclude_repeated=True,
        )  # fmt: skip
        files = write_shards(Path(folder), scores, lengths, documents, cuts, tokens)
        selection = select(rules, files, in_any_order(seed))
        assert_equal_to_loop(selection, rules, scores, lengths, documents, excluded=excluded)
        assert selection.excluded_blocks == len(excluded)


@settings(max_examples=150, deadline=None)
@given(
    corpus=corpora(),
    quantile=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    window=st.integers(0, 2),
    max_fraction=st.floats(0, 1),
    unit=st.sampled_from(["document", "block"]),
    prior=st.sampled_from([None, 0, 5]),
)
def test_selection_in_one_process_equals_the_literal_loop(corpus, quantile, window, max_fraction, unit, prior) -> None:
    scores, lengths, spans, _, _ = corpus
    begins, ends = np.array(spans).T
    documents = Documents(token_start=begins, num_tokens=ends - begins)
    options = {"quantile": quantile, "window": window, "max_fraction": max_fraction, "unit": unit}
    blocks = [row[:length].astype(np.float64).tolist() for row, length in zip(scores, lengths, strict=True)]
    _, _, masked = algorithm1.select(blocks, spans, scores.shape[1], prior=prior, **options)
    ranked = {"rank_by": "sum"} if prior is None else {"rank_by": "rate", "rate_prior": prior}
    found = select_tokens(scores, lengths, documents, **options, **ranked)
    assert set(map(tuple, np.argwhere(found).tolist())) == masked


@settings(max_examples=60, deadline=None)
@given(
    corpus=corpora(),
    fdr=st.sampled_from([None, 0.05, 0.3, 0.9]),
    nulls=st.integers(1, 3),
    unit=st.sampled_from(["document", "block"]),
    seed=st.integers(0, 99),
)
def test_z_scores_of_any_sharding_equal_the_literal_loop_on_those_of_the_whole(corpus, fdr, nulls, unit, seed) -> None:
    scores, lengths, documents, cuts, _ = corpus
    valid = (np.arange(scores.shape[1]) >= 1) & (np.arange(scores.shape[1]) < lengths[:, None])
    nulls_KNT = np.random.default_rng(seed).normal(size=(nulls, *scores.shape)).astype(np.float32)
    nulls_KNT[:, ~valid] = np.where(np.isnan(scores[~valid]), np.nan, 0)  # padding must never be read
    spread = fit_spread(high_histogram(null_variance(nulls_KNT[:, valid])), nulls)
    z_KN = standardise(scores[valid], nulls_KNT[:, valid], spread)
    z_NT = np.full_like(scores, np.nan)
    z_NT[valid], z_NT[:, 0] = z_KN[0], 0
    tau = None
    if fdr:
        tau = discoveries(high_histogram(z_KN[0]), high_histogram(z_KN[1:].reshape(-1)), nulls, fdr).threshold
    measure = Measure(column="token_score", nulls=tuple(null_column(OWN, number) for number in range(nulls)))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        rules = rules_of(Path(folder), quantile=0.7, unit=unit, measure=measure, fdr=fdr)
        files = write_shards(Path(folder), scores, lengths, documents, cuts, nulls_KNT=nulls_KNT)
        selection = select(rules, files, in_any_order(seed))
        assert_equal_to_loop(selection, rules, z_NT, lengths, documents, tau=tau)
        assert selection.spread == spread
        assert (selection.discoveries is None) == (fdr is None)


def heavy_tailed() -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    rng = np.random.default_rng(7)
    scores = (rng.standard_t(2, size=(40, 64)) * rng.choice([1e-3, 1, 1e3], size=(40, 64))).astype(np.float32)
    lengths = np.full(40, 64, dtype=np.int64)
    lengths[-1] = 17
    total = int(lengths.sum())
    # From one token to several blocks, so that some units span shards and one of them is cut.
    ends = np.unique(np.minimum(np.cumsum(rng.choice([1, 5, 30, 300], size=200)), total))
    assert ends[-1] == total
    return scores, lengths, list(zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True))


@pytest.mark.parametrize("unit", ["document", "block"])
@pytest.mark.parametrize("num_shards", [1, 3, 40])
def test_heavy_tailed_corpus_equals_the_literal_loop(unit: str, num_shards: int, tmp_path: Path) -> None:
    scores, lengths, documents = heavy_tailed()
    files = write_shards(tmp_path, scores, lengths, documents, range(0, 40, 40 // num_shards))
    limits = {"sample_units": 1, "file_units": 12}  # splitters at every third sample
    for max_fraction in (0.005, 0.02, 0.07):
        rules = rules_of(tmp_path / str(max_fraction), quantile=0.9, max_fraction=max_fraction, unit=unit, **limits)
        selection = select(rules, files, in_any_order())
        assert selection.tokens_masked == selection.budget > 0
        assert_equal_to_loop(selection, rules, scores, lengths, documents)


@pytest.mark.parametrize("unit", ["document", "block"])
def test_ranking_files_are_the_same_bytes_however_the_corpus_is_sharded(unit: str, tmp_path: Path) -> None:
    scores, lengths, documents = heavy_tailed()
    written = []
    for step in (40, 13, 1):
        files = write_shards(tmp_path / f"{step}", scores, lengths, documents, range(0, 40, step))
        rules = rules_of(tmp_path / f"{step}", quantile=0.9, max_fraction=0.02, unit=unit, file_units=3)
        select(rules, files, in_any_order(step))
        written.append([path.read_bytes() for path in data_files(rules.ranking, "ranking-*.parquet")])
    assert len(written[0]) > 2
    assert written[0] == written[1] == written[2]
