"""An exact quantile of float32 values that lie in shards, from histograms that add up.

An order statistic needs counts only. Finite floats map to unsigned integers of the same order; one histogram of the
high 16 bits, summed over the shards, finds the bucket, and one of the low 16 bits within that bucket the value. Two
passes, no sketch error, and what leaves a shard is 512 KiB a histogram, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
BUCKETS = 1 << 16


def order_preserving_uint32(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Finite float32 -> uint32 with a < b iff key(a) < key(b). -0.0 and 0.0 share a key."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    # All ones where the sign is set, else the sign bit alone. Half the time of np.where, or less.
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31))


def from_order_preserving_uint32(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Inverse of `order_preserving_uint32`; zero comes back as 0.0."""
    return np.where(keys >> 31, keys ^ np.uint32(1 << 31), ~keys).view(np.float32)


def high_histogram(values: NDArray[np.float32]) -> Ints:
    """(65536,) counts of the finite values (N,) by the high 16 bits of their keys. Adds up."""
    return np.bincount(order_preserving_uint32(values) >> 16, minlength=BUCKETS).astype(np.int64)


def least_of(bucket: int) -> np.float32:
    """The least float32 whose key has the high 16 bits `bucket`."""
    return np.float32(from_order_preserving_uint32(np.array([bucket << 16], dtype=np.uint32))[0])


def low_histogram(values: NDArray[np.float32], bucket: int) -> Ints:
    """(65536,) counts by the low 16 bits of the keys whose high 16 bits are `bucket`. Adds up."""
    keys = order_preserving_uint32(values[values >= least_of(bucket)])
    return np.bincount(keys[keys >> 16 == bucket] & 0xFFFF, minlength=BUCKETS).astype(np.int64)


def _neighbours(high: Ints, quantile: float) -> tuple[list[tuple[int, int]], float]:
    """(bucket, rank within it) of the two order statistics around the quantile, and the weight of the upper one."""
    assert 0 <= quantile <= 1, quantile
    ends = np.cumsum(high)
    if ends[-1] == 0:
        raise ValueError("there is no value to take a quantile of: the corpus is empty")
    position = float(ends[-1] - 1) * quantile
    ranks = np.array([math.floor(position), math.ceil(position)])
    buckets = np.searchsorted(ends, ranks, side="right")
    within = ranks - (ends - high)[buckets]
    return list(zip(buckets.tolist(), within.tolist(), strict=True)), position - math.floor(position)


def quantile_buckets(high: Ints, quantile: float) -> tuple[int, ...]:
    """The one or two high buckets whose low histogram `quantile_from_histograms` needs, ascending."""
    return tuple(sorted({bucket for bucket, _ in _neighbours(high, quantile)[0]}))


def quantile_from_histograms(high: Ints, low: Mapping[int, Ints], quantile: float) -> float:
    """The linear-interpolation quantile, equal to `np.quantile(values.astype(float64), quantile)`.

    `high` is the sum of the shards' high histograms; `low` maps each of `quantile_buckets(high, quantile)`
    to the sum of its low histograms. Raises ValueError when the two are not of the same scores.
    """
    neighbours, weight = _neighbours(high, quantile)
    keys = []
    for bucket, rank in neighbours:
        if low[bucket].sum() != high[bucket]:
            raise ValueError("the two histogram passes saw different values: was a score shard rewritten?")
        keys.append(bucket << 16 | int(np.searchsorted(np.cumsum(low[bucket]), rank, side="right")))
    a, b = from_order_preserving_uint32(np.array(keys, dtype=np.uint32)).astype(np.float64).tolist()
    # numpy interpolates from the nearer end; any other form differs from it in the last bit.
    return b - (b - a) * (1 - weight) if weight >= 0.5 else a + (b - a) * weight
