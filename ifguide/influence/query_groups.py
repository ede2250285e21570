"""Groups of the queries, whose gradients tell the noise of their choice: for reliability, and for null directions."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
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
        for row, number in zip(rows, counted_as([prompt_of(queries[row]) for row in rows], groups), strict=True):
            dealt[row] = number % groups
    return dealt


def prompt_of(query: TokenisedQuery) -> tuple[int, ...]:
    return tuple(query.token_ids[: query.completion_start])


def counted_as(prompts: Sequence[Hashable], groups: int) -> list[int]:
    """(N,) what each query of a set counts as: its prompt, by number, or itself where there are fewer prompts than
    groups."""
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return places if len(numbers) >= groups else list(range(len(places)))


def total_weights(counted: Sequence[int], weights: Sequence[float]) -> list[float]:
    """The sum of the weights of the queries that count as one, of each such one."""
    totals: dict[int, float] = {}
    for number, weight in zip(counted, weights, strict=True):
        totals[number] = totals.get(number, 0.0) + weight
    return list(totals.values())


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


def group_weights(
    weights: Sequence[float], positive: Sequence[bool], dealt: Sequence[int]
) -> dict[bool, list[list[float]]]:
    """Set -> the weights of the queries of each group; a set without queries is left out."""
    groups = max(dealt) + 1
    by_set: dict[bool, list[list[float]]] = {}
    for weight, kind, group in zip(weights, positive, dealt, strict=True):
        by_set.setdefault(kind, [[] for _ in range(groups)])[group].append(weight)
    return by_set
