"""How documents are dealt to folds."""

import numpy as np
import pytest

from ifguide.folds import fold_of


@pytest.mark.parametrize("period", [2, 3, 5, 10])
def test_documents_at_regular_places_are_of_all_folds_alike(period: int) -> None:
    for first in range(period):
        share = np.bincount(fold_of(np.arange(first, 50_000, period), 5), minlength=5) / (50_000 / period)
        np.testing.assert_allclose(share, 0.2, atol=0.02)


def test_a_document_is_in_one_fold_wherever_it_is_read() -> None:
    numbers = np.arange(60, dtype=np.int32).reshape(6, 10)
    folds = fold_of(numbers, 4)
    assert folds.shape == numbers.shape
    assert set(folds.flat) == set(range(4))
    np.testing.assert_array_equal(fold_of(numbers[2:4].astype(np.int64), 4), folds[2:4])
    assert (fold_of(numbers, 1) == 0).all()
