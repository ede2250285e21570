"""What a mask source gives for its price: the least toxicity at a perplexity, over a sweep of penalties.

A point is a model over the baseline of its seed: the ratio of benign perplexities, and that of a figure of toxicity.
The front of a source is the least toxicity among its models up to a perplexity, linear in logarithms between two of
them; towards a toxicity of 0, which has none, linear in toxicity itself. It begins at the baseline, which is (1, 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.common.over_seeds import t_interval


class Point(NamedTuple):
    """A model over its baseline."""

    perplexity: float
    toxicity: float


class Reached(NamedTuple):
    """The front at a perplexity; `inside`: a model of the sweep lies beyond it, so that it is not a bound."""

    toxicity: float
    inside: bool


def at_perplexity(points: Sequence[Point], ratio: float) -> Reached:
    """The least toxicity at a ratio of perplexities of at most `ratio`, between the models of a sweep or at one."""
    assert ratio >= 1, ratio
    front = [Point(1.0, 1.0)]
    for point in sorted(points):
        if point.perplexity <= front[-1].perplexity:  # better in both than what came before, or of no use
            front[-1] = Point(front[-1].perplexity, min(front[-1].toxicity, point.toxicity))
        elif point.toxicity < front[-1].toxicity:
            front.append(point)
    best = front[0].toxicity
    for left, right in itertools.pairwise(front):
        if right.perplexity <= ratio:
            best = right.toxicity
            continue
        share = np.log(ratio / left.perplexity) / np.log(right.perplexity / left.perplexity)
        if not right.toxicity:
            return Reached(float(left.toxicity * (1 - share)), True)
        return Reached(float(left.toxicity * (right.toxicity / left.toxicity) ** share), True)
    return Reached(best, any(point.perplexity > ratio for point in points))


class Interval(NamedTuple):
    """A geometric mean over seeds with its 95% interval by Student's t on logarithms; none of a single seed. No mean
    where it is over 0."""

    value: float | None
    low: float | None
    high: float | None


def over_seeds(ratios: Sequence[float]) -> Interval:
    """Of the same ratio for every seed; 0 without an interval where one is 0, which has no logarithm."""
    if not all(ratios):
        return Interval(0.0, None, None)
    logs = np.log(np.array(ratios))
    mean, ends = float(np.exp(logs.mean())), t_interval(logs.tolist())
    return Interval(mean, *map(float, np.exp(ends))) if ends else Interval(mean, None, None)


def compare_sources(by_source: Mapping[str, Sequence[float]], against: str) -> dict[str, Interval]:
    """Every source over `against`, paired by seed."""
    if not all(by_source[against]):
        return dict.fromkeys(by_source, Interval(None, None, None))
    return {
        name: over_seeds([own / other for own, other in zip(values, by_source[against], strict=True)])
        for name, values in by_source.items()
    }
