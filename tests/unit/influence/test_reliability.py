"""How far scores depend on which queries were drawn, and scorings as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ifguide.influence.agreement import ranks
from ifguide.influence.nulls import null_directions
from ifguide.influence.query import (
    ModuleFactors,
    TokenisedQuery,
    differential_weights,
    mean_completion_gradient,
)
from ifguide.influence.query_groups import deal_queries, group_gradients, group_weights
from ifguide.influence.reliability import (
    Reliability,
    effective_number,
    measure_reliability,
    separation,
    spearman_brown,
)
from ifguide.models import tracked_modules
from tests.tiny import as_tensors, random_blocks, tiny_model

POSITIVE = [True, True, False, True, False, False, False, True, True]


def queries(*, seed: int = 0, spread: int = 40) -> list[TokenisedQuery]:
    """One for each of `POSITIVE`: completions of few tokens that differ between the sets, or of any (`spread` 40)."""
    rng = np.random.default_rng(seed)
    return [
        TokenisedQuery(
            token_ids=(5, *(int(t) for t in (3 if kind else 30) + rng.integers(0, spread, 3))), completion_start=1
        )
        for kind in POSITIVE
    ]


def identity_factors(model: PreTrainedModel, names: Sequence[str]) -> dict[str, ModuleFactors]:
    factors = {}
    for name in names:
        d_out, d_in = model.get_submodule(name).weight.shape
        factors[name] = ModuleFactors(Q_A=torch.eye(d_in), Q_S=torch.eye(d_out), lambda_mean=torch.ones(d_out, d_in))
    return factors


def test_groups_of_a_set_add_up_to_it() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    names, asked = list(tracked_modules(model).names), queries(spread=15)
    parts = list(group_gradients(model, names, asked, POSITIVE, deal_queries(asked, POSITIVE, 2), batch_tokens=64))
    assert [(part.positive, part.group, part.weight) for part in parts] == [
        (True, 0, 3), (True, 1, 2), (False, 0, 2), (False, 1, 2),
    ]  # fmt: skip
    whole = mean_completion_gradient(model, names, asked, differential_weights(POSITIVE), batch_tokens=64)
    for name in names:
        added = sum(part.gradient[name] * (1 / 5 if part.positive else -1 / 4) for part in parts)
        torch.testing.assert_close(added, whole[name], rtol=1e-9, atol=1e-12)
    first = mean_completion_gradient(model, names, [asked[0], asked[3], asked[8]], [1.0] * 3, batch_tokens=64)
    torch.testing.assert_close(parts[0].gradient, first, rtol=1e-9, atol=1e-12)


def test_a_query_of_weight_two_is_that_query_twice() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    names, asked = list(tracked_modules(model).names), queries(spread=15)[:4]  # + + - +
    weights = differential_weights(POSITIVE[:4], [2.0, 1.0, 0.5, 1.0])
    assert weights == [0.5, 0.25, -1.0, 0.25]
    weighted = mean_completion_gradient(model, names, asked, weights, batch_tokens=64)
    again, kinds = [asked[0], *asked], [True, *POSITIVE[:4]]
    twice = mean_completion_gradient(model, names, again, differential_weights(kinds), batch_tokens=64)
    torch.testing.assert_close(weighted, twice, rtol=1e-9, atol=1e-12)
    parts = list(
        group_gradients(model, names, asked, POSITIVE[:4], [0] * 4, batch_tokens=64, weights=[2.0, 1.0, 0.5, 1.0])
    )
    assert [part.weight for part in parts] == [4.0, 0.5]
    for name in names:
        added = parts[0].gradient[name] / 4.0 - parts[1].gradient[name] / 0.5
        torch.testing.assert_close(added, weighted[name], rtol=1e-9, atol=1e-12)


def test_weighted_queries_count_as_fewer_equal_ones() -> None:
    assert effective_number([3.0] * 7) == pytest.approx(7)
    assert effective_number([1.0, 0.0]) == 1
    assert effective_number([]) == 0
    noise = np.random.default_rng(0).normal(size=(200_000, 3)) @ np.array([2.0, 1.0, 1.0]) / 4
    assert 1 / noise.var() == pytest.approx(effective_number([2.0, 1.0, 1.0]), rel=0.02)


def test_queries_that_are_told_apart() -> None:
    """Along the gradient of one positive completion, that completion's like is higher than another."""
    model = tiny_model("llama")
    names, asked = list(tracked_modules(model).names), queries(spread=1)
    direction = mean_completion_gradient(model, names, asked, differential_weights(POSITIVE), batch_tokens=64)
    assert separation(model, asked, POSITIVE, direction, batch_tokens=8) == 1.0
    assert separation(model, asked, [not kind for kind in POSITIVE], direction) == 0.0
    assert separation(model, [asked[0]] * 6, [True, False] * 3, direction) == 0.5


