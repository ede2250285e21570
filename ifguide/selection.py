"""Algorithm 1: from token scores to a token mask, exactly, one score shard at a time.

Method (IF-Guide, arXiv 2506.01790, Algorithm 1). tau is the `quantile` of the scores of all predicted tokens.
A unit (document or block) has s tokens above tau, with sum of scores f, both min-max normalised over all units.
Units are ranked by 2sf / (s + f), descending, ties by id. In that order every token above tau is masked with
its `window` neighbours, until `floor(max_fraction * predicted tokens)` are; the last unit is cut in position order.

It equals the sequential loop bit for bit under any sharding, because
- an order statistic needs counts only (`ifguide.quantiles`);
- shards report each piece (unit within block) by itself, and a unit is summed piece by piece in block order;
- neighbours stay within document and block, so tau alone decides what a unit would mask, and rank only where to
  stop: counts per unit and shard give the cut-off, then every shard fills its own mask.

Alignment: block b, index i is stream position b * T + i, and `scores[b, i]` speaks of predicting token i. Index 0
of a block has no prediction: like padding it is never counted and never selected.

Cost: five passes over a shard, 40 ns per token in all on one core (tau at 0.99); what leaves a shard is histograms
of 512 KiB and one row per piece with a token above tau.
Blocks may be excluded: for ranking and masking their tokens are as if they scored minus infinity, while tau and the
budget remain those of all predicted tokens, so that excluding a block moves no other token across tau.
It reads and writes no files, and does not judge the sign of a score: higher is masked first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ifguide.quantiles import BUCKETS, high_histogram, low_histogram, quantile_buckets, quantile_from_histograms

Unit = Literal["document", "block"]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
N = TypeVar("N", np.int64, np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreShard:
    """A run of consecutive blocks: `scores` (B, T) float32, label aligned; `lengths` (B,) real tokens; `excluded`
    (B,), none by default: blocks whose tokens are never above tau.

    Raises ValueError, naming the block, for a NaN or infinite score of a predicted token, and for a block of
    fewer than T tokens that is not the last.
    """

    first_block: int
    scores: NDArray[np.float32]
    lengths: Ints
    excluded: Bools | None = None

    def __post_init__(self) -> None:
        num_blocks, block_size = self.scores.shape
        assert self.excluded is None or self.excluded.shape == (num_blocks,), num_blocks
        assert self.lengths.shape == (num_blocks,), (self.lengths.shape, num_blocks)
        assert self.scores.dtype == np.float32, self.scores.dtype
        least = np.where(np.arange(num_blocks) < num_blocks - 1, block_size, 1)
        for row in np.flatnonzero((self.lengths < least) | (self.lengths > block_size))[:1]:
            raise ValueError(
                f"block {self.first_block + row} has {self.lengths[row]} tokens of {block_size}: only the last "
                "block of a corpus may be shorter; pack the corpus again"
            )
        for row, index in np.argwhere(self.valid & ~np.isfinite(self.scores))[:1]:
            raise ValueError(
                f"block {self.first_block + row} has score {self.scores[row, index]} at index {index}: a score "
                "must be finite; score this shard again, in a wider dtype if it overflowed"
            )

    @property
    def valid(self) -> Bools:
        """(B, T): the predicted tokens, 1 <= index < length."""
        index = np.arange(self.scores.shape[1])
        return (index >= 1) & (index < self.lengths[:, None])

    @property
    def span(self) -> tuple[int, int]:
        """Stream positions [begin, end) of this shard."""
        begin = self.first_block * self.scores.shape[1]
        return begin, begin + int(self.lengths.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Consecutive documents: number `first_id + k` covers [token_start[k], token_start[k] + num_tokens[k]).

    The closing EOS is part of its document. A shard needs only the documents that meet its span. Raises
    ValueError if they leave a gap or overlap, naming the document.
    """

    token_start: Ints
    num_tokens: Ints
    first_id: int = 0

    def __post_init__(self) -> None:
        assert len(self.token_start) == len(self.num_tokens) > 0
        ends = self.token_start + self.num_tokens
        following = np.append(self.token_start[1:], ends[-1:])
        for row in np.flatnonzero((self.num_tokens < 1) | (ends != following))[:1]:
            raise ValueError(
                f"document {self.first_id + row} covers [{self.token_start[row]}, {ends[row]}), the next begins at "
                f"{following[row]}: documents must cover the stream in order, without gaps"
            )

    @property
    def span(self) -> tuple[int, int]:
        """Stream positions [begin, end) that the documents cover."""
        return int(self.token_start[0]), int(self.token_start[-1] + self.num_tokens[-1])

    def meeting(self, begin: int, end: int) -> "Documents":
        """The documents that have a token in [begin, end); where none does, one that does not."""
        first = max(int(np.searchsorted(self.token_start, begin, side="right")) - 1, 0)
        rows = slice(first, max(int(np.searchsorted(self.token_start, end, side="left")), first + 1))
        return Documents(
            token_start=self.token_start[rows], num_tokens=self.num_tokens[rows], first_id=self.first_id + first
        )


