"""Cross-fitted ridge regression from sums, against scikit-learn on the tokens themselves, fold by fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ifguide.config.score_corpus import Smoothing
from ifguide.folds import fold_of
from ifguide.influence.smoothing import FoldSums, Smoother, fit_smoother, ranges, smoothing_layers

FOLDS = 3
RIDGES = Smoothing().ridges
EVERYTHING = np.array([[-np.inf, np.inf]])
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def tokens(count: int = 400, width: int = 6, *, noise: float = 1.0) -> Arrays:
    """Features on several scales, one of them constant; scores; folds of documents of many lengths."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, width)) * 10.0 ** rng.integers(-2, 3, width) + 5
    features[:, 2] = 7
    scores = features[:, 0] / features[:, 0].std() - 0.5 * features[:, 3] / features[:, 3].std()
    documents = np.sort(rng.integers(0, 40, count))
    return features, scores + noise * rng.normal(size=count), documents % FOLDS


def fitted(features: np.ndarray, scores: np.ndarray, folds: np.ndarray, *ridges: float) -> Smoother:
    """Of one score (N,) or of several (N, S)."""
    columns = scores.reshape(len(scores), -1)
    sums = FoldSums.of(features, columns, folds, FOLDS)
    limits = np.repeat(EVERYTHING, columns.shape[1], axis=0)
    return fit_smoother(sums, limits, ridges=ridges or RIDGES, own_weight=0.25)


