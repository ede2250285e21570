"""What is easier than influence, on packed documents: the characters that a word list or a classifier marks.

A mark is a half-open span of a document's characters; a document that is marked as a whole has one span over all of
it, its EOS included. The text is what the document's tokens decode to. It is another one where the tokenizer changes
texts (NFC, lower case): the number of characters is compared. Where that differs, marks go over to the document's own
characters token by token, so a mark covers whole tokens there. Documents of token ids are refused by
`config.methods`: their last token need be no EOS.

Cost: one decoding of the corpus, and one classifier call for each sentence, document, or distinct word of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ifguide.methods.finders import sentence_spans, word_spans
from ifguide.spans.mapping import mask_of_spans, spans_of_mask, token_edges, token_stops
from ifguide.spans.tables import PackedCorpus, SpanCounts, read_documents, write_found_spans
from ifguide.tokenizer import token_places
from ifguide.words import Span, WordList

Find = Callable[[Sequence[str]], list[list[Span]]]


def find_words(words: Sequence[str]) -> Find:
    """The words of a list."""
    listed = WordList(words)
    return lambda texts: [listed.spans(text) for text in texts]


def find_classified_words(classify: Callable[[list[str]], np.ndarray], threshold: float) -> Find:
    """Words that score at least `threshold` alone, without their context; each distinct one is classified once."""

    def find(texts: Sequence[str]) -> list[list[Span]]:
        spans = [word_spans(text) for text in texts]
        words = sorted({text[start:stop] for text, own in zip(texts, spans, strict=True) for start, stop in own})
        scores = classify(words) if words else np.zeros(0)
        flagged = {word for word, score in zip(words, scores, strict=True) if score >= threshold}
        return [
            [(start, stop) for start, stop in own if text[start:stop] in flagged]
            for text, own in zip(texts, spans, strict=True)
        ]

    return find


def find_sentences(classify: Callable[[list[str]], np.ndarray], threshold: float) -> Find:
    """Sentences that score at least `threshold`; the sentences of all texts are classified at once."""

    def find(texts: Sequence[str]) -> list[list[Span]]:
        spans = [sentence_spans(text) for text in texts]
        sentences = [text[start:stop] for text, own in zip(texts, spans, strict=True) for start, stop in own]
        scores = iter(classify(sentences).tolist() if sentences else [])
        return [[span for span in own if next(scores) >= threshold] for own in spans]

    return find


def find_documents(classify: Callable[[list[str]], np.ndarray], threshold: float) -> Find:
    """Documents that score at least `threshold`."""

    def find(texts: Sequence[str]) -> list[list[Span]]:
        scores = classify(list(texts)) if texts else np.zeros(0)
        return [_whole(len(text)) if score >= threshold else [] for text, score in zip(texts, scores, strict=True)]

    return find


def whole_documents(find: Find) -> Find:
    """All of each document in which `find` marks anything."""
    return lambda texts: [_whole(len(text)) if own else [] for text, own in zip(texts, find(texts), strict=True)]


def mark_texts(corpus: PackedCorpus, folder: Path, shard: int, tokenizer: Any, find: Find) -> SpanCounts:
    """Write `spans-<shard>` in `folder`: what `find` marks in the documents that begin in the shard.

    Raises:
        ValueError: a marked document decodes to another number of characters than it had, and it cannot be told which
            of its tokens they are of; names it.
    """
    documents = read_documents(corpus, shard)
    ids, begins, sizes, chars = (
        documents.column(name).to_numpy() for name in ("doc_id", "token_start", "num_tokens", "num_chars")
    )
    if not len(ids):
        return _write(folder, shard, documents, [])
    first, end = int(begins[0]), int(begins[-1] + sizes[-1])
    tokens = corpus.read(corpus.folder, "shard", "tokens", first, end)
    own = [slice(start, start + size) for start, size in zip(begins - first, sizes, strict=True)]
    tokens_D = [tokens[place][:-1].tolist() for place in own]  # without the EOS
    texts = [str(tokenizer.decode(of_document, clean_up_tokenization_spaces=False)) for of_document in tokens_D]
    marks = [np.array(spans, np.float64).reshape(-1, 2) for spans in find(texts)]
    changed = [i for i, text in enumerate(texts) if len(marks[i]) and len(text) != chars[i]]
    stops = corpus.read(corpus.folder, "offsets", "stops", first, end) if changed else np.zeros(0, np.int32)
    for i in changed:
        try:
            places = token_places(tokenizer, texts[i], tokens_D[i])
        except ValueError as error:
            raise ValueError(
                f"{corpus.folder}: document {ids[i]} had {chars[i]} characters and decodes to {len(texts[i])}, and its"
                f" tokens do not tell which are which ({error}); compare with another tokenizer, a byte-level one, say"
            ) from error
        decoded = token_edges(token_stops(places[:, 1], len(texts[i])))
        marks[i] = spans_of_mask(mask_of_spans(marks[i], decoded), token_edges(stops[own[i]]))
    return _write(folder, shard, documents, marks)


def _write(folder: Path, shard: int, documents: pa.Table, spans_D: Sequence[np.ndarray]) -> SpanCounts:
    """Write `spans-<shard>`, of each of `documents` its (K, 2) spans."""
    counts = np.array([len(spans) for spans in spans_D], np.int64)
    return write_found_spans(folder, shard, documents, np.concatenate([np.zeros((0, 2)), *spans_D]), counts, 0)


def mark_annotated_documents(corpus: PackedCorpus, folder: Path, shard: int) -> SpanCounts:
    """Write `spans-<shard>` in `folder`: all of each document that begins in the shard and has an annotated token."""
    documents = read_documents(corpus, shard)
    begins, sizes, chars = (documents.column(name).to_numpy() for name in ("token_start", "num_tokens", "num_chars"))
    marks = [np.zeros((0, 2))] * len(begins)
    if len(begins):
        annotated = corpus.read(corpus.folder, "shard", "annotated", int(begins[0]), int(begins[-1] + sizes[-1]))
        marked = np.add.reduceat(annotated.astype(np.int64), begins - begins[0]) > 0
        marks = [
            np.array(_whole(int(n)) if flag else [], float).reshape(-1, 2)
            for n, flag in zip(chars, marked, strict=True)
        ]
    return _write(folder, shard, documents, marks)


def _whole(num_chars: int) -> list[Span]:
    return [(0, num_chars + 1)]
