"""ifguide.methods.probes: states at a token's own position, the regression against scikit-learn, folds by query."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ifguide.config.compare import Probe
from ifguide.folds import fold_of
from ifguide.methods.probes import (
    fit_cross_probe,
    fit_probe,
    fit_query_probe,
    fit_token_probe,
    load_probe,
    split_groups,
)
from ifguide.methods.reading import QuerySets, hidden_states
from tests.tiny import VOCABULARY, tiny_model

OPTIONS = Probe(tokens=800, folds=3, strengths=(0.01, 1.0))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t2")


def random_texts(seed: int, count: int, low: int, high: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(4, 9)).tolist() for _ in range(count)]


def as_pairs(texts: list[list[int]]) -> list[tuple[str, str]]:
    return [("t3 t4", "".join(f" t{token}" for token in tokens)) for tokens in texts]


@pytest.mark.parametrize("beginning", [None, 1])
def test_states_are_those_of_a_block_alone_at_each_tokens_own_position(beginning: int | None) -> None:
    model = tiny_model("llama")
    blocks = random_texts(0, 5, 3, VOCABULARY)
    seen = dict(hidden_states(model, blocks, beginning=beginning))
    assert sorted(seen) == list(range(5))
    for number, block in enumerate(blocks):
        read = block if beginning is None else [beginning, *block]
        alone = model(torch.tensor([read]), output_hidden_states=True).hidden_states
        assert len(seen[number]) == len(alone) == 3
        for layer, expected in zip(seen[number], alone, strict=True):
            torch.testing.assert_close(layer, expected[0, len(read) - len(block) :], rtol=1e-4, atol=1e-5)


def planted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of three layers, of which the second alone knows the label, with the queries of 300 tokens."""
    rng = np.random.default_rng(seed)
    labels, groups = rng.random(300) < 0.3, rng.integers(0, 40, 300)
    features = rng.normal(size=(3, 300, 6)) * 5 + 2
    features[1, :, 2] += 9 * labels
    return features.astype(np.float32), labels, groups


def test_the_best_layer_by_cross_validation_with_scikit_learns_regression_on_it() -> None:
    features, labels, groups = planted(0)
    probe = fit_probe(features, labels, groups, OPTIONS, seed=0)
    assert probe.layer == 1
    fresh = make_pipeline(StandardScaler(), LogisticRegression(C=probe.strength, class_weight="balanced"))
    fresh.fit(features[1].astype(np.float64), labels)
    wanted = fresh.decision_function(features[1].astype(np.float64))
    np.testing.assert_allclose(features[1] @ probe.weight + probe.bias, wanted, rtol=1e-3, atol=1e-3)
    # its AUROC is that of tokens that it was not fitted on
    split, odds = split_groups(labels, groups, OPTIONS.folds, 0), np.zeros(300)
    for train, held_out in split:
        fresh.fit(features[1][train], labels[train])
        odds[held_out] = fresh.decision_function(features[1][held_out])
    assert probe.auroc[1] == pytest.approx(roc_auc_score(labels, odds), abs=1e-3)
    assert probe.auroc[1] > 0.85 > 0.65 > max(probe.auroc[0], probe.auroc[2])


def test_no_query_is_in_two_folds() -> None:
    _, labels, groups = planted(1)
    held_out = [set(groups[rows].tolist()) for _, rows in split_groups(labels, groups, 4, seed=0)]
    assert sum(map(len, held_out)) == len(set.union(*held_out)) == len(set(groups.tolist()))
    assert held_out == [set(groups[rows].tolist()) for _, rows in split_groups(labels, groups, 4, seed=2**32)]
    for train, rows in split_groups(labels, groups, 4, seed=0):
        assert not set(groups[train]) & set(groups[rows])
    with pytest.raises(ValueError, match="2 queries or documents with positive tokens for 3 folds"):
        split_groups(labels, np.where(labels, groups % 2, groups), 3, seed=0)


