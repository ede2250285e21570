"""Scores against their nulls: a z-score for each token, and the threshold of a false-discovery rate.

A token has a score x_0 and K null scores x_1..x_K along null directions (`ifguide.influence.nulls`). Where a token says
nothing of the behaviour, all are alike: of mean 0 and the token's own spread, which is large where it has leverage (a
rare token, a list, another language). K is small, so the spread is shrunk to that of all tokens (empirical Bayes for
variances, Smyth 2004, doi:10.2202/1544-6115.1027):

    z_i = x_i / sqrt((w v + sum over l != i of x_l^2) / (w + K)),    i = 0..K

z_0 is the token's z-score. Each null is divided by the others, x_0 among them, so that all z_i are alike under the null
whatever K and the weight w are: z_1..z_K of all tokens, pooled, are what chance gives. A token with a real score widens
its own nulls alone, which makes the pooled tail lighter by at most the share of such tokens; Benjamini and Hochberg's
rate is high by that same share, so the two together stay below the nominal rate.

The threshold is the least t, among the 65,536 edges of `quantiles.high_histogram`, for which

    N p(t) / #{z_0 >= t} <= rate,     p(t) = (1 + #{pooled nulls >= t}) / (1 + N K)

Tokens are not independent of each other: all are scored along one V, and the pool holds K draws of it. So the rate is
that of many queries drawn anew, on average; one mask may have more or less, the more so the fewer tokens it takes.

Edges are 2^-7 apart at most, relatively, so that it takes a little less than Benjamini and Hochberg's at the values
themselves, and never more. Counts add up: the threshold is the same for any sharding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ifguide.selection.quantiles import BUCKETS, Ints, from_order_preserving_uint32, least_of

Floats = NDArray[np.float64]
ZERO_BUCKET = 1 << 15  # of 0.0 and the least positive numbers
FAR = 1e5  # variances that are this many times off the median count as that: those of dead tokens are 0
LARGEST, LARGEST_BUCKET = float(np.finfo(np.float32).max), 0xFF7F  # above every z-score
MOST_WEIGHT = 1e6  # all tokens have one spread


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The null variance that tokens are shrunk to, and its weight, in nulls."""

    variance: float
    weight: float


def null_variance(nulls_KN: NDArray[np.floating]) -> NDArray[np.float32]:
    """(N,) mean squares of the nulls, whose mean is known to be 0."""
    return np.square(nulls_KN.astype(np.float64)).mean(axis=0).astype(np.float32)


def fit_spread(histogram: Ints, nulls: int) -> Spread:
    """The prior of the tokens' null variances, from `high_histogram` of `null_variance` over all tokens.

    The variances are v_j chi^2_K / K with 1 / v_j of a gamma distribution; their logarithms' mean and variance give it.
    Tokens whose nulls are all 0 have no say: they have no gradient, as the first one of a document read by itself.

    Raises:
        ValueError: there is no token, or all nulls are 0.
    """
    rows = np.flatnonzero(histogram[ZERO_BUCKET:]) + ZERO_BUCKET
    counts = histogram[rows].astype(np.float64)
    edges = from_order_preserving_uint32(rows.astype(np.uint32) << np.uint32(16)).astype(np.float64)
    values = edges * (1 + 2.0**-8)  # the middle of a bucket
    if not len(rows) or not values.any():
        raise ValueError("all null scores are 0: build the query again, with `build_query.nulls`")
    values, counts = values[values > 0], counts[values > 0]
    middle = values[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
    logs = np.log(np.clip(values, middle / FAR, middle * FAR))
    mean = float(np.average(logs, weights=counts))
    excess = float(np.average((logs - mean) ** 2, weights=counts)) - trigamma(nulls / 2)
    mean += math.log(nulls / 2) - digamma(nulls / 2)
    half = _inverse_trigamma(excess) if excess > trigamma(MOST_WEIGHT / 2) else MOST_WEIGHT / 2
    return Spread(variance=math.exp(mean + digamma(half) - math.log(half)), weight=2 * half)


def digamma(x: float) -> float:
    """The derivative of log gamma, x > 0: up by its recurrence, then its asymptotic series."""
    total = 0.0
    while x < 10:
        total -= 1 / x
        x += 1
    inverse = 1 / (x * x)
    return (
        total + math.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse / 240)))
    )


def trigamma(x: float) -> float:
    """The derivative of `digamma`."""
    total = 0.0
    while x < 10:
        total += 1 / (x * x)
        x += 1
    inverse = 1 / (x * x)
    series = 1 / 6 - inverse * (1 / 30 - inverse * (1 / 42 - inverse / 30))
    return total + 1 / x + inverse / 2 + inverse / x * series


def _inverse_trigamma(value: float) -> float:
    low, high = -30.0, 30.0  # logarithms; trigamma falls
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if trigamma(math.exp(middle)) > value else (low, middle)
    return math.exp(low)


def standardise(scores_N: NDArray[np.floating], nulls_KN: NDArray[np.floating], spread: Spread) -> NDArray[np.float32]:
    """(1 + K, N) z_0 of the scores, then z_1..z_K of the nulls; 0 where all are 0. Each token by itself."""
    x = np.concatenate([scores_N[None], nulls_KN]).astype(np.float64)
    squares = np.square(x)
    others = np.zeros_like(x)  # what stands before and after: the total less one's own would cancel where that is large
    for row in range(1, len(x)):
        others[row] = others[row - 1] + squares[row - 1]
    after = np.zeros(x.shape[1])
    for row in reversed(range(len(x))):
        others[row] += after
        after += squares[row]
    variance = (spread.weight * spread.variance + others) / (spread.weight + len(nulls_KN))
    z = np.divide(x, np.sqrt(variance), out=np.zeros_like(x), where=variance > 0)
    return np.clip(z, -1e30, 1e30).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Discoveries:
    """The tokens with z_0 > `threshold` are `count`, of which chance gives the share `rate`; the largest float32 where
    no threshold has the wanted rate. `bucket`: of the least of them."""

    threshold: float
    bucket: int
    count: int
    rate: float


def discoveries(own: Ints, nulls: Ints, num_nulls: int, wanted: float) -> Discoveries:
    """The most tokens of false-discovery rate `wanted`, from `high_histogram` of z_0 and of the pooled nulls' z."""
    tokens = int(own.sum())
    assert nulls.sum() == tokens * num_nulls, (nulls.sum(), tokens, num_nulls)
    above, null_above = (np.cumsum(counts[::-1])[::-1].astype(np.float64) for counts in (own, nulls))
    chance = tokens * (1 + null_above) / (1 + tokens * num_nulls)
    rates = np.divide(chance, above, out=np.full(BUCKETS, np.inf), where=above > 0)
    rows = np.flatnonzero(rates[ZERO_BUCKET + 1 :] <= wanted)
    if not len(rows):
        return Discoveries(threshold=LARGEST, bucket=LARGEST_BUCKET, count=0, rate=0.0)
    bucket = ZERO_BUCKET + 1 + int(rows[0])
    below = float(np.nextafter(least_of(bucket), np.float32(-np.inf)))
    return Discoveries(threshold=below, bucket=bucket, count=int(above[bucket]), rate=float(rates[bucket]))
