"""The work of `score_corpus` before its first shard: fit the smoother of the scores on a sample of the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ifguide import schemas
from ifguide.artifacts import verified
from ifguide.config.score_corpus import Smoothing
from ifguide.folds import fold_of
from ifguide.influence.query_file import read_direction
from ifguide.influence.scoring_worker import SMOOTHER, ScoringSettings, by_micro_batch, layers_of
from ifguide.influence.smoothing import FoldSums, fit_smoother, ranges
from ifguide.models import predicted_positions
from ifguide.spans.tables import PackedCorpus, document_numbers, in_blocks, shard_name

SAMPLED_SHARDS = 16  # at most: a shard is read whole
RANGE_TOKENS = 32_768  # of which the range of the scores is taken: their states are held


class SampledBlocks(NamedTuple):
    """Blocks of one shard: token ids and documents (B, T), and how many tokens each block has."""

    tokens_BT: np.ndarray
    documents_BT: np.ndarray
    lengths_B: np.ndarray


class _Sums:
    """Adds up tokens for a smoother. The range of the scores is that of the first `RANGE_TOKENS`."""

    def __init__(self, folds: int):
        self.folds = folds
        self.held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.ranges_S2: np.ndarray | None = None
        self.sums: FoldSums | None = None

    def add(self, features_ND: np.ndarray, scores_NS: np.ndarray, documents_N: np.ndarray) -> None:
        self.held.append((features_ND, scores_NS, fold_of(documents_N, self.folds)))
        if sum(len(part[0]) for part in self.held) >= RANGE_TOKENS:
            self.add_held()

    def add_held(self) -> None:
        if not self.held:
            return
        features, scores, folds = (np.concatenate(parts) for parts in zip(*self.held, strict=True))
        self.held.clear()
        self.ranges_S2 = ranges(scores) if self.ranges_S2 is None else self.ranges_S2
        part = FoldSums.of(features, scores.clip(*self.ranges_S2.T), folds, self.folds)
        if self.sums is None:
            self.sums = part
        else:
            self.sums.add(part)


def fit_on_sample(settings: ScoringSettings, options: Smoothing, seed: int) -> dict[str, dict[str, float]]:
    """Publish the smoother of the scores of all behaviours in their folder; returns, of each, its ridge and the share
    of the variance of held-out scores that it explains.

    Raises:
        ValueError: the sample has too few documents, or no score differs from another; says what to set.
    """
    scorer = settings.scorer([read_direction(folder) for folder in settings.queries.values()])
    layers, size, sums = layers_of(scorer), settings.decision.micro_batch_blocks, _Sums(options.folds)
    for sampled in sample_blocks(settings.corpus, options.tokens, seed):
        apart_BT = sampled.documents_BT if settings.beginning.of_documents else None
        where_BT = predicted_positions(
            torch.from_numpy(sampled.tokens_BT),
            torch.from_numpy(sampled.lengths_B),
            None if apart_BT is None else torch.from_numpy(apart_BT),
        ).numpy()
        batches = by_micro_batch(scorer, layers, sampled.tokens_BT, sampled.lengths_B, size, apart_BT)
        for rows, (scores_SBT, states), _ in batches:
            predicted_BT = where_BT[rows]
            where = torch.from_numpy(predicted_BT).to(scores_SBT.device)
            features_ND = torch.cat([layer[where] for layer in states], dim=-1).float().cpu().numpy()
            sums.add(features_ND, scores_SBT[:, where].T.cpu().numpy(), sampled.documents_BT[rows][predicted_BT])
    sums.add_held()
    assert sums.sums is not None, "a corpus has blocks"
    assert sums.ranges_S2 is not None
    try:
        smoother = fit_smoother(sums.sums, sums.ranges_S2, ridges=options.ridges, own_weight=options.own_weight)
    except ValueError as error:
        raise ValueError(f"{error}; set score_corpus.smooth to null, and delete the folder of the scores") from error
    smoother.save(settings.scores / SMOOTHER)
    return smoother.summary(list(settings.queries))


def sample_blocks(corpus: PackedCorpus, tokens: int, seed: int) -> Iterator[SampledBlocks]:
    """Blocks that hold about `tokens` tokens, or all: as many of each of at most `SAMPLED_SHARDS` shards."""
    rng = np.random.default_rng([seed, tokens])
    shards = rng.permutation(corpus.num_shards)[:SAMPLED_SHARDS].tolist()
    wanted = -(-tokens // corpus.block_size)
    for place, shard in enumerate(shards):
        share = -(-wanted // (len(shards) - place))
        table = schemas.read_table(verified(corpus.folder, f"shard-{shard_name(shard)}.parquet"))
        tokens_BT = schemas.per_token_array(table, "tokens")
        rows = np.sort(rng.permutation(len(tokens_BT))[:share])
        wanted -= len(rows)
        if len(rows):
            documents_BT = in_blocks(document_numbers(corpus, shard), tokens_BT)
            yield SampledBlocks(tokens_BT[rows], documents_BT[rows], table.column("length").to_numpy()[rows])
