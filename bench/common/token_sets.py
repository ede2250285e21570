"""Sets of tokens to leave out of a training, and what scores say of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BOOTSTRAPS = 2000


def document_halves(documents_NT: Ints, count: int, seed: int) -> list[Bools]:
    """`count` masks (N, T) of the tokens whose document is not in a random half of all documents; -1: of none."""
    number = int(documents_NT.max()) + 1
    halves = []
    for index in range(count):
        left_out = np.ones(number, bool)
        left_out[np.random.default_rng([seed, index]).permutation(number)[: number // 2]] = False
        halves.append(left_out[documents_NT] & (documents_NT >= 0))
    return halves


def token_count(candidates_NT: Bools, share: float) -> int:
    """How many tokens a share of the candidates is; at least one."""
    return max(1, int(share * candidates_NT.sum()))


def top_tokens(scores_NT: NDArray[np.floating], candidates_NT: Bools, count: int, seed: int) -> Bools:
    """The `count` candidates of the highest scores; equal scores in random order."""
    places = np.random.default_rng(seed).permutation(np.flatnonzero(candidates_NT))
    order = np.argsort(-scores_NT.reshape(-1)[places], kind="stable")
    chosen = np.zeros(candidates_NT.size, bool)
    chosen[places[order[:count]]] = True
    return chosen.reshape(candidates_NT.shape)


def predictions(scores_NT: NDArray[np.floating], left_out: Sequence[Bools]) -> Floats:
    """The sum of the scores of the tokens that each training learns from."""
    return np.array([float(scores_NT[~mask].sum(dtype=np.float64)) for mask in left_out])


def rank_correlation(predicted: Floats, actual: Floats) -> float:
    """Spearman's; 0 where one of them is constant."""
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return 0.0
    return float(stats.spearmanr(predicted, actual).statistic)


def correlation_intervals(predicted: dict[str, Floats], actual: Floats, seed: int) -> dict[str, list[float]]:
    """95% intervals of each score's rank correlation, of a bootstrap over retrainings: the same draws for all scores.

    `A-B`: of the difference of the first score and each other one."""
    rng, names = np.random.default_rng(seed), list(predicted)
    draws = []
    for _ in range(BOOTSTRAPS):
        rows = rng.integers(0, len(actual), len(actual))
        draws.append([rank_correlation(predicted[name][rows], actual[rows]) for name in names])
    correlations = dict(zip(names, np.array(draws).T, strict=True))
    correlations |= {f"{names[0]}-{other}": correlations[names[0]] - correlations[other] for other in names[1:]}
    return {
        name: [round(float(value), 4) for value in np.percentile(each, [2.5, 97.5])]
        for name, each in correlations.items()
    }
