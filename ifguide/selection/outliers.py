"""Blocks that stand out in a corpus' scores: those of great score mass, and those of repeated tokens.

The paper leaves open what its odd, highly influential documents are. Two plain figures per block tell them apart:

- mass, the sum of |score| over its predicted tokens, in float64, kept as float32; high where it is over `mass_ratio`
  times the median block's, which `ifguide.selection.quantiles` gives exactly;
- distinct bigram share, the number of distinct pairs of neighbouring tokens over the number of pairs; repeated where
  it is below `bigram_share`. A text of period p in a block of T has a share near p / T; running text in blocks of up
  to 8,192 tokens stays above 0.4.

Cost: about 8 ns a token for the shares, on one core whose numpy sorts in vectors; the masses are nothing beside
reading the scores. It judges nothing: whether such a block is excluded is an option of the selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.selection.algorithm import ScoreShard

DOMINANT_SHARE = 0.2  # of a mask


def block_mass(shard: ScoreShard) -> NDArray[np.float32]:
    """(B,) sums of |score| over the predicted tokens; a sum beyond float32 is its largest finite value."""
    mass = np.abs(shard.scores.astype(np.float64))
    mass[:, 0] = 0
    mass[-1:, shard.lengths[-1] :] = 0
    return np.minimum(mass.sum(axis=1), np.finfo(np.float32).max).astype(np.float32)


def distinct_bigram_share(tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B,) distinct pairs of neighbouring real tokens over all pairs; 1 for a block of one token."""
    pairs = tokens_BT[:, :-1].astype(np.int64) << 32 | tokens_BT[:, 1:]
    counts = np.maximum(lengths_B - 1, 0)
    short = np.flatnonzero(lengths_B < tokens_BT.shape[1])
    of_short = [np.unique(pairs[row, : counts[row]]).size for row in short]
    pairs.sort(axis=1)  # rows at a time: np.unique of a row takes eight times as long
    distinct = 1 + np.count_nonzero(pairs[:, 1:] != pairs[:, :-1], axis=1)
    distinct[short] = of_short
    return np.divide(distinct, counts, out=np.ones(len(counts)), where=counts > 0)


def find_outliers(
    block_id: NDArray[np.int64],
    mass: NDArray[np.float32],
    share: NDArray[np.float64],
    *,
    median_mass: float,
    mass_ratio: float,
    bigram_share: float,
) -> pa.Table:
    """The outliers among blocks, all arrays (B,), as a table of `schemas.OUTLIERS` in their order."""
    wide = mass.astype(np.float64)
    high_mass, repeated = wide > mass_ratio * median_mass, share < bigram_share
    with np.errstate(divide="ignore"):  # a block of repeated tokens may have no mass: 0 of a median of 0 is 0
        over_median = np.divide(wide, median_mass, out=np.zeros(len(wide)), where=wide > 0)
    columns: list[np.ndarray] = [block_id, mass, over_median, share, repeated, high_mass]
    rows = np.flatnonzero(high_mass | repeated)
    return pa.Table.from_arrays([pa.array(column[rows]) for column in columns], schema=schemas.OUTLIERS)


def outlier_line(summary: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """One line on a mask's outlying blocks, from its manifest's summary and options."""
    excluded = f", {summary['excluded_blocks']:,} excluded" if options["exclude_repeated"] else ""
    return (
        f"outliers: {summary['high_mass_blocks']:,} blocks of over {options['outlier_mass_ratio']:g} times the median"
        f" score mass, {summary['repeated_blocks']:,} of repeated tokens{excluded};"
        " ranking/outliers-*.parquet list them"
    )


def dominant_line(summary: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A warning of the unit that takes more than `DOMINANT_SHARE` of a mask, from its manifest's summary and options;
    empty where none does, and for a mask whose manifest does not name the largest."""
    tokens = summary.get("largest_unit_tokens", 0)
    share = tokens / max(summary["tokens_masked"], 1)
    if not tokens or share <= DOMINANT_SHARE:
        return ""
    advice = (
        "`build_mask.rank_by: rate` ranks by what a unit holds per token"
        if options.get("rank_by", "sum") == "sum"
        else ""
    )
    return f"{summary['unit']} {summary['largest_unit']} takes {share:.0%} of the mask: look at it" + (
        f"; {advice}" if advice else ""
    )
