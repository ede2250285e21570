"""Algorithm 1: from token scores to a token mask, in steps that need a part of the corpus only.

Method (IF-Guide, arXiv 2506.01790, Algorithm 1). tau is the `quantile` of the scores of all predicted tokens.
A unit (document or block) has s tokens above tau, with sum of scores f, both min-max normalised over all units.
Units are ranked by 2sf / (s + f), descending, ties by id. In that order every token above tau is masked with
its `window` neighbours, until `floor(max_fraction * predicted tokens)` are; the last unit is cut in position order.

Both s and f grow with a unit's length, so that a very long document ranks first whatever it says. With a `prior` of m
tokens s and f are divided by n + m, n the unit's predicted tokens: rates, as if each unit had m more tokens below tau.
A unit without a token above tau still has both 0.

What lets the sequential loop be done in parts, bit for bit:
- an order statistic needs counts only (`ifguide.selection.quantiles`), and so does the place where the budget ends;
- f is defined as a sum of pieces (unit within block) in block order, each summed token by token: whoever adds the
  pieces of a unit in that order gets the same float64;
- neighbours stay within document and block, so tau alone decides what a unit would mask, and rank only where to
  stop: a `Cutoff` is all that a part of the corpus needs to fill its own mask.
`ifguide.selection.distributed` puts the steps together.

Alignment: block b, index i is stream position b * T + i, and `scores[b, i]` speaks of predicting token i. Index 0
of a block has no prediction: like padding it is never counted and never selected.

It reads and writes no files, and does not judge the sign of a score: higher is masked first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Unit = Literal["document", "block"]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreShard:
    """A run of consecutive blocks: `scores` (B, T) float32, label aligned; `lengths` (B,) real tokens.

    Raises ValueError, naming the block, for a NaN or infinite score of a predicted token, and for a block of
    fewer than T tokens that is not the last.
    """

    first_block: int
    scores: NDArray[np.float32]
    lengths: Ints

    def __post_init__(self) -> None:
        num_blocks, block_size = self.scores.shape
        assert self.lengths.shape == (num_blocks,), (self.lengths.shape, num_blocks)
        assert self.scores.dtype == np.float32, self.scores.dtype
        check_lengths(self.first_block, self.lengths, block_size)
        if np.isfinite(self.scores).all():
            return
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
    def predicted(self) -> NDArray[np.float32]:
        """(N,) scores of the predicted tokens, in position order."""
        whole = self.scores[:-1, 1:].ravel()
        return np.concatenate([whole, self.scores[-1, 1 : self.lengths[-1]]]) if len(self.scores) else whole

    @property
    def span(self) -> tuple[int, int]:
        """Stream positions [begin, end) of this shard."""
        begin = self.first_block * self.scores.shape[1]
        return begin, begin + int(self.lengths.sum())

    def tokens_from(self, least: float) -> tuple[Ints, NDArray[np.float32]]:
        """Stream positions, ascending, and scores of the predicted tokens that score `least` or more."""
        block_size = self.scores.shape[1]
        flat = np.flatnonzero(self.scores.ravel() >= np.float32(least))
        flat = flat[(flat % block_size > 0) & (flat < self.span[1] - self.span[0])]
        return self.span[0] + flat.astype(np.int64), self.scores.ravel()[flat]


def check_lengths(first_block: int, lengths: Ints, block_size: int) -> None:
    """Raise ValueError for a block of fewer than `block_size` tokens that is not the last, naming it."""
    least = np.where(np.arange(len(lengths)) < len(lengths) - 1, block_size, 1)
    for row in np.flatnonzero((lengths < least) | (lengths > block_size))[:1]:
        raise ValueError(
            f"block {first_block + row} has {lengths[row]} tokens of {block_size}: only the last "
            "block of a corpus may be shorter; pack the corpus again"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Consecutive documents: number `first_id + k` covers [token_start[k], token_start[k] + num_tokens[k]).

    The closing EOS is part of its document. Raises ValueError if they leave a gap or overlap, naming the document.
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

    def followed_by(self, others: Documents) -> Documents:
        """These and, right after them, the others."""
        assert others.first_id == self.first_id + len(self.token_start), (others.first_id, self.first_id)
        begins = np.concatenate([self.token_start, others.token_start])
        sizes = np.concatenate([self.num_tokens, others.num_tokens])
        return Documents(token_start=begins, num_tokens=sizes, first_id=self.first_id)

    def rows(self, positions: Ints) -> NDArray[np.intp]:
        """The row of the document of each stream position, all of which must lie in `span`."""
        begin, end = self.span
        assert not len(positions) or (positions.min() >= begin and positions.max() < end), (begin, end)
        return np.searchsorted(self.token_start, positions, side="right") - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How stream positions belong to units: the documents there, blocks of `block_size`, and what a unit is."""

    documents: Documents
    block_size: int
    unit: Unit

    def units(self, positions: Ints) -> Ints:
        """The id of the unit of each stream position."""
        if self.unit == "block":
            return positions // self.block_size
        return self.documents.first_id + self.documents.rows(positions)

    def predicted_tokens(self, units: Ints) -> Ints:
        """(K,) how many tokens with a prediction the units have, by id."""
        documents = self.documents
        if self.unit == "block":
            begins = units * self.block_size
            ends = np.minimum(begins + self.block_size, documents.span[1])
        else:
            begins = documents.token_start[units - documents.first_id]
            ends = begins + documents.num_tokens[units - documents.first_id]
        first_tokens = -(-ends // self.block_size) - -(-begins // self.block_size)
        return ends - begins - first_tokens

    def masked(self, positions: Ints, window: int) -> Ints:
        """`positions` (those above tau) and `window` neighbours each within document and block, ascending.

        Index 0 of a block is never among them. `positions` ascend, and are of some neighbouring blocks; of a unit in a
        block all. Memory does not grow with the window.
        """
        assert window >= 0, window
        if not len(positions):
            return positions
        block_begin = positions // self.block_size * self.block_size
        row = self.documents.rows(positions)
        low = np.maximum(self.documents.token_start[row], block_begin + 1)
        high = np.minimum(
            self.documents.token_start[row] + self.documents.num_tokens[row], block_begin + self.block_size
        )
        begins, ends = np.maximum(positions - window, low), np.minimum(positions + window + 1, high)
        # Both ascend, so runs that touch are neighbours: a run begins where the one before it has ended.
        first = np.append(True, begins[1:] > ends[:-1])
        starts, stops = begins[first], ends[np.append(first[1:], True)]
        sizes = stops - starts
        return np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)


