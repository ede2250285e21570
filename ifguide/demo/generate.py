"""The data set of `make demo`: a corpus with hidden insults, and everything that a run needs beside it.

All of it is drawn from the project's own grammar, so the demo needs no download, and the true spans of the insults
are known. Files, all JSONL but the tokenizer:

    corpus.jsonl     {id, text, toxic, toxic_spans}: the training corpus; spans are half-open, in characters
    heldout.jsonl    the same row, benign documents that are not in the corpus: for perplexity
    annotated.jsonl  the same row, documents that are not in the corpus, half of them with insults: how likely are they?
    queries.jsonl    RealToxicityPrompts' row: half with an insulting continuation, half with a benign one
    prompts.jsonl    RealToxicityPrompts' row: half with prompt.toxicity >= 0.5; no prompt is also a query's
    cloze.jsonl      {text}: the last word is a name or thing that the text has told before (like LAMBADA)
    tokenizer/       byte-level BPE, trained on the corpus; loads with AutoTokenizer
    summary.json     counts, and how well a word list and a sentence classifier would do; written last

`toxicity` in prompts and queries is the score of alt-profanity-check, a classifier that works offline; the other
attributes of the schema are null, as nothing here measures them.

Every document has its own random stream, named by seed, file and number: the bytes depend on the arguments and
on nothing else, and more documents leave the earlier ones as they were. Cost: about 10 seconds of one core.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ifguide.artifacts import publish, write_json
from ifguide.demo.baselines import (
    INSULT_WORDS,
    Giveaway,
    classifier_spans,
    measure_giveaway,
    sentence_spans,
)
from ifguide.demo.documents import Document, Passage, compose
from ifguide.tokenizer import save_tokenizer, train_tokenizer
from ifguide.toxicity import load_classifier
from ifguide.words import WordList

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
CLASSIFIER = "alt-profanity-check"
THRESHOLD = 0.5

_INSULTING_RATE = 0.09
_HELDOUT_SHARE = 1 / 14  # of the number of documents; as many with insults
_CLOZE_WORDS = 85  # fits a block of 128 tokens
_ATTRIBUTES = (
    "profanity",
    "sexually_explicit",
    "identity_attack",
    "flirtation",
    "threat",
    "insult",
    "severe_toxicity",
)

Classify = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class DemoSummary:
    """What was made. Tokens are the new tokenizer's, without end-of-text; a toxic token overlaps a span.

    `word_list` and `classifier` are precision and recall, over words of the corpus, of `INSULT_WORDS` and of
    the sentences that the offline classifier scores at 0.5 or more.
    """

    seed: int
    documents: int
    toxic_documents: int
    tokens: int
    toxic_tokens: int
    heldout_documents: int
    heldout_tokens: int
    queries: int
    prompts: int
    cloze: int
    vocab_size: int
    word_list: dict[str, float]
    classifier: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A document cut in two, and the classifier's score of either side."""

    name: str
    begin: int
    end: int
    prompt: str
    continuation: str
    prompt_score: float
    continuation_score: float
    told_insult: bool  # the prompt ends after an insulting sentence

    def row(self) -> dict[str, Any]:
        """The row in the schema of RealToxicityPrompts."""
        unscored = dict.fromkeys(_ATTRIBUTES)
        return {
            "filename": self.name,
            "begin": self.begin,
            "end": self.end,
            "challenging": False,
            "prompt": {"text": self.prompt, "toxicity": self.prompt_score, **unscored},
            "continuation": {"text": self.continuation, "toxicity": self.continuation_score, **unscored},
        }


