"""Cross-fitted ridge regression from sums, against scikit-learn on the tokens themselves, fold by fold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ifguide.influence.smoothing import RIDGES, FoldSums, cut, fit_smoother, smoothing_layers

FOLDS = 3


def tokens(count: int = 400, width: int = 6, *, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features on several scales, one of them constant; scores; folds of documents of many lengths."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, width)) * 10.0 ** rng.integers(-2, 3, width) + 5
    features[:, 2] = 7
    scores = features[:, 0] / features[:, 0].std() - 0.5 * features[:, 3] / features[:, 3].std()
    documents = np.sort(rng.integers(0, 40, count))
    return features, scores + noise * rng.normal(size=count), documents % FOLDS


def by_hand(features: np.ndarray, scores: np.ndarray, folds: np.ndarray, ridge: float) -> np.ndarray:
    predicted = np.zeros(len(scores))
    for fold in range(FOLDS):
        others = folds != fold
        scaler = StandardScaler().fit(features[others])
        model = Ridge(alpha=ridge * others.sum()).fit(scaler.transform(features[others]), scores[others])
        predicted[~others] = model.predict(scaler.transform(features[~others]))
    return predicted


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_smoothed_scores_are_those_of_a_ridge_regression_on_the_other_folds(ridge: float) -> None:
    features, scores, folds = tokens()
    smoother = fit_smoother(FoldSums.of(features, scores, folds, FOLDS), ridges=[ridge])
    expected = by_hand(features, scores, folds, ridge)
    np.testing.assert_allclose(smoother.predict(features, folds), expected, rtol=1e-5, atol=1e-5)
    explained = 1 - ((scores - expected) ** 2).sum() / ((scores - scores.mean()) ** 2).sum()
    assert smoother.explained[ridge] == pytest.approx(explained, abs=1e-9)


def test_the_ridge_is_the_one_that_explains_most_of_what_it_has_not_seen() -> None:
    features, scores, folds = tokens(120, noise=3.0)
    smoother = fit_smoother(FoldSums.of(features, scores, folds, FOLDS))
    errors = {ridge: ((scores - by_hand(features, scores, folds, ridge)) ** 2).sum() for ridge in RIDGES}
    assert smoother.ridge == min(errors, key=errors.__getitem__)
    assert smoother.ridge > RIDGES[0]


def test_parts_add_up_to_the_whole() -> None:
    features, scores, folds = tokens()
    whole = fit_smoother(FoldSums.of(features, scores, folds, FOLDS))
    parts = [FoldSums.of(features[i::4], scores[i::4], folds[i::4], FOLDS) for i in range(4)]
    added = fit_smoother(parts[0] + parts[1] + parts[2] + parts[3])
    np.testing.assert_allclose(added.predict(features, folds), whole.predict(features, folds), rtol=1e-5)


def test_no_score_of_a_document_moves_its_own_smoothed_scores() -> None:
    features, scores, folds = tokens()
    before = fit_smoother(FoldSums.of(features, scores, folds, FOLDS), ridges=[0.1]).predict(features, folds)
    moved = np.where(folds == 1, scores + 100.0 * features[:, 4], scores)
    after = fit_smoother(FoldSums.of(features, moved, folds, FOLDS), ridges=[0.1]).predict(features, folds)
    np.testing.assert_array_equal(after[folds == 1], before[folds == 1])
    assert not np.allclose(after[folds != 1], before[folds != 1])


def test_what_cannot_be_smoothed_is_said() -> None:
    features, scores, _ = tokens()
    with pytest.raises(ValueError, match="two folds"):
        fit_smoother(FoldSums.of(features, scores, np.zeros(len(scores), int), FOLDS))
    with pytest.raises(ValueError, match="the same"):
        fit_smoother(FoldSums.of(features, np.zeros(len(scores)), np.arange(len(scores)) % FOLDS, FOLDS))


def test_scores_far_out_are_cut_and_layers_are_spread() -> None:
    scores = np.append(np.linspace(0, 1, 999), 1000.0)
    assert cut(scores).max() < 3
    np.testing.assert_array_equal(cut(scores)[1:998], scores[1:998])
    assert smoothing_layers(30) == (5, 15, 25, 30)
    assert smoothing_layers(1) == (1,)
