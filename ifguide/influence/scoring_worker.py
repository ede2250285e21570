"""The work of `score_corpus` on one shard of the corpus."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide import schemas
from ifguide.artifacts import verified
from ifguide.config import ModelSource
from ifguide.folds import fold_of
from ifguide.influence.decision import Decision
from ifguide.influence.memory import is_out_of_memory, keep_memory
from ifguide.influence.method import Attribution
from ifguide.influence.proxy import Beginning, load_same_proxy
from ifguide.influence.query_file import read_direction, read_nulls
from ifguide.influence.score_tables import write_scores
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.smoothing import Smoother, smoothing_layers
from ifguide.influence.smoothing_sample import ScoredPart, part_path, smoothed_part
from ifguide.models import predicted_positions
from ifguide.spans.tables import PackedCorpus, document_numbers, in_blocks
from ifguide.storage import local_copy

logger = logging.getLogger(__name__)
Scored = TypeVar("Scored")

SMOOTHER = "smoother.npz"  # in the folder of the scores, where they are smoothed


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """What an actor scores with. `queries`: behaviour -> folder of its query, the run's own first. `proxy_fingerprint`
    is of the driver's proxy. `smoothed`: by `SMOOTHER`."""

    corpus: PackedCorpus
    scores: Path
    queries: Mapping[str, Path]
    proxy: ModelSource
    proxy_fingerprint: str
    beginning: Beginning
    attribution: Attribution
    decision: Decision
    gpus: float
    smoothed: bool = False

    @property
    def device(self) -> str:
        """Where an actor computes."""
        return "cuda" if self.gpus else "cpu"

    def model(self) -> PreTrainedModel:
        """The proxy, and the run's threads, whatever this run's actors have: their number changes the bytes.

        Raises:
            MismatchError: another proxy lies on this node."""
        torch.set_num_threads(self.decision.threads)
        return load_same_proxy(self.proxy, gpus=self.gpus, fingerprint=self.proxy_fingerprint)

    def scorer(self, directions: Sequence[Mapping[str, Tensor]]) -> TokenScorer:
        """That of the decision. Raises MismatchError, as `model`."""
        return TokenScorer(
            self.model(),
            directions,
            attribution=self.attribution,
            method=self.decision.method,
            steps=self.decision.steps[: len(directions)] if self.decision.steps else None,
            beginning=self.beginning.token,
        )

    def apart(self, documents_BT: np.ndarray) -> np.ndarray | None:
        """The documents (B, T) of blocks, where they do not see each other."""
        return documents_BT if self.beginning.of_documents else None

    def full_scorer(self) -> tuple[TokenScorer, dict[str, int]]:
        """That of the behaviours' directions, and of their nulls after them; and how many nulls a behaviour has that
        has any."""
        nulls = {behaviour: read_nulls(folder) for behaviour, folder in self.queries.items()}
        directions = [*map(read_direction, self.queries.values()), *itertools.chain.from_iterable(nulls.values())]
        return self.scorer(directions), {behaviour: len(own) for behaviour, own in nulls.items() if own}


@dataclass(frozen=True, kw_only=True)
class CorpusShard:
    """A shard of the corpus by its file's name and number; `bytes` are what progress is counted by. `parts`: the keys
    of those of the sample that are its blocks (`smoothing_sample`), which have `sampled` of them."""

    key: str
    name: str
    number: int
    bytes: int
    parts: tuple[str, ...] = ()
    sampled: int = 0


class Blocks(NamedTuple):
    """Blocks of a shard: ids, tokens (B, T), lengths, and the numbers of documents (B, T) where something asks."""

    ids: pa.ChunkedArray
    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    documents_BT: np.ndarray | None

    def take(self, rows: np.ndarray) -> Blocks:
        """Some of them."""
        documents_BT = None if self.documents_BT is None else self.documents_BT[rows]
        return Blocks(self.ids.take(pa.array(rows)), self.tokens_BT[rows], self.lengths_B[rows], documents_BT)


def read_blocks(settings: ScoringSettings, name: str, number: int) -> Blocks:
    """All blocks of a shard of the corpus."""
    table = schemas.read_table(verified(settings.corpus.folder, name))
    tokens_BT, documents_BT = schemas.per_token_array(table, "tokens"), None
    if settings.smoothed or settings.beginning.of_documents:
        documents_BT = in_blocks(document_numbers(settings.corpus, number), tokens_BT)
    return Blocks(table.column("block_id"), tokens_BT, table.column("length").to_numpy(), documents_BT)


