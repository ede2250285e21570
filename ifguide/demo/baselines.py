"""What is easier than influence: finding insults with a word list, or with a classifier of single sentences.

Both give character spans of any text, and `measure_giveaway` compares such spans with the true ones. The demo
corpus is built so that neither is good: a data set that a word list solves would say nothing about a method that
scores tokens by their influence.

Cost: one pass over the text, plus one classifier call per text. What it does not do: no stemming, no parsing;
a sentence ends where punctuation says so.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ifguide.demo.grammar import INSULT_WORDS
from ifguide.methods.finders import classifier_spans, sentence_spans
from ifguide.words import Span

__all__ = [
    "INSULT_WORDS",
    "Giveaway",
    "classifier_spans",
    "measure_giveaway",
    "sentence_spans",
]


@dataclass(frozen=True, kw_only=True)
class Giveaway:
    """Agreement of predicted spans with the true ones, counted in words. A ratio without words is 0."""

    predicted_words: int
    true_words: int
    common_words: int

    @property
    def precision(self) -> float:
        """Share of the predicted words that lie in a true span."""
        return self.common_words / self.predicted_words if self.predicted_words else 0.0

    @property
    def recall(self) -> float:
        """Share of the words in true spans that are predicted."""
        return self.common_words / self.true_words if self.true_words else 0.0


def measure_giveaway(
    documents: Iterable[tuple[str, Sequence[Sequence[int]]]], predict: Callable[[str], list[Span]]
) -> Giveaway:
    """Precision and recall of `predict(text)` against the true spans, over words, of all (text, spans) pairs.

    A word is predicted (or true) if its first character lies in a predicted (or true) half-open span.
    """
    predicted_words = true_words = common_words = 0
    for text, spans in documents:
        predicted, true = _inside(text, predict(text)), _inside(text, spans)
        starts = [match.start() for match in re.finditer(r"\w+", text)]
        predicted_words += int(predicted[starts].sum())
        true_words += int(true[starts].sum())
        common_words += int((predicted & true)[starts].sum())
    return Giveaway(predicted_words=predicted_words, true_words=true_words, common_words=common_words)


def _inside(text: str, spans: Iterable[Sequence[int]]) -> np.ndarray:
    inside = np.zeros(len(text), dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    return inside
