"""Outliers among judged texts: what is laid, whose share is counted, and the rate along shuffled queries."""

import numpy as np
import pytest
import torch

from bench.common.outliers import (
    BUDGET,
    Laid,
    algorithm_1,
    lay_among,
    leverage,
    outlier_figures,
    shares_of,
    shuffled_rate,
    top,
    z_scores,
)
from ifguide.influence.nulls import null_directions
from ifguide.influence.query import ModuleFactors, TokenisedQuery, mean_completion_gradient
from ifguide.models import tracked_modules
from ifguide.tokenizer import load_tokenizer
from tests.real_text import DATA, needs_real_text
from tests.tiny import VOCABULARY, tiny_model


def laid_of(*sizes: tuple[str, int], seed: int = 0) -> Laid:
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(3, VOCABULARY, 1 + size).astype(np.int32) for _, size in sizes]
    return Laid(blocks=blocks, kinds=[kind for kind, _ in sizes])


def test_shares_are_of_the_masked_tokens() -> None:
    laid = laid_of(("judged", 6), ("code", 2), ("list", 2))
    mask = np.array([1, 0, 0, 0, 0, 1, 1, 0, 1, 1], bool)
    assert shares_of(mask, laid.of_tokens()) == {"judged": 0.4, "code": 0.2, "list": 0.4}
    assert shares_of(np.zeros(10, bool), laid.of_tokens()) == {"judged": 1.0, "code": 0.0, "list": 0.0}


def test_the_highest_share_is_taken_and_a_long_text_by_sum_alone() -> None:
    values = np.arange(100, dtype=np.float32)
    assert np.flatnonzero(top(values)).tolist() == [98, 99]
    rng = np.random.default_rng(0)
    sizes = [4000, *[50] * 40]
    scores = rng.normal(size=6000)
    scores[-50::5] = 6.0  # of the last short text a fifth
    by_sum, by_rate = algorithm_1(scores, sizes, rank_by="sum"), algorithm_1(scores, sizes, rank_by="rate")
    assert by_sum.sum() == by_rate.sum() == BUDGET * 6000
    assert by_sum[:4000].mean() > 0.02
    assert by_rate[-50:].sum() >= 20  # with their neighbours
    assert by_rate[:4000].sum() < by_sum[:4000].sum()


def test_nulls_in_place_of_the_score_have_the_nominal_rate() -> None:
    rng = np.random.default_rng(0)
    nulls = (rng.normal(size=(4, 50_000)) * np.exp(rng.normal(size=50_000))).astype(np.float32)
    assert shuffled_rate(nulls, 0.05) == pytest.approx(0.05, rel=0.05)


def test_figures_of_tokens_that_are_all_leverage() -> None:
    model, laid = tiny_model("llama"), laid_of(*[("judged", 60)] * 20, *[("code", 60)] * 5)
    rng = np.random.default_rng(1)
    kinds = laid.of_tokens()
    scores_KN = rng.normal(size=(5, len(kinds))).astype(np.float32)
    truth = [np.append(False, rng.random(60) < 0.1) for _ in range(20)]
    marked = np.concatenate([own[1:] for own in truth])
    scores_KN[0, : len(marked)][marked] += 6
    scores_KN[:, kinds == "code"] *= 50
    found = outlier_figures(model, laid, scores_KN, truth)
    assert found["outlier_shares"]["exact"] == 1.0
    assert found["outlier_shares"]["z"] < 0.1
    assert found["ap_z"] > 0.8
    assert (found["outlier_share_before"], found["outlier_share_after"]) == (
        found["outlier_shares"]["exact, documents by sum"],
        found["outlier_shares"]["smoothed, documents by rate"],
    )
    of_kinds = leverage(model, laid, scores_KN)
    assert of_kinds["code"]["null_spread"] > 10 * of_kinds["judged"]["null_spread"]
    assert of_kinds["judged"]["nll"] == pytest.approx(np.log(VOCABULARY), rel=0.5)
    assert z_scores(scores_KN).shape == scores_KN.shape


def test_null_directions_lie_in_the_span_of_the_queries_with_weights_that_cancel() -> None:
    model, rng = tiny_model("llama"), np.random.default_rng(0)
    names = tracked_modules(model).names
    factors = {}
    for name in names:
        d_out, d_in = model.get_submodule(name).weight.shape
        factors[name] = ModuleFactors(Q_A=torch.eye(d_in), Q_S=torch.eye(d_out), lambda_mean=torch.ones(d_out, d_in))
    query = TokenisedQuery(token_ids=tuple(rng.integers(3, VOCABULARY, 8).tolist()), completion_start=3)
    alike = null_directions(model, [query] * 17, [True] * 9 + [False] * 8, factors, count=2, seed=0, batch_tokens=1024)
    scale = mean_completion_gradient(model, names, [query], [1.0], batch_tokens=64)
    for null in alike:  # queries that are all the same have no noise
        assert all(float(null[name].norm()) < 1e-5 * float(scale[name].norm()) for name in names)


@needs_real_text
def test_outliers_have_as_many_tokens_of_each_kind() -> None:
    tokenizer = load_tokenizer(str(DATA / "pythia_tokenizer"))
    judged = [np.zeros(101, np.int32) for _ in range(40)]
    laid = lay_among(judged, tokenizer, share=0.05, length=100, seed=0)
    assert laid.kinds[:40] == ["judged"] * 40
    counts = {
        kind: sum(len(b) - 1 for b, own in zip(laid.blocks, laid.kinds, strict=True) if own == kind)
        for kind in laid.kinds
    }
    assert counts.keys() == {"judged", "repeated", "list", "code", "language"}
    assert all(100 <= count <= 200 for kind, count in counts.items() if kind != "judged")
    assert laid.blocks[41][0] == tokenizer.eos_token_id
