"""Which documents of a large corpus are compared with the annotations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ifguide.report import agreement
from ifguide.report.agreement import sampled_documents, span_agreement


def test_a_large_corpus_is_compared_in_documents_of_drawn_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    stops = np.cumsum(lengths)
    starts = stops - lengths
    block, blocks_per_shard = 16, 40
    first_blocks = list(range(0, -(-int(stops[-1]) // block), blocks_per_shard))
    view: Any = SimpleNamespace(block_size=block, first_blocks=first_blocks, files=first_blocks)

    def sampled(limit: int, seed: int = 0) -> list[range]:
        monkeypatch.setattr(agreement, "AGREEMENT_TOKENS", limit)
        return sampled_documents(view, starts, stops, seed)

    assert sampled(int(stops[-1])) == [range(400)]
    shard = block * blocks_per_shard
    for limit in (int(stops[-1]) - 1, 5 * shard + 300, 200):
        parts = sampled(limit)
        documents = [i for part in parts for i in part]
        assert len(set(documents)) == len(documents)
        assert all(starts[i] // shard == (stops[i] - 1) // shard for i in documents)
        # but for what is cut off at the ends of the shards, the limit is used up
        assert limit - 60 * 2 * (limit // shard + 1) <= lengths[documents].sum() <= limit
    assert sampled(5 * shard) != sampled(5 * shard, seed=1)
    assert sampled(5 * shard) == sampled(5 * shard)


def test_a_marked_document_whose_tokens_cannot_be_placed_is_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def places(tokenizer: Any, text: str, tokens: list[int]) -> np.ndarray:
        if tokens[0] == 9:
            raise ValueError("no place")
        return np.stack([np.arange(len(tokens)), np.arange(len(tokens)) + 1], axis=1)

    tokens, annotated = np.array([1, 2, 3, 0, 9, 2, 3, 0]), np.array([0, 1, 0, 0, 1, 1, 1, 0], dtype=bool)
    table = pa.table({"token_start": [0, 4], "num_tokens": [4, 4]})
    monkeypatch.setattr(agreement, "token_places", places)
    monkeypatch.setattr(agreement, "document_table", lambda corpus: table)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(map(str, ids)))
    view: Any = SimpleNamespace(
        corpus=None, tokenizer=tokenizer, read=lambda first, last: {"tokens": tokens, "annotated": annotated}
    )
    finders = {
        "twos": lambda texts: [[(text.index("2"), text.index("2") + 1)] for text in texts],
        "none": lambda texts: [[] for _ in texts],
    }
    twos, none = span_agreement(view, finders, 0)
    assert (twos.method, twos.selected, twos.precision) == ("twos, without 1 whose tokens cannot be placed", 1, 1.0)
    assert (none.method, none.selected) == ("none", 0)
