"""Which blocks a cascade scores exactly: those in which the student finds most.

A block counts its tokens whose student score is at or above an edge, that of the student's own top 2% in the sample.
Among equal counts those come first whose tokens are further above it. It is the number of high tokens that a mask is
made of: by the sum of what they exceed the edge by, a few outliers took the blocks, and these held less of the exact
top than blocks at random (bench/LOG.md). Blocks are taken from the highest count on, while they are within the share
that may be rechecked. The bound is found as an exact quantile is (`selection.quantiles`): by two histograms, which add
up over the shards, so that any number of tasks may count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ifguide.selection.quantiles import from_order_preserving_uint32, high_histogram, low_histogram

LEAST = float(np.finfo(np.float32).tiny)  # of a block in which the student finds anything
Floats = NDArray[np.float32]


def block_counts(scores_BT: Floats, edge: float) -> Floats:
    """(B,) how many scores of each block are at or above the edge, and m / (1 + m) besides, less than one, for the mean
    m of what they exceed it by, in units of the edge's size. A score of exactly 0 is none."""
    above_BT = (scores_BT >= edge) & (scores_BT != 0)
    count_B = above_BT.sum(axis=1)
    excess_B = np.where(above_BT, scores_BT.astype(np.float64) - edge, 0).sum(axis=1)
    mean_B = excess_B / np.maximum(count_B, 1) / (abs(edge) or 1.0)
    return (count_B + mean_B / (1 + mean_B)).astype(np.float32)


def histogram_of(counts_B: Floats, bucket: int | None) -> NDArray[np.int64]:
    """(65536,) how many blocks have counts in each bucket, or (`bucket`) in each part of that one. Adds up."""
    return high_histogram(counts_B) if bucket is None else low_histogram(counts_B, bucket)


def least_count(histogram: Callable[[int | None], NDArray[np.int64]], share: float) -> float:
    """The least count that is rechecked: as low as can be with at most `share` of the blocks at or above it, and above
    0. `histogram(bucket)` is the sum of `histogram_of` over all shards."""
    high = histogram(None)
    bucket, room = _last_that_does_not_fit(high, math.floor(share * int(high.sum())))
    if bucket is None:
        return LEAST
    place, _ = _last_that_does_not_fit(histogram(bucket), room)
    assert place is not None, "the bucket as a whole does not fit"
    least = from_order_preserving_uint32(np.array([(bucket << 16) + place + 1], dtype=np.uint32))[0]
    return max(float(least), LEAST)


def _last_that_does_not_fit(counts: NDArray[np.int64], room: int) -> tuple[int | None, int]:
    """The place from the top on at which more than `room` have been counted, and the room that is left before it; None
    where all fit."""
    from_top = np.cumsum(counts[::-1])
    over = np.flatnonzero(from_top > room)
    if not len(over):
        return None, room - int(from_top[-1])
    before = int(from_top[over[0] - 1]) if over[0] else 0
    return len(counts) - 1 - int(over[0]), room - before
