"""To which fold a document belongs, where something is fitted on some documents and used on the others.

It is a hash of the document's number. A remainder would not do. Inputs are interleaved in proportion to their
documents: one that has every fifth document would be a fold, and what is fitted on the others knew nothing of its kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DEALT = "splitmix64"  # how: files that were fitted by folds say it
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def fold_of(documents: NDArray[np.integer[Any]], folds: int) -> NDArray[np.int64]:
    """The fold, from 0, of each document by its number; of the same shape."""
    numbers = documents.astype(np.uint64) + np.uint64(1)
    return (spread_bits(numbers * GOLDEN) % np.uint64(folds)).astype(np.int64)


def spread_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits spread by multiplications and shifts, the last steps of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def require_dealt(path: object, saved: Any) -> None:
    """Raise ValueError where the .npz file was fitted by folds that were dealt in another way."""
    if "dealt" not in saved.files or str(saved["dealt"]) != DEALT:
        raise ValueError(f"{path}: fitted by folds of an earlier version; delete the folder that it is in, and go on")
