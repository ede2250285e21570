"""Linear probes: can a logistic regression tell two kinds of text apart from a model's hidden states, layer by layer?

(Alain and Bengio, arXiv 1610.01644.) Features are standardised, the regression has scikit-learn's default L2 penalty,
and every text is judged by the regression of the folds it is not in. Intervals are of a bootstrap over texts and hold
the folds' regressions fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ifguide.evaluation import Bootstrap, classifier_agreement

FIGURES = ("accuracy", "auroc")


def probe_layers(
    features_LND: np.ndarray, labels_N: np.ndarray, *, folds: int, seed: int, bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """FIGURES of the out-of-fold probability of each layer's probe, each with value, low, high and n.

    features_LND: of N texts at L layers; labels_N: bool. ValueError where a kind has fewer texts than folds.
    """
    least = int(min(labels_N.sum(), (~labels_N).sum()))
    if least < folds:
        raise ValueError(f"{least} texts of the rarer kind for {folds} folds; give more texts, or lower analyse.folds")
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    figures = []
    for features_ND in features_LND:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        scores_N = cross_val_predict(probe, features_ND, labels_N, cv=split, method="predict_proba")[:, 1]
        agreement = classifier_agreement(scores_N, labels_N, threshold=0.5, bootstrap=bootstrap)
        figures.append({name: agreement[name] for name in FIGURES})
    return figures
