"""z-scores and false-discovery rates against slow oracles in float64, and their rates where the truth is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from ifguide.influence.nulls import groups_for, half_signs, half_weights, null_gradients
from ifguide.influence.query import TokenisedQuery, mean_completion_gradient
from ifguide.influence.query_groups import GroupGradient
from ifguide.influence.scorer import TokenScorer
from ifguide.models import tracked_modules
from ifguide.selection.fdr import (
    Spread,
    digamma,
    discoveries,
    fit_spread,
    null_variance,
    standardise,
    trigamma,
)
from ifguide.selection.quantiles import high_histogram
from tests.tiny import VOCABULARY, tiny_model

LEVELS = (0.001, 0.01, 0.1)


def oracle_z(scores: list[float], spread: Spread) -> list[float]:
    """z of a token's own score and its nulls, one by one."""
    found = []
    for i, score in enumerate(scores):
        others = sum(other * other for row, other in enumerate(scores) if row != i)
        variance = (spread.weight * spread.variance + others) / (spread.weight + len(scores) - 1)
        found.append(score / math.sqrt(variance) if variance > 0 else 0.0)
    return found


def benjamini_hochberg(own: list[float], nulls: list[float], wanted: float) -> set[int]:
    """The tokens that the step-up procedure takes, with p-values by counting pooled nulls; positive scores alone."""
    p = [(1 + sum(null >= z for null in nulls)) / (1 + len(nulls)) for z in own]
    order = sorted((i for i in range(len(own)) if own[i] > 0), key=lambda i: (p[i], -own[i]))
    taken = 0
    for number, i in enumerate(order, start=1):
        if p[i] <= wanted * number / len(own):
            taken = number
    return {i for i in range(len(own)) if taken and own[i] >= min(own[j] for j in order[:taken])}


def simulated(
    rng: np.random.Generator, tokens: int, *, effects: np.ndarray | None = None, queries: int = 64, nulls: int = 4
):
    """A token's influence on each query, of heavy tails and of spreads that differ a hundredfold; scores and nulls as
    they follow from labels that say nothing (but for `effects`, in units of the score's own spread)."""
    spread = np.exp(rng.normal(size=tokens))
    on_queries = spread[:, None] * rng.standard_t(5, size=(tokens, 2 * queries)) + 3 * spread[:, None]
    positive, negative = on_queries[:, :queries], on_queries[:, queries:]
    if effects is not None:
        positive = positive + (effects * spread * math.sqrt(5 / 3 * 2 / queries))[:, None]
    scores = positive.mean(axis=1) - negative.mean(axis=1)
    signs = half_signs(nulls, int(rng.integers(1 << 30)))
    weights = half_weights(signs, [queries // signs.shape[1]] * signs.shape[1])
    by_group = [
        np.stack([part[:, g :: signs.shape[1]].sum(axis=1) for g in range(signs.shape[1])])
        for part in (positive, negative)
    ]
    return scores.astype(np.float32), (weights @ by_group[0] - weights @ by_group[1]).astype(np.float32)


def z_of(scores: np.ndarray, nulls: np.ndarray) -> np.ndarray:
    return standardise(scores, nulls, fit_spread(high_histogram(null_variance(nulls)), len(nulls)))


def found_by(z: np.ndarray, wanted: float):
    return discoveries(high_histogram(z[0]), high_histogram(z[1:].ravel()), len(z) - 1, wanted)


@given(x=st.floats(1e-4, 1e5))
def test_gamma_derivatives_are_scipys(x: float) -> None:
    assert digamma(x) == pytest.approx(float(special.digamma(x)), rel=1e-9, abs=1e-9)
    assert trigamma(x) == pytest.approx(float(special.polygamma(1, x)), rel=1e-8)


@settings(deadline=None)
@given(
    scores=st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=8),
    spread=st.builds(Spread, variance=st.sampled_from([0.0, 1e-3, 5.0]), weight=st.sampled_from([1e-9, 0.5, 30.0])),
)
def test_z_scores_are_the_oracles_token_by_token(scores: list[list[float]], spread: Spread) -> None:
    x = np.array(scores, np.float32).T
    expected = np.array([oracle_z([float(value) for value in token], spread) for token in x.T]).T
    found = standardise(x[0], x[1:], spread)
    np.testing.assert_allclose(found, np.clip(expected, -1e30, 1e30), rtol=2e-6, atol=1e-7)
    alone = [standardise(x[0, i : i + 1], x[1:, i : i + 1], spread)[:, 0] for i in range(x.shape[1])]
    np.testing.assert_array_equal(found.T, alone)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 60), wanted=st.sampled_from([0.02, 0.1, 0.4]))
