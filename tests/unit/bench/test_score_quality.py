"""bench/score_quality.py: what is judged, and how a choice is kept from what it is measured on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from bench.score_quality import (
    Judged,
    Made,
    bootstrap,
    chosen_on_one_half,
    difference,
    gain_on_the_other_half,
    in_place_of,
)


def judged(*, whole: bool) -> Judged:
    truth = [np.array([1]), np.array([0]), np.array([0]), np.array([1])] if whole else [np.array([0, 1, 0])] * 4
    return Judged(blocks=[np.arange(3)] * 5, truth=truth, groups=np.array(["a", "a", "b", "b"]))


def test_a_text_with_one_label_is_judged_by_its_highest_token() -> None:
    scores = [np.array([9.0, 1.0, 2.0]), np.array([9.0, -3.0, -4.0]), *[np.array([9.0, 0.0, 0.0])] * 3]
    assert [float(value[0]) for value in judged(whole=True).values(scores)] == [2, -3, 0, 0]
    assert [value.tolist() for value in judged(whole=False).values(scores)][:2] == [[1, 2], [-3, -4]]
    assert [label.tolist() for label in judged(whole=False).labels()] == [[1, 0]] * 4


def test_the_choice_is_made_on_one_half_and_measured_on_the_other() -> None:
    def scores(*values: float) -> list[np.ndarray]:
        return [np.array([0.0, value]) for value in (*values, 0.0)]

    found = chosen_on_one_half(
        judged(whole=True),
        {"exact": scores(0, 1, 0, 1), "lucky": scores(1, 0, 1, 0), "worse": scores(0, 1, 1, 0)},
    )
    assert found == {"auroc_implicit_exact": 1.0, "auroc_implicit_best": 0.0, "implicit_best": "lucky"}


def test_ranks_lie_where_the_scores_did() -> None:
    placed = in_place_of([np.zeros(3), np.zeros(2)], np.array([0.1, 0.2, 0.3]))
    assert [block.tolist() for block in placed] == [[0, 0.1, 0.2], [0, 0.3]]


def test_an_interval_is_of_groups() -> None:
    """Groups alike have no interval, whatever their texts."""
    labels, values = [np.array([0, 1, 0, 1])] * 6, [np.array([1.0, 2.0, 3.0, 4.0])] * 6
    value = average_precision_score(np.concatenate(labels), np.concatenate(values))
    low, high = bootstrap(labels, values, np.array([1, 1, 2, 2, 3, 3]), average_precision_score, seed=0, times=20)
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)


def test_the_weight_is_chosen_on_one_half_and_its_gain_measured_on_the_other() -> None:
    """Weight 0 is right in the even documents and wrong in the odd ones, weight 1 the other way round."""
    right, wrong = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])
    made = Made(
        scores={"exact": [wrong] * 5},
        by_weight={0.0: [right, wrong, right, wrong, right], 1.0: [wrong, right, wrong, right, right]},
        cost=1.0,
    )
    assert gain_on_the_other_half(judged(whole=False), made) == {
        "gain_other_half": 1.0,
        "own_weight_by_half": [0.0, 1.0],
    }


def test_a_difference_is_of_the_same_texts() -> None:
    """Against itself a score has no difference, in no sample of the groups."""
    scores = [np.array([0.0, value]) for value in (0.9, 0.1, 0.3, 0.2, 0.0)]
    assert difference(judged(whole=True), scores, scores, 0) == [0, 0, 0]
    worse = [-block for block in scores]
    assert difference(judged(whole=True), scores, worse, 0)[0] == pytest.approx(0.5)