class ScoreByProxy:
    """Worker: corpus shard in, scores shard out. Two threads call it: one computes, one reads or writes."""

    def __init__(self, settings: ScoringSettings):
        keep_memory()
        self.settings, self.computing = settings, threading.Lock()
        self.scorer, self.nulls = settings.full_scorer()
        self.smoother = Smoother.load(local_copy(settings.scores / SMOOTHER)) if settings.smoothed else None
        self.layers = layers_of(self.scorer) if settings.smoothed else ()

    def process(self, shard: CorpusShard) -> dict[str, Any]:
        blocks = read_blocks(self.settings, shard.name, shard.number)
        with self.computing:
            started = time.monotonic()
            scores_KBT, smoothed_SBT, halvings = self._score(blocks, shard.parts)
            seconds = time.monotonic() - started
        columns = iter(scores_KBT)
        scores = {behaviour: next(columns) for behaviour in self.settings.queries}
        nulls = {behaviour: [next(columns) for _ in range(number)] for behaviour, number in self.nulls.items()}
        smoothed = dict(zip(self.settings.queries, smoothed_SBT, strict=True)) if self.smoother else {}
        write_scores(self.settings.scores / shard.name, blocks.ids, scores, nulls, smoothed)
        return {
            "blocks": len(blocks.tokens_BT),
            "tokens": int(blocks.lengths_B.sum()),
            "score_min": min(float(scores_BT.min()) for scores_BT in scores.values()),
            "score_max": max(float(scores_BT.max()) for scores_BT in scores.values()),
            "seconds": seconds,
            "halvings": halvings,
        }

    def _score(self, blocks: Blocks, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """(K, B, T), smoothed ones (S, B, T) of the behaviours or of none, and how often the micro-batch was halved.
        What the sample's parts have is taken from them."""
        directions, behaviours = len(self.settings.queries) + sum(self.nulls.values()), len(self.settings.queries)
        scores_KBT = np.zeros((directions, *blocks.tokens_BT.shape), np.float32)
        smoothed_SBT = np.zeros((behaviours if self.smoother else 0, *blocks.tokens_BT.shape), np.float32)
        scored_B, halvings = np.zeros(len(blocks.tokens_BT), bool), 0
        for key in parts:
            part = ScoredPart.load(part_path(self.settings.scores, key))
            scored_B[part.rows_R] = True
            scores_KBT.reshape(directions, -1)[:, part.places_N] = part.scores_KN
            if self.smoother is not None:
                smoothed_SBT.reshape(behaviours, -1)[:, part.places_N] = smoothed_part(part, self.smoother)
        rest = np.flatnonzero(~scored_B)
        own = blocks.take(rest)
        apart_BT = None if own.documents_BT is None else self.settings.apart(own.documents_BT)
        for rows, (batch_KBT, states), times in by_micro_batch(
            self.scorer, self.layers, own.tokens_BT, own.lengths_B, self.settings.decision.micro_batch_blocks, apart_BT
        ):
            halvings += times
            scores_KBT[:, rest[rows]] = batch_KBT.float().cpu().numpy()
            if self.smoother is not None:
                assert own.documents_BT is not None
                folds_BT = torch.from_numpy(fold_of(own.documents_BT[rows], self.smoother.folds))
                lengths = torch.from_numpy(own.lengths_B[rows].astype(np.int64))
                found_SBT = _smoothed(self.smoother, batch_KBT, states, folds_BT, lengths, _rows(apart_BT, rows))
                smoothed_SBT[:, rest[rows]] = found_SBT.cpu().numpy()
        return scores_KBT, smoothed_SBT, halvings


def _smoothed(
    smoother: Smoother,
    scores_KBT: Tensor,
    states: Sequence[Tensor],
    folds_BT: Tensor,
    lengths_B: Tensor,
    document_BT: Tensor | None,
) -> Tensor:
    """(S, B, T), zero where nothing is predicted. Block by block: float64 states of a batch would be large."""
    S = len(smoother.biases_SK)
    folds_BT = folds_BT.to(scores_KBT.device)
    rows = []
    for row in range(len(folds_BT)):
        features_TD = torch.cat([layer[row] for layer in states], dim=-1)
        predicted_TS = smoother.predict(features_TD, folds_BT[row])
        rows.append(smoother.smooth(scores_KBT[:S, row].T, predicted_TS).T)
    smoothed_SBT = torch.stack(rows, dim=1)
    predicted_BT = predicted_positions(folds_BT.cpu(), lengths_B, document_BT)
    return smoothed_SBT.masked_fill(~predicted_BT.to(smoothed_SBT.device), 0.0)


def _rows(values_BT: np.ndarray | None, rows: slice) -> Tensor | None:
    return None if values_BT is None else torch.from_numpy(values_BT[rows].astype(np.int64))


def layers_of(scorer: TokenScorer) -> tuple[int, ...]:
    """The layers of a scorer's model whose states scores are smoothed by."""
    return smoothing_layers(len(scorer.blocks))


def by_micro_batch(
    scorer: TokenScorer,
    layers: Sequence[int],
    tokens_BT: np.ndarray,
    lengths_B: np.ndarray,
    size: int,
    document_BT: np.ndarray | None = None,
) -> Iterator[tuple[slice, tuple[Tensor, list[Tensor]], int]]:
    """Rows of the blocks, their scores (K, B, T) with the states of `layers`, and how often the micro-batch had to be
    halved for them. `document_BT`: the number of each token's document, where documents do not see each other."""

    def score(rows: slice, usual_blocks: int) -> tuple[Tensor, list[Tensor]]:
        tokens, lengths, documents = tensors(tokens_BT, lengths_B, document_BT, rows)
        return scorer.score_and_read(tokens, lengths, layers, documents, usual_blocks=usual_blocks)[:2]

    return in_micro_batches(len(tokens_BT), size, score)


def tensors(
    tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some of the blocks as int64 tensors."""
    lengths = torch.from_numpy(lengths_B[rows].astype(np.int64))
    return torch.from_numpy(tokens_BT[rows].astype(np.int64)), lengths, _rows(document_BT, rows)


def in_micro_batches(
    blocks: int, size: int, score: Callable[[slice, int], Scored]
) -> Iterator[tuple[slice, Scored, int]]:
    """Rows of so many blocks, what `score(rows, size)` gives of them, and how often the size had to be halved for them.

    Micro-batches start at multiples of their size: the same batches whoever scores the shard.
    """
    start = halvings = 0
    while start < blocks:
        rows = slice(start, start + size)
        try:
            scored = score(rows, size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size, halvings = size // 2, halvings + 1
            logger.warning("out of memory at %d blocks, going on with %d", 2 * size, size)
            continue
        yield rows, scored, halvings
        start, halvings = start + size, 0