def test_the_threshold_takes_no_token_that_benjamini_and_hochberg_do_not(seed: int, tokens: int, wanted: float) -> None:
    rng = np.random.default_rng(seed)
    own, nulls = rng.normal(size=tokens).astype(np.float32), rng.normal(size=(3, tokens)).astype(np.float32)
    own[: tokens // 3] += 4
    found = found_by(np.concatenate([own[None], nulls]), wanted)
    taken = set(np.flatnonzero(own > found.threshold).tolist())
    allowed = benjamini_hochberg(own.tolist(), nulls.ravel().tolist(), wanted)
    assert taken <= allowed
    assert found.count == len(taken)
    assert found.rate <= wanted
    # No lower edge has the rate: an edge below the threshold with a token right above it is that token's own.
    edges = (own[own > 0].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    for edge in edges[edges <= found.threshold]:
        chance = tokens * (1 + np.count_nonzero(nulls >= edge)) / (1 + nulls.size)
        assert chance / np.count_nonzero(own >= edge) > wanted


@pytest.mark.parametrize("nulls", [2, 4, 7])
def test_shuffled_labels_give_the_nominal_rate(nulls: int) -> None:
    """The share of tokens with p <= level is the level, within 20%, over shuffles and tokens of unlike leverage."""
    rng = np.random.default_rng(nulls)
    realised = {level: [] for level in LEVELS}
    for _ in range(20):
        z = z_of(*simulated(rng, 20_000, nulls=nulls))
        pooled = np.sort(z[1:].ravel())
        for level in LEVELS:
            realised[level].append(np.mean(z[0] > np.quantile(pooled, 1 - level)))
    for level in LEVELS:
        assert np.mean(realised[level]) == pytest.approx(level, rel=0.2), level


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("wanted", [0.05, 0.2])
def test_the_share_of_false_discoveries_is_the_nominal_one(share: float, wanted: float) -> None:
    rng = np.random.default_rng(1)
    false, taken, high = 0, 0, 0
    for _ in range(10):
        effects = np.where(rng.random(20_000) < share, 8.0, 0.0)
        z = z_of(*simulated(rng, 20_000, effects=effects, nulls=7))
        chosen = z[0] > found_by(z, wanted).threshold
        false, taken = false + np.count_nonzero(chosen & (effects == 0)), taken + np.count_nonzero(chosen)
        high += np.count_nonzero(effects)
    # The procedure is low by the share, and the lighter tail gives at most that back: it lies between the two.
    assert (1 - share) * wanted * 0.8 < false / taken < wanted * 1.2
    assert taken - false > 0.5 * high  # it finds what is there


def test_leverage_alone_is_no_discovery() -> None:
    """Of tokens that say nothing, a tenth with a hundred times the spread: they take all of the highest scores, and
    their share of the highest z-scores."""
    rng = np.random.default_rng(3)
    scores, nulls = simulated(rng, 20_000, nulls=7)
    scores[:2000] *= 100
    nulls[:, :2000] *= 100
    z = z_of(scores, nulls)
    by_score, by_z = (np.mean(np.argsort(-values)[:400] < 2000) for values in (scores, z[0]))
    assert by_score > 0.95
    assert by_z < 0.25
    assert found_by(z, 0.1).count <= 40


def test_nothing_is_found_where_no_score_is_above_its_nulls() -> None:
    z = np.full((3, 50), -1.0, np.float32)
    found = found_by(z, 0.5)
    assert (found.count, found.threshold) == (0, float(np.finfo(np.float32).max))


@pytest.mark.parametrize("weight", [3.0, 20.0])
def test_the_prior_of_spreads_is_found_from_counts(weight: float) -> None:
    rng = np.random.default_rng(0)
    variance = 0.04 * weight / rng.chisquare(weight, size=200_000)
    nulls = rng.normal(size=(4, 200_000)) * np.sqrt(variance)
    found = fit_spread(high_histogram(null_variance(nulls)), 4)
    assert found.variance == pytest.approx(0.04, rel=0.03)
    assert found.weight == pytest.approx(weight, rel=0.1)
    alike = fit_spread(high_histogram(null_variance(rng.normal(size=(4, 200_000)))), 4)
    assert alike.variance == pytest.approx(1.0, rel=0.03)
    assert alike.weight > 100


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_signs_are_halves_and_orthogonal(count: int) -> None:
    signs = half_signs(count, 5)
    assert signs.shape == (count, groups_for(count))
    assert not signs.sum(axis=1).any()
    np.testing.assert_array_equal(signs @ signs.T, signs.shape[1] * np.eye(count))


def test_null_gradients_are_half_the_difference_of_halves() -> None:
    rng = np.random.default_rng(0)
    gradients = {True: rng.normal(size=(13, 3, 2)) + 5, False: rng.normal(size=(22, 3, 2)) - 9}
    signs = half_signs(3, 1)
    groups = signs.shape[1]
    sums = [
        GroupGradient(
            group=group, positive=kind, weight=0.0, gradient={"m": torch.from_numpy(of_set[group::groups].sum(axis=0))}
        )
        for kind, of_set in gradients.items()
        for group in range(groups)
    ]
    sizes = {kind: [len(of_set[group::groups]) for group in range(groups)] for kind, of_set in gradients.items()}
    for row, found in zip(signs, null_gradients(sums, signs, sizes), strict=True):
        expected = np.zeros((3, 2))
        for kind, of_set in gradients.items():
            upper = [g for i, g in enumerate(of_set) if row[i % groups] == 1]
            lower = [g for i, g in enumerate(of_set) if row[i % groups] == -1]
            expected += (1 if kind else -1) * (np.mean(upper, axis=0) - np.mean(lower, axis=0)) / 2
        np.testing.assert_allclose(found["m"].numpy(), expected, atol=1e-12)
        assert np.abs(expected).max() < 2  # the means of 5 and -9 are gone
    with pytest.raises(ValueError, match="too few for halves"):
        half_weights(signs, [1, 0, 0, 0])


def test_queries_whose_labels_say_nothing_have_the_nominal_rate_with_a_model() -> None:
    """Directions of shuffled queries and their nulls, with tokens scored by a model.

    A model of width 16 has twenty directions that tokens differ in, so that a whole shuffle is high or low. Where the
    pool of few nulls ends, at 0.001, one in two draws too many is beyond it; from 0.05 on that is nothing."""
    rng = np.random.default_rng(0)
    model = tiny_model("llama")
    names = tracked_modules(model).names
    tokens_BT = torch.from_numpy(rng.integers(3, VOCABULARY, (48, 32)))
    lengths_B = torch.full((48,), 32)
    queries = [
        TokenisedQuery(token_ids=tuple(rng.integers(3, VOCABULARY, 12).tolist()), completion_start=4) for _ in range(64)
    ]
    singles = [mean_completion_gradient(model, names, [query], [1.0], batch_tokens=64) for query in queries]
    # Scores are linear in the direction: those along each query's own gradient give those of any labels.
    scores_QBT = TokenScorer(model, singles, attribution="target").score(tokens_BT, lengths_B)
    scores_QN = scores_QBT[:, :, 1:].flatten(1).numpy()
    realised: dict[float, list[float]] = {level: [] for level in (0.05, 0.1, 0.2)}
    for shuffle in range(200):
        order = rng.permutation(64)
        positive, negative = scores_QN[order[:32]], scores_QN[order[32:]]
        signs = half_signs(4, shuffle)
        weights = half_weights(signs, [4] * 8)
        upper, lower = (np.stack([part[group::8].sum(axis=0) for group in range(8)]) for part in (positive, negative))
        z = z_of(positive.mean(axis=0) - negative.mean(axis=0), weights @ upper - weights @ lower)
        pooled = z[1:].ravel()
        for level, shares in realised.items():
            shares.append(float(np.mean(z[0] > np.quantile(pooled, 1 - level))))
    for level, shares in realised.items():
        assert np.mean(shares) == pytest.approx(level, rel=0.2), level


@pytest.mark.parametrize("share", [0.005, 0.02, 0.05])
def test_tokens_without_a_gradient_say_nothing_of_the_spread_of_the_others(share: float) -> None:
    """The first token of a document that is read by itself has a score and nulls of 0."""
    rng = np.random.default_rng(0)
    variance_N = 6 / rng.chisquare(6, size=200_000)
    own_N = (variance_N * rng.chisquare(4, size=len(variance_N)) / 4).astype(np.float32)
    plain = fit_spread(high_histogram(own_N), 4)
    zeros = np.zeros(round(share * len(own_N)), np.float32)
    with_zeros = fit_spread(high_histogram(np.concatenate([own_N, zeros])), 4)
    assert with_zeros == pytest.approx(plain)
    assert with_zeros.weight == pytest.approx(6, rel=0.1)