def _totals(row: NDArray[np.intp], values: NDArray[N], size: int) -> NDArray[N]:
    """(size,) sums of the values of each row, added one by one in order, where np.sum would add in pairs."""
    totals = np.zeros(size, dtype=values.dtype)
    np.add.at(totals, row, values)
    return totals


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentStatistics:
    """s (`count`) and f (`sum`) of the units with a token above tau, ascending `doc_id`, all (K,).

    Where the unit is the block, a block takes the document's part and `doc_id` is the block id.
    """

    doc_id: Ints
    count: Ints
    sum: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class PieceStatistics(DocumentStatistics):
    """The same of one shard per piece, with `block_id` (P,); ascending block, a unit may come several times."""

    block_id: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking(DocumentStatistics):
    """The units of `DocumentStatistics` in the order of selection, with `rank_score` (K,).

    Units without a token above tau have rank score 0, the lowest there is, and nothing to mask: left out.
    """

    rank_score: Floats


def _documents_of(positions: Ints, shard: ScoreShard, documents: Documents) -> NDArray[np.intp]:
    """Row in `documents` of each stream position."""
    begin, end = documents.span
    if shard.span[0] < begin or shard.span[1] > end:
        raise ValueError(
            f"blocks from {shard.first_block} on hold stream positions {shard.span}, the documents cover only "
            f"{documents.span}: the document table belongs to another corpus"
        )
    return np.searchsorted(documents.token_start, positions, side="right") - 1


def _unit_ids(positions: Ints, shard: ScoreShard, documents: Documents, unit: Unit) -> Ints:
    if unit == "block":
        return positions // shard.scores.shape[1]
    return documents.first_id + _documents_of(positions, shard, documents)


def _above(shard: ScoreShard, tau: float) -> tuple[Ints, Floats]:
    """Stream positions, ascending, and float64 scores of the predicted tokens above tau in blocks not excluded."""
    # In float32 a score equal to the rounded tau would be lost or won by the rounding.
    wide = shard.scores.astype(np.float64).ravel()
    eligible = shard.valid if shard.excluded is None else shard.valid & ~shard.excluded[:, None]
    flat = np.flatnonzero((wide > tau) & eligible.ravel())
    return shard.span[0] + flat.astype(np.int64), wide[flat]


def piece_statistics(shard: ScoreShard, documents: Documents, *, tau: float, unit: Unit) -> PieceStatistics:
    """Count and float64 sum, in position order, of the scores above tau in each piece of the shard."""
    positions, scores = _above(shard, tau)
    unit_ids = _unit_ids(positions, shard, documents, unit)
    block_ids = positions // shard.scores.shape[1]
    # Unit and block both ascend with position, so a piece is a run in which neither changes.
    begins = (np.diff(unit_ids, prepend=-1) != 0) | (np.diff(block_ids, prepend=-1) != 0)
    piece = np.cumsum(begins) - 1
    return PieceStatistics(
        doc_id=unit_ids[begins],
        block_id=block_ids[begins],
        count=np.bincount(piece).astype(np.int64),
        sum=_totals(piece, scores, int(begins.sum())),
    )


