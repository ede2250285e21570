"""What words alone find: lists, which mark or do not, and shares and probabilities, which rank.

Average precision is of a ranking, so a list is at a disadvantage in it: all its tokens tie. `word_marks` and
`word_probability` are the same knowledge as `word_list` and `classified_words`, ranked.

- `word_marks`: how often people marked the word in other documents, (marked + a r) / (uses + a) with r the share of all
  marked words and a = `PRIOR`; r for a word that the others do not have;
- `word_list`: the words with at least five uses there of which half are marked;
- `word_probability`: a classifier's probability of the word alone; `classified_words`: where that is .5 or more;
- `classifier`: its probability of the token's sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bench.common.behaviours import SPANS
from bench.common.texts import Document
from ifguide.methods.finders import sentence_spans, word_spans
from ifguide.words import Span, WordList

PRIOR = 5.0  # uses
LEAST_USES, LEAST_SHARE, THRESHOLD = 5, 0.5, 0.5
WORD = re.compile(r"\w[\w'*$@]*")
Offsets = Sequence[tuple[int, int]]  # of the tokens of a text, in characters
Classify = Callable[[list[str]], np.ndarray]


def word_rivals(
    documents: Sequence[Document], others: Sequence[Document], offsets: Sequence[Offsets], classify: Classify
) -> dict[str, list[np.ndarray]]:
    """Name -> the scores (T,) of each document's tokens. `others`: documents that people's marks are known of."""
    texts = [document["text"] for document in documents]
    uses, marked = count_marks(others)
    words, shares = WordList(marked_words(uses, marked)), mark_shares(uses, marked)
    rate = sum(marked.values()) / max(1, sum(uses.values()))
    own = [[(match.span(), match.group().lower()) for match in WORD.finditer(text)] for text in texts]
    alone = [[(span, text[slice(*span)]) for span in word_spans(text)] for text in texts]
    distinct = sorted({word for of_text in alone for _, word in of_text})
    probability = dict(zip(distinct, classify(distinct), strict=True)) if distinct else {}
    return {
        "word_marks": [
            spread_values(places, [(span, shares.get(word, rate)) for span, word in of_text])
            for of_text, places in zip(own, offsets, strict=True)
        ],
        "word_list": [spread(places, words.spans(text), 1.0) for text, places in zip(texts, offsets, strict=True)],
        "word_probability": [
            spread_values(places, [(span, float(probability[word])) for span, word in of_text])
            for of_text, places in zip(alone, offsets, strict=True)
        ],
        "classified_words": [
            spread(places, [span for span, word in of_text if probability[word] >= THRESHOLD], 1.0)
            for of_text, places in zip(alone, offsets, strict=True)
        ],
        "classifier": [sentence_scores(text, places, classify) for text, places in zip(texts, offsets, strict=True)],
    }


def spread(offsets: Offsets, spans: Iterable[Sequence[int]], value: float) -> np.ndarray:
    """`value` at the tokens that overlap one of the character spans, 0 elsewhere; index 0, the EOS, is 0."""
    return spread_values(offsets, [((start, stop), value) for start, stop in spans])


def spread_values(offsets: Offsets, spans: Sequence[tuple[Span, float]]) -> np.ndarray:
    """The highest value of the spans that a token overlaps, 0 where there is none."""
    scores = np.zeros(len(offsets))
    for (start, stop), value in spans:
        for token, (begin, end) in enumerate(offsets):
            if begin < stop and end > start:
                scores[token] = max(scores[token], value)
    return scores


def sentence_scores(text: str, offsets: Offsets, classify: Classify) -> np.ndarray:
    """The classifier's probability of the sentence that a token lies in."""
    spans = sentence_spans(text)
    scores = classify([text[start:stop] for start, stop in spans]) if spans else np.zeros(0)
    return spread_values(offsets, [(span, float(score)) for span, score in zip(spans, scores, strict=True)])


def sentence_means(text: str, offsets: Offsets, scores_T: np.ndarray) -> np.ndarray:
    """(T,) the mean score of the tokens of the sentence that a token lies in; its own score outside of all."""
    means = np.array(scores_T, dtype=np.float64)
    for start, stop in sentence_spans(text):
        inside = np.array([begin < stop and end > start for begin, end in offsets])
        if inside.any():
            means[inside] = scores_T[inside].mean()
    return means


def count_marks(documents: Sequence[Document]) -> tuple[Counter[str], Counter[str]]:
    """How often each word is used, and how often it overlaps a marked span."""
    uses, marked = Counter[str](), Counter[str]()
    for document in documents:
        for match in WORD.finditer(document["text"]):
            word = match.group().lower()
            uses[word] += 1
            marked[word] += any(match.start() < b and match.end() > a for a, b in document.get(SPANS, []))
    return uses, marked


def marked_words(uses: Mapping[str, int], marked: Mapping[str, int]) -> list[str]:
    """The words that have enough uses, of which enough are marked."""
    return sorted(w for w, count in uses.items() if count >= LEAST_USES and marked[w] >= LEAST_SHARE * count)


def mark_shares(uses: Mapping[str, int], marked: Mapping[str, int]) -> dict[str, float]:
    """Word -> the share of its uses that are marked, drawn towards that of all words."""
    rate = sum(marked.values()) / max(1, sum(uses.values()))
    return {word: (marked[word] + PRIOR * rate) / (count + PRIOR) for word, count in uses.items()}
