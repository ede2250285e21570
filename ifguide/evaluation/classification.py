"""How a classifier agrees with human labels: accuracy, average precision, AUROC and F1, each with an interval.

With texts in descending order of score, ties as one step, and TP, FP the weighted counts up to a step,

    AUROC = sum_steps  dFP (TP + TP_before) / 2  / (P N)         AP = sum_steps  dTP / P  *  TP / (TP + FP)

A bootstrap over texts gives text i the weight c_si in replicate s, so one sort serves all replicates. Accuracy and F1
are those of `score >= threshold`. Cost: one sort, and a few passes over S x N weights in chunks.

It does not calibrate, and does not say whether the labels are right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ifguide.evaluation.bootstrap import Bootstrap, Replicates

METRICS = ("accuracy", "average_precision", "auroc", "f1")


def classifier_agreement(
    scores_N: np.ndarray, labels_N: np.ndarray, *, threshold: float, bootstrap: Bootstrap
) -> dict[str, Any]:
    """`n`, `positives`, `threshold`, and each of METRICS as a figure's value, low, high and n.

    Raises:
        ValueError: shapes that differ, a score that is NaN (naming its row), or labels of one kind alone.
    """
    scores_N, labels_N = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N)
    if scores_N.ndim != 1 or labels_N.shape != scores_N.shape or labels_N.dtype != np.bool_:
        raise ValueError(f"expected scores (n,) and bool labels (n,), got {scores_N.shape} and {labels_N.shape}")
    if np.isnan(scores_N).any():
        raise ValueError(f"the score of labelled text {int(np.isnan(scores_N).argmax())} is NaN")
    positives = int(labels_N.sum())
    if positives in (0, len(labels_N)):
        raise ValueError(f"{positives} of {len(labels_N)} labels are positive: both kinds are needed to compare")
    order = np.argsort(-scores_N, kind="stable")
    scores_N, labels_N = scores_N[order], labels_N[order]
    steps = np.append(np.flatnonzero(np.diff(scores_N)), len(scores_N) - 1)
    flagged = int((scores_N >= threshold).sum())
    value = _metrics(np.ones((1, len(scores_N))), labels_N, steps, flagged)
    samples = [_metrics(counts, labels_N, steps, flagged) for counts in bootstrap.counts(len(scores_N))]
    figures = {
        name: bootstrap.figure(
            Replicates(
                value=float(value[name][0]),
                samples=np.concatenate([part[name] for part in samples]),
                n=len(scores_N),
            )
        ).as_json()
        for name in METRICS
    }
    return {"n": len(scores_N), "positives": positives, "threshold": threshold, **figures}


def _metrics(weights_SN: np.ndarray, labels_N: np.ndarray, steps: np.ndarray, flagged: int) -> dict[str, np.ndarray]:
    """METRICS of each row of weights; texts in descending order of score, the first `flagged` called positive."""
    positive_SN = np.cumsum(weights_SN * labels_N, axis=1)
    total_SN = np.cumsum(weights_SN, axis=1)
    positives, total = positive_SN[:, -1], total_SN[:, -1]
    true_flagged = positive_SN[:, flagged - 1] if flagged else np.zeros_like(total)
    all_flagged = total_SN[:, flagged - 1] if flagged else np.zeros_like(total)
    true_positive, called = positive_SN[:, steps], total_SN[:, steps]
    false_positive = called - true_positive
    gained = np.diff(true_positive, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # A step that a replicate did not draw finds nothing: 0 / 0, and adds nothing.
        precision = np.where(called > 0, true_positive / called, 0)
        area = (np.diff(false_positive, axis=1, prepend=0) * (true_positive - gained / 2)).sum(1)
        return {
            "accuracy": (total - positives - all_flagged + 2 * true_flagged) / total,
            "average_precision": (gained * precision).sum(1) / positives,
            "auroc": area / (positives * (total - positives)),
            "f1": 2 * true_flagged / (all_flagged + positives),
        }
