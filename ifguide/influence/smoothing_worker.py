"""The work of `score_corpus` before its first shard: score the sample that its smoother is fitted on."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch

from ifguide.influence.memory import keep_memory
from ifguide.influence.score_tables import require_finite
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
        rows, name = np.array(part.rows), f"shard-{shard_name(part.number)}.parquet"
        blocks = read_blocks(self.settings, name, part.number).take(rows)
        with self.computing:
            started = time.monotonic()
            scored, halvings = self._score(blocks, rows, name, size=part.most)
            seconds = time.monotonic() - started
        scored.save(part_path(self.settings.scores, part.key))
        return {"tokens": int(blocks.lengths_B.sum()), "seconds": seconds, "halvings": halvings}

    def _score(self, blocks: Blocks, rows_R: np.ndarray, name: str, *, size: int) -> tuple[ScoredPart, int]:
        """And how often the micro-batch was halved; `size` blocks at once, or fewer if that is decided.

        Raises ValueError where a score is not finite."""
        assert blocks.documents_BT is not None
        apart_BT = self.settings.apart(blocks.documents_BT)
        where_BT = predicted_positions(*tensors(blocks.tokens_BT, blocks.lengths_B, apart_BT, slice(None)))
        row_N, place_N = np.nonzero(where_BT.numpy())
        scores, features_ND, begin, halvings = [], np.zeros((0, 0), np.float32), 0, 0
        # A part is smaller than a GPU's micro-batch, to which it would be padded.
        at_once = min(size, self.settings.decision.micro_batch_blocks)
        for rows, (scores_KBT, states), times in by_micro_batch(
            self.scorer, self.layers, blocks.tokens_BT, blocks.lengths_B, at_once, apart_BT
        ):
            halvings += times
            batch_KBT, where = scores_KBT.float().cpu().numpy(), where_BT[rows].to(scores_KBT.device)
            for batch_BT in batch_KBT:
                require_finite(batch_BT, blocks.ids[rows], name)
            scores.append(batch_KBT[:, where.cpu().numpy()])
            states_nD = torch.cat([layer[where] for layer in states], dim=-1).float().cpu().numpy()
            if not len(features_ND):
                features_ND = np.empty((len(row_N), states_nD.shape[1]), np.float32)
            features_ND[begin : begin + len(states_nD)] = states_nD
            begin += len(states_nD)
        return ScoredPart(
            rows_R=rows_R,
            places_N=rows_R[row_N] * where_BT.shape[1] + place_N,
            documents_N=blocks.documents_BT[row_N, place_N],
            scores_KN=np.concatenate(scores, axis=1),
            features_ND=features_ND,
        ), halvings
