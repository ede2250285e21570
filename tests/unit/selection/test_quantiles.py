"""The quantile from histograms is numpy's, to the last bit, however the values are sharded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ifguide.selection.quantiles import (
    from_order_preserving_uint32,
    high_histogram,
    low_histogram,
    order_preserving_uint32,
    quantile_buckets,
    quantile_from_histograms,
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(1, 200), elements=finite)


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
    high = sum(high_histogram(part) for part in parts)
    low = {bucket: sum(low_histogram(part, bucket) for part in parts) for bucket in quantile_buckets(high, quantile)}
    return quantile_from_histograms(high, low, quantile)


@settings(max_examples=300, deadline=None)
@given(arrays, st.floats(0, 1), st.integers(0, 200))
def test_quantile_equals_numpy_to_the_last_bit(values: np.ndarray, quantile: float, cut: int) -> None:
    tau = histogram_quantile([values[:cut], values[cut:]], quantile)
    assert tau == np.quantile(values.astype(np.float64), quantile)


def test_quantile_between_two_buckets_needs_both() -> None:
    values = np.array([-3.0, 5.0], dtype=np.float32)
    assert len(quantile_buckets(high_histogram(values), 0.25)) == 2
    assert histogram_quantile([values], 0.25) == -1.0


def test_passes_over_different_values_are_refused() -> None:
    values = np.arange(5, dtype=np.float32)
    high = high_histogram(values)
    low = {bucket: low_histogram(values + 100, bucket) for bucket in quantile_buckets(high, 0.5)}
    with pytest.raises(ValueError, match="different values"):
        quantile_from_histograms(high, low, 0.5)


def test_quantile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        quantile_buckets(np.zeros(1 << 16, dtype=np.int64), 0.99)
