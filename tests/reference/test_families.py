"""Influence in every supported model family, against float64 oracles that know nothing of families."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.config import ModelSource
from ifguide.influence.method import Attribution
from ifguide.influence.query import TokenisedQuery, load_factors, mean_completion_gradient
from ifguide.influence.scorer import TokenScorer
from ifguide.models import linearise, load_model, tracked_modules
from tests.reference import oracles
from tests.reference.test_influence import fit_factors, random_directions
from tests.tiny import ARCHITECTURES, WINDOW, as_tensors, random_blocks, tiny_model

LENGTH = 3 * WINDOW
ORACLES = {"target": oracles.target_scores, "position": oracles.position_scores}


def logits(model: PreTrainedModel, rows: int = 2) -> Tensor:
    tokens_BT, _ = as_tensors(*random_blocks(rows, LENGTH, ragged=False))
    with torch.no_grad():
        return model(tokens_BT, use_cache=False).logits


@pytest.mark.parametrize("attribution", ["target", "position"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_scores_are_the_oracles(family: str, attribution: Attribution) -> None:
    model, oracle = tiny_model(family), tiny_model(family, dtype=torch.float64)
    directions = random_directions(model)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    scores_BT = TokenScorer(model, directions, attribution=attribution).score(tokens_BT, lengths_B)
    assert scores_BT.dtype == torch.float32
    assert bool((scores_BT[:, 0] == 0).all())
    for tokens_T, length, scores_T in zip(tokens_BT, lengths_B.tolist(), scores_BT, strict=True):
        assert bool((scores_T[length:] == 0).all())
        expected = ORACLES[attribution](oracle, directions, tokens_T[:length])
        error = (scores_T[:length] - expected).abs().max() / expected.abs().max()
        assert error.item() < 1e-4


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_block_sums_of_both_attributions_are_equal(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    target, position = (
        TokenScorer(model, random_directions(model), attribution=attribution).score(tokens_BT, lengths_B)
        for attribution in ("target", "position")
    )
    assert target.dtype == torch.float64
    scale = target.abs().sum(1)
    assert bool(((target.sum(1) - position.sum(1)).abs() < 1e-10 * scale).all())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_oracles_model_is_float64_throughout(family: str) -> None:
    """A step of 1e-9 would drown in one float32 rounding; in float64 steps forth and back mirror each other."""
    model = tiny_model(family, dtype=torch.float64)
    middle = logits(model)
    steps = random_directions(model, seed=5)
    moved = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, step in steps.items():
                weight = model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                weight += sign * 1e-9 * step[:, : weight.shape[1]]
        moved.append(logits(model) - middle)
    assert ((moved[0] + moved[1]).abs().max() / moved[0].abs().max()).item() < 1e-4


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 64}),
        ("gpt_neo", {"window_size": 64}),
        ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("opt_350m", {"do_layer_norm_before": True}),
    ],
)
def test_a_familys_peculiarity_is_at_work_in_its_tiny_model(family: str, without: dict[str, Any]) -> None:
    with_it, without_it = (
        load_model(ModelSource(architecture=ARCHITECTURES[family] | change), seed=0) for change in ({}, without)
    )
    assert (logits(with_it) - logits(without_it)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "opt", "opt_350m"])
def test_linearising_leaves_the_function(family: str) -> None:
    model = load_model(ModelSource(architecture=ARCHITECTURES[family]), dtype=torch.float64)
    before, parameters = logits(model), {name: p.numel() for name, p in model.named_parameters()}
    assert linearise(model) is model
    assert {name: p.numel() for name, p in model.named_parameters()} == parameters
    assert (logits(model) - before).abs().max() < 1e-12


def test_the_query_gradient_of_a_linearised_model_is_autograds_of_the_original() -> None:
    queries = [
        TokenisedQuery(token_ids=(5, 6, 7, 8, 9, 10, 11), completion_start=3),
        TokenisedQuery(token_ids=(12, 3, 4, 4, 20), completion_start=2),
    ]
    weights = [1.0, -0.5]
    original = load_model(ModelSource(architecture=ARCHITECTURES["gpt2"]), dtype=torch.float64)
    loss = torch.stack(
        [
            weight * F.cross_entropy(original(ids[None]).logits[0, start - 1 : -1], ids[start:], reduction="sum")
            for ids, start, weight in (
                (torch.tensor(query.token_ids), query.completion_start, weight)
                for query, weight in zip(queries, weights, strict=True)
            )
        ]
    ).sum()
    loss.backward()
    model = linearise(load_model(ModelSource(architecture=ARCHITECTURES["gpt2"]), dtype=torch.float64))
    names = tracked_modules(model).names
    assert len(names) == 8
    gradient = mean_completion_gradient(model, names, queries, weights, batch_tokens=64)
    for name in names:
        weight_gradient = original.get_parameter(f"{name}.weight").grad
        bias_gradient = original.get_parameter(f"{name}.bias").grad
        assert weight_gradient is not None
        assert bias_gradient is not None
        expected = torch.cat([weight_gradient.T, bias_gradient[:, None]], dim=1)
        torch.testing.assert_close(gradient[name], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "gemma2"])
def test_factors_are_of_every_tracked_module_and_of_sequences(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    sample = fit_factors(model, tmp_path, empirical=True).sample
    factors = load_factors(tmp_path / "out")
    assert set(factors) == set(names)
    gradients = oracles.sequence_gradients(model, names, *as_tensors(sample.blocks_NT, sample.lengths_N))
    for name in names:
        Q_A, Q_S = factors[name].Q_A, factors[name].Q_S
        squares = torch.stack([(Q_S.T @ sequence[name] @ Q_A).square() for sequence in gradients])
        torch.testing.assert_close(factors[name].lambda_mean, squares.mean(0), rtol=1e-8, atol=1e-9)
