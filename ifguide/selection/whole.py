"""Algorithm 1 on scores that one process holds: the steps of `ifguide.selection.algorithm` over one shard.

It selects what `ifguide.selection.distributed.select` does. Cost: a sort of the scores and of the units.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ifguide.selection.algorithm import (
    Bools,
    Documents,
    Extremes,
    Ints,
    Layout,
    ScoreShard,
    Unit,
    UnitTotals,
    divisors,
    rank_scores,
    token_budget,
)


def select_tokens(
    scores_NT: NDArray[np.float32],
    lengths_N: Ints,
    documents: Documents,
    *,
    quantile: float = 0.99,
    window: int = 1,
    max_fraction: float = 0.02,
    unit: Unit = "document",
    rank_by: Literal["sum", "rate"] = "rate",
    rate_prior: int = 100,
) -> Bools:
    """The (N, T) token mask of Algorithm 1 (IF-Guide, arXiv 2506.01790), label aligned as the scores are.

    scores_NT: higher is masked first; entry j of a block speaks of predicting token j, so index 0 and padding count for
    nothing. lengths_N: real tokens of each block; only the last may have fewer than T. documents: in stream order. At
    most floor(max_fraction * predicted tokens) are masked: those above the `quantile` of all scores with `window`
    neighbours on each side, unit by unit. rank_by, rate_prior: units by what they hold per token, or as in the paper by
    what they hold (`ifguide.selection.algorithm`).

    Raises:
        ValueError: a score is NaN or infinite, or lengths or documents do not cover the blocks.
    """
    shard = ScoreShard(first_block=0, scores=np.asarray(scores_NT, np.float32), lengths=np.asarray(lengths_N, np.int64))
    num_blocks, block_size = shard.scores.shape
    if documents.span != shard.span:
        raise ValueError(f"the documents cover {documents.span} of the stream, the blocks {shard.span}")
    predicted = shard.predicted.astype(np.float64)
    mask = np.zeros((num_blocks, block_size), bool)
    if not len(predicted):
        return mask
    tau = float(np.quantile(predicted, quantile))
    positions, scores = shard.tokens_from(tau)
    above = scores.astype(np.float64) > tau
    positions, layout = positions[above], Layout(documents=documents, block_size=block_size, unit=unit)
    totals = UnitTotals(0, num_blocks if unit == "block" else len(documents.token_start))
    totals.add(positions, scores[above].astype(np.float64), layout, window)
    divisor = divisors(
        layout, totals.first_id + np.arange(len(totals.count)), rate_prior if rank_by == "rate" else None
    )
    s, f = totals.count / divisor, totals.sum / divisor
    rank_score = rank_scores(s, f, Extremes.of(s, f))
    order = np.argsort(-rank_score, kind="stable")  # ties by id
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    chosen = layout.masked(positions, window)
    chosen = chosen[np.argsort(rank[layout.units(chosen)], kind="stable")]  # unit by unit, in position order
    mask.reshape(-1)[chosen[: token_budget(max_fraction, len(predicted))]] = True
    return mask
