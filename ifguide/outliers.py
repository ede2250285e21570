"""Blocks that stand out in a corpus' scores: those of great score mass, and those of repeated tokens.

The paper leaves open what its odd, highly influential documents are. Two plain figures per block tell them apart:

- mass, the sum of |score| over its predicted tokens, in float64, kept as float32; high where it is over `mass_ratio`
  times the median block's, which `ifguide.quantiles` gives exactly;
- distinct bigram share, the number of distinct pairs of neighbouring tokens over the number of pairs; repeated where
  it is below `bigram_share`. A text of period p in a block of T has a share near p / T; running text in blocks of up
  to 8,192 tokens stays above 0.4.

Cost: about 40 ns a token for the shares, on one core; the masses are nothing beside reading the scores. It judges
nothing: whether such a block is excluded is an option of the selection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ifguide.selection import ScoreShard


@dataclass(frozen=True, kw_only=True, eq=False)
class Outliers:
    """The blocks of a shard that are outliers in either way, ascending `block_id`; all (K,)."""

    block_id: NDArray[np.int64]
    mass: NDArray[np.float32]
    distinct_bigram_share: NDArray[np.float64]
    repeated: NDArray[np.bool_]
    high_mass: NDArray[np.bool_]


def block_mass(shard: ScoreShard) -> NDArray[np.float32]:
    """(B,) sums of |score| over the predicted tokens; a sum beyond float32 is its largest finite value."""
    mass = np.abs(shard.scores.astype(np.float64)).sum(axis=1, where=shard.valid)
    return np.minimum(mass, np.finfo(np.float32).max).astype(np.float32)


def distinct_bigram_share(tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B,) distinct pairs of neighbouring real tokens over all pairs; 1 for a block of one token."""
    pairs = tokens_BT[:, :-1].astype(np.int64) << 32 | tokens_BT[:, 1:]
    counts = np.maximum(lengths_B - 1, 0)
    distinct = [np.unique(row[:count]).size for row, count in zip(pairs, counts.tolist(), strict=True)]
    return np.divide(distinct, counts, out=np.ones(len(counts)), where=counts > 0)


def find_outliers(
    shard: ScoreShard, tokens_BT: NDArray[np.int32], *, median_mass: float, mass_ratio: float, bigram_share: float
) -> Outliers:
    """The outliers among the blocks of a shard, whose tokens are `tokens_BT` (B, T)."""
    mass, share = block_mass(shard), distinct_bigram_share(tokens_BT, shard.lengths)
    high_mass, repeated = mass.astype(np.float64) > mass_ratio * median_mass, share < bigram_share
    rows = np.flatnonzero(high_mass | repeated)
    return Outliers(
        block_id=shard.first_block + rows,
        mass=mass[rows],
        distinct_bigram_share=share[rows],
        repeated=repeated[rows],
        high_mass=high_mass[rows],
    )
