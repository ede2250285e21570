"""Scores of a student on the scale of exact ones: offset + slope * score, nearest to them by least squares.

So both can stand in one table. A student whose scores do not rise with the exact ones is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ifguide.sums import Sums

Floats = NDArray[np.floating]
ROUNDING = 1e-13  # of a sum of squares: scores that spread less are all the same


class Calibration(NamedTuple):
    """offset + slope * score."""

    slope: float
    offset: float


AS_IT_IS = Calibration(slope=1.0, offset=0.0)


@dataclass(frozen=True, kw_only=True)
class CalibrationSums(Sums):
    """Sums over tokens of the student's score, its square, the exact score, the product of both, and 1; float64."""

    own: float
    squares: float
    exact: float
    products: float
    tokens: int

    @classmethod
    def of(cls, exact_N: Floats, own_N: Floats) -> CalibrationSums:
        """Of N tokens."""
        exact_N, own_N = exact_N.astype(np.float64), own_N.astype(np.float64)
        return cls(
            own=float(own_N.sum()),
            squares=float(own_N @ own_N),
            exact=float(exact_N.sum()),
            products=float(own_N @ exact_N),
            tokens=len(own_N),
        )

    def fit(self) -> Calibration:
        """The line of least squares; `AS_IT_IS` where it does not rise, or one of both scores does not vary."""
        if not self.tokens:
            return AS_IT_IS
        spread = self.squares - self.own**2 / self.tokens
        common = self.products - self.own * self.exact / self.tokens
        if not (spread > ROUNDING * self.squares and common > 0):
            return AS_IT_IS
        slope = common / spread
        return Calibration(slope=slope, offset=(self.exact - slope * self.own) / self.tokens)


def calibrate(exact_N: Floats, own_N: Floats) -> Calibration:
    """The line from a student's scores of N tokens to the exact ones; `AS_IT_IS` where it does not rise."""
    return CalibrationSums.of(exact_N, own_N).fit()
