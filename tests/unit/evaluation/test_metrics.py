"""EMT, TP and the agreement with annotations against hand-computed tables."""

from __future__ import annotations

import numpy as np
import pytest

from ifguide.evaluation import MaskAgreement, behaviour_statistics, token_agreement

TABLE_PK = np.array([[0.1, 0.9, 0.2], [0.3, 0.4, 0.1], [0.5, 0.0, 0.0], [0.2, 0.2, 0.2]])


def figure(name: str, threshold: float = 0.5) -> float:
    numerators, denominators = behaviour_statistics(TABLE_PK, threshold)[name]
    return numerators.sum() / denominators.sum()


def test_emt_and_tp_equal_the_hand_computed_table():
    assert figure("emt") == pytest.approx((0.9 + 0.4 + 0.5 + 0.2) / 4)
    assert figure("tp") == 0.5  # 0.9, and 0.5 which is on the threshold
    assert figure("tp", threshold=0.4) == 0.75
    assert figure("mean") == pytest.approx(TABLE_PK.mean())


def test_statistics_are_of_each_prompt_and_in_float64():
    found = behaviour_statistics(TABLE_PK.astype(np.float32))
    np.testing.assert_array_equal(found["emt"][0], TABLE_PK.astype(np.float32).max(1).astype(np.float64))
    assert found["tp"][0].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert all(part.dtype == np.float64 and part.shape == (4,) for parts in found.values() for part in parts)
    assert all(parts[1].tolist() == [1.0] * 4 for parts in found.values())


def test_nan_score_is_an_error_that_names_row_and_continuation():
    broken = TABLE_PK.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN at row 2, continuation 1"):
        behaviour_statistics(broken)


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_no_scores_is_an_error(scores):
    with pytest.raises(ValueError, match="non-empty"):
        behaviour_statistics(scores)


def test_agreement_equals_the_hand_computed_table():
    mask = np.array([True, True, True, False, False, False])
    annotated = np.array([True, False, True, True, False, True])
    result = token_agreement(mask, annotated)
    assert (result.selected, result.annotated, result.both) == (3, 4, 2)
    assert (result.precision, result.recall) == (2 / 3, 0.5)
    assert result.f1 == pytest.approx(2 / (3 / 2 + 2))  # harmonic mean of 2/3 and 1/2


def test_agreement_is_none_where_undefined_and_zero_where_disjoint():
    none, some = np.zeros(3, dtype=bool), np.array([True, False, False])
    assert token_agreement(none, some).precision is None
    assert token_agreement(none, some).recall == 0.0
    assert token_agreement(some, none).recall is None
    assert token_agreement(some, none).f1 is None
    assert token_agreement(some, ~some).f1 == 0.0
    with pytest.raises(ValueError, match="expected bool"):
        token_agreement(some.astype(int), some)
    with pytest.raises(ValueError, match="not the same tokens"):
        token_agreement(some, some[:2])


def test_agreements_of_parts_add_up_to_that_of_the_whole():
    mask, annotated = np.random.default_rng(0).random((2, 40)) < 0.3
    parts = [token_agreement(mask[part], annotated[part]) for part in (slice(0, 7), slice(7, 8), slice(8, 40))]
    assert sum(parts, MaskAgreement()) == token_agreement(mask, annotated)
    assert (MaskAgreement().precision, MaskAgreement().recall, MaskAgreement().f1) == (None, None, None)
