"""What is easier than influence: marking text by a classifier of single sentences (a word list: `ifguide.words`).

It gives half-open character spans of any text, to be compared with known spans beside the mask's tokens.
No stemming and no parsing; a sentence ends where punctuation says so, a word where its letters do (in scripts without
spaces that is a run of words). Cost: one pass over the text, and one classifier call per text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np

from ifguide.words import Span, mark_ranges

ENDS = "。｡！？।॥؟۔።။។"  # of scripts that put no space behind a sentence, or another mark at its end
QUOTES = '"“”「」『』'

# A sentence ends at its last mark, or before a line break; a colon before a space ends a lead-in.
_SENTENCE = re.compile(rf"[^\s{QUOTES}](?:[^.!?:{ENDS}\n]|[.!?:](?![\s{QUOTES}.!?{ENDS}]|$))*(?:[.!?{ENDS}]+|:)?")


@cache
def _word() -> re.Pattern[str]:
    """Letters and digits with their marks, and within or behind them what stands for letters ("f*ck", "a$$") or joins
    them ("don't")."""
    return re.compile(rf"\w[\w{mark_ranges()}'’*@$]*(?<!['’])")


def word_spans(text: str) -> list[Span]:
    """Spans of the words of `text`, in order."""
    return [match.span() for match in _word().finditer(text)]


def sentence_spans(text: str) -> list[Span]:
    """Spans of the sentences of `text`, in order, without quotation marks around them."""
    spans = []
    for match in _SENTENCE.finditer(text):
        sentence = match.group().rstrip(f"{QUOTES} \t")
        spans.append((match.start(), match.start() + len(sentence)))
    return spans


def classifier_spans(text: str, classify: Callable[[list[str]], np.ndarray], threshold: float = 0.5) -> list[Span]:
    """Spans of the sentences of `text` whose score is at least `threshold`; `classify` maps N texts to N scores."""
    spans = sentence_spans(text)
    if not spans:
        return []
    scores = np.asarray(classify([text[start:end] for start, end in spans]))
    return [span for span, score in zip(spans, scores, strict=True) if score >= threshold]
