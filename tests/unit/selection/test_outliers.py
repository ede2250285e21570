"""Outlying blocks: figures by hand, exactness of the median over shards, and no false alarm on running text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ifguide import schemas
from ifguide.config import BuildMask
from ifguide.selection.algorithm import ScoreShard
from ifguide.selection.outliers import block_mass, distinct_bigram_share, dominant_line, find_outliers
from ifguide.selection.quantiles import high_histogram, low_histogram, quantile_buckets, quantile_from_histograms
from ifguide.tokenizer import load_tokenizer
from tests.real_text import DATA, needs_real_text

THRESHOLD = BuildMask().outlier_bigram_share


def shard_of(scores: np.ndarray, last: int | None = None) -> ScoreShard:
    lengths = np.full(len(scores), scores.shape[1])
    lengths[-1] = scores.shape[1] if last is None else last
    return ScoreShard(first_block=7, scores=scores.astype(np.float32), lengths=lengths)


def shares(*rows: list[int]) -> list[float]:
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, values in enumerate(rows):
        tokens[row, : len(values)] = values
    return distinct_bigram_share(tokens, np.array([len(row) for row in rows])).tolist()


def test_bigrams_are_counted_within_the_real_tokens_of_a_block() -> None:
    assert shares([1, 2, 3, 4, 5], [3, 3, 3, 3, 3], [1, 2, 1, 2, 1]) == [1, 1 / 4, 2 / 4]
    assert shares([1, 2, 3], [1, 1], [9]) == [1, 1, 1]  # the padding of a short block is no repetition
    assert shares([2, 1, 1, 2, 2, 1]) == [4 / 5]  # (2, 1) and (1, 2) differ


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 60))
def test_a_text_of_period_p_has_at_most_p_bigrams(period: int, size: int) -> None:
    row = (np.arange(size) % period).tolist()
    assert shares(row) == [min(period, size - 1) / (size - 1)]


def test_mass_counts_no_index_zero_and_no_padding() -> None:
    scores = np.array([[9, 1, -2, 3], [9, -4, 9, 9]])
    assert block_mass(shard_of(scores, last=2)).tolist() == [6, 4]


def test_a_mass_beyond_float32_stays_finite() -> None:
    assert np.isfinite(block_mass(shard_of(np.full((1, 4), 3e38)))).all()


@settings(deadline=None)
@given(hnp.arrays(np.float32, (9, 5), elements=st.floats(0, 2**20, width=32)), st.integers(0, 9))
def test_the_median_mass_over_shards_is_numpys(scores: np.ndarray, cut: int) -> None:
    parts = [block_mass(shard_of(part)) for part in (scores[:cut], scores[cut:]) if len(part)]
    high = sum(high_histogram(part) for part in parts)
    low = {bucket: sum(low_histogram(part, bucket) for part in parts) for bucket in quantile_buckets(high, 0.5)}
    assert quantile_from_histograms(high, low, 0.5) == np.median(np.concatenate(parts).astype(np.float64))


def test_only_outliers_are_listed_each_for_its_reason() -> None:
    mass, share = np.array([8, 8, 88, 8, 0], np.float32), np.array([1, THRESHOLD, 1, 1 / 8, 0])
    limits = {"mass_ratio": 10.0, "bigram_share": THRESHOLD}
    found = find_outliers(7 + np.arange(5), mass, share, median_mass=8.0, **limits)
    assert found.schema == schemas.OUTLIERS
    assert found.drop_columns(["distinct_bigram_share"]).to_pylist() == [
        {"block_id": 9, "mass": 88.0, "mass_over_median": 11.0, "repeated": False, "high_mass": True},
        {"block_id": 10, "mass": 8.0, "mass_over_median": 1.0, "repeated": True, "high_mass": False},
        {"block_id": 11, "mass": 0.0, "mass_over_median": 0.0, "repeated": True, "high_mass": False},
    ]
    exactly_ten = find_outliers(7 + np.arange(5), mass, share, median_mass=8.8, **limits)
    assert not any(exactly_ten.column("high_mass").to_pylist())
    of_nothing = find_outliers(7 + np.arange(5), mass, share, median_mass=0.0, **limits)
    assert of_nothing.column("mass_over_median").to_pylist() == [np.inf, np.inf, np.inf, np.inf, 0.0]


def test_a_unit_that_takes_much_of_the_mask_is_named() -> None:
    summary = {"unit": "document", "tokens_masked": 100, "largest_unit": 17, "largest_unit_tokens": 63}
    options = {"rank_by": "sum"}
    line = dominant_line(summary, options)
    assert "document 17 takes 63% of the mask" in line
    assert "rank_by: rate" in line
    assert "rank_by" not in dominant_line(summary, {"rank_by": "rate"})
    assert not dominant_line({**summary, "largest_unit_tokens": 20}, options)
    assert not dominant_line({**summary, "tokens_masked": 0, "largest_unit_tokens": 0}, options)


@needs_real_text
@pytest.mark.parametrize("name", ["wikitext2_articles", "civil_comments_unflagged"])
def test_running_text_is_not_called_repeated(name: str) -> None:
    tokenizer = load_tokenizer(str(DATA / "pythia_tokenizer"))
    rows = [json.loads(line)["text"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()[:1500]]
    stream = np.concatenate(tokenizer(rows, add_special_tokens=False)["input_ids"]).astype(np.int32)
    for block_size in (1024, 8192):
        blocks = stream[: len(stream) // block_size * block_size].reshape(-1, block_size)
        assert distinct_bigram_share(blocks, np.full(len(blocks), block_size)).min() > 1.5 * THRESHOLD
