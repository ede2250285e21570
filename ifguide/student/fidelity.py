"""Two scorings of the same tokens beside each other, with a weight for each token.

Weights are counts of a bootstrap, or all one. Where scores tie at the edge of a top, each of the tied tokens is in it
in part, so that a top has its exact size. Cost: a sort when it is made, then a few passes for each weighting.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ifguide.student.said import RECHECK_SHARE

Floats = NDArray[np.floating]
TOP_SHARE = 0.02  # of the tokens: what a mask holds by default


class OrderedScores:
    """One scoring (N,), sorted once: weighted ranks and tops of it by sums alone."""

    def __init__(self, scores_N: Floats):
        values, self.group_N = np.unique(scores_N, return_inverse=True)
        self.groups = len(values)

    def _weights(self, weight_N: Floats) -> NDArray[np.float64]:
        """Of each group of equal scores, from the lowest."""
        return np.bincount(self.group_N, weights=weight_N, minlength=self.groups).astype(np.float64, copy=False)

    def ranks(self, weight_N: Floats) -> Floats:
        """(N,) the middle of each token's own group in the weight of all, in order."""
        weight_G = self._weights(weight_N)
        middle_N: Floats = (np.cumsum(weight_G) - weight_G / 2)[self.group_N]
        return middle_N

    def top(self, weight_N: Floats, share: float) -> Floats:
        """(N,) from 0 to 1: how far each token is in the top `share` of the weight."""
        weight_G = self._weights(weight_N)
        above_G = weight_N.sum() - np.cumsum(weight_G)
        with np.errstate(invalid="ignore", divide="ignore"):
            part_G = np.nan_to_num(((share * weight_N.sum()) - above_G) / weight_G, posinf=1.0, neginf=0.0)
        inside_N: Floats = part_G.clip(0, 1)[self.group_N]
        return inside_N


class PairedScores:
    """Both scorings of the same tokens."""

    def __init__(self, exact_N: Floats, student_N: Floats):
        self.values = exact_N.astype(np.float64), student_N.astype(np.float64)
        self.exact, self.student = OrderedScores(exact_N), OrderedScores(student_N)

    def correlations(self, weight_N: Floats) -> tuple[float, float]:
        """Pearson's and Spearman's."""
        return _pearson(*self.values, weight_N), _pearson(
            self.exact.ranks(weight_N), self.student.ranks(weight_N), weight_N
        )


def _pearson(a_N: Floats, b_N: Floats, weight_N: Floats) -> float:
    """NaN where one of the two does not vary."""
    total = weight_N.sum()
    if total == 0:
        return math.nan
    a_N, b_N = a_N - weight_N @ a_N / total, b_N - weight_N @ b_N / total
    weighted_N = weight_N * a_N
    norm = math.sqrt(float((weighted_N @ a_N) * (weight_N @ (b_N * b_N))))
    return float(weighted_N @ b_N) / norm if norm > 0 else math.nan


def fidelity(exact_N: Floats, student_N: Floats) -> dict[str, float]:
    """`pearson`, `spearman`, `overlap` of both tops, and `recall`: the share of the exact top `TOP_SHARE` that lies in
    the student's top `RECHECK_SHARE`. NaN where a scoring does not vary."""
    scores, ones_N = PairedScores(exact_N, student_N), np.ones(len(exact_N))
    pearson, spearman = scores.correlations(ones_N)
    exact_top_N = scores.exact.top(ones_N, TOP_SHARE)
    shares = (
        exact_top_N @ scores.student.top(ones_N, share) / exact_top_N.sum() for share in (TOP_SHARE, RECHECK_SHARE)
    )
    return dict(
        zip(("pearson", "spearman", "overlap", "recall"), map(float, (pearson, spearman, *shares)), strict=True)
    )
