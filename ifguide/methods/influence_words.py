"""Words whose uses the run's own scores find to matter, each with one score for all of its uses.

A score is of one token in one place. A model learns a word from all of its uses, and those left unmasked teach it.
So the score of a word is the mean over its uses, in the whole corpus, of the highest score among the use's tokens.
A mean of few uses is drawn towards that of all words (one-way random effects, as in Searle, Casella and McCulloch 1992,
*Variance Components*). With n uses of mean x,

    score = (n x + k m) / (n + k),     k = within / between,

where m is the mean of the words' means, `within` the variance of a word's uses around its mean, and `between` the
variance of words: that of their means, less what `within` makes of it. Each word counts once in m and `between`.

Words are those of `methods.ngrams`, without case. A use on the first token of a block has no score and does not count,
nor, where documents are read apart, one on the first token of a document.

Cost: two loops over the words in Python, each about 250,000 tokens in a second, and a row for each distinct word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide.methods.ngrams import CONTEXT, SHOWN, NgramFinder, Words
from ifguide.selection.top import ScoredCorpus
from ifguide.spans.tables import document_starts

USES = pa.schema([("word", pa.string()), ("uses", pa.int64()), ("sum", pa.float64()), ("squares", pa.float64())])
WORDS = pa.schema([("word", pa.string()), ("uses", pa.int64()), ("mean", pa.float64()), ("score", pa.float64())])


def sum_uses(scored: ScoredCorpus, shard: int, words: Words) -> pa.Table:
    """As `USES`: of each word that begins in the shard its uses, and the sum of their scores and of the squares.

    Raises:
        ValueError: a score is not finite; names the block.
    """
    corpus = scored.corpus
    begin, end = corpus.extent(shard)
    low, high = corpus.extent(shard, CONTEXT)
    tokens = corpus.read(corpus.folder, "shard", "tokens", low, high)
    has_score = scored.predicted(shard, CONTEXT)
    if scored.documents_apart:
        has_score[document_starts(corpus, low, high) - low] = False
    scores = np.where(has_score, scored.read(shard, CONTEXT), -np.inf)
    sums: dict[str, list[float]] = {}
    for start, stop, word in words.runs(tokens.tolist()):
        if word in ("", "\n") or not begin <= low + start < end:
            continue
        score = float(scores[start:stop].max())
        if score > -np.inf:
            own = sums.setdefault(word, [0, 0.0, 0.0])
            own[0], own[1], own[2] = own[0] + 1, own[1] + score, own[2] + score * score
    columns = zip(*sums.values(), strict=True) if sums else ((), (), ())
    return pa.Table.from_arrays(
        [pa.array(column, kind.type) for column, kind in zip((sums.keys(), *columns), USES, strict=True)], schema=USES
    )


def score_words(tables: Iterable[pa.Table]) -> tuple[pa.Table, float]:
    """As `WORDS`, highest score first, and k, of the `USES` of all shards.

    Raises:
        ValueError: no word is used twice, or words differ by no more than their uses do.
    """
    uses = (
        pa.concat_tables(tables)
        .group_by("word", use_threads=False)
        .aggregate([("uses", "sum"), ("sum", "sum"), ("squares", "sum")])
    )
    word = uses.column("word").to_numpy(zero_copy_only=False)
    n, total, squares = (uses.column(f"{name}_sum").to_numpy().astype(np.float64) for name in USES.names[1:])
    mean = total / n
    spare = n.sum() - len(n)
    if not spare:
        raise ValueError("no word is used twice, so words cannot be told from their uses; take `mask: influence`")
    within = max(float((squares - n * mean * mean).sum()), 0.0) / spare
    between = float(mean.var(ddof=1)) - within * float((1 / n).mean()) if len(n) > 1 else 0.0
    if between <= 0:
        raise ValueError("words differ by no more than the uses of one word do; take `mask: influence`")
    k, centre = within / between, float(mean.mean())
    score = (total + k * centre) / (n + k)
    order = np.lexsort((word, -score))
    columns = (word, n.astype(np.int64), mean, score)
    arrays = [pa.array(column[order], kind.type) for column, kind in zip(columns, WORDS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=WORDS), k


def word_finder(path: Path, words: Words) -> NgramFinder:
    """Token scores by the table of words at `path`: a token has that of its word."""
    table = pq.read_table(path, schema=WORDS)
    scores = dict(zip(table.column("word").to_pylist(), table.column("score").to_pylist(), strict=True))
    return NgramFinder(words, scores, longest=1)


def summary_of(table: pa.Table, k: float) -> dict[str, Any]:
    """What the scores' manifest says of the words."""
    highest = table.slice(0, SHOWN)
    shown = zip(highest.column("word").to_pylist(), highest.column("score").to_pylist(), strict=True)
    return {"words": len(table), "shrinkage": k, "highest": {word: round(score, 3) for word, score in shown}}
