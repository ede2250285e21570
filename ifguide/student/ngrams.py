"""A student without a model: shrunken mean scores of the n-grams that end in a token.

With g_n(j) the last n tokens up to and with token j, and sums over the tokens of the sample,

    p_0 = the mean of all scores
    p_n(j) = (sum of the scores of g_n(j) + k p_{n-1}(j)) / (count of g_n(j) + k),  n = 1, ..., longest

so an n-gram that was seen seldom says what its last n - 1 tokens say, as in a hierarchical language model (MacKay and
Peto 1995), for means. k and the longest n are chosen on blocks that were held out (`choose_ngrams`): the tables do not
depend on them, and add up over parts of a sample in any order. An n-gram is found by its hash, and two may share a
place: 2^20 places for each n are enough for about a million different n-grams. Of a larger sample long n-grams share
theirs with many others, and say the mean of those; shorter ones are then chosen.

Nothing is read but token ids: no model, no accelerator. Before the first token of a block there is none.

Memory: 16 bytes * longest * 2^bits. Cost: about 30 operations a token for each n, and one look-up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ifguide.artifacts import publish
from ifguide.folds import GOLDEN, spread_bits
from ifguide.student.fidelity import fidelity
from ifguide.sums import Sums

BITS, LONGEST = 20, 4
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramSums(Sums):
    """Sums of the scores and counts by the place of an n-gram, (N, P) each, n from 1 to N; float64, P a power of two.
    The total and the number of all tokens beside them."""

    scores_NP: NDArray[np.float64]
    counts_NP: NDArray[np.float64]
    total: float
    tokens: int

    @classmethod
    def of(
        cls, tokens_BT: Integers, scores_BT: Floats, known_BT: NDArray[np.bool_], *, longest: int = LONGEST,
        bits: int = BITS,
    ) -> NgramSums:  # fmt: skip
        """Of blocks of token ids and their label-aligned scores, where `known_BT`.

        Raises:
            ValueError: a score is not finite.
        """
        known_scores = scores_BT[known_BT].astype(np.float64)
        if not np.isfinite(known_scores).all():
            raise ValueError("scores are not finite; the proxy or the query overflows, check both for NaN")
        places = [places_BT[known_BT] for places_BT in ngram_places(tokens_BT, longest=longest, bits=bits)]
        return cls(
            scores_NP=np.stack([np.bincount(own, weights=known_scores, minlength=1 << bits) for own in places]),
            counts_NP=np.stack([np.bincount(own, minlength=1 << bits).astype(np.float64) for own in places]),
            total=float(known_scores.sum()),
            tokens=len(known_scores),
        )

    @classmethod
    def read(cls, saved: Mapping[str, NDArray[np.float64]], prefix: str = "") -> NgramSums:
        """Those of a file in which each field stands under the prefix and its name."""
        scores_NP, counts_NP, total, tokens = (saved[f"{prefix}{field.name}"] for field in fields(cls))
        return cls(scores_NP=scores_NP, counts_NP=counts_NP, total=float(total), tokens=int(tokens))


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramStudent:
    """Scores from sums; `strength` is k, `longest` the greatest n that is used."""

    sums: NgramSums
    strength: float
    longest: int = LONGEST

    def score(self, tokens_BT: Integers) -> NDArray[np.float32]:
        """(B, T) p_N of every token, label-aligned; entry 0 of a block is 0, for nothing predicts it.

        Raises:
            ValueError: the sample had no token.
        """
        if not self.sums.tokens:
            raise ValueError("the sample holds no token with a score; raise fit_student.sample_fraction")
        longest, size = min(self.longest, len(self.sums.scores_NP)), self.sums.scores_NP.shape[1]
        mean_BT = np.full(tokens_BT.shape, self.sums.total / self.sums.tokens)
        for n, places_BT in enumerate(ngram_places(tokens_BT, longest=longest, bits=size.bit_length() - 1)):
            of_ngram_BT, count_BT = self.sums.scores_NP[n][places_BT], self.sums.counts_NP[n][places_BT]
            mean_BT = (of_ngram_BT + self.strength * mean_BT) / (count_BT + self.strength)
        mean_BT[:, 0] = 0
        return mean_BT.astype(np.float32)

    def save(self, path: Path) -> None:
        """Publish what `load` reads."""
        with publish(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **vars(self.sums), strength=self.strength, longest=self.longest)

    @classmethod
    def load(cls, path: Path) -> NgramStudent:
        """What `save` wrote."""
        with np.load(path) as saved:
            longest = int(saved["longest"]) if "longest" in saved.files else LONGEST
            return cls(sums=NgramSums.read(saved), strength=float(saved["strength"]), longest=longest)


def choose_ngrams(
    sums: NgramSums, tokens_BT: Integers, scores_BT: Floats, known_BT: NDArray[np.bool_]
) -> tuple[NgramStudent, list[dict[str, float]]]:
    """The student of `sums` whose strength and longest n find most of the highest scores of blocks that `sums` does not
    hold, and the figures (`fidelity`) of all of them."""
    tried = []
    for longest, strength in itertools.product(range(len(sums.scores_NP), 0, -1), STRENGTHS):
        found_BT = NgramStudent(sums=sums, strength=strength, longest=longest).score(tokens_BT)
        figures = fidelity(scores_BT[known_BT], found_BT[known_BT])
        tried.append({"strength": strength, "longest": longest, **figures})
    best = best_ngram(tried)
    return NgramStudent(sums=sums, strength=best["strength"], longest=int(best["longest"])), tried


def best_ngram(tried: Sequence[dict[str, float]]) -> dict[str, float]:
    """The one that is kept: what finds most of the highest exact scores."""
    return max(tried, key=lambda own: (own["recall"], own["spearman"]))


def ngram_places(tokens_BT: Integers, *, longest: int, bits: int) -> Iterator[NDArray[np.int64]]:
    """(B, T) the place of the n-gram that ends in each token, of [0, 2^bits), for n = 1, ..., longest."""
    ids_BT = tokens_BT.astype(np.uint64) + np.uint64(1)  # 0: before a block
    hash_BT = np.zeros_like(ids_BT)
    for n in range(longest):
        shifted_BT = np.zeros_like(ids_BT)
        shifted_BT[:, n:] = ids_BT[:, : ids_BT.shape[1] - n]
        hash_BT = spread_bits(hash_BT + shifted_BT * GOLDEN)
        yield (hash_BT >> np.uint64(64 - bits)).astype(np.int64)