def merge_statistics(parts: Sequence[PieceStatistics]) -> DocumentStatistics:
    """Sum the pieces of each unit in block order. The order of `parts` does not matter."""
    doc_id, block_id = (np.concatenate([getattr(x, name) for x in parts]) for name in ("doc_id", "block_id"))
    order = np.lexsort((block_id, doc_id))
    ids, row = np.unique(doc_id[order], return_inverse=True)
    counts = _totals(row, np.concatenate([part.count for part in parts])[order], len(ids))
    sums = _totals(row, np.concatenate([part.sum for part in parts])[order], len(ids))
    return DocumentStatistics(doc_id=ids, count=counts, sum=sums)


def _min_max(values: Floats, others_are_zero: bool) -> Floats:
    """(values - min) / (max - min), with 0 among the values if `others_are_zero`; all equal gives 0."""
    extremes = np.append(values, 0.0) if others_are_zero else values
    low, high = extremes.min(initial=np.inf), extremes.max(initial=-np.inf)
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def rank_units(statistics: DocumentStatistics, num_units: int) -> Ranking:
    """Order the units by 2sf / (s + f), s and f min-max normalised over all `num_units` units."""
    assert len(statistics.doc_id) <= num_units, (len(statistics.doc_id), num_units)
    others = len(statistics.doc_id) < num_units
    s = _min_max(statistics.count.astype(np.float64), others)
    f = _min_max(statistics.sum, others)
    total = s + f
    score = np.divide(2 * s * f, total, out=np.zeros_like(total), where=total > 0)
    order = np.lexsort((statistics.doc_id, -score))
    ids, counts, sums = statistics.doc_id[order], statistics.count[order], statistics.sum[order]
    return Ranking(doc_id=ids, count=counts, sum=sums, rank_score=score[order])


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedCounts:
    """Tokens each unit would have masked in this shard if the budget did not end: arrays (K,), count > 0."""

    first_block: int
    doc_id: Ints
    count: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Cutoff:
    """Where the budget ends: `whole` units (ascending ids) are masked in full, `cut` only in part.

    `quota` maps a shard's `first_block` to the tokens of `cut` it masks, the first in position order.
    """

    whole: Ints
    cut: int | None
    quota: Mapping[int, int]
    masked_tokens: int


def masked_positions(shard: ScoreShard, documents: Documents, *, tau: float, window: int) -> Ints:
    """Stream positions, ascending, of the tokens above tau and of `window` neighbours within each piece."""
    assert window >= 0, window
    positions, _ = _above(shard, tau)
    document = _documents_of(positions, shard, documents)
    block_begin = positions // shard.scores.shape[1] * shard.scores.shape[1]
    low = np.maximum(documents.token_start[document], block_begin + 1)
    high = np.minimum((documents.token_start + documents.num_tokens)[document], shard.span[1])
    high = np.minimum(high, block_begin + shard.scores.shape[1])
    around = positions + np.arange(-window, window + 1)[:, None]
    return np.unique(around[(around >= low) & (around < high)])


def masked_counts(shard: ScoreShard, documents: Documents, *, tau: float, window: int, unit: Unit) -> MaskedCounts:
    """Count `masked_positions` by unit."""
    positions = masked_positions(shard, documents, tau=tau, window=window)
    ids, counts = np.unique(_unit_ids(positions, shard, documents, unit), return_counts=True)
    return MaskedCounts(first_block=shard.first_block, doc_id=ids, count=counts.astype(np.int64))


