"""The uses of words in a shard, against a loop over the whole stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.methods.influence_words import sum_uses
from ifguide.selection.top import ScoredCorpus
from ifguide.spans.tables import PackedCorpus, shard_name

BLOCK, SHARDS = 4, 3
STARTS = [0, 3, 5, 6, 13, 22]  # of documents in a stream of 24 tokens
WORD_TOKENS = 2  # a word is so many tokens of the same number, or one alone


class SpeltWords:
    """Runs of one number, up to two tokens long, are a word; number 0 is none."""

    def runs(self, tokens: Sequence[int]) -> list[tuple[int, int, str]]:
        runs, start = [], 0
        while start < len(tokens):
            stop = start + 1
            while stop < min(len(tokens), start + WORD_TOKENS) and tokens[stop] == tokens[start]:
                stop += 1
            runs.append((start, stop, f"w{tokens[start]}" if tokens[start] else ""))
            start = stop
        return runs


@pytest.fixture
def scored(tmp_path: Path) -> ScoredCorpus:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, BLOCK * 2 * SHARDS)
    values = rng.normal(size=len(tokens)).astype(np.float32)
    corpus = PackedCorpus(folder=tmp_path / "corpus", block_size=BLOCK, blocks_per_shard=2, num_tokens=len(tokens))
    scores = tmp_path / "scores"
    for folder in (corpus.folder, scores):
        folder.mkdir()
    for shard in range(SHARDS):
        begin, end = corpus.extent(shard)
        ids = pa.array(np.arange(begin, end, BLOCK) // BLOCK, pa.int64())
        schema = schemas.scores(BLOCK)
        column = schemas.per_token_column(values[begin:end].reshape(-1, BLOCK), schema, "token_score")
        pq.write_table(
            pa.Table.from_arrays([ids, column], schema=schema), scores / f"shard-{shard_name(shard)}.parquet"
        )
        blocks = pa.FixedSizeListArray.from_arrays(pa.array(tokens[begin:end], pa.int32()), BLOCK)
        pq.write_table(
            pa.table({"block_id": ids, "tokens": blocks}), corpus.folder / f"shard-{shard_name(shard)}.parquet"
        )
        rows = [
            dict.fromkeys(schemas.DOCUMENTS.names, 0) | {"source": "a", "doc_id": number, "token_start": start}
            for number, start in enumerate(STARTS)
            if begin <= start < end
        ]
        documents = pa.Table.from_pylist(rows, schema=schemas.DOCUMENTS)
        pq.write_table(documents, corpus.folder / f"documents-{shard_name(shard)}.parquet")
    return ScoredCorpus(corpus=corpus, scores=scores)


@pytest.mark.parametrize("apart", [False, True])
def test_the_uses_of_all_shards_are_those_of_the_stream(scored: ScoredCorpus, apart: bool) -> None:
    corpus, words = scored.corpus, SpeltWords()
    tokens = corpus.read(corpus.folder, "shard", "tokens", 0, corpus.num_tokens)
    values = corpus.read(scored.scores, "shard", "token_score", 0, corpus.num_tokens)
    expected: dict[str, list[float]] = defaultdict(list)
    for start, stop, word in words.runs(tokens.tolist()):
        own = [values[i] for i in range(start, stop) if i % BLOCK and not (apart and i in STARTS)]
        if word and own:
            expected[word].append(float(max(own)))
    found: dict[str, list[float]] = {}
    for shard in range(SHARDS):
        for row in sum_uses(replace(scored, documents_apart=apart), shard, cast("Any", words)).to_pylist():
            sums = found.setdefault(row["word"], [0, 0.0, 0.0])
            for i, name in enumerate(("uses", "sum", "squares")):
                sums[i] += row[name]
    assert found.keys() == expected.keys()
    for word, uses in expected.items():
        assert found[word] == pytest.approx([len(uses), sum(uses), sum(value**2 for value in uses)], rel=1e-6)
