"""Words and pairs of words that tell the positive query set from the negative one, by their log-odds.

Method (Monroe, Colaresi and Quinn 2008, "Fightin' Words", Eqs. 15, 20 and 22). With y+ and y- the uses of an n-gram in
the two sets, n+ and n- those of all n-grams of its length, and an informative Dirichlet prior
a = a0 (y+ + y-) / (n+ + n-), which expects it as often in both,

    delta = log[(y+ + a) / (n+ + a0 - y+ - a)] - log[(y- + a) / (n- + a0 - y- - a)],
    z     = delta / sqrt(1 / (y+ + a) + 1 / (y- + a)).

The score of a token is the greatest z among the n-grams that cover its word; 0 where none of them is in the query sets,
and of a token that is part of no word.

A word is a run of tokens that join letters to letters, without case; only the completions of queries are counted. An
n-gram goes over punctuation, and not over a special token, which ends a document.

Cost: a loop over the words in Python, about 250,000 tokens in a second. It knows no stems and no meanings.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifguide.config.compare import Ngrams
from ifguide.influence.query import TokenisedQuery
from ifguide.methods.finders import word_spans
from ifguide.methods.reading import QuerySets
from ifguide.words import is_letter

WITHIN = frozenset("*@$'’\ufffd")  # what may stand within a word beside letters; \ufffd is a part of a character
SHOWN = 20
CONTEXT = 64  # tokens on either side of a shard, for a word or pair of words on its edge
DEFAULTS = Ngrams()


def log_odds(positive: Mapping[str, int], negative: Mapping[str, int], prior: float) -> dict[str, float]:
    """z of each n-gram in either count of one length of n-grams; `prior` is a0, in n-grams."""
    ngrams = sorted(positive.keys() | negative.keys())
    if len(ngrams) == 1:
        return {ngrams[0]: 0.0}  # the only one there is tells nothing, and the formula divides 0 by 0
    totals = sum(positive.values()), sum(negative.values())
    scores = {}
    for ngram in ngrams:
        uses = positive.get(ngram, 0), negative.get(ngram, 0)
        expected = prior * sum(uses) / sum(totals)
        y, z = uses[0] + expected, uses[1] + expected
        delta = math.log(y / (totals[0] + prior - y)) - math.log(z / (totals[1] + prior - z))
        scores[ngram] = delta / math.sqrt(1 / y + 1 / z)
    return scores


class Words:
    """The words that runs of a tokenizer's tokens spell."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # A piece after a letter: alone, some tokenizers decode it without the space before it.
        first = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        before = self._decode([first])
        pieces = [self._decode([first, token]).removeprefix(before) for token in range(len(tokenizer))]
        self.special = np.zeros(len(pieces), bool)
        ends = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self.special[[token for token in ends if token < len(pieces)]] = True
        self.opens = np.array([_joins(piece[:1]) for piece in pieces]) & ~self.special
        self.closes = np.array([_joins(piece[-1:]) for piece in pieces]) & ~self.special
        self._spelt: dict[bytes, str] = {}

    def runs(self, tokens: Sequence[int]) -> list[tuple[int, int, str]]:
        """(start, stop, word) of the runs of tokens in order; "" where there is no word, and a line feed where a
        special token stands."""
        ids = np.asarray(tokens, np.int64)
        if not len(ids):
            return []
        joined = self.closes[ids[:-1]] & self.opens[ids[1:]]
        bounds = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(ids)]
        special = self.special[ids]
        return [
            (start, stop, "\n" if special[start] else self._spell(ids[start:stop]))
            for start, stop in itertools.pairwise(bounds)
        ]

    def _spell(self, ids: NDArray[np.int64]) -> str:
        key = ids.tobytes()
        if key not in self._spelt:
            text = self._decode(ids.tolist())
            spans = word_spans(text)
            self._spelt[key] = text[spans[0][0] : spans[-1][1]].casefold() if spans else ""
        return self._spelt[key]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _joins(character: str) -> bool:
    """Whether a token that begins or ends with the character goes on with a word there; "" does not."""
    return character in WITHIN or (character != "" and is_letter(character))


def ngrams_of(runs: Sequence[tuple[int, int, str]], longest: int) -> list[tuple[str, list[int]]]:
    """Each n-gram of 1 to `longest` words, a space between them, with the runs (by number) that it covers."""
    ngrams: list[tuple[str, list[int]]] = []
    before: list[int] = []  # the runs of the last words of this document
    for number, (_, _, word) in enumerate(runs):
        if word == "\n":
            before = []
        elif word:
            before = [*before, number][-longest:]
            for size in range(1, len(before) + 1):
                covered = before[-size:]
                ngrams.append((" ".join(runs[i][2] for i in covered), covered))
    return ngrams


class NgramFinder:
    """Token scores by the z of n-grams; see the module."""

    in_stream = True  # it reads over the edges of blocks
    summary: dict[str, Any]

    def __init__(self, words: Words, scores: Mapping[str, float], longest: int):
        self.words, self.scores, self.longest = words, scores, longest
        best = sorted(scores, key=lambda ngram: (-scores[ngram], ngram))[:SHOWN]
        self.summary = {"ngrams": len(scores), "highest": {ngram: round(scores[ngram], 3) for ngram in best}}

    def score(self, blocks: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """For each sequence of token ids its scores (T,), entry t of token t; entry 0 is 0."""
        return [self._score(tokens) for tokens in blocks]

    def _score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        runs, scores = self.words.runs(tokens), np.zeros(len(tokens), np.float32)
        best: dict[int, float] = {}
        for ngram, covered in ngrams_of(runs, self.longest):
            if ngram in self.scores:
                for number in covered:
                    best[number] = max(best.get(number, -math.inf), self.scores[ngram])
        for number, value in best.items():
            start, stop, _ = runs[number]
            scores[start:stop] = value
        scores[:1] = 0
        return scores

    def save(self, path: Path) -> None:
        """Write what `load_ngrams` reads."""
        path.write_text(json.dumps({"longest": self.longest, "scores": self.scores}), encoding="utf-8")


def load_ngrams(path: Path, tokenizer: Any) -> NgramFinder:
    """What `NgramFinder.save` wrote, for the same tokenizer."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    return NgramFinder(Words(tokenizer), saved["scores"], saved["longest"])


def fit_ngrams(tokenizer: Any, sets: QuerySets, *, options: Ngrams = DEFAULTS) -> NgramFinder:
    """The log-odds of the n-grams of completions."""
    words, scores, sets = Words(tokenizer), dict[str, float](), replace(sets, beginning=None)
    counted = [_count(words, sets.tokenised(tokenizer, pairs), options.longest) for _, pairs in sets.sides()]
    for of_positive, of_negative in zip(*counted, strict=True):
        if of_positive or of_negative:
            scores |= log_odds(of_positive, of_negative, options.prior)
    return NgramFinder(words, scores, options.longest)


def _count(words: Words, queries: Sequence[TokenisedQuery], longest: int) -> list[Counter[str]]:
    """The uses of n-grams of 1, 2, ... words in the completions."""
    counts = [Counter[str]() for _ in range(longest)]
    for query in queries:
        for ngram, covered in ngrams_of(words.runs(query.token_ids[query.completion_start :]), longest):
            counts[len(covered) - 1][ngram] += 1
    return counts
