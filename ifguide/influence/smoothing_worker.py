"""The work of `score_corpus` before its first shard: score the sample that its smoother is fitted on."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch

from ifguide.influence.memory import keep_memory
from ifguide.influence.scoring_worker import Blocks, ScoringSettings, by_micro_batch, layers_of, read_blocks, tensors
from ifguide.influence.smoothing_sample import SamplePart, ScoredPart, part_path
from ifguide.models import predicted_positions
from ifguide.spans.tables import shard_name


class ScoreSample:
    """Worker: a part of the sample in, its scores and features out. Two threads call it: one computes, one reads or
    writes."""

    def __init__(self, settings: ScoringSettings):
        keep_memory()
        self.settings, self.computing = settings, threading.Lock()
        self.scorer, _ = settings.full_scorer()
        self.layers = layers_of(self.scorer)

    def process(self, part: SamplePart) -> dict[str, Any]:
        rows = np.array(part.rows)
        blocks = read_blocks(self.settings, f"shard-{shard_name(part.number)}.parquet", part.number).take(rows)
        with self.computing:
            started = time.monotonic()
            scored, halvings = self._score(blocks, rows)
            seconds = time.monotonic() - started
        scored.save(part_path(self.settings.scores, part.key))
        return {"tokens": int(blocks.lengths_B.sum()), "seconds": seconds, "halvings": halvings}

    def _score(self, blocks: Blocks, rows_R: np.ndarray) -> tuple[ScoredPart, int]:
        """And how often the micro-batch was halved."""
        size, halvings, scores, features = self.settings.decision.micro_batch_blocks, 0, [], []
        assert blocks.documents_BT is not None
        apart_BT = blocks.documents_BT if self.settings.beginning.of_documents else None
        where_BT = predicted_positions(*tensors(blocks.tokens_BT, blocks.lengths_B, apart_BT, slice(None)))
        for rows, (scores_KBT, states), times in by_micro_batch(
            self.scorer, self.layers, blocks.tokens_BT, blocks.lengths_B, size, apart_BT
        ):
            halvings += times
            where = where_BT[rows].to(scores_KBT.device)
            scores.append(scores_KBT[:, where].float().cpu().numpy())
            features.append(torch.cat([layer[where] for layer in states], dim=-1).float().cpu().numpy())
        row_N, place_N = np.nonzero(where_BT.numpy())
        return ScoredPart(
            rows_R=rows_R,
            places_N=rows_R[row_N] * where_BT.shape[1] + place_N,
            documents_N=blocks.documents_BT[row_N, place_N],
            scores_KN=np.concatenate(scores, axis=1),
            features_ND=np.concatenate(features),
        ), halvings