def find_cutoff(ranking: Ranking, parts: Sequence[MaskedCounts], max_tokens: int) -> Cutoff:
    """Spend `max_tokens` on the units in rank order; the unit that exceeds it is cut, early shards first.

    `parts` are all shards' counts, in any order. Raises ValueError if they and the ranking disagree.
    """
    parts = sorted(parts, key=lambda part: part.first_block)
    ids, row = np.unique(np.concatenate([part.doc_id for part in parts]), return_inverse=True)
    counts = _totals(row, np.concatenate([part.count for part in parts]), len(ids))
    if not np.array_equal(ids, np.sort(ranking.doc_id)):
        raise ValueError("masked counts and ranking name different documents: was a score shard rewritten?")
    ends = np.cumsum(counts[np.searchsorted(ids, ranking.doc_id)])
    num_whole = int(np.searchsorted(ends, max_tokens, side="right"))
    spent = int(ends[num_whole - 1]) if num_whole else 0
    whole = np.sort(ranking.doc_id[:num_whole])
    if num_whole == len(ends) or spent == max_tokens:
        return Cutoff(whole=whole, cut=None, quota={}, masked_tokens=spent)
    cut = int(ranking.doc_id[num_whole])
    quota, left = {}, max_tokens - spent
    for part in parts:
        quota[part.first_block] = min(left, int(part.count[part.doc_id == cut].sum()))
        left -= quota[part.first_block]
    return Cutoff(whole=whole, cut=cut, quota=quota, masked_tokens=max_tokens)


def fill_mask(shard: ScoreShard, documents: Documents, *, tau: float, window: int, unit: Unit, cutoff: Cutoff) -> Bools:
    """(B, T) mask of this shard alone, label aligned: True where the loss of that token is penalised."""
    positions = masked_positions(shard, documents, tau=tau, window=window)
    unit_ids = _unit_ids(positions, shard, documents, unit)
    taken = np.isin(unit_ids, cutoff.whole)
    if cutoff.cut is not None:
        taken[np.flatnonzero(unit_ids == cutoff.cut)[: cutoff.quota.get(shard.first_block, 0)]] = True
    mask = np.zeros(shard.scores.shape, dtype=bool)
    mask.ravel()[positions[taken] - shard.span[0]] = True
    return mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The result: `masks` has one (B, T) array per shard, in the order the shards were given."""

    tau: float
    max_tokens: int
    ranking: Ranking
    cutoff: Cutoff
    masks: list[Bools]


def token_budget(max_fraction: float, predicted_tokens: int) -> int:
    """`max_tokens`: floor(max_fraction * predicted_tokens)."""
    assert 0 <= max_fraction <= 1, max_fraction
    return math.floor(max_fraction * predicted_tokens)


def select_tokens(
    shards: Sequence[ScoreShard], documents: Documents, *, quantile: float, window: int, max_fraction: float, unit: Unit
) -> Selection:
    """Algorithm 1 over shards that together are the corpus, by the per-shard functions alone.

    The result does not depend on how the corpus is cut into shards, nor on their order. Raises ValueError
    where shards or documents do not cover the same stream exactly.
    """
    spans = sorted(shard.span for shard in shards)
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), documents.span[1]] or documents.span[0]:
        raise ValueError(f"score shards {spans} and documents {documents.span} must cover one stream from 0 on, once")
    pairs = [(shard, documents.meeting(*shard.span)) for shard in shards]
    zero = np.zeros(BUCKETS, dtype=np.int64)
    high = sum((high_histogram(x.scores[x.valid]) for x in shards), zero)
    buckets = quantile_buckets(high, quantile)
    low = {bucket: sum((low_histogram(x.scores[x.valid], bucket) for x in shards), zero) for bucket in buckets}
    tau = quantile_from_histograms(high, low, quantile)
    statistics = merge_statistics([piece_statistics(x, docs, tau=tau, unit=unit) for x, docs in pairs])
    num_blocks = sum(len(shard.lengths) for shard in shards)
    ranking = rank_units(statistics, num_blocks if unit == "block" else len(documents.token_start))
    budget = token_budget(max_fraction, int(high.sum()))
    counts = [masked_counts(x, docs, tau=tau, window=window, unit=unit) for x, docs in pairs]
    cutoff = find_cutoff(ranking, counts, budget)
    masks = [fill_mask(x, docs, tau=tau, window=window, unit=unit, cutoff=cutoff) for x, docs in pairs]
    return Selection(tau=tau, max_tokens=budget, ranking=ranking, cutoff=cutoff, masks=masks)