def predicted(smoother: Smoother, features: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N,) of the first score."""
    return smoother.predict(torch.from_numpy(features), torch.from_numpy(folds)).numpy()[:, 0]


def by_hand(features: np.ndarray, scores: np.ndarray, folds: np.ndarray, ridge: float) -> np.ndarray:
    expected = np.zeros(len(scores))
    for fold in range(FOLDS):
        others = folds != fold
        scaler = StandardScaler().fit(features[others])
        model = Ridge(alpha=ridge * others.sum()).fit(scaler.transform(features[others]), scores[others])
        expected[~others] = model.predict(scaler.transform(features[~others]))
    return expected


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_it_predicts_as_a_ridge_regression_on_the_other_folds(ridge: float) -> None:
    features, scores, folds = tokens()
    smoother = fitted(features, scores, folds, ridge)
    expected = by_hand(features, scores, folds, ridge)
    np.testing.assert_allclose(predicted(smoother, features, folds), expected, rtol=1e-5, atol=1e-5)
    explained = 1 - ((scores - expected) ** 2).sum() / ((scores - scores.mean()) ** 2).sum()
    assert smoother.explained_SR[0, 0] == pytest.approx(explained, abs=1e-9)
    assert smoother.summary(["own"]) == {"own": {"ridge": ridge, "explained": round(explained, 4), "used": True}}


def test_the_ridge_is_the_one_that_explains_most_of_what_it_has_not_seen() -> None:
    features, scores, folds = tokens(120, noise=3.0)
    smoother = fitted(features, scores, folds)
    errors = [((scores - by_hand(features, scores, folds, ridge)) ** 2).sum() for ridge in RIDGES]
    assert smoother.chosen_S[0] == np.argmin(errors) > 0


def test_several_scores_are_fitted_as_each_alone() -> None:
    features, scores, folds = tokens()
    other = np.roll(scores, 7) ** 2
    both = fitted(features, np.stack([scores, other], axis=1), folds)
    found = both.predict(torch.from_numpy(features), torch.from_numpy(folds)).numpy()
    for column, alone in enumerate((scores, other)):
        single = fitted(features, alone, folds)
        np.testing.assert_allclose(found[:, column], predicted(single, features, folds), rtol=1e-8)
        assert both.chosen_S[column] == single.chosen_S[0]


def test_a_score_is_cut_and_drawn_towards_what_is_predicted() -> None:
    features, scores, folds = tokens()
    limits = np.quantile(scores, [[0.1, 0.8]])
    near = scores.clip(*limits[0])
    sums = FoldSums.of(features, near[:, None], folds, FOLDS)
    smoother = fit_smoother(sums, limits, ridges=[0.1], own_weight=0.25)
    prior = by_hand(features, near, folds, 0.1)
    found = smoother.smooth(torch.from_numpy(scores)[:, None], torch.from_numpy(prior)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(found, prior + 0.25 * (near - prior), rtol=1e-5)
    np.testing.assert_allclose(predicted(smoother, features, folds), prior, rtol=1e-5)


def test_scores_that_states_do_not_predict_stay_as_they_are() -> None:
    features, scores, folds = tokens(noise=0.0)
    # the feature says in each fold the contrary of what it says in the others
    contrary = np.where(folds == 0, 2.5, -1.0) * features[:, 0]
    columns = np.stack([scores, contrary], axis=1)
    smoother = fitted(features, columns, folds)
    assert smoother.used_S.tolist() == [True, False]
    assert smoother.explained_SR[1].max() < 0
    prior = smoother.predict(torch.from_numpy(features), torch.from_numpy(folds))
    found = smoother.smooth(torch.from_numpy(columns), prior).numpy()
    np.testing.assert_array_equal(found[:, 1], columns[:, 1].astype(np.float32))
    np.testing.assert_allclose(found[:, 0], prior[:, 0] + 0.25 * (scores - prior[:, 0].numpy()), rtol=1e-5)


def test_parts_add_up_to_the_whole_and_files_keep_it(tmp_path: Path) -> None:
    features, scores, folds = tokens()
    whole = fitted(features, scores, folds)
    parts = [FoldSums.of(features[i::4], scores[i::4, None], folds[i::4], FOLDS) for i in range(4)]
    added = fit_smoother(parts[0] + parts[1] + parts[2] + parts[3], EVERYTHING, ridges=RIDGES, own_weight=0.25)
    np.testing.assert_allclose(predicted(added, features, folds), predicted(whole, features, folds), rtol=1e-5)
    whole.save(tmp_path / "smoother.npz")
    again = Smoother.load(tmp_path / "smoother.npz")
    np.testing.assert_array_equal(predicted(again, features, folds), predicted(whole, features, folds))
    assert again.own_weight == 0.25
    assert again.folds == FOLDS


def test_folds_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    smoother = fitted(*tokens())
    with (tmp_path / "smoother.npz").open("wb") as file:
        np.savez(file, **vars(smoother))
    with pytest.raises(ValueError, match=r"smoother\.npz: fitted by folds of an earlier version; delete the folder"):
        Smoother.load(tmp_path / "smoother.npz")


def test_no_score_of_a_document_moves_what_is_predicted_of_it() -> None:
    features, scores, folds = tokens()
    before = predicted(fitted(features, scores, folds, 0.1), features, folds)
    moved = np.where(folds == 1, scores + 100.0 * features[:, 4], scores)
    after = predicted(fitted(features, moved, folds, 0.1), features, folds)
    np.testing.assert_array_equal(after[folds == 1], before[folds == 1])
    assert not np.allclose(after[folds != 1], before[folds != 1])


def test_what_cannot_be_smoothed_is_said() -> None:
    features, scores, _ = tokens()
    with pytest.raises(ValueError, match="two folds"):
        fitted(features, scores, np.zeros(len(scores), int))
    with pytest.raises(ValueError, match="the same"):
        fitted(features, np.zeros(len(scores)), np.arange(len(scores)) % FOLDS)


def test_scores_far_out_are_cut_and_layers_are_spread() -> None:
    scores = np.append(np.linspace(0, 1, 999), 1000.0)
    low, high = ranges(np.stack([scores, -scores], axis=1))[0]
    assert 0 < low < 0.01
    assert 0.99 < high < 3
    np.testing.assert_allclose(ranges(np.stack([scores, -scores], axis=1))[1], [-high, -low])
    assert smoothing_layers(30) == (5, 15, 25, 30)
    assert smoothing_layers(1) == (1,)


def test_an_input_at_regular_places_is_smoothed_by_others_of_its_kind() -> None:
    """What only one input teaches is known to the regression that its tokens meet. A remainder of documents' numbers
    would make that input a fold of its own."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(500), 20)
    kind = (documents % FOLDS == 1).astype(float)  # documents at regular places of the stream
    features = np.column_stack([kind * rng.normal(1, 0.1, len(documents)), rng.normal(size=len(documents))])
    scores = 5 * kind + rng.normal(size=len(documents))

    def of_kind(folds: np.ndarray) -> float:
        smoother = fitted(features, scores, folds, 0.01)
        return float(predicted(smoother, features, folds)[kind > 0].mean())

    assert of_kind(documents % FOLDS) < 1
    assert of_kind(fold_of(documents, FOLDS)) == pytest.approx(5, abs=0.3)
