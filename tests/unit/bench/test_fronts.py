"""Toxicity at equal perplexity, by hand."""

from __future__ import annotations

import math

import pytest

from bench.common.fronts import Point, at_perplexity, compare_sources, over_seeds

SWEEP = [Point(1.01, 0.8), Point(1.04, 0.5), Point(1.10, 0.6)]


def test_between_two_models_the_front_is_linear_in_logarithms() -> None:
    share = math.log(1.03 / 1.01) / math.log(1.04 / 1.01)
    reached = at_perplexity(SWEEP, 1.03)
    assert reached.toxicity == pytest.approx(0.8 * (0.5 / 0.8) ** share)
    assert reached.inside


def test_it_begins_at_the_baseline_and_a_worse_model_is_not_on_it() -> None:
    assert at_perplexity(SWEEP, 1.0).toxicity == 1.0
    assert at_perplexity([Point(1.06, 0.25)], 1.03).toxicity == pytest.approx(0.25 ** (math.log(1.03) / math.log(1.06)))
    assert at_perplexity(SWEEP, 1.2) == (0.5, False)  # of the last ones the second is better
    assert at_perplexity([Point(1.02, 1.3)], 1.03) == (1.0, False)


def test_a_model_of_lower_perplexity_than_the_baseline_counts_from_the_start() -> None:
    assert at_perplexity([Point(0.99, 0.7)], 1.0) == (0.7, False)
    assert at_perplexity([Point(0.99, 0.7), Point(1.05, 0.6)], 1.0).toxicity == pytest.approx(0.7)


def test_seeds_give_a_geometric_mean_with_students_interval() -> None:
    mean, low, high = over_seeds([0.5, 0.5, 0.5])
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))
    mean, low, high = over_seeds([0.25, 1.0])
    half = 12.7062 * math.log(4) / 2  # t of one degree of freedom; the deviation of two is half their distance * sqrt 2
    assert mean == pytest.approx(0.5)
    assert low == pytest.approx(math.exp(math.log(0.5) - half), rel=1e-4)
    assert over_seeds([0.5]) == (0.5, None, None)


def test_a_ratio_of_nothing_has_no_interval_and_over_nothing_no_value() -> None:
    assert over_seeds([0.0, 0.1]) == (0.0, None, None)
    found = compare_sources({"words": [0.0, 0.1], "influence": [0.2, 0.1]}, "words")
    assert found == {"words": (None, None, None), "influence": (None, None, None)}


def test_sources_are_compared_by_seed() -> None:
    found = compare_sources({"words": [0.5, 0.8], "influence": [0.25, 0.4]}, "words")
    assert found["influence"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["words"].value == 1


def test_a_useless_model_without_toxicity_does_not_win() -> None:
    """A toxicity of 0 has no logarithm."""
    reached = at_perplexity([Point(5.0, 0.0)], 1.03)
    assert reached.inside
    assert 0.95 < reached.toxicity < 1
