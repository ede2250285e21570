"""Intervals and paired tests for every figure, by resampling prompts (or blocks, or texts).

A figure is a ratio of sums over N items, f = sum_i a_i / sum_i b_i: a mean has b = 1, perplexity is exp of one. Each of
S replicates draws N items with replacement; with c_si the times that item i is in replicate s,

    f_s = (C a)_s / (C b)_s      for all figures of the items at once: two matrix products

The interval is the percentile one. Two models on the same items are compared within replicates, for the counts
depend on (seed, N) alone: the difference d_s = f_s - g_s has an interval of its own, and

    p = 2 min(1 + #{d_s <= 0}, 1 + #{d_s >= 0}) / (S + 1), at most 1       two-sided; no smaller than 2 / (S + 1)

So has their ratio f_s / g_s. Where g_s is 0 and f_s is not, it is infinite and counts as that; 0 / 0 is left out.

Cost: S x N draws and products, in chunks of about 64 MB. Continuations of a prompt are not resampled, but each prompt
brings draws of its own, so the interval covers other prompts and another sampling seed together. It does not cover
another training seed, is too narrow for fewer than about 20 items, and says nothing of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CHUNK_COUNTS = 8_000_000

Resampled = Mapping[str, tuple[np.ndarray, np.ndarray]]  # name -> numerator and denominator of each item, (N,)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value with its interval [low, high] over `n` items; None where it is undefined (no items, or 0 / 0)."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Replicates:
    """A figure and its S bootstrap replicates (NaN where undefined)."""

    value: float
    samples: np.ndarray
    n: int

    def map(self, function: Callable[[Any], Any]) -> Replicates:
        """The same of a function of the figure, such as exp."""
        return Replicates(value=float(function(self.value)), samples=function(self.samples), n=self.n)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """`samples` replicates from `seed`; intervals hold a share `confidence` of them."""

    samples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def ratios(self, items: Resampled, *, stream: int | None = None) -> dict[str, Replicates]:
        """Every figure of N items with its replicates; the same draws for all calls with N items and one `stream`.

        Another `stream` has independent draws: for figures of other items that are set against these.

        Raises:
            ValueError: numerators and denominators of different lengths, or not finite.
        """
        if not items:
            return {}
        names = list(items)
        num_NM, den_NM = (np.stack([np.asarray(items[name][part], np.float64) for name in names], 1) for part in (0, 1))
        if num_NM.shape != den_NM.shape or not (np.isfinite(num_NM).all() and np.isfinite(den_NM).all()):
            raise ValueError(f"figures {names}: numerators and denominators must be finite and of one length")
        n = len(num_NM)
        sums = np.concatenate([num_NM, den_NM], axis=1)
        parts = [counts @ sums for counts in self.counts(n, stream)] if n else [np.zeros((0, 2 * len(names)))]
        drawn = np.concatenate(parts)
        with np.errstate(invalid="ignore", divide="ignore"):
            values, samples = (both[..., : len(names)] / both[..., len(names) :] for both in (sums.sum(0), drawn))
        return {name: Replicates(value=float(values[i]), samples=samples[:, i], n=n) for i, name in enumerate(names)}

    def counts(self, n: int, stream: int | None = None) -> Iterator[np.ndarray]:
        """Chunks (s, n) of how often each replicate holds each of n items; float64, every row sums to n."""
        spawn_key = () if stream is None else (stream,)
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, n), spawn_key=spawn_key))
        chunk = max(1, CHUNK_COUNTS // max(1, n))
        for start in range(0, self.samples, chunk):
            rows = min(chunk, self.samples - start)
            drawn = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
            yield np.bincount(drawn.reshape(-1), minlength=rows * n).reshape(rows, n).astype(np.float64)

    def figure(self, replicates: Replicates) -> Figure:
        """The figure with its percentile interval."""
        low, high = self._interval(replicates.samples)
        return Figure(value=_finite(replicates.value), low=low, high=high, n=replicates.n)

    def difference(self, model: Replicates, baseline: Replicates) -> dict[str, Any]:
        """`difference` model - baseline of two figures of the same items, `low`, `high`, `p_value`, `n`; and `ratio`
        model / baseline, None where the baseline is 0, with `ratio_low`, `ratio_high`: an end is None where it is
        infinite, so a ratio with `ratio_low` alone has no upper bound.

        Raises:
            ValueError: figures of different numbers of items, which cannot be paired.
        """
        if model.n != baseline.n:
            raise ValueError(f"figures of {model.n} and {baseline.n} items cannot be paired")
        samples = model.samples - baseline.samples
        low, high = self._interval(samples)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio, ratio_samples = np.float64(model.value) / baseline.value, model.samples / baseline.samples
        ratio_low, ratio_high = self._ratio_interval(ratio_samples)
        defined = samples[np.isfinite(samples)]
        tail = 1 + min(int((defined <= 0).sum()), int((defined >= 0).sum()))
        return {
            "difference": _finite(model.value - baseline.value),
            "low": low,
            "high": high,
            "p_value": min(1.0, 2 * tail / (len(defined) + 1)) if len(defined) else None,
            "n": model.n,
            "ratio": _finite(ratio),
            "ratio_low": ratio_low,
            "ratio_high": ratio_high,
        }

    def _interval(self, samples: np.ndarray) -> tuple[float | None, float | None]:
        defined = samples[np.isfinite(samples)]
        if not len(defined):
            return None, None
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [outside, 1 - outside])
        return float(low), float(high)

    def _ratio_interval(self, samples: np.ndarray) -> tuple[float | None, float | None]:
        """The interval of samples that may be infinite, of which none lies between two; an infinite end is None."""
        defined = samples[~np.isnan(samples)]
        if np.isfinite(defined).all():
            return self._interval(defined)
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [outside, 1 - outside], method="inverted_cdf")
        return _finite(low), _finite(high)


def benjamini_hochberg(p_values: Iterable[float | None]) -> dict[float | None, float | None]:
    """p value -> the corrected one of the family of all that are not None, None -> None.

    Of the m p values in ascending order the i-th becomes min over j >= i of p_j m / j, at most 1. Calling significant
    what is then at most 0.05 keeps the expected share of false ones among these at 0.05 (Benjamini and Hochberg, 1995;
    for figures that depend on each other positively: Benjamini and Yekutieli, 2001)."""
    ordered = sorted(p for p in p_values if p is not None)
    corrected: dict[float | None, float | None] = {None: None}
    least = 1.0
    for place in range(len(ordered), 0, -1):
        least = min(least, ordered[place - 1] * len(ordered) / place)
        corrected[ordered[place - 1]] = least
    return corrected


def gap(groups: Mapping[str, Replicates]) -> Replicates:
    """The largest figure of the groups less the smallest, by replicate; groups without a value are left out.

    The groups are resampled each by itself: a `stream` for each. Of groups that are alike the gap is above zero by
    chance alone, the more of them and the smaller they are: compare gaps of models on the same prompts, not a gap with
    zero."""
    defined = [group for group in groups.values() if math.isfinite(group.value)]
    if not defined:
        return Replicates(value=math.nan, samples=np.empty(0), n=0)
    samples = np.stack([group.samples for group in defined])
    values = [group.value for group in defined]
    return Replicates(
        value=max(values) - min(values), samples=samples.max(0) - samples.min(0), n=sum(group.n for group in defined)
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
