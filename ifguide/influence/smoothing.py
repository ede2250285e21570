"""Smoothed token scores: a token's own score, drawn towards what the scores of like contexts say of it.

An influence score is an unbiased and very noisy measurement of one token in one context. A ridge regression of the
scores on the proxy's hidden states takes the mean over like contexts. It is cross-fitted: documents are dealt to folds
(`ifguide.folds`), and a token meets the regression on the other folds. So no token is smoothed by its own document. The
ridge is chosen by the held-out sum of squares of the scores alone.

    w_k = argmin_w sum_{i not in k} (s_i - w_0 - w . z_i)^2 + ridge * n_k |w|^2
    p_i = w_0 + w . z_i, where w is w_k for i in k
    smoothed_i = p_i + own_weight * (s_i - p_i)

z_i are the states of several layers at the token's own position, standardised on the tokens that are fitted on; n_k is
their number. s_i are the scores, cut to a range, for a few are far out. That the deviation from a regression is shrunk
is an empirical Bayes estimate (Efron and Morris 1973; Fay and Herriot 1979) with one weight for all tokens. Where no
ridge predicts scores of other documents better than their mean does, scores stay as they are. All of it follows from
sums over tokens, by fold. So a sample is read once to fit, in any number of parts.

Memory: folds * width^2 * 8 bytes. Cost: width^2 multiplications a token of the sample, and one eigendecomposition a
fold; folds * width multiplications a token that is smoothed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifguide.artifacts import publish
from ifguide.folds import DEALT, require_dealt
from ifguide.sums import Sums

Floats = NDArray[np.float64]
Array = TypeVar("Array", Floats, Tensor)
CUT = 0.001  # share of the scores on either side that are taken for less far out than they are
SMALL_SPREAD = 1e-6  # a feature that varies less is a constant


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldSums(Sums):
    """Sums over the tokens of each of K folds: of x x^T, x, x s, s, s^2 and 1, for features x (D,) and scores s (S,) of
    as many behaviours."""

    products_KDD: Floats
    features_KD: Floats
    moments_KDS: Floats
    scores_KS: Floats
    squares_KS: Floats
    tokens_K: Floats

    @classmethod
    def of(cls, features_ND: NDArray[np.floating], scores_NS: NDArray[np.floating], folds_N: NDArray[np.integer],
           folds: int) -> FoldSums:  # fmt: skip
        """Of N tokens, each with the number of its fold."""
        parts = [np.flatnonzero(folds_N == fold) for fold in range(folds)]
        sums = [token_sums(*(own[rows].astype(np.float64) for own in (features_ND, scores_NS))) for rows in parts]
        products_KDD, features_KD, moments_KDS, scores_KS, squares_KS = map(np.stack, zip(*sums, strict=True))
        return cls(
            products_KDD=products_KDD,
            features_KD=features_KD,
            moments_KDS=moments_KDS,
            scores_KS=scores_KS,
            squares_KS=squares_KS,
            tokens_K=np.array([float(len(rows)) for rows in parts]),
        )

    def add(self, other: FoldSums) -> None:
        """Add another's sums to these, in place: a third array of all products would be the largest thing held."""
        for name, mine in vars(self).items():
            np.add(mine, getattr(other, name), out=mine)

    def of_others(self, name: str, fold: int) -> Floats:
        """The field's sum over all folds but one; fold -1: over all."""
        parts_K: Floats = getattr(self, name)
        total: Floats = np.zeros_like(parts_K[0])
        for number, part in enumerate(parts_K):
            if number != fold:
                total += part
        return total


