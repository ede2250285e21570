"""The work of `score_corpus` on one shard of the corpus."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ifguide import schemas
from ifguide.artifacts import require_same, verified
from ifguide.config import ModelSource
from ifguide.influence.decision import Decision
from ifguide.influence.memory import is_out_of_memory, keep_memory
from ifguide.influence.method import Attribution
from ifguide.influence.proxy import Beginning, load_proxy
from ifguide.influence.query_file import read_direction, read_nulls
from ifguide.influence.score_tables import write_scores
from ifguide.influence.scorer import TokenScorer
from ifguide.models import state_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """What an actor scores with. `queries`: behaviour -> folder of its query, the run's own first. Another node may see
    another model under the proxy's name: `proxy_fingerprint` is the driver's."""

    corpus: Path
    scores: Path
    queries: Mapping[str, Path]
    proxy: ModelSource
    proxy_fingerprint: str
    beginning: Beginning
    attribution: Attribution
    decision: Decision
    gpus: float


@dataclass(frozen=True, kw_only=True)
class CorpusShard:
    """A shard of the corpus by its file's name; `bytes` are what progress is counted by."""

    key: str
    name: str
    bytes: int


class ScoreShard:
    """Worker: corpus shard in, scores shard out. Two threads call it: one computes, one reads or writes."""

    def __init__(self, settings: ScoringSettings):
        keep_memory()
        self.settings, self.computing = settings, threading.Lock()
        decision = settings.decision
        torch.set_num_threads(decision.threads)  # of the run, whatever this run's actors have: it changes the bytes
        model = load_proxy(settings.proxy, gpus=settings.gpus)
        fingerprint = state_fingerprint(model)
        require_same("the proxy on this node", fingerprint, "the driver's", settings.proxy_fingerprint, "sync it")
        nulls = {behaviour: read_nulls(folder) for behaviour, folder in settings.queries.items()}
        self.nulls = {behaviour: len(of_behaviour) for behaviour, of_behaviour in nulls.items() if of_behaviour}
        self.scorer = TokenScorer(
            model,
            [*map(read_direction, settings.queries.values()), *itertools.chain.from_iterable(nulls.values())],
            attribution=settings.attribution,
            method=decision.method,
            steps=decision.steps,
            beginning=settings.beginning.token,
        )

    def process(self, shard: CorpusShard) -> dict[str, Any]:
        table = schemas.read_table(verified(self.settings.corpus, shard.name))
        tokens_BT = schemas.per_token_array(table, "tokens")
        lengths_B = table.column("length").to_numpy()
        with self.computing:
            started = time.monotonic()
            scores_KBT, halvings = self._score(tokens_BT, lengths_B)
            seconds = time.monotonic() - started
        columns = iter(scores_KBT)
        scores = {behaviour: next(columns) for behaviour in self.settings.queries}
        nulls = {behaviour: [next(columns) for _ in range(number)] for behaviour, number in self.nulls.items()}
        write_scores(self.settings.scores / shard.name, table.column("block_id"), scores, nulls)
        return {
            "blocks": len(tokens_BT),
            "tokens": int(lengths_B.sum()),
            "score_min": min(float(scores_BT.min()) for scores_BT in scores.values()),
            "score_max": max(float(scores_BT.max()) for scores_BT in scores.values()),
            "seconds": seconds,
            "halvings": halvings,
        }

    def _score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> tuple[np.ndarray, int]:
        """(K, B, T), and how often the micro-batch had to be halved.

        Micro-batches start at multiples of their size: the same batches whoever scores the shard.
        """
        size, halvings, start, parts = self.settings.decision.micro_batch_blocks, 0, 0, []
        while start < len(tokens_BT):
            rows = slice(start, start + size)
            tokens = torch.from_numpy(tokens_BT[rows].astype(np.int64))
            lengths = torch.from_numpy(lengths_B[rows].astype(np.int64))
            try:
                parts.append(self.scorer.score(tokens, lengths, usual_blocks=size).float().cpu().numpy())
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size, halvings = size // 2, halvings + 1
                logger.warning("out of memory at %d blocks, going on with %d", 2 * size, size)
                continue
            start += size
        return np.concatenate(parts, axis=1), halvings
