"""Token scores of single texts, smoothed as `score_corpus` smooths a corpus: each text is a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ifguide.config.score_corpus import Smoothing
from ifguide.influence.smoothing import FoldSums, fit_smoother, ranges, smoothing_layers
from ifguide.methods.reading import hidden_states
from ifguide.telemetry import log

DEFAULTS = Smoothing()
CHUNK_TOKENS = 16_384  # whose states are float64 at once
Scores = Sequence[NDArray[np.floating]]  # (T,) of each text; entry 0 is of no token


class TextSmoother:
    """Scores of the blocks, by name, and what smooths them. The model reads the blocks once; their states are held."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[NDArray[np.integer]], scores: Mapping[str, Scores]):
        layers = smoothing_layers(model.config.num_hidden_layers)
        states: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(blocks)
        for number, of_block in hidden_states(model, [block.tolist() for block in blocks]):
            states[number] = np.concatenate([of_block[i].float().cpu().numpy()[1:] for i in layers], axis=1)
        self.names, self.sizes = list(scores), [len(own) for own in states]
        # Texts of one kind lie together here, so that a remainder deals every kind to all folds.
        self.x, self.folds = np.concatenate(states), np.repeat(np.arange(len(blocks)) % DEFAULTS.folds, self.sizes)
        self.s = np.stack([np.concatenate([own[1:] for own in scores[name]]) for name in self.names], axis=1)
        limits = ranges(self.s)
        sums: FoldSums | None = None
        for part in self._chunks():
            of_part = FoldSums.of(self.x[part], self.s[part].clip(*limits.T), self.folds[part], DEFAULTS.folds)
            sums = of_part if sums is None else sums + of_part
        assert sums is not None, "no texts"
        self.smoother = fit_smoother(sums, limits, ridges=DEFAULTS.ridges, own_weight=DEFAULTS.own_weight)
        for name, fit in self.smoother.summary(self.names).items():
            log("smoothing", f"{name}: ridge {fit['ridge']:g}, explained {fit['explained']}")

    def smoothed(self, own_weight: float = DEFAULTS.own_weight) -> dict[str, list[NDArray[np.float32]]]:
        """By name, the smoothed scores (T,) of each block; entry 0 is 0."""
        weighted = replace(self.smoother, own_weight=own_weight)
        parts = []
        for part in self._chunks():
            x, s, folds = (torch.from_numpy(own[part]) for own in (self.x, self.s.astype(np.float64), self.folds))
            parts.append(weighted.smooth(s, weighted.predict(x, folds)).numpy())
        columns = np.concatenate(parts).T
        ends = np.cumsum(self.sizes)[:-1]
        return {
            name: [np.append(np.float32(0), own) for own in np.split(column, ends)]
            for name, column in zip(self.names, columns, strict=True)
        }

    def _chunks(self) -> list[slice]:
        return [slice(begin, begin + CHUNK_TOKENS) for begin in range(0, len(self.x), CHUNK_TOKENS)]
