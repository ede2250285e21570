"""The work of `build_query` on null directions: gradients of groups of the queries, and nulls of their halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ifguide.influence.nulls import half_signs, null_gradients
from ifguide.influence.proxy import load_proxy
from ifguide.influence.query import group_gradients, load_factors, precondition, tokenise_query
from ifguide.influence.query_file import read_queries, write_nulls
from ifguide.influence.query_worker import FactorsFolder, QuerySettings
from ifguide.storage import local_copy
from ifguide.tokenizer import load_tokenizer


def build_nulls(settings: QuerySettings, factors: FactorsFolder, seed: int) -> dict[str, float]:
    """Publish `build_query.nulls` null directions beside V, of all its queries; returns the norm of each.

    Cost: one more forward and backward pass over the queries; nulls + 2 gradients are held.

    Raises:
        ValueError: there are too few queries of a set to halve them.
    """
    options = settings.options
    model = load_proxy(settings.proxy, gpus=options.resources.gpus)
    tokenizer, beginning = load_tokenizer(settings.tokenizer), settings.beginning.token
    rows = read_queries(settings.folder)
    queries = [
        tokenise_query(tokenizer, row.prompt, row.completion, max_tokens=options.max_tokens, beginning=beginning)
        for row in rows
    ]
    positive = [row.positive for row in rows]
    signs_KG = half_signs(options.nulls, seed)
    _require_halves(positive, signs_KG.shape[1])
    groups = group_gradients(
        model, settings.module_names, queries, positive, groups=signs_KG.shape[1], batch_tokens=options.batch_tokens
    )
    gradients = null_gradients(groups, signs_KG, {True: sum(positive), False: len(positive) - sum(positive)})
    loaded = load_factors(local_copy(factors.folder), [factors.names[name] for name in settings.module_names])
    of_modules = {name: loaded[factors.names[name]] for name in settings.module_names}
    nulls = [
        precondition(gradient, of_modules, damping=options.damping, damping_scale=options.damping_scale)
        for gradient in gradients
    ]
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
