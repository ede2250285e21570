"""The scores and the metric of the DATE-LM benchmark against slow oracles on a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from bench.common.date_lm_data import read_benchmark
from bench.common.similarity import (
    HiddenStates,
    gradient_norms,
    hidden_states,
    mean_cosine,
    reference_gradients,
    token_scores,
)
from bench.date_lm import algorithm1_statistic, auprc, example_scores, measure, over_draws, top_mean
from ifguide.influence.method import PRESETS, Method
from ifguide.influence.query import TokenisedQuery
from ifguide.models import tracked_modules
from tests.reference import oracles
from tests.reference.algorithm1 import select
from tests.tiny import VOCABULARY, tiny_model

FAMILIES = ("llama", "gpt_neox")  # without biases, and with


def queries(count: int, seed: int) -> list[TokenisedQuery]:
    rng = np.random.default_rng(seed)
    return [
        TokenisedQuery(
            token_ids=tuple(rng.integers(1, VOCABULARY, int(rng.integers(4, 9))).tolist()),
            completion_start=int(rng.integers(1, 3)),
        )
        for _ in range(count)
    ]


def oracle_gradients(family: str, examples: list[TokenisedQuery]) -> list[torch.Tensor]:
    """Each example's gradient of its response's summed NLL over all tracked modules, flat, float64."""
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    found = []
    for query in examples:
        tokens_T = torch.tensor(query.token_ids)
        places = range(query.completion_start, len(query.token_ids))
        loss = torch.stack([oracles.token_nll(model, tokens_T, j) for j in places]).sum()
        found.append(torch.cat([part.flatten() for part in oracles.module_gradients(model, names, loss).values()]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_similarity_is_the_mean_cosine_of_whole_gradients(family: str) -> None:
    train, reference = queries(5, 0), queries(3, 1)
    model = tiny_model(family)
    names = tracked_modules(model).names
    gradients = reference_gradients(model, names, reference)
    tokens = token_scores(model, {"gradsim": gradients.mean_unit}, train, method=PRESETS["exact"])
    norms = gradient_norms(model, names, train)
    ours, theirs = oracle_gradients(family, train), oracle_gradients(family, reference)
    np.testing.assert_allclose(norms, [float(g.norm()) for g in ours], rtol=1e-5)
    cosines = [float(np.mean([float(F.cosine_similarity(g, h, dim=0)) for h in theirs])) for g in ours]
    np.testing.assert_allclose([scores.sum() for scores in tokens["gradsim"]] / norms, cosines, rtol=1e-4, atol=1e-6)
    mean = torch.cat([gradients.mean[name].flatten() for name in names]).double()
    torch.testing.assert_close(mean, torch.stack(theirs).mean(0), rtol=1e-4, atol=1e-5)


def test_token_scores_are_those_of_the_response_alone() -> None:
    model, oracle = tiny_model("llama"), tiny_model("llama", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    names = tracked_modules(model).names
    V = {name: torch.randn(oracle.get_submodule(name).weight.shape, generator=generator) for name in names}
    train = queries(4, 2)
    for method in (PRESETS["exact"], Method(engine="difference", precision="float32", rank=None)):
        found = token_scores(model, {"v": V}, train, method=method)["v"]
        for query, scores in zip(train, found, strict=True):
            expected = oracles.target_scores(oracle, V, torch.tensor(query.token_ids))[query.completion_start :]
            np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_hidden_states_and_their_cosines() -> None:
    model, train, reference = tiny_model("gpt_neox"), queries(4, 3), queries(2, 4)
    found, others = hidden_states(model, train), hidden_states(model, reference)
    by_hand = []
    with torch.no_grad():
        for query in [*train, *reference]:
            states_TD = model.base_model(torch.tensor([query.token_ids])).last_hidden_state[0]
            by_hand.append((states_TD[-1], states_TD[query.completion_start :].mean(0)))
    torch.testing.assert_close(torch.cat([found.last, others.last]), torch.stack([last for last, _ in by_hand]))
    torch.testing.assert_close(torch.cat([found.mean, others.mean]), torch.stack([mean for _, mean in by_hand]))
    cosines = [
        [float(F.cosine_similarity(by_hand[i][0], by_hand[4 + r][0], dim=0)) for r in range(2)] for i in range(4)
    ]
    np.testing.assert_allclose(mean_cosine(found.last, others.last), np.mean(cosines, axis=1), rtol=1e-4)


def test_aggregations_of_token_scores() -> None:
    examples = [np.array([1.0, 5.0, 3.0]), np.array([-1.0]), np.array([9.0, 0.5, 4.0, 0.0])]
    np.testing.assert_allclose(top_mean(examples, 2), [4.0, -1.0, 6.5])
    blocks = [[0.0, *each] for each in examples]
    stream = [(0, 5), (5, 10), (10, 15)]
    _, expected, _ = select(blocks, stream, 5, quantile=0.5, window=0, max_fraction=1.0, unit="block")
    np.testing.assert_allclose(algorithm1_statistic(examples, 0.5), expected)
    states = HiddenStates(last=torch.eye(3), mean=torch.eye(3))
    scores = example_scores(
        {"ifguide": examples, "ekfac": examples, "ekfac-mean": examples, "gradsim": examples},
        np.array([3.0, 2.0, 9.0]),
        states,
        states,
    )
    np.testing.assert_allclose(scores["gradsim"], [3.0, -0.5, 1.5])
    np.testing.assert_allclose(scores["ekfac"], [9.0, -1.0, 13.5])
    np.testing.assert_allclose(scores["ekfac-mean"], [3.0, -1.0, 3.375])
    np.testing.assert_allclose(scores["ifguide"], [9.0, -1.0, 13.5])
    np.testing.assert_allclose(scores["ifguide-top"], [3.0, -1.0, 3.375])


def test_auprc_is_the_trapezoids_of_the_curve_and_lies_by_average_precision() -> None:
    # Descending: 1 0 1 (0 1 tied) 0. Curve: (0, 1), (1/3, 1), (1/3, 1/2), (2/3, 2/3), (1, 3/5).
    labels, scores = np.array([1, 0, 1, 0, 1, 0]), np.array([9.0, 8.0, 7.0, 5.0, 5.0, 1.0])
    expected = 1 / 3 + (1 / 2 + 2 / 3) / 6 + (2 / 3 + 3 / 5) / 6
    assert auprc(labels, scores) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    labels, scores = rng.random(4000) < 0.2, rng.normal(size=4000)
    assert auprc(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=2e-3)
    assert auprc(labels, labels.astype(float)) == 1


def test_draws_are_averaged_and_differences_are_paired() -> None:
    labels = np.arange(40) < 8
    assert measure(labels, {"ifguide": labels * 1.0})["ifguide"] == {"ap": 1, "auprc": 1}
    values = {"ifguide": [0.8, 0.6, 0.7], "ekfac": [0.7, 0.5, 0.6]}
    draws = [
        {"scores": {name: {"ap": ap[i], "auprc": 0.5} for name, ap in values.items()}, "examples": 40} for i in range(3)
    ]
    found = over_draws(draws)
    assert (found["draws"], found["examples"]) == (3, 40)
    row = found["scores"]["ekfac"]
    half = 4.302653 * 0.1 / 3**0.5  # the t quantile of two degrees of freedom, by a table
    assert row["ap_interval"] == pytest.approx([0.6 - half, 0.6 + half], abs=1e-4)
    assert row["ifguide_minus"] == 0.1
    assert row["ifguide_minus_interval"] == pytest.approx([0.1, 0.1])  # the difference is the same in all
    assert over_draws(draws[:1])["scores"]["ekfac"]["ap_interval"] is None


def options(data: Path, **changes: int) -> argparse.Namespace:
    fields = {"subset": None, "data": data, "examples": 20, "unsafe": 4, "reference": 4, "seed": 0}
    return argparse.Namespace(**{**fields, **changes})


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def test_a_folder_of_date_lms_own_splits_keeps_the_share_of_unsafe_ones(tmp_path: Path) -> None:
    kinds = ["Unsafe"] * 10 + ["Safe"] * 90
    rows: list[dict[str, object]] = [{"prompt": f"p{i}", "response": f"r{i}", "type": k} for i, k in enumerate(kinds)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "ref.jsonl", rows[:6])
    found = read_benchmark(options(tmp_path))
    assert (len(found.train), sum(e.unsafe for e in found.train), len(found.reference)) == (20, 2, 4)
    everything = read_benchmark(options(tmp_path, examples=0, reference=0))
    assert (len(everything.train), len(everything.reference), len(everything.benign)) == (100, 6, 6)


def test_a_drawn_set_has_disjoint_parts_of_one_kind_of_text(tmp_path: Path) -> None:
    write(tmp_path / "offensive_tweets.jsonl", [{"text": f"rude {i % 20}"} for i in range(25)])
    write(tmp_path / "other_tweets.jsonl", [{"text": f"calm {i}"} for i in range(30)])
    found = read_benchmark(options(tmp_path))
    texts = [e.response for e in [*found.train, *found.reference, *found.benign]]
    assert len(texts) == len(set(texts)) == 20 + 4 + 4
    assert [e.unsafe for e in found.train] == [True] * 4 + [False] * 16
    for example in [*found.train, *found.reference, *found.benign]:
        assert example.unsafe == example.response.startswith("rude")
    assert all(e.unsafe for e in found.reference)
    assert not any(e.unsafe for e in found.benign)
    assert found.digest == read_benchmark(options(tmp_path)).digest
    assert found.digest != read_benchmark(options(tmp_path, seed=1)).digest
    with pytest.raises(FileNotFoundError, match="--data"):
        read_benchmark(options(tmp_path / "bold"))
