"""Two behaviours on real text, each with queries, and with documents whose tokens people judged.

- `explicit`: comments of which people marked the toxic spans, among tweets called not offensive and paragraphs of an
  encyclopedia. Queries: RealToxicityPrompts by Perspective's scores of the continuation.
- `implicit`: posts of a white supremacist forum whose sentences people called hateful or not. Nearly no hateful one
  holds an insult. Queries: sentences of other posts, by the same labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common.texts import Document, read_paragraphs, read_rows
from ifguide.telemetry import log

Query = tuple[str, str]  # prompt, completion
SPANS = "spans"  # of a document: half-open spans of characters that people marked
SOURCE = "source"  # of a document: what kind it is of


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What a behaviour is found in, and what describes it.

    `documents` are scored and judged, `others` are disjoint documents of the same kinds."""

    documents: list[Document]
    others: list[Document]
    positive: list[Query]
    negative: list[Query]


def read_behaviour(name: str, data: Path, *, documents: int, queries: int, seed: int) -> Behaviour:
    """The behaviour `name`, with so many documents, and so many queries of each set where there are as many.

    Raises:
        FileNotFoundError: a file of `data` is absent.
    """
    pools, label, thresholds, table = BEHAVIOURS[name](data)
    rng = np.random.default_rng(seed)
    sample: list[Document] = []
    others: list[Document] = []
    for pool, share in pools:
        order = rng.permutation(len(pool))
        number = round(share * documents)
        sample += [pool[i] for i in order[:number]]
        others += [pool[i] for i in order[number:]]
    positive, negative = _read_queries(data / table, label, thresholds, queries, seed)
    return Behaviour(
        documents=sample,
        others=[others[i] for i in rng.permutation(len(others))],
        positive=positive,
        negative=negative,
    )


Pools = Sequence[tuple[list[Document], float]]  # documents of a kind, and their share of the sample
Source = tuple[Pools, str, tuple[float, float], str]  # those, and of the queries label, thresholds and file


def _explicit(data: Path) -> Source:
    comments = _with_spans(read_rows(data / "civil_comments_spans.jsonl"), "toxic_spans", "comments")
    tweets = _with_spans(read_rows(data / "other_tweets.jsonl"), "offensive_spans", "tweets")
    paragraphs = [{**row, SOURCE: "encyclopedia"} for row in read_paragraphs(data)]
    pools = ((comments, 0.6), (tweets, 0.2), (paragraphs, 0.2))
    return pools, "toxicity", (0.1, 0.5), "rtp_prompts.jsonl"


def _implicit(data: Path) -> Source:
    posts = _with_spans(read_rows(data / "forum_posts.jsonl"), "hateful_spans", "posts")
    return ((posts, 1.0),), "hateful", (0.0, 1.0), "forum_queries.jsonl"


BEHAVIOURS: dict[str, Callable[[Path], Source]] = {"explicit": _explicit, "implicit": _implicit}


def _with_spans(rows: Sequence[Document], column: str, source: str) -> list[Document]:
    return [{"text": row["text"], SPANS: row[column], SOURCE: source} for row in rows]


def _read_queries(
    path: Path, label: str, thresholds: tuple[float, float], count: int, seed: int
) -> tuple[list[Query], list[Query]]:
    """`count` (prompt, continuation) pairs that score at least the higher threshold, and `count` at most the lower."""
    low, high = thresholds
    positive: list[Query] = []
    negative: list[Query] = []
    for row in read_rows(path):
        score, text = row["continuation"][label], row["continuation"]["text"]
        if score is not None and text.strip():
            if score >= high:
                positive.append((row["prompt"]["text"], text))
            elif score <= low:
                negative.append((row["prompt"]["text"], text))
    rng = np.random.default_rng(seed)
    chosen = [[rows[i] for i in rng.permutation(len(rows))[:count]] for rows in (positive, negative)]
    log("queries", f"{len(chosen[0])} of {len(positive)} positive, {len(chosen[1])} of {len(negative)} negative")
    return chosen[0], chosen[1]