def test_a_set_smaller_than_the_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="4 queries of a set cannot be dealt to 5 groups"):
        deal_queries(queries(), POSITIVE, 5)


def test_completions_of_a_prompt_are_dealt_together_where_there_are_prompts_enough() -> None:
    def asked(prompts: Sequence[int]) -> list[TokenisedQuery]:
        return [TokenisedQuery(token_ids=(prompt, 9), completion_start=1) for prompt in prompts]

    kinds = [True] * 6 + [False] * 4
    assert deal_queries(asked([1, 1, 2, 2, 3, 3, 1, 7, 8, 7]), kinds, 2) == [0, 0, 1, 1, 0, 0, 0, 1, 0, 1]
    assert deal_queries(asked(range(10)), kinds, 2) == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert deal_queries(asked([4] * 10), kinds, 2) == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]  # one prompt tells nothing apart
    weights = [float(2**row) for row in range(10)]
    dealt = deal_queries(asked([1, 1, 2, 2, 3, 3, 1, 7, 8, 7]), kinds, 2)
    assert group_weights(weights, kinds, dealt) == {
        True: [[1.0, 2.0, 16.0, 32.0], [4.0, 8.0]],
        False: [[64.0, 256.0], [128.0, 512.0]],
    }
    assert group_weights([1.0, 1.0], [True, True], [0, 1]) == {True: [[1.0], [1.0]]}


def test_copies_of_a_query_make_no_query_more_reliable() -> None:
    """Two rows of each prompt that say the same are one query in noise: the halves must not share them."""
    model = tiny_model("llama")
    names = list(tracked_modules(model).names)
    rng = np.random.default_rng(3)
    kinds = [True] * 12 + [False] * 12
    drawn = [TokenisedQuery(token_ids=tuple(int(t) for t in rng.integers(3, 40, 5)), completion_start=2) for _ in kinds]
    twice = [query for query in drawn for _ in range(2)]
    kinds_twice = [kind for kind in kinds for _ in range(2)]
    factors = identity_factors(model, names)
    (once,), (again,) = (
        null_directions(model, of, own, factors, count=1, seed=0, batch_tokens=256)
        for of, own in ((drawn, kinds), (twice, kinds_twice))
    )
    for name in names:
        torch.testing.assert_close(again[name], once[name], rtol=1e-4, atol=1e-6)


def test_queries_that_agree_are_more_reliable_than_those_that_do_not() -> None:
    model = tiny_model("llama")
    names = tracked_modules(model).names[:6]
    factors = identity_factors(model, names)
    blocks = as_tensors(*random_blocks(4, 10))

    def measured(asked: list[TokenisedQuery], positive: list[bool], of: tuple[int, int]) -> Reliability:
        return measure_reliability(model, asked, positive, factors, *blocks, of=of)

    same = measured(queries(spread=1), POSITIVE, (5, 4))
    assert same.spearman == pytest.approx(1.0)
    assert same.reliability == pytest.approx(1.0)
    assert (same.positive, same.negative) == (5, 4)
    assert same.tokens == int((blocks[1] - 1).sum())
    other = measured(queries(spread=15), POSITIVE, (5, 4))
    assert 0 < other.spearman < 0.99
    noise = (1 / 3 + 1 / 2 + 1 / 2 + 1 / 2) / 2
    assert other.reliability == pytest.approx(spearman_brown(other.spearman, noise / (1 / 5 + 1 / 4)))
    assert other.spearman < other.reliability < measured(queries(spread=15), POSITIVE, (500, 400)).reliability
    plain = measured(queries(spread=15)[:2], [True, True], (2, 0))
    assert plain.negative == 0
    assert plain.reliability == pytest.approx(spearman_brown(plain.spearman, 2))


def test_spearman_brown_is_the_reliability_of_the_whole() -> None:
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert spearman_brown(1.0, 7) == 1.0
    assert spearman_brown(-0.2, 2) == 0.0
    rng = np.random.default_rng(0)  # a truth, and four measurements of it
    truth, noise = rng.normal(size=200_000), 2 * rng.normal(size=(4, 200_000))
    halves = [truth + noise[:2].mean(axis=0), truth + noise[2:].mean(axis=0)]
    whole, again = truth + noise.mean(axis=0), truth + 2 * rng.normal(size=(4, 200_000)).mean(axis=0)
    found = spearman_brown(float(np.corrcoef(*halves)[0, 1]), 2)
    assert found == pytest.approx(float(np.corrcoef(whole, again)[0, 1]), abs=0.01)


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks(torch.tensor([0.1, 0.4, 0.2, 0.4])).tolist() == [0, 2.5, 1, 2.5]
