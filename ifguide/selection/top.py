"""The tokens of highest score, exactly as many as asked for, over any number of shards.

A score and its mask need no unit, window or quantile here: of all predicted tokens the highest are taken, and among
those that tie with the last one the first in the stream. An order statistic needs counts only
(`ifguide.selection.quantiles`): one pass over the scores finds the bucket of the last token's score, one the score, one
counts its ties in each shard, and the last one fills. The mask is the same for any sharding and any number of workers.

Cost: four reads of the scores; a task holds one shard of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.selection.distributed import RunTasks
from ifguide.selection.quantiles import (
    BUCKETS,
    Ints,
    from_order_preserving_uint32,
    high_histogram,
    low_histogram,
)
from ifguide.spans.tables import PackedCorpus, write_mask_shard


@dataclass(frozen=True, kw_only=True)
class ScoredCorpus:
    """A corpus and, in the folder `scores`, tables of its token scores, sharded as it is. `documents_apart`: each
    document was read alone, so that its first token has no score."""

    corpus: PackedCorpus
    scores: Path
    column: str = schemas.OWN_SCORES
    documents_apart: bool = False

    def read(self, shard: int, context: int = 0) -> NDArray[np.float32]:
        """The scores (n,) of a shard's tokens, and of up to `context` more on either side. Raises ValueError, naming
        the block, where a predicted token's is not finite."""
        begin, end = self.corpus.extent(shard, context)
        values = self.corpus.read(self.scores, "shard", self.column, begin, end)
        broken = np.flatnonzero(~np.isfinite(values) & self.predicted(shard, context))
        if len(broken):
            block = (begin + broken[0]) // self.corpus.block_size
            raise ValueError(f"{self.scores}: a score of block {block} is {values[broken[0]]}; it must be finite")
        return values

    def predicted(self, shard: int, context: int = 0) -> NDArray[np.bool_]:
        """Flags (n,) of the same tokens that have a prediction: all but the first of each block."""
        return np.arange(*self.corpus.extent(shard, context)) % self.corpus.block_size > 0


class TopCounts(NamedTuple):
    """What `select_top` filled: `least` is the score of the last token taken (inf of none)."""

    blocks: int
    masked: int
    predicted: int
    least: float


def select_top(scored: ScoredCorpus, mask: Path, count: int, run_tasks: RunTasks) -> TopCounts:
    """Write the tables of `mask`: the `count` predicted tokens of highest score, ties by stream position.

    Raises:
        ValueError: there are fewer tokens, a score is not finite, or a table was rewritten between two passes.
    """
    shards = range(scored.corpus.num_shards)
    high = _sum(run_tasks(_high, ((scored, shard) for shard in shards)))
    predicted = int(high.sum())
    if count > predicted:
        raise ValueError(f"{count} tokens are to be masked, {scored.corpus.folder} has {predicted} with a prediction")
    if count:
        bucket, left = _from_top(high, count)
        low = _sum(run_tasks(_low, ((scored, shard, bucket) for shard in shards)))
        if low.sum() != high[bucket]:
            raise ValueError(f"two passes over {scored.scores} saw different scores: was a table rewritten?")
        key, left = _from_top(low, left)
        least = from_order_preserving_uint32(np.array([bucket << 16 | key], np.uint32))[0]
        tied = dict(run_tasks(_tied, ((scored, shard, least) for shard in shards)))
    else:
        least, left, tied = np.float32(np.inf), 0, dict.fromkeys(shards, 0)
    before = np.cumsum([0, *(tied[shard] for shard in shards)])
    calls = ((scored, mask, shard, least, max(0, left - int(before[shard]))) for shard in shards)
    filled = list(run_tasks(_fill, calls))
    blocks, masked = (sum(counts[name] for counts in filled) for name in ("blocks", "masked"))
    if (blocks, masked) != (scored.corpus.num_blocks, count):
        raise ValueError(f"filled {blocks} blocks with {masked} tokens, expected {count}: was a table rewritten?")
    return TopCounts(blocks, masked, predicted, float(least))


def _sum(histograms: Iterator[Ints]) -> Ints:
    total = np.zeros(BUCKETS, np.int64)
    for histogram in histograms:
        total += histogram
    return total


def _from_top(histogram: Ints, count: int) -> tuple[int, int]:
    """The bucket of the `count`-th value from the top, and how many are to be taken of that bucket."""
    taken = np.cumsum(histogram[::-1])
    row = int(np.searchsorted(taken, count))
    return BUCKETS - 1 - row, count - int(taken[row] - histogram[::-1][row])


def _predicted(scored: ScoredCorpus, shard: int) -> NDArray[np.float32]:
    return scored.read(shard)[scored.predicted(shard)]


def _high(scored: ScoredCorpus, shard: int) -> Ints:
    return high_histogram(_predicted(scored, shard))


def _low(scored: ScoredCorpus, shard: int, bucket: int) -> Ints:
    return low_histogram(_predicted(scored, shard), bucket)


def _tied(scored: ScoredCorpus, shard: int, least: np.float32) -> tuple[int, int]:
    return shard, int(np.count_nonzero(_predicted(scored, shard) == least))


def _fill(scored: ScoredCorpus, mask: Path, shard: int, least: np.float32, ties: int) -> dict[str, int]:
    """Publish a shard of the mask: what scores more than `least`, and the first `ties` that score as much."""
    values = scored.read(shard)
    predicted = scored.predicted(shard)
    masked = predicted & (values > least)
    masked[np.flatnonzero(predicted & (values == least))[:ties]] = True
    return write_mask_shard(scored.corpus, mask, shard, masked)
