"""Linear probes: can a logistic regression tell two kinds of text apart from a model's hidden states, layer by layer?

(Alain and Bengio, arXiv 1610.01644.) Features are standardised, the regression has scikit-learn's default L2 penalty,
and every text is judged by the regression of the folds it is not in. Intervals are of a bootstrap over texts and hold
the folds' regressions fixed.

The best of many layers looks better than it is on the texts that it was picked on. So `chosen` is a figure of its own:
in each fold the layer with the highest AUROC by a cross-validation within the other folds judges the texts of this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ifguide.evaluation import Bootstrap, classifier_agreement

FIGURES = ("accuracy", "auroc")
INNER_FOLDS = 3  # that a layer is chosen by
LEAST = 4  # texts of a kind: two in the training part of two folds, to choose a layer by


def probe_layers(
    features_LND: np.ndarray, labels_N: np.ndarray, *, folds: int, seed: int, bootstrap: Bootstrap
) -> dict[str, Any]:
    """`layers`: FIGURES of the out-of-fold probability of each layer's probe, each with value, low, high and n;
    `chosen`: the same of the layer chosen in each fold, and the `depths` chosen, by fold.

    features_LND: of N texts at L layers; labels_N: bool. ValueError where a kind has fewer texts than folds or LEAST.
    """
    least = int(min(labels_N.sum(), (~labels_N).sum()))
    if least < max(folds, LEAST):
        raise ValueError(
            f"{least} texts of the rarer kind for {folds} folds, which need {max(folds, LEAST)}; give more texts, or"
            " lower analyse.folds"
        )
    seed %= 2**32  # scikit-learn takes no larger one
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scores_LN = np.stack([_out_of_fold(features_ND, labels_N, split) for features_ND in features_LND])

    chosen_N, depths = np.empty(len(labels_N)), []
    for train, test in split.split(labels_N, labels_N):
        inner = StratifiedKFold(min(INNER_FOLDS, least - -(-least // folds)), shuffle=True, random_state=seed)
        areas = [
            roc_auc_score(labels_N[train], _out_of_fold(features_ND[train], labels_N[train], inner))
            for features_ND in features_LND
        ]
        depths.append(int(np.argmax(areas)))
        chosen_N[test] = scores_LN[depths[-1], test]  # of the regression of the same training part

    def figures(scores_N: np.ndarray) -> dict[str, Any]:
        agreement = classifier_agreement(scores_N, labels_N, threshold=0.5, bootstrap=bootstrap)
        return {name: agreement[name] for name in FIGURES}

    return {"layers": [figures(scores_N) for scores_N in scores_LN], "chosen": {**figures(chosen_N), "depths": depths}}


def _out_of_fold(features_ND: np.ndarray, labels_N: np.ndarray, split: StratifiedKFold) -> np.ndarray:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return cross_val_predict(probe, features_ND, labels_N, cv=split, method="predict_proba")[:, 1]
