"""Figures of several seeds: as lists, in one cell of a table, as a point with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


def by_figure(figures: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Variant -> figure -> its values in the order of the seeds."""
    return {
        name: {key: [round(values[key], 5) for values in seeds] for key in seeds[0]}
        for name, seeds in figures.items()
        if seeds
    }


def cell(values: Sequence[float], form: str) -> str:
    """Mean [least, greatest], or the one value that all share; empty for none."""
    texts = [format(value, form) for value in values]
    if len(set(texts)) < 2:
        return "".join(texts[:1])
    return f"{sum(values) / len(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and how far it is from there to the least and to the greatest, as error bars take them."""
    mean = sum(values) / len(values)
    return mean, mean - min(values), max(values) - mean


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The ends of the mean's 95% interval, by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean - half, mean + half
