"""The work of `build_query` on null directions: gradients of groups of the queries, and nulls of their halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ifguide.influence.nulls import groups_for, null_directions
from ifguide.influence.query_file import read_queries, write_nulls
from ifguide.influence.query_worker import FactorsFolder, QuerySettings
from ifguide.tokenizer import load_tokenizer


def build_nulls(settings: QuerySettings, factors: FactorsFolder, seed: int) -> dict[str, float]:
    """Publish `build_query.nulls` null directions beside V, of all its queries; returns the norm of each.

    Cost: one more forward and backward pass over the queries; nulls + 2 gradients are held.

    Raises:
        ValueError: there are too few queries of a set to halve them.
    """
    options = settings.options
    model = settings.model()
    rows = read_queries(settings.folder)
    queries = settings.tokenise(load_tokenizer(settings.tokenizer), rows, model)
    positive = [row.positive for row in rows]
    _require_halves(positive, groups_for(options.nulls))
    nulls = null_directions(
        model,
        queries,
        positive,
        factors.load(settings.module_names),
        count=options.nulls,
        seed=seed,
        batch_tokens=options.batch_tokens,
        weights=[row.weight for row in rows],
        damping=options.damping,
        damping_scale=options.damping_scale,
    )
    write_nulls(settings.folder, nulls)
    return {str(number): _norm(null) for number, null in enumerate(nulls)}


def _norm(direction: Mapping[str, Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in direction.values())) ** 0.5


def _require_halves(positive: Sequence[bool], groups: int) -> None:
    for name, count in (("positive", sum(positive)), ("negative", len(positive) - sum(positive))):
        if 0 < count < groups:
            raise ValueError(
                f"build_query.nulls: {count} {name} queries cannot be dealt to the {groups} groups that so many nulls"
                " need; take more queries or fewer nulls"
            )
