"""ifguide.methods.excess_loss: training against AdamW written out, scores against two models' own losses."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide.config.compare import ExcessLoss
from ifguide.influence.query import TokenisedQuery
from ifguide.methods.excess_loss import ExcessLossFinder, load_excess_loss, tune, tune_excess_loss
from ifguide.methods.reading import QuerySets
from tests.tiny import VOCABULARY, tiny_model

QUERIES = [
    TokenisedQuery(token_ids=(3, 9, 11, 30, 7), completion_start=2),
    TokenisedQuery(token_ids=(4, 8), completion_start=1),
    TokenisedQuery(token_ids=(6, 6, 5, 40), completion_start=3),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t2")


def loss_alone(model: PreTrainedModel, tokens: list[int], place: int) -> torch.Tensor:
    """The NLL of one token from a pass over what stands before it."""
    return -torch.log_softmax(model(torch.tensor([tokens[:place]])).logits[0, -1].double(), -1)[tokens[place]]


def by_hand(model: PreTrainedModel, order: list[list[int]], rate: float) -> None:
    """AdamW without weight decay, token by token, a step for each list of queries."""
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step, batch in enumerate(order, start=1):
        losses = [
            loss_alone(model, list(QUERIES[i].token_ids), place)
            for i in batch
            for place in range(QUERIES[i].completion_start, len(QUERIES[i].token_ids))
        ]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(model.parameters(), gradients, moments, strict=True):
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                root = (second / (1 - 0.999**step)).sqrt() + 1e-8
                parameter -= rate * (first / (1 - 0.9**step)) / root


def test_a_copy_is_trained_on_completions_by_adamw() -> None:
    trained, expected = tiny_model("gpt_neox", dtype=torch.float64), tiny_model("gpt_neox", dtype=torch.float64)
    options = ExcessLoss(epochs=2, batch_size=2, learning_rate=1e-3)
    rng = np.random.default_rng(5)
    permutations = [rng.permutation(3).tolist() for _ in range(2)]
    by_hand(expected, [part for p in permutations for part in (p[:2], p[2:])], 1e-3)
    losses = tune(trained, QUERIES, options, np.random.default_rng(5))
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=name)
    assert losses[1] < losses[0]
    assert not any(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("beginning", [None, 1])
def test_a_score_is_the_difference_of_the_two_losses(beginning: int | None, tmp_path: Path) -> None:
    positive, negative = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    finder = ExcessLossFinder(positive, negative, summary={}, beginning=beginning)
    blocks = [[5, 9, 13, 40], [7, 7], [3], [30, 4, 8, 8, 8, 21]]
    scores = finder.score(blocks)
    for block, own in zip(blocks, scores, strict=True):
        assert own.dtype == np.float32
        assert own[0] == 0
        read = block if beginning is None else [beginning, *block]
        for place in range(1, len(block)):
            at = place + len(read) - len(block)
            wanted = loss_alone(negative, read, at) - loss_alone(positive, read, at)
            assert own[place] == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)
    finder.save(tmp_path / "tuned.safetensors")
    again = load_excess_loss(tmp_path / "tuned.safetensors", tiny_model("llama", seed=3), beginning=beginning)
    for own, saved in zip(scores, again.score(blocks), strict=True):
        np.testing.assert_array_equal(own, saved)


def test_bfloat16_products_give_nearly_the_same_scores_and_copies() -> None:
    positive, negative = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    blocks = [np.random.default_rng(0).integers(0, VOCABULARY, 60).tolist()]
    (exact,), (near,) = (
        ExcessLossFinder(positive, negative, summary={}, precision=precision).score(blocks)
        for precision in ("float32", "bfloat16")
    )
    assert near.dtype == np.float32
    assert not np.array_equal(near, exact)
    assert np.corrcoef(near, exact)[0, 1] > 0.999
    options = ExcessLoss(epochs=2, batch_size=2, learning_rate=1e-3)
    halved = replace(options, precision="bfloat16")
    copies = [copy.deepcopy(positive) for _ in range(2)]
    full, half = (
        tune(model, QUERIES, own, np.random.default_rng(5))
        for model, own in zip(copies, (options, halved), strict=True)
    )
    assert half == pytest.approx(full, rel=1e-2)
    assert half != full
    assert all(parameter.dtype == torch.float32 for parameter in copies[1].parameters())


def test_tokens_of_the_positive_set_score_above_those_of_the_negative(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)

    def queries(low: int, high: int, count: int) -> list[tuple[str, str]]:
        return [("t3 t4", "".join(f" t{i}" for i in rng.integers(low, high, 5))) for _ in range(count)]

    model = tiny_model("gpt_neox")
    before = copy.deepcopy(model.state_dict())
    options = ExcessLoss(epochs=12, batch_size=4, learning_rate=3e-3)
    sets = QuerySets(positive=queries(5, 25, 16), negative=queries(25, VOCABULARY, 24))
    finder = tune_excess_loss(model, tokenizer, sets, options=options, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert finder.summary["queries"] == 16
    block = rng.integers(5, VOCABULARY, 40).tolist()
    (scores,) = finder.score([block])
    toxic = np.array(block) < 25
    assert roc_auc_score(toxic[1:], scores[1:]) > 0.95
    assert scores[1:][toxic[1:]].mean() > 0 > scores[1:][~toxic[1:]].mean()
    (again,) = tune_excess_loss(model, tokenizer, sets, options=options, seed=1).score([block])
    np.testing.assert_array_equal(again, scores)
    with pytest.raises(ValueError, match="queries of both sets"):
        tune_excess_loss(model, tokenizer, replace(sets, negative=[]), options=options)