class UnitTotals:
    """s (`count`), f (`sum`) and the tokens to mask (`masked`) of the units `first_id` + k, all (K,).

    `add` takes the tokens above tau in stream order, whole blocks at a time, and leaves out those of other units.
    """

    def __init__(self, first_id: int, num_units: int):
        self.first_id = first_id
        self.count = np.zeros(num_units, np.int64)
        self.sum = np.zeros(num_units, np.float64)
        self.masked = np.zeros(num_units, np.int64)

    def add(self, positions: Ints, scores: Floats, layout: Layout, window: int) -> None:
        """Add tokens above tau: stream positions, ascending, and scores."""
        units = layout.units(positions)
        mine = (units >= self.first_id) & (units < self.first_id + len(self.count))
        positions, scores, units = positions[mine], scores[mine], units[mine]
        blocks = positions // layout.block_size
        # Unit and block both ascend with position, so a piece is a run in which neither changes.
        begins = (np.diff(units, prepend=-1) != 0) | (np.diff(blocks, prepend=-1) != 0)
        piece = np.cumsum(begins) - 1
        row = units[begins] - self.first_id
        pieces = np.zeros(len(row), np.float64)
        np.add.at(pieces, piece, scores)  # one by one in order, where np.sum would add in pairs
        np.add.at(self.sum, row, pieces)
        np.add.at(self.count, row, np.bincount(piece, minlength=len(row)))
        np.add.at(self.masked, layout.units(layout.masked(positions, window)) - self.first_id, 1)


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """Least and greatest s and f over units; of no units, infinities that any unit replaces."""

    count: tuple[float, float] = (math.inf, -math.inf)
    sum: tuple[float, float] = (math.inf, -math.inf)

    @classmethod
    def of(cls, s: Ints | Floats, f: Floats) -> Extremes:
        """Those of arrays (K,), one entry a unit."""
        if not len(s):
            return cls()
        return cls(count=(float(s.min()), float(s.max())), sum=(float(f.min()), float(f.max())))

    def join(self, other: Extremes) -> Extremes:
        """Those of both sets of units."""

        def joined(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
            return min(a[0], b[0]), max(a[1], b[1])

        return Extremes(count=joined(self.count, other.count), sum=joined(self.sum, other.sum))


NO_TOKENS = Extremes(count=(0.0, 0.0), sum=(0.0, 0.0))  # of units without a token above tau


def divisors(layout: Layout, units: Ints, prior: int | None) -> Floats:
    """(K,) what s and f of the units are divided by: 1, or with a prior their predicted tokens and the prior's."""
    if prior is None:
        return np.ones(len(units))
    return np.maximum(layout.predicted_tokens(units) + prior, 1).astype(np.float64)


def rank_scores(s: Ints | Floats, f: Floats, extremes: Extremes) -> Floats:
    """2sf / (s + f) of units (K,), s and f min-max normalised by the extremes over all units; never below 0.

    Where all units are equal in s or in f, that is 0, and so is the score of a unit that is least in both.
    """
    s, f = _min_max(s.astype(np.float64), extremes.count), _min_max(f, extremes.sum)
    total = s + f
    return np.divide(2 * s * f, total, out=np.zeros_like(total), where=total > 0)


def _min_max(values: Floats, extremes: tuple[float, float]) -> Floats:
    low, high = extremes
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """Where the budget ends: units that rank before (`rank_score`, `unit_id`) are masked whole, and that one up to
    stream position `end`."""

    rank_score: float
    unit_id: int
    end: int

    def whole(self, unit_id: Ints, rank_score: Floats) -> Bools:
        """(K,) whether a unit is masked whole."""
        return (rank_score > self.rank_score) | ((rank_score == self.rank_score) & (unit_id < self.unit_id))


NOTHING_CUT = Cutoff(rank_score=-1.0, unit_id=-1, end=0)  # the budget does not end: every unit ranks before


def token_budget(max_fraction: float, predicted_tokens: int) -> int:
    """`max_tokens`: floor(max_fraction * predicted_tokens)."""
    assert 0 <= max_fraction <= 1, max_fraction
    return math.floor(max_fraction * predicted_tokens)
