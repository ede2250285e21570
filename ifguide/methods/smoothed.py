"""Scores smoothed by the proxy's hidden states (`ifguide.influence.smoothing`), of a run's own scores: fit and apply.

Folds are of documents: document d is in fold d % K, and its tokens are scored by the regression that has not seen the
fold. Cost: a forward pass over the tokens that are fitted on, width^2 multiplications for each, and to score a forward
pass over the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.config.compare import Smoothing
from ifguide.influence.smoothing import FoldSums, Smoother, cut, fit_smoother, smoothing_layers
from ifguide.methods.reading import Blocks, hidden_states

Ints = NDArray[np.int64]
CHUNK_TOKENS = 16_384  # whose sums are taken at once
DEFAULTS = Smoothing()


class SmoothedFinder:
    """Token scores by a regression for each fold of documents."""

    in_stream = False  # it reads blocks
    summary: dict[str, Any]

    def __init__(self, model: PreTrainedModel, smoother: Smoother, *, beginning: int | None = None):
        self.model, self.smoother, self.beginning = model, smoother, beginning
        explained = smoother.explained[smoother.ridge]
        self.summary = {"ridge": smoother.ridge, "explained": round(explained, 4)}

    def score(self, blocks: Blocks, documents: Sequence[Ints] | None = None) -> list[NDArray[np.float32]]:
        """For each block of token ids its scores (T,), entry t of token t; entry 0 is 0.

        documents: the number (T,) of the document of each token; None: of block i it is i."""
        scores = [np.zeros(len(block), np.float32) for block in blocks]
        folds = len(self.smoother.biases_K)
        for number, states in hidden_states(self.model, blocks, beginning=self.beginning):
            features = _features(states)
            of_tokens = np.full(len(features), number) if documents is None else documents[number]
            scores[number][1:] = self.smoother.predict(features, of_tokens % folds)[1:]
        return scores

    def save(self, path: Path) -> None:
        """Write what `load_smoothed` reads."""
        with path.open("wb") as file:
            fields = {name: value for name, value in asdict(self.smoother).items() if name != "explained"}
            explained = np.array(list(self.smoother.explained.items()))
            np.savez(file, explained=explained, **fields)


def load_smoothed(path: Path, model: PreTrainedModel, *, beginning: int | None) -> SmoothedFinder:
    """What `SmoothedFinder.save` wrote, of the same model."""
    with np.load(path) as saved:
        smoother = Smoother(
            weights_KD=saved["weights_KD"],
            biases_K=saved["biases_K"],
            ridge=float(saved["ridge"]),
            explained=dict(saved["explained"].tolist()),
        )
    return SmoothedFinder(model, smoother, beginning=beginning)


def fit_smoothed(
    model: PreTrainedModel,
    blocks: Blocks,
    scores: Sequence[NDArray[np.floating]],
    documents: Sequence[Ints] | None = None,
    *,
    options: Smoothing = DEFAULTS,
    beginning: int | None = None,
) -> SmoothedFinder:
    """The regressions of the scores (T,) of blocks, of each block all but the first, which has no prediction.

    documents: as for `SmoothedFinder.score`. Raises ValueError for documents of a single fold."""
    values = np.split(
        cut(np.concatenate([own[1:] for own in scores])), np.cumsum([len(own) - 1 for own in scores])[:-1]
    )
    sums: FoldSums | None = None
    chunk: list[tuple[NDArray[np.floating], NDArray[np.floating], Ints]] = []
    for count, (number, states) in enumerate(hidden_states(model, blocks, beginning=beginning), start=1):
        features = _features(states)[1:]
        of_tokens = np.full(len(features), number) if documents is None else documents[number][1:]
        chunk.append((features, values[number], of_tokens % options.folds))
        if count == len(blocks) or sum(len(own[0]) for own in chunk) >= CHUNK_TOKENS:
            x, s, folds = map(np.concatenate, zip(*chunk, strict=True))
            part = FoldSums.of(x, s, folds, options.folds)
            sums, chunk = (part if sums is None else sums + part), []
    assert sums is not None, "no blocks"
    return SmoothedFinder(model, fit_smoother(sums, ridges=options.ridges), beginning=beginning)


def _features(states: Sequence[Tensor]) -> NDArray[np.floating]:
    """(T, D) of a block: the states of the layers chosen, side by side."""
    layers = smoothing_layers(len(states) - 1)
    features: NDArray[np.floating] = np.concatenate([states[i].float().cpu().numpy() for i in layers], axis=1)
    return features
