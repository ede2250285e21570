"""Smoothed token scores: what the scores of like contexts say of a token, in place of its own score.

An influence score is an unbiased and very noisy measurement of one token in one context. A ridge regression of the
scores on the proxy's hidden states takes the mean over like contexts. It is cross-fitted: documents are dealt to folds,
and a token's smoothed score is that of the regression on the documents of the other folds. So no token is smoothed by
its own score. The ridge is chosen by the held-out sum of squares of the scores alone.

    w_k = argmin_w sum_{i not in k} (s_i - w_0 - w . z_i)^2 + ridge * n_k |w|^2
    smoothed_i = w_0 + w . z_i, where w is w_k for i in k

z_i are the states of several layers at the token's own position, standardised on the tokens that are fitted on; n_k is
their number. s_i are the scores, cut to a range, for a few are far out. All of it follows from sums over tokens, by
fold. So a corpus is read once to fit and once to predict, in any number of parts.

Memory: folds * width^2 * 8 bytes. Cost: width^2 multiplications a token, and one eigendecomposition a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # times the number of tokens
CUT = 0.001  # share of the scores on either side that are taken for less far out than they are
SMALL_SPREAD = 1e-6  # a feature that varies less is a constant


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldSums:
    """Sums over the tokens of each of K folds: of x x^T, x, x s, s, s^2 and 1, for features x (D,) and scores s."""

    products_KDD: Floats
    features_KD: Floats
    moments_KD: Floats
    scores_K: Floats
    squares_K: Floats
    tokens_K: Floats

    @classmethod
    def of(cls, features_ND: NDArray[np.floating], scores_N: NDArray[np.floating], folds_N: NDArray[np.integer],
           folds: int) -> FoldSums:  # fmt: skip
        """Of N tokens, each with the number of its fold."""
        parts = [np.flatnonzero(folds_N == fold) for fold in range(folds)]
        x = [features_ND[rows].astype(np.float64) for rows in parts]
        s = [scores_N[rows].astype(np.float64) for rows in parts]
        return cls(
            products_KDD=np.stack([part.T @ part for part in x]),
            features_KD=np.stack([part.sum(axis=0) for part in x]),
            moments_KD=np.stack([part.T @ own for part, own in zip(x, s, strict=True)]),
            scores_K=np.array([own.sum() for own in s]),
            squares_K=np.array([own @ own for own in s]),
            tokens_K=np.array([float(len(rows)) for rows in parts]),
        )

    def __add__(self, other: FoldSums) -> FoldSums:
        return FoldSums(
            products_KDD=self.products_KDD + other.products_KDD,
            features_KD=self.features_KD + other.features_KD,
            moments_KD=self.moments_KD + other.moments_KD,
            scores_K=self.scores_K + other.scores_K,
            squares_K=self.squares_K + other.squares_K,
            tokens_K=self.tokens_K + other.tokens_K,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Smoother:
    """smoothed = x @ `weights_KD`[fold] + `biases_K`[fold].

    `explained`: the share of the scores' variance that each ridge explains in documents that it was not fitted on.
    `ridge` is the best."""

    weights_KD: Floats
    biases_K: Floats
    ridge: float
    explained: dict[float, float]

    def predict(self, features_ND: NDArray[np.floating], folds_N: NDArray[np.integer]) -> NDArray[np.float32]:
        """(N,) smoothed scores of tokens, each by the regression that has not seen its fold."""
        by_fold_NK = features_ND.astype(np.float64) @ self.weights_KD.T + self.biases_K
        return by_fold_NK[np.arange(len(features_ND)), folds_N].astype(np.float32)


def fit_smoother(sums: FoldSums, *, ridges: Sequence[float] = RIDGES) -> Smoother:
    """The regressions of all folds, each on the others.

    Raises:
        ValueError: fewer than two folds have tokens, or no score differs from another.
    """
    if np.count_nonzero(sums.tokens_K) < 2:
        raise ValueError("smoothing needs documents in two folds at least: there are too few")
    mean = sums.scores_K.sum() / sums.tokens_K.sum()
    spread = sums.squares_K.sum() - sums.tokens_K.sum() * mean**2
    if spread <= 0:
        raise ValueError("all scores are the same: there is nothing to smooth")
    fits = [_fit_others(sums, fold, ridges) for fold in range(len(sums.tokens_K))]
    errors_R = sum(_held_out_error(sums, fold, *fit) for fold, fit in enumerate(fits))
    explained = {ridge: float(1 - error / spread) for ridge, error in zip(ridges, np.asarray(errors_R), strict=True)}
    best = int(np.argmin(errors_R))
    return Smoother(
        weights_KD=np.stack([weights_RD[best] for weights_RD, _ in fits]),
        biases_K=np.array([biases_R[best] for _, biases_R in fits]),
        ridge=ridges[best],
        explained=explained,
    )


def _fit_others(sums: FoldSums, fold: int, ridges: Sequence[float]) -> tuple[Floats, Floats]:
    """Weights (R, D) on features as they are, and biases (R,), of all folds but one."""
    others = np.arange(len(sums.tokens_K)) != fold
    n = sums.tokens_K[others].sum()
    mean_D, mean = sums.features_KD[others].sum(axis=0) / n, sums.scores_K[others].sum() / n
    covariance_DD = sums.products_KDD[others].sum(axis=0) / n - np.outer(mean_D, mean_D)
    spread_D = np.sqrt(np.maximum(np.diagonal(covariance_DD), 0))
    scale_D = np.where(spread_D > SMALL_SPREAD, spread_D, np.inf)  # a constant gets no weight
    moment_D = (sums.moments_KD[others].sum(axis=0) / n - mean_D * mean) / scale_D
    values_D, vectors_DD = np.linalg.eigh(covariance_DD / np.outer(scale_D, scale_D))
    projected_D = vectors_DD.T @ moment_D
    weights_RD = np.stack(
        [vectors_DD @ (projected_D / (np.maximum(values_D, 0) + ridge)) / scale_D for ridge in ridges]
    )
    return weights_RD, mean - weights_RD @ mean_D


def _held_out_error(sums: FoldSums, fold: int, weights_RD: Floats, biases_R: Floats) -> Floats:
    """(R,) sum over the fold's tokens of (s - w . x - b)^2, from its sums."""
    quadratic_R = np.einsum("rd,de,re->r", weights_RD, sums.products_KDD[fold], weights_RD, optimize=True)
    linear_R = weights_RD @ sums.moments_KD[fold]
    shift_R = weights_RD @ sums.features_KD[fold]
    squares = sums.squares_K[fold] + quadratic_R - 2 * linear_R
    result: Floats = squares + biases_R * (2 * (shift_R - sums.scores_K[fold]) + biases_R * sums.tokens_K[fold])
    return result


def cut(scores_N: NDArray[np.floating], *, share: float = CUT) -> Floats:
    """The scores, those beyond the quantiles `share` and 1 - `share` taken for these."""
    result: Floats = np.clip(scores_N.astype(np.float64), *np.quantile(scores_N, [share, 1 - share]))
    return result


def smoothing_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose states are the features, from a sixth of the way up to the top; 0 is the embedding."""
    return tuple(sorted({max(1, round(num_layers * share)) for share in (1 / 6, 1 / 2, 5 / 6, 1)}))
