"""Smoothed scores of blocks against regressions fold by fold on the states of a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ifguide.config.compare import Smoothing
from ifguide.influence.smoothing import cut, smoothing_layers
from ifguide.methods.smoothed import fit_smoothed, load_smoothed
from tests.tiny import VOCABULARY, tiny_model

OPTIONS = Smoothing(folds=3, ridges=(0.1,))
Made = tuple[list[list[int]], list[np.ndarray], list[np.ndarray]]


@pytest.fixture(scope="module")
def made() -> Made:
    """Blocks, their scores, and the documents of their tokens, some of which go on in the next block."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, VOCABULARY, int(rng.integers(6, 12))).tolist() for _ in range(30)]
    scores = [np.array([0.0, *rng.normal(size=len(block) - 1)], np.float32) for block in blocks]
    stream = np.arange(sum(map(len, blocks))) // 7
    return blocks, scores, np.split(stream, np.cumsum([len(block) for block in blocks])[:-1])


def by_hand(made: Made, beginning: int | None) -> list[np.ndarray]:
    blocks, scores, documents = made
    model, first = tiny_model("gpt_neox"), [] if beginning is None else [beginning]
    states = []
    for block in blocks:
        with torch.no_grad():
            layers = model.base_model(torch.tensor([[*first, *block]]), output_hidden_states=True).hidden_states
        chosen = [layers[i][0, len(first) :] for i in smoothing_layers(len(layers) - 1)]
        states.append(torch.cat(chosen, dim=1).double().numpy())
    x, s = (np.concatenate([own[1:] for own in values]) for values in (states, scores))
    folds = np.concatenate([own[1:] for own in documents]) % 3
    expected = [np.zeros(len(block)) for block in blocks]
    for fold in range(3):
        others = folds != fold
        scaler = StandardScaler().fit(x[others])
        ridge = Ridge(alpha=0.1 * others.sum()).fit(scaler.transform(x[others]), cut(s)[others])
        for own, block_states, numbers in zip(expected, states, documents, strict=True):
            held = np.flatnonzero(numbers % 3 == fold)
            own[held] = ridge.predict(scaler.transform(block_states[held])) if len(held) else 0
            own[0] = 0
    return expected


@pytest.mark.parametrize("beginning", [None, 3])
def test_each_token_has_what_the_other_folds_say_of_its_states(made: Made, beginning: int | None) -> None:
    blocks, scores, documents = made
    finder = fit_smoothed(tiny_model("gpt_neox"), blocks, scores, documents, options=OPTIONS, beginning=beginning)
    found = finder.score(blocks, documents)
    for own, expected in zip(found, by_hand(made, beginning), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-4)
        assert own[0] == 0


def test_it_is_the_same_after_it_was_saved(made: Made, tmp_path: Path) -> None:
    blocks, scores, documents = made
    model = tiny_model("gpt_neox")
    finder = fit_smoothed(model, blocks, scores, documents, options=OPTIONS)
    finder.save(tmp_path / "smoothed.npz")
    again = load_smoothed(tmp_path / "smoothed.npz", model, beginning=None)
    assert again.summary == finder.summary
    for own, other in zip(finder.score(blocks, documents), again.score(blocks, documents), strict=True):
        np.testing.assert_array_equal(own, other)


def test_blocks_without_documents_are_documents_of_their_own(made: Made) -> None:
    blocks, scores, _ = made
    numbers = [np.full(len(block), i) for i, block in enumerate(blocks)]
    model = tiny_model("gpt_neox")
    found, expected = (
        fit_smoothed(model, blocks, scores, documents, options=OPTIONS).score(blocks, documents)
        for documents in (None, numbers)
    )
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)
    with pytest.raises(ValueError, match="two folds"):
        fit_smoothed(model, blocks[:1], scores[:1], options=OPTIONS)
