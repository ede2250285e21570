"""The sample of a corpus that a smoother is fitted on: which blocks it has, its parts as files, and the fit.

The sample is scored before all else, in parts, and what is scored is kept until all scores are made: the pass over the
corpus takes it from there, so that no token is scored twice. Which blocks a part has depends on the corpus and the seed
alone.

Storage, until the scores are finished: 4 bytes for each feature of each token of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ifguide.artifacts import publish
from ifguide.config.score_corpus import Smoothing
from ifguide.folds import fold_of
from ifguide.influence.smoothing import FoldSums, Smoother, fit_smoother, ranges
from ifguide.spans.tables import PackedCorpus, shard_name

SAMPLE = "sample"  # a folder in that of the scores, until they are finished
SAMPLED_SHARDS = 16  # at most: a shard is read whole
PART_TOKENS = 16_384  # at most: the states of a part are held
AT_ONCE = 1024  # tokens that are smoothed at once


@dataclass(frozen=True, kw_only=True)
class SamplePart:
    """Some blocks of one shard: their rows in it, ascending. `key` names its file. `most`: blocks of the largest
    part."""

    key: str
    number: int
    rows: tuple[int, ...]
    most: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPart:
    """The scores of K directions, and the features, of the N tokens of a part that have a score. `places_N`: where each
    is in its shard's blocks (B, T), flattened; `documents_N`: the number of its document."""

    rows_R: NDArray[np.int64]
    places_N: NDArray[np.int64]
    documents_N: NDArray[np.int64]
    scores_KN: NDArray[np.float32]
    features_ND: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Publish what `load` reads."""
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> ScoredPart:
        """What `save` wrote."""
        with path.open("rb") as file, np.load(file) as saved:
            return cls(**saved)


def sample_parts(corpus: PackedCorpus, tokens: int, seed: int) -> list[SamplePart]:
    """Blocks that hold about `tokens` tokens, or all: as many of each of at most `SAMPLED_SHARDS` shards. By shard."""
    rng = np.random.default_rng([seed, tokens])
    # The last shard of a corpus can be short, and comes first: the others make up for it.
    shards = sorted(rng.permutation(corpus.num_shards)[:SAMPLED_SHARDS].tolist(), reverse=True)
    wanted, most = -(-tokens // corpus.block_size), max(1, PART_TOKENS // corpus.block_size)
    parts = list[tuple[int, int, NDArray[np.int64]]]()
    for place, shard in enumerate(shards):
        share = -(-wanted // (len(shards) - place))
        begin, end = corpus.extent(shard)
        rows = np.sort(rng.permutation(-(-(end - begin) // corpus.block_size))[:share])
        wanted -= len(rows)
        parts += [(shard, number, rows[i : i + most]) for number, i in enumerate(range(0, len(rows), most))]
    largest = max(len(rows) for _, _, rows in parts)
    return [
        SamplePart(key=f"part-{shard_name(shard)}-{number:03d}", number=shard, rows=tuple(rows.tolist()), most=largest)
        for shard, number, rows in sorted(parts, key=lambda part: part[:2])
    ]


def part_path(scores: Path, key: str) -> Path:
    """Where a part is, in the folder of the scores."""
    return scores / SAMPLE / f"{key}.npz"


def fit_on_parts(
    paths: Sequence[Path], behaviours: Sequence[str], options: Smoothing, smoother: Path
) -> Mapping[str, Mapping[str, Any]]:
    """Publish the smoother of the scores of the behaviours, whose directions are the first of the parts; returns its
    `summary`.

    Raises:
        ValueError: the sample has too few documents, or no score differs from another; says what to set.
    """
    limits_S2 = ranges(np.concatenate([_scores(path, len(behaviours)) for path in paths]))
    sums: FoldSums | None = None
    for path in paths:
        part = ScoredPart.load(path)
        scores_NS = part.scores_KN[: len(behaviours)].T.clip(*limits_S2.T)
        own = FoldSums.of(part.features_ND, scores_NS, fold_of(part.documents_N, options.folds), options.folds)
        if sums is None:
            sums = own
        else:
            sums.add(own)
    assert sums is not None, "a corpus has blocks"
    try:
        fitted = fit_smoother(sums, limits_S2, ridges=options.ridges, own_weight=options.own_weight)
    except ValueError as error:
        raise ValueError(f"{error}; set score_corpus.smooth to null, and delete the folder of the scores") from error
    fitted.save(smoother)
    return fitted.summary(behaviours)


def _scores(path: Path, behaviours: int) -> NDArray[np.float32]:
    """(N, S) of a part, without its features."""
    with path.open("rb") as file, np.load(file) as saved:
        scores_SN: NDArray[np.float32] = saved["scores_KN"][:behaviours]
    return scores_SN.T


def smoothed_part(part: ScoredPart, smoother: Smoother) -> NDArray[np.float32]:
    """(S, N) the smoothed scores of a part's tokens. Some at a time: float64 features of a part would be large."""
    folds_N = torch.from_numpy(fold_of(part.documents_N, smoother.folds))
    scores_NS = torch.from_numpy(part.scores_KN[: len(smoother.biases_SK)]).T
    smoothed_NS = torch.empty(scores_NS.shape)
    for begin in range(0, len(scores_NS), AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        predicted_nS = smoother.predict(torch.from_numpy(part.features_ND[some]), folds_N[some])
        smoothed_NS[some] = smoother.smooth(scores_NS[some], predicted_nS)
    return smoothed_NS.T.numpy()
