"""How far scores depend on which queries were drawn: the agreement of scores by either half of the queries.

The queries of each set are dealt to two halves, those of one prompt to the same. Each half has a direction V of its
own, with the same factors, and the same tokens are scored along both. What differs is noise: of the choice of queries,
not of the model or the factors. With r the rank correlation of the two scorings, the Spearman-Brown formula estimates
that of scores by all queries with scores by as many others,

    reliability = f r / (1 + (f - 1) r),    f = (noise variance of a half) / (that of all queries).

It is the share of the scores' variance that is not noise. Their correlation with scores by endlessly many queries is
its square root.

The differential gradient is a difference of two means, so its noise variance goes with 1 / positive + 1 / negative
queries, if a query of either set is as noisy; weighted ones count as (sum w)^2 / sum w^2. f is 2 where the halves are
halves of all queries, and more where they are of a sample. 1 says that more queries change nothing; at 0.5 half of the
variance of the scores' ranks is noise.

`separation` asks what reliability cannot: whether V speaks of the behaviour, or of these queries alone. It is the AUROC
of queries that V is not made of, each by the mean score of its completion's tokens.

The directions are EK-FAC's: refinement is linear in the gradient, and not repeated for the halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.agreement import compare, ranks
from ifguide.influence.method import PRESETS
from ifguide.influence.query import (
    ModuleFactors,
    TokenisedQuery,
    add_gradient,
    length_batches,
    padded,
    precondition,
)
from ifguide.influence.query_groups import counted_as, deal_queries, group_gradients, prompt_of, total_weights
from ifguide.influence.scorer import TokenScorer
from ifguide.models import predicted_positions

HALVES = 2


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """`spearman` of the scores of `tokens` tokens by two halves of `positive` + `negative` queries; `reliability` of
    the scores by all queries, from 0 to 1."""

    reliability: float
    spearman: float
    positive: int
    negative: int
    tokens: int


def measure_reliability(
    model: PreTrainedModel,
    queries: Sequence[TokenisedQuery],
    positive: Sequence[bool],
    factors: Mapping[str, ModuleFactors],
    tokens_NT: Tensor,
    lengths_N: Tensor,
    *,
    of: tuple[float, float],
    weights: Sequence[float] | None = None,
    batch_tokens: int = 4096,
    damping: float | None = None,
    damping_scale: float = 0.1,
    beginning: int | None = None,
    document_NT: Tensor | None = None,
) -> Reliability:
    """Of scores of the blocks' tokens by all `of` (positive, negative) queries, judged by halves of `queries`: of all,
    or of a sample. `of` is the `effective_number` of each whole set's `total_weights`. The other options are those of
    `build_direction` and `score_tokens`.

    Raises ValueError when a set has a single query.
    """
    halves: list[dict[str, Tensor]] = [{} for _ in range(HALVES)]
    own = [1.0] * len(queries) if weights is None else weights
    dealt = deal_queries(queries, positive, HALVES)
    for part in group_gradients(model, list(factors), queries, positive, dealt, batch_tokens=batch_tokens, weights=own):
        add_gradient(halves[part.group], part.gradient, (1 if part.positive else -1) / part.weight)
    directions = [precondition(half, factors, damping=damping, damping_scale=damping_scale) for half in halves]
    scorer = TokenScorer(model, directions, attribution="target", method=PRESETS["exact"], beginning=beginning)
    scores_KNT = scorer.score_one_by_one(tokens_NT, lengths_N, document_NT)
    predicted_NT = predicted_positions(tokens_NT, lengths_N, document_NT)
    spearman = compare(scores_KNT[0], scores_KNT[1], predicted_NT).spearman
    noise = sum(map(_noise, *(_numbers(queries, own, positive, dealt, kind) for kind in (True, False)))) / HALVES
    return Reliability(
        reliability=spearman_brown(spearman, noise / _noise(*of)),
        spearman=spearman,
        positive=sum(positive),
        negative=len(positive) - sum(positive),
        tokens=int(predicted_NT.sum()),
    )


def _numbers(
    queries: Sequence[TokenisedQuery],
    weights: Sequence[float],
    positive: Sequence[bool],
    dealt: Sequence[int],
    kind: bool,
) -> list[float]:
    """As how many equal prompts the mean of each half of a set is noisy."""
    rows = [row for row, own in enumerate(positive) if own == kind]
    counted = counted_as([prompt_of(queries[row]) for row in rows], HALVES)
    halves = [[place for place, row in enumerate(rows) if dealt[row] == half] for half in range(HALVES)]
    return [effective_number(total_weights([counted[i] for i in of], [weights[rows[i]] for i in of])) for of in halves]


def separation(
    model: PreTrainedModel,
    queries: Sequence[TokenisedQuery],
    positive: Sequence[bool],
    direction: Mapping[str, Tensor],
    *,
    batch_tokens: int = 4096,
) -> float:
    """The probability that a positive query has a higher mean score of its completion's tokens than a negative one; 0.5
    is chance. Both kinds are needed."""
    scorer = TokenScorer(model, [direction], attribution="target", method=PRESETS["exact"])
    means = torch.zeros(len(queries), dtype=torch.float64)
    for numbers in length_batches(queries, batch_tokens):
        tokens_BT, lengths_B = padded([queries[i].token_ids for i in numbers])
        scores_BT = scorer.score(tokens_BT, lengths_B)[0].double().cpu()
        for i, scores_T in zip(numbers, scores_BT, strict=True):
            means[i] = scores_T[queries[i].completion_start : len(queries[i].token_ids)].mean()
    ranks_N = ranks(means)
    kinds = torch.tensor(positive)
    n, m = int(kinds.sum()), int((~kinds).sum())
    return float(ranks_N[kinds].sum() - n * (n - 1) / 2) / (n * m)


def spearman_brown(correlation: float, factor: float) -> float:
    """The reliability of a measurement whose noise variance is 1 / `factor` of that of each of two that correlate so;
    0 where they do not."""
    if correlation <= 0:
        return 0.0
    return factor * correlation / (1 + (factor - 1) * correlation)


def effective_number(weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2: of how many equal queries a mean is as noisy as that of weighted ones (Kish 1965); 0 of
    none."""
    squares = sum(w * w for w in weights)
    return sum(weights) ** 2 / squares if squares else 0.0


def _noise(positive: float, negative: float) -> float:
    """Noise variance of a difference of means of so many queries, in that of one query; of one mean alone."""
    return 1 / positive + (1 / negative if negative else 0)