def test_a_probe_of_the_query_sets_finds_their_tokens_elsewhere(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("gpt_neox")
    positive, negative = (as_pairs(random_texts(seed, 60, *ids)) for seed, ids in ((1, (5, 9)), (2, (9, VOCABULARY))))
    sets = QuerySets(positive=positive, negative=negative)
    finder = fit_query_probe(model, tokenizer, sets, options=OPTIONS, seed=3)
    blocks = random_texts(5, 20, 5, VOCABULARY)
    scores = finder.score(blocks)
    flat, truth = np.concatenate([own[1:] for own in scores]), np.concatenate([np.array(own[1:]) < 9 for own in blocks])
    assert roc_auc_score(truth, flat) > 0.9
    assert all(own.dtype == np.float32 and len(own) == len(block) for own, block in zip(scores, blocks, strict=True))
    assert all(own[0] == 0 for own in scores)
    assert len(finder.auroc) == 3
    # the token's own state is read, in one block as in many
    states = model(torch.tensor([blocks[4]]), output_hidden_states=True).hidden_states[finder.layer][0]
    by_hand = states.double().detach().numpy() @ finder.weights[0] + finder.biases[0]
    np.testing.assert_allclose(scores[4][1:], by_hand[1:], rtol=1e-3, atol=1e-4)
    again = fit_query_probe(model, tokenizer, sets, options=OPTIONS, seed=3)
    np.testing.assert_array_equal(again.weights, finder.weights)
    finder.save(tmp_path / "probe.npz")
    for own, saved in zip(scores, load_probe(tmp_path / "probe.npz", model, beginning=None).score(blocks), strict=True):
        np.testing.assert_array_equal(own, saved)


def test_a_probe_in_bfloat16_reads_nearly_the_same_states_and_stays_in_it(tmp_path: Path) -> None:
    model, blocks = tiny_model("gpt_neox"), random_texts(7, 60, 5, VOCABULARY)
    exact, rounded = (dict(hidden_states(model, blocks, precision=name)) for name in ("float32", "bfloat16"))
    for number, layers in exact.items():
        for own, other in zip(layers, rounded[number], strict=True):
            torch.testing.assert_close(own, other.float(), rtol=0.05, atol=0.05)
    assert any((own != other).any() for own, other in zip(exact[0], rounded[0], strict=True))
    labels = [np.array(block) < 12 for block in blocks]
    options = replace(OPTIONS, precision="bfloat16")
    finder = fit_token_probe(model, blocks, labels, list(range(60)), options=options)
    scores = finder.score(blocks)
    truth = np.concatenate([own[1:] for own in labels])
    assert roc_auc_score(truth, np.concatenate([own[1:] for own in scores])) > 0.95
    states = rounded[4][finder.layer].double().numpy()
    by_hand = states @ finder.weights[0] + finder.biases[0]
    np.testing.assert_allclose(scores[4][1:], by_hand[1:], rtol=1e-3, atol=1e-4)
    finder.save(tmp_path / "probe.npz")
    for own, saved in zip(scores, load_probe(tmp_path / "probe.npz", model, beginning=None).score(blocks), strict=True):
        np.testing.assert_array_equal(own, saved)


def test_a_probe_of_labelled_tokens_and_one_for_each_fold_of_documents() -> None:
    model = tiny_model("gpt_neox")
    blocks = random_texts(7, 60, 5, VOCABULARY)
    labels = [np.array(block) < 12 for block in blocks]
    finder = fit_token_probe(model, blocks, labels, list(range(60)), options=OPTIONS)
    held_out = random_texts(8, 20, 5, VOCABULARY)
    truth = np.concatenate([np.array(own[1:]) < 12 for own in held_out])
    assert roc_auc_score(truth, np.concatenate([own[1:] for own in finder.score(held_out)])) > 0.95

    documents = [np.full(len(block), number) for number, block in enumerate(blocks)]
    crossed = fit_cross_probe(model, blocks, labels, documents, options=OPTIONS)
    scores = crossed.score(blocks, documents)
    states, folds = dict(hidden_states(model, blocks)), fold_of(np.arange(60), 3).tolist()
    for number, own in enumerate(scores):
        # a document is scored by the probe of its fold, which was fitted on the others
        fold = folds[number]
        odds = states[number][crossed.layer].double().numpy() @ crossed.weights[fold] + crossed.biases[fold]
        np.testing.assert_allclose(own[1:], odds[1:], rtol=1e-3, atol=1e-4)
    changed = [own[::-1] if fold == 1 else own for fold, own in zip(folds, blocks, strict=True)]
    again = fit_cross_probe(model, changed, labels, documents, options=OPTIONS)
    if again.layer == crossed.layer:
        np.testing.assert_allclose(again.weights[1], crossed.weights[1], rtol=1e-6)
    assert not np.allclose(again.weights[0], crossed.weights[0], rtol=1e-3)