def generate_demo(
    out_dir: Path,
    *,
    seed: int = 0,
    documents: int = 2700,
    vocab_size: int = 2048,
    queries: int = 300,
    prompts: int = 200,
    cloze: int = 200,
) -> DemoSummary:
    """Write the demo data set into `out_dir`, replacing the files of an earlier one.

    Files are published one by one and `summary.json` last: without it the set is unfinished. ValueError: fewer
    than 100 documents, a vocabulary below 300, or a number of prompt rows that is not positive and even.
    """
    if documents < 100:
        raise ValueError(f"documents must be at least 100 for a corpus with insults, got {documents}")
    if vocab_size < 300:
        raise ValueError(f"vocab_size must be at least 300 (256 bytes and some merges), got {vocab_size}")
    for name, count in (("queries", queries), ("prompts", prompts), ("cloze", cloze)):
        if count < 2 or count % 2:
            raise ValueError(f"{name} must be a positive even number, got {count}")
    (out_dir / SUMMARY).unlink(missing_ok=True)
    corpus = list(_documents("corpus", seed, documents, _INSULTING_RATE))
    texts = {document.text for document in corpus}
    heldout, annotated = (
        [
            document
            for document in _documents(name, seed, round(documents * _HELDOUT_SHARE), insulting_rate)
            if document.text not in texts
        ]
        for name, insulting_rate in (("heldout", 0.0), ("annotated", 0.5))
    )
    classify = _offline_classifier()
    query_rows, prompt_rows = _prompt_tables(seed, queries, prompts, classify)
    cloze_rows = _cloze_rows(seed, cloze)

    write_rows(out_dir / "corpus.jsonl", (_row("corpus", i, d) for i, d in enumerate(corpus)))
    write_rows(out_dir / "heldout.jsonl", (_row("heldout", i, d) for i, d in enumerate(heldout)))
    write_rows(out_dir / "annotated.jsonl", (_row("annotated", i, d) for i, d in enumerate(annotated)))
    write_rows(out_dir / "queries.jsonl", query_rows)
    write_rows(out_dir / "prompts.jsonl", prompt_rows)
    write_rows(out_dir / "cloze.jsonl", cloze_rows)
    tokenizer = train_tokenizer([document.text for document in corpus], vocab_size=vocab_size)
    save_tokenizer(tokenizer, out_dir / "tokenizer")

    word_list, classifier = _giveaways(corpus, classify)
    tokens, toxic_tokens = _count_tokens(tokenizer, corpus)
    summary = DemoSummary(
        seed=seed,
        documents=len(corpus),
        toxic_documents=sum(bool(document.toxic_spans) for document in corpus),
        tokens=tokens,
        toxic_tokens=toxic_tokens,
        heldout_documents=len(heldout),
        heldout_tokens=_count_tokens(tokenizer, heldout)[0],
        queries=len(query_rows),
        prompts=len(prompt_rows),
        cloze=len(cloze_rows),
        vocab_size=len(tokenizer),
        word_list=_ratios(word_list),
        classifier=_ratios(classifier),
    )
    write_json(out_dir / SUMMARY, dataclasses.asdict(summary))
    logger.info("demo data in %s: %s", out_dir, summary)
    return summary


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Publish rows as JSONL, UTF-8, one object a line."""
    with publish(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _offline_classifier() -> Classify:
    classifier = load_classifier(CLASSIFIER)
    return lambda texts: classifier.score(texts)[classifier.classes[0]]


def _documents(name: str, seed: int, count: int, insulting_rate: float) -> Iterator[Document]:
    for number in range(count):
        rng = Random(f"{seed}/{name}/{number}")
        yield compose(rng, insulting=rng.random() < insulting_rate)


def _row(name: str, number: int, document: Document) -> dict[str, Any]:
    return {
        "id": f"{name}-{number:05d}",
        "text": document.text,
        "toxic": bool(document.toxic_spans),
        "toxic_spans": [list(span) for span in document.toxic_spans],
    }


# ------------------------------------------------------------------------------------------ prompts and cloze


def _prompt_tables(
    seed: int, queries: int, prompts: int, classify: Classify
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Query rows and prompt rows, from documents of their own; no prompt text occurs twice in both together."""
    candidates = _candidates(seed, 24 * (queries + prompts), classify)
    taken: set[str] = set()

    def take(count: int, wanted: Callable[[_Candidate], bool]) -> list[dict[str, Any]]:
        chosen: list[_Candidate] = []
        for candidate in candidates:
            if len(chosen) < count and candidate.prompt not in taken and wanted(candidate):
                taken.add(candidate.prompt)
                chosen.append(candidate)
        assert len(chosen) == count, f"{len(chosen)} of {count} rows: draw more candidates"
        return [candidate.row() for candidate in chosen]

    # Half of the toxic prompts break off within insults; the others only mention something the classifier dislikes.
    toxic = prompts // 2
    rows = take(toxic // 2, lambda c: c.prompt_score >= THRESHOLD and c.told_insult)
    rows += take(toxic - toxic // 2, lambda c: c.prompt_score >= THRESHOLD and not c.told_insult)
    rows += take(prompts - toxic, lambda c: c.prompt_score < THRESHOLD)
    Random(f"{seed}/prompts").shuffle(rows)
    query_rows = take(queries // 2, lambda c: c.continuation_score >= THRESHOLD)
    query_rows += take(queries - queries // 2, lambda c: c.continuation_score < THRESHOLD)
    Random(f"{seed}/queries").shuffle(query_rows)
    return query_rows, rows


def _candidates(seed: int, count: int, classify: Classify) -> list[_Candidate]:
    cuts = []
    for number in range(count):
        rng = Random(f"{seed}/prompts/{number}")
        document = compose(rng, insulting=number % 2 == 0)
        kind = rng.choice(document.passages)
        begin, cut = _cut(rng, document.text, kind)
        told = any(insult and start < cut for (start, _), insult in zip(kind.sentences, kind.insults, strict=True))
        cuts.append((f"demo-{number:05d}", begin, cut, kind.end, document.text, told))
    scores = classify(
        [text[begin:cut] for _, begin, cut, _, text, _ in cuts] + [text[cut:end] for _, _, cut, end, text, _ in cuts]
    )
    return [
        _Candidate(
            name=name,
            begin=begin,
            end=end,
            prompt=text[begin:cut],
            continuation=text[cut:end],
            prompt_score=round(float(prompt_score), 6),
            continuation_score=round(float(continuation_score), 6),
            told_insult=told,
        )
        for (name, begin, cut, end, text, told), prompt_score, continuation_score in zip(
            cuts, scores[:count], scores[count:], strict=True
        )
    ]


def _cut(rng: Random, text: str, passage: Passage) -> tuple[int, int]:
    """Where a prompt begins (up to two sentences before the lead-in), and where it ends.

    It ends after the lead-in, after two words of the passage, or after its first sentence; like the prompts of
    RealToxicityPrompts, never with a space.
    """
    starts = [start for start, _ in sentence_spans(text) if start < passage.lead_end]
    begin = starts[-min(len(starts), rng.randint(2, 3))]
    first_start, first_end = passage.sentences[0]
    words = [match.end() for match in re.finditer(r"\S+", text[first_start:first_end])]
    ends = [passage.lead_end, first_start + words[min(2, len(words) - 1) - 1]]
    if len(passage.sentences) > 1:
        ends.append(first_end)
    return begin, rng.choice(ends)


def _cloze_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Short benign stories up to the last word, which occurs at least twice before."""
    rows: list[dict[str, Any]] = []
    number = 0
    while len(rows) < count:
        rng = Random(f"{seed}/cloze/{number}")
        number += 1
        words = compose(rng, insulting=False, format="story").text.removesuffix(".").split(" ")
        earlier = re.findall(r"\w+", " ".join(words[:-1]))
        if len(words) <= _CLOZE_WORDS and earlier.count(words[-1]) >= 2:
            rows.append({"text": " ".join(words)})
    return rows


# ------------------------------------------------------------------------------------------------ measurements


def _giveaways(corpus: list[Document], classify: Classify) -> tuple[Giveaway, Giveaway]:
    pairs = [(document.text, document.toxic_spans) for document in corpus]
    sentences = sorted({text[start:end] for text, _ in pairs for start, end in sentence_spans(text)})
    # One call for all sentences: a call for each text would take most of the generator's time.
    labels = dict(zip(sentences, classify(sentences), strict=True))
    by_words = measure_giveaway(pairs, WordList(INSULT_WORDS).spans)
    by_classifier = measure_giveaway(
        pairs, lambda text: classifier_spans(text, lambda parts: np.array([labels[p] for p in parts]), THRESHOLD)
    )
    return by_words, by_classifier


def _ratios(giveaway: Giveaway) -> dict[str, float]:
    return {"precision": round(giveaway.precision, 4), "recall": round(giveaway.recall, 4)}


def _count_tokens(tokenizer: Any, documents: list[Document]) -> tuple[int, int]:
    """All tokens, and those that overlap a toxic span."""
    encoded = tokenizer([document.text for document in documents], return_offsets_mapping=True)
    tokens = toxic = 0
    for document, offsets in zip(documents, encoded["offset_mapping"], strict=True):
        tokens += len(offsets)
        toxic += sum(
            any(start < span_end and span_start < end for span_start, span_end in document.toxic_spans)
            for start, end in offsets
        )
    return tokens, toxic
