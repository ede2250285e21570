"""Figures of several seeds, by hand."""

from __future__ import annotations

import pytest

from bench.common.over_seeds import cell, mean_and_range, t_interval


def test_a_cell_is_one_value_where_all_seeds_share_it() -> None:
    assert cell([], ".2f") == ""
    assert cell([0.501, 0.502], ".2f") == "0.50"
    assert cell([1.0, 2.0], ".1f") == "1.5 [1.0, 2.0]"


def test_error_bars_reach_from_the_mean_to_the_extremes() -> None:
    assert mean_and_range([1.0, 2.0, 6.0]) == (3.0, 2.0, 3.0)


def test_the_t_interval_by_hand() -> None:
    half = 4.302653 * 1 / 3**0.5  # the .975 quantile of t with two degrees of freedom
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert t_interval([1.0]) is None
