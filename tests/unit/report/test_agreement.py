"""Which documents of a large corpus are compared with the annotations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ifguide.report import agreement
from ifguide.report.agreement import sampled_documents


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
