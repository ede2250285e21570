"""Groups of the queries, whose gradients tell the noise of their choice: for reliability, and for null directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.query import TokenisedQuery, mean_completion_gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupGradient:
    """The sum over the queries of one set (`positive` or not) in one group of the gradients of their completions'
    summed NLL, per module, each times the query's weight; `weight` is the sum of these."""

    group: int
    positive: bool
    weight: float
    gradient: dict[str, Tensor]


def deal_queries(queries: Sequence[TokenisedQuery], positive: Sequence[bool], groups: int) -> list[int]:
    """(N,) the group of each query. Those of one set are dealt in turn, all completions of a prompt to one group, for
    they say much the same; query by query where a set has fewer prompts than groups, as without any.

    Raises ValueError when a set has fewer queries than groups.
    """
    dealt = [0] * len(queries)
    for kind in (True, False):
        rows = [row for row, of in enumerate(positive) if of == kind]
        if 0 < len(rows) < groups:
            raise ValueError(f"{len(rows)} queries of a set cannot be dealt to {groups} groups")
        prompts: dict[tuple[int, ...], int] = {}
        own = [tuple(queries[row].token_ids[: queries[row].completion_start]) for row in rows]
        places = [prompts.setdefault(prompt, len(prompts)) for prompt in own]
        for place, row in enumerate(rows):
            dealt[row] = (places[place] if len(prompts) >= groups else place) % groups
    return dealt


def group_gradients(
    model: PreTrainedModel,
    names: Sequence[str],
    queries: Sequence[TokenisedQuery],
    positive: Sequence[bool],
    dealt: Sequence[int],
    *,
    batch_tokens: int,
    weights: Sequence[float] | None = None,
) -> Iterator[GroupGradient]:
    """The gradients of disjoint groups of each set, one at a time; `dealt`: the group of each query.

    Means of groups are independent of each other, so what differs between them is noise of the choice of queries. A set
    without queries has no groups. Without `weights` each is 1. Cost: that of `mean_completion_gradient` of all queries.
    """
    own = [1.0] * len(queries) if weights is None else weights
    members: dict[tuple[bool, int], list[int]] = {}
    for row, of in enumerate(zip(positive, dealt, strict=True)):
        members.setdefault(of, []).append(row)
    for (kind, group), rows in sorted(members.items(), key=lambda item: (not item[0][0], item[0][1])):
        part, of_part = [queries[row] for row in rows], [own[row] for row in rows]
        gradient = mean_completion_gradient(model, names, part, of_part, batch_tokens=batch_tokens)
        yield GroupGradient(group=group, positive=kind, weight=sum(of_part), gradient=gradient)


def prompt_weights(prompts: Sequence[object], weights: Sequence[float], groups: int) -> list[float]:
    """The sum of the weights of each prompt's queries, or the weights where there are fewer prompts than groups."""
    totals: dict[object, float] = {}
    for prompt, weight in zip(prompts, weights, strict=True):
        totals[prompt] = totals.get(prompt, 0.0) + weight
    return list(totals.values()) if len(totals) >= groups else list(weights)


def group_weights(
    weights: Sequence[float], positive: Sequence[bool], dealt: Sequence[int]
) -> dict[bool, list[list[float]]]:
    """Set -> the weights of the queries of each group; a set without queries is left out."""
    groups = max(dealt) + 1
    by_set: dict[bool, list[list[float]]] = {}
    for weight, kind, group in zip(weights, positive, dealt, strict=True):
        by_set.setdefault(kind, [[] for _ in range(groups)])[group].append(weight)
    return by_set
