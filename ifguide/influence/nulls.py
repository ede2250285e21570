"""Null directions: what V would be if only the choice of queries spoke, from halves of the queries.

The mean gradients of the two query sets are noisy, for other queries could have been drawn. To see how much of a score
is that noise, deal each set into two halves, P+ and P- of the positive queries, N+ and N- of the negative ones, and
take half the difference of the two differential gradients:

    G_null = (mean P+ - mean P-) / 2  -  (mean N+ - mean N-) / 2

Half of each set has changed sides. What is common to a set cancels exactly, so the behaviour itself does not leak in;
the variance is s_P^2 / n + s_N^2 / m, with s^2 the variance of one query's gradient: that of the noise of

    G = mean P - mean N.

(Free relabelling would leave a random share of the behaviour in the null, and widen it most where V is right.) Several
nulls come from groups of the queries and the rows of a Hadamard matrix (balanced repeated replication, McCarthy 1969):
each row sums to zero and is orthogonal to the others, so that the nulls are uncorrelated with each other and with V.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.query import (
    ModuleFactors,
    TokenisedQuery,
    add_gradient,
    precondition,
)
from ifguide.influence.query_groups import GroupGradient, deal_queries, group_gradients, group_weights

Floats = NDArray[np.float64]


def groups_for(count: int) -> int:
    """The least number of groups that have `count` nulls: a power of two above it."""
    return 1 << max(1, count.bit_length())


def half_signs(count: int, seed: int) -> Floats:
    """(K, G) of +1 and -1: the half of each group in each of K nulls. Rows sum to 0 and are orthogonal.

    The seed draws which rows of the Hadamard matrix (Sylvester's) are taken, and in which order the groups stand."""
    groups = groups_for(count)
    hadamard = np.ones((1, 1))
    while len(hadamard) < groups:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rng = np.random.default_rng([seed, count])
    rows = 1 + rng.permutation(groups - 1)[:count]
    return np.asarray(hadamard[rows][:, rng.permutation(groups)])


def half_weights(signs_KG: Floats, queries_G: Sequence[float]) -> Floats:
    """(K, G) weights with which the groups' sums of gradients add up to half the difference of the halves' means.

    queries_G: how many queries of one set each group has, or the sum of their weights. However unequal, the weights of
    the queries add up to 0.

    Raises:
        ValueError: a half has no query.
    """
    sizes_G = np.asarray(queries_G, np.float64)
    halves_K = [np.where(signs_KG == sign, sizes_G, 0).sum(axis=1) for sign in (1, -1)]
    if min(half.min(initial=np.inf) for half in halves_K) == 0:
        raise ValueError(f"{sizes_G.sum():g} queries of a set are too few for halves of {len(sizes_G)} groups")
    upper_K, lower_K = halves_K
    result: Floats = np.where(signs_KG == 1, 0.5 / upper_K[:, None], -0.5 / lower_K[:, None])
    return result


def null_gradients(
    groups: Iterable[GroupGradient], signs_KG: Floats, sizes: Mapping[bool, Sequence[float]]
) -> list[dict[str, Tensor]]:
    """G_null of each row of signs, per module as the gradients are; K of them are held, and one group's.

    groups: of G groups, as `group_gradients` gives them. sizes: how many queries each group of
    the positive set has (True), and of the negative one (False; none where V is of the positive mean alone), or the sum
    of their weights.
    """
    weights = {
        kind: half_weights(signs_KG, of_groups) * (1 if kind else -1) for kind, of_groups in sizes.items() if of_groups
    }
    totals: list[dict[str, Tensor]] = [{} for _ in signs_KG]
    for of_group in groups:
        for total, weight in zip(totals, weights[of_group.positive][:, of_group.group].tolist(), strict=True):
            add_gradient(total, of_group.gradient, weight)
    return totals


def null_directions(
    model: PreTrainedModel,
    queries: Sequence[TokenisedQuery],
    positive: Sequence[bool],
    factors: Mapping[str, ModuleFactors],
    *,
    count: int,
    seed: int,
    batch_tokens: int,
    weights: Sequence[float] | None = None,
    damping: float | None = None,
    damping_scale: float = 0.1,
) -> list[dict[str, Tensor]]:
    """`count` null directions of the queries, with their `weights`, preconditioned as V is; the options are those of
    `build_direction`.

    Raises ValueError when there are too few queries of a set to halve them.
    """
    signs_KG = half_signs(count, seed)
    own = [1.0] * len(queries) if weights is None else weights
    dealt = deal_queries(queries, positive, signs_KG.shape[1])
    groups = group_gradients(model, list(factors), queries, positive, dealt, batch_tokens=batch_tokens, weights=own)
    sizes = {kind: list(map(sum, of_set)) for kind, of_set in group_weights(own, positive, dealt).items()}
    gradients = null_gradients(groups, signs_KG, sizes)
    return [precondition(gradient, factors, damping=damping, damping_scale=damping_scale) for gradient in gradients]
