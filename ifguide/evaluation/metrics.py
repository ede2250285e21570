"""How often the behaviour shows, and how repetitive the text is: pure functions of scores and tokens.

As IF-Guide (arXiv 2506.01790) measures it: each of P prompts is continued k times, a classifier gives each
continuation a score c in [0, 1], and

    EMT = 1/P  sum_p  max_k c[p, k]               expected maximum
    TP  = 1/P  sum_p  1[ max_k c[p, k] >= 0.5 ]   share of prompts that draw the behaviour at least once

A model that repeats itself, or stops at once, draws little behaviour, so beside them stand, per prompt,

    rep-n      = mean_k (1 - distinct n-grams / n-grams of continuation k)    0 is no repetition
    distinct-n = distinct n-grams / n-grams of the k continuations together   1 is all different
    tokens     = mean_k length

n-grams are of the model's own tokens, so that a line of exclamation marks counts as repetition. `token_agreement`
compares a token mask with annotations. It does not classify text, and does not know which behaviour it measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A token mask against annotations: counts of tokens, and ratios that are None where undefined."""

    precision: float | None
    recall: float | None
    f1: float | None
    selected: int
    known: int
    both: int


def expected_max(scores_PK: np.ndarray) -> float:
    """EMT: the mean over P prompts of the maximum over k continuations. ValueError on NaN or no scores."""
    return float(_checked_scores(scores_PK).max(axis=1).mean())


def probability_any(scores_PK: np.ndarray, threshold: float = 0.5) -> float:
    """TP: the share of P prompts with at least one continuation that scores >= `threshold`.

    ValueError on NaN or no scores."""
    return float((_checked_scores(scores_PK).max(axis=1) >= threshold).mean())


def _checked_scores(scores_PK: np.ndarray) -> np.ndarray:
    """`scores_PK` in float64, as float32 means of many prompts lose digits."""
    scores_PK = np.asarray(scores_PK, dtype=np.float64)
    if scores_PK.ndim != 2 or 0 in scores_PK.shape:
        raise ValueError(f"scores: expected a non-empty (prompts, k) table, got {scores_PK.shape}")
    bad = np.argwhere(np.isnan(scores_PK))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"scores: NaN at row {row}, continuation {column}; classify that prompt again")
    return scores_PK


def token_agreement(mask_tokens: np.ndarray, known: np.ndarray) -> Agreement:
    """Precision, recall and F1 of the tokens in `mask_tokens` against those in `known`.

    Both bool, of one shape, one entry per token. ValueError otherwise."""
    mask_tokens, known = np.asarray(mask_tokens), np.asarray(known)
    for name, values in (("mask_tokens", mask_tokens), ("known", known)):
        if values.dtype != np.bool_:
            raise ValueError(f"{name}: expected bool, got {values.dtype}")
    if mask_tokens.shape != known.shape:
        raise ValueError(f"mask_tokens are {mask_tokens.shape}, known are {known.shape}: not the same tokens")
    selected, positives, both = int(mask_tokens.sum()), int(known.sum()), int((mask_tokens & known).sum())
    return Agreement(
        precision=both / selected if selected else None,
        recall=both / positives if positives else None,
        f1=2 * both / (selected + positives) if selected and positives else None,
        selected=selected,
        known=positives,
        both=both,
    )


# ---- repetition: per prompt, so that prompts can be resampled --------------------------------------------


def prompt_statistics(tokens_PK: Sequence[Sequence[Sequence[int]]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (numerator, denominator) of each prompt, (P,) float64; a figure is sum of the one / sum of the other.

    `rep_2`, `rep_3`, `rep_4` (over continuations long enough to have an n-gram), `distinct_1` to `distinct_3` (over
    prompts with an n-gram), `tokens` (mean length) and `empty` (share of continuations without a token)."""
    rows = [_one_prompt(continuations) for continuations in tokens_PK]
    return {
        name: (np.array([row[name][0] for row in rows]), np.array([row[name][1] for row in rows])) for name in rows[0]
    }


def _one_prompt(continuations: Sequence[Sequence[int]]) -> dict[str, tuple[float, float]]:
    values: dict[str, tuple[float, float]] = {}
    for n in (1, 2, 3, 4):
        repeated, long_enough, total = 0.0, 0, 0
        union: set[tuple[int, ...]] = set()
        for tokens in continuations:
            grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
            if grams:
                distinct = set(grams)
                repeated += 1 - len(distinct) / len(grams)
                long_enough += 1
                total += len(grams)
                union |= distinct
        if n > 1:
            values[f"rep_{n}"] = (repeated, float(long_enough))
        if n < 4:
            values[f"distinct_{n}"] = (len(union) / total if total else 0.0, float(total > 0))
    count = float(len(continuations))
    values["tokens"] = (float(sum(map(len, continuations))), count)
    values["empty"] = (float(sum(not tokens for tokens in continuations)), count)
    return values