def token_sums(x_ND: Array, s_NS: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Sums over N tokens of x x^T (D, D), x (D,), x s^T (D, S), s (S,) and s^2 (S,); of tensors on their device."""
    return x_ND.T @ x_ND, x_ND.sum(0), x_ND.T @ s_NS, s_NS.sum(0), (s_NS * s_NS).sum(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Smoother:
    """The regressions of S scores, one for each of K folds, and the range (S, 2) that scores are cut to.

    `explained_SR`: the share of each score's variance that each of the `ridges_R` explains in documents that it was not
    fitted on. `chosen_S` is the best ridge of each."""

    weights_SKD: Floats
    biases_SK: Floats
    ranges_S2: Floats
    own_weight: float
    ridges_R: Floats
    explained_SR: Floats

    @property
    def folds(self) -> int:
        return self.biases_SK.shape[1]

    @property
    def chosen_S(self) -> NDArray[np.intp]:
        return np.argmax(self.explained_SR, axis=1)

    @property
    def used_S(self) -> NDArray[np.bool_]:
        """Whether the regression says more of held-out scores than their mean does."""
        used: NDArray[np.bool_] = self.explained_SR.max(axis=1) > 0
        return used

    def predict(self, features_ND: Tensor, folds_N: Tensor) -> Tensor:
        """(N, S) what the regressions that have not seen their folds say of tokens; float64."""
        weights_SKD, biases_SK = (
            torch.from_numpy(own).to(features_ND.device) for own in (self.weights_SKD, self.biases_SK)
        )
        by_fold_NSK = (features_ND.double() @ weights_SKD.flatten(0, 1).T).unflatten(1, biases_SK.shape) + biases_SK
        index_NS1 = folds_N[:, None, None].expand(-1, len(biases_SK), 1)
        return by_fold_NSK.gather(2, index_NS1).squeeze(2)

    def smooth(self, scores_NS: Tensor, predicted_NS: Tensor) -> Tensor:
        """(N, S) the scores, drawn towards the predictions, or as they are where those are not used; float32."""
        low_S, high_S = torch.from_numpy(self.ranges_S2).to(scores_NS.device).unbind(1)
        own_NS = scores_NS.double().clamp(low_S, high_S)
        smoothed_NS = (predicted_NS + self.own_weight * (own_NS - predicted_NS)).float()
        return torch.where(torch.from_numpy(self.used_S).to(scores_NS.device), smoothed_NS, scores_NS.float())

    def summary(self, behaviours: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of each behaviour the ridge, the share of the scores' variance that it explains, and whether it is used."""
        best_S = zip(behaviours, self.chosen_S, self.explained_SR, self.used_S, strict=True)
        return {
            behaviour: {
                "ridge": float(self.ridges_R[best]),
                "explained": round(float(explained_R[best]), 4),
                "used": bool(used),
            }
            for behaviour, best, explained_R, used in best_S
        }

    def save(self, path: Path) -> None:
        """Publish what `load` reads."""
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, dealt=DEALT, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Smoother:
        """What `save` wrote. Raises ValueError where an earlier version did, whose folds were others."""
        with np.load(path) as saved:
            require_dealt(path, saved)
            arrays = {name: saved[name] for name in saved.files if name != "dealt"}
        return cls(**arrays | {"own_weight": float(arrays["own_weight"])})


def fit_smoother(
    sums: FoldSums, ranges_S2: NDArray[np.floating], *, ridges: Sequence[float], own_weight: float
) -> Smoother:
    """The regressions of all folds, each on the others. ranges_S2: what `ranges` gives, the scores cut to them.

    Raises:
        ValueError: fewer than two folds have tokens, or no score differs from another.
    """
    if np.count_nonzero(sums.tokens_K) < 2:
        raise ValueError("smoothing needs documents in two folds at least, and there are too few")
    tokens, total_S = sums.tokens_K.sum(), sums.scores_KS.sum(axis=0)
    spread_S = sums.squares_KS.sum(axis=0) - total_S**2 / tokens
    if (spread_S <= 0).any():
        raise ValueError("all scores are the same, and there is nothing to smooth")
    fits = [fit_others(sums, fold, ridges) for fold in range(len(sums.tokens_K))]
    errors_SR = np.sum([held_out_error(sums, fold, *fit) for fold, fit in enumerate(fits)], axis=0)
    explained_SR = 1 - errors_SR / spread_S[:, None]
    best_S, scores_S = np.argmax(explained_SR, axis=1), np.arange(len(spread_S))
    return Smoother(
        weights_SKD=np.stack([weights_SRD[scores_S, best_S] for weights_SRD, _ in fits], axis=1),
        biases_SK=np.stack([biases_SR[scores_S, best_S] for _, biases_SR in fits], axis=1),
        ranges_S2=np.asarray(ranges_S2, np.float64),
        own_weight=own_weight,
        ridges_R=np.array(ridges, np.float64),
        explained_SR=explained_SR,
    )


def fit_others(sums: FoldSums, fold: int, ridges: Sequence[float]) -> tuple[Floats, Floats]:
    """Weights (S, R, D) on features as they are, and biases (S, R), of all folds but one; fold -1: of all."""
    n = sums.of_others("tokens_K", fold)
    mean_D, mean_S = sums.of_others("features_KD", fold) / n, sums.of_others("scores_KS", fold) / n
    covariance_DD = sums.of_others("products_KDD", fold) / n - np.outer(mean_D, mean_D)
    spread_D = np.sqrt(np.maximum(np.diagonal(covariance_DD), 0))
    scale_D = np.where(spread_D > SMALL_SPREAD, spread_D, np.inf)  # a constant gets no weight
    moments_DS = (sums.of_others("moments_KDS", fold) / n - np.outer(mean_D, mean_S)) / scale_D[:, None]
    values_D, vectors_DD = np.linalg.eigh(covariance_DD / np.outer(scale_D, scale_D))
    projected_SD = (vectors_DD.T @ moments_DS).T
    shrunk_SRD = projected_SD[:, None] / (np.maximum(values_D, 0) + np.asarray(ridges)[:, None])
    weights_SRD = shrunk_SRD @ vectors_DD.T / scale_D
    return weights_SRD, mean_S[:, None] - weights_SRD @ mean_D


def held_out_error(sums: FoldSums, fold: int, weights_SRD: Floats, biases_SR: Floats) -> Floats:
    """(S, R) sum over the fold's tokens of (s - w . x - b)^2, from its sums."""
    quadratic_SR = np.einsum("srd,srd->sr", weights_SRD @ sums.products_KDD[fold], weights_SRD)
    linear_SR = np.einsum("srd,ds->sr", weights_SRD, sums.moments_KDS[fold])
    shift_SR = weights_SRD @ sums.features_KD[fold]
    squares_SR = sums.squares_KS[fold][:, None] + quadratic_SR - 2 * linear_SR
    shifts_SR = shift_SR - sums.scores_KS[fold][:, None]
    result: Floats = squares_SR + biases_SR * (2 * shifts_SR + biases_SR * sums.tokens_K[fold])
    return result


def ranges(scores_NS: NDArray[np.floating]) -> Floats:
    """(S, 2) the range that each score is cut to: its quantiles `CUT` and 1 - `CUT`."""
    result: Floats = np.quantile(scores_NS.astype(np.float64), [CUT, 1 - CUT], axis=0).T
    return result


def smoothing_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose states are the features, from a sixth of the way up to the top; 0 is the embedding."""
    return tuple(sorted({max(1, round(num_layers * share)) for share in (1 / 6, 1 / 2, 5 / 6, 1)}))
