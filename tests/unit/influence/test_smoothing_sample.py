"""The sample that a smoother is fitted on: its draw, and its parts on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ifguide.influence import smoothing_sample
from ifguide.influence.smoothing_sample import (
    PART_TOKENS,
    SAMPLED_SHARDS,
    ScoredPart,
    sample_parts,
)
from ifguide.spans.tables import PackedCorpus


def corpus(shards: int, *, blocks: int = 200, block_size: int = 128, last: int = 1000) -> PackedCorpus:
    """Its last shard has `last` tokens."""
    tokens = (shards - 1) * blocks * block_size + last
    return PackedCorpus(folder=Path("corpus"), block_size=block_size, blocks_per_shard=blocks, num_tokens=tokens)


@pytest.mark.parametrize(("shards", "tokens"), [(1, 10_000), (3, 20_000), (40, 100_000), (40, 30_000), (5, 200_000)])
def test_the_sample_is_spread_over_shards_in_parts_of_bounded_size(shards: int, tokens: int) -> None:
    packed = corpus(shards)
    parts = sample_parts(packed, tokens, seed=0)
    drawn = {(part.number, row) for part in parts for row in part.rows}
    wanted = min(-(-tokens // 128), packed.num_blocks)
    assert len(drawn) == wanted  # the others make up for a last shard that is short
    assert len(drawn) == sum(len(part.rows) for part in parts)
    assert all(row < -(-1000 // 128) for number, row in drawn if number == shards - 1)
    assert len({number for number, _ in drawn}) == min(shards, SAMPLED_SHARDS)
    assert max(len(part.rows) for part in parts) <= PART_TOKENS // 128
    assert all(list(part.rows) == sorted(part.rows) for part in parts)
    assert parts == sample_parts(packed, tokens, seed=0)
    if wanted < packed.num_blocks:
        assert parts != sample_parts(packed, tokens, seed=1)


def test_a_corpus_smaller_than_the_sample_is_in_it_whole() -> None:
    packed = corpus(2)
    drawn = sorted((part.number, row) for part in sample_parts(packed, 1_000_000, seed=0) for row in part.rows)
    assert drawn == [(0, row) for row in range(200)] + [(1, row) for row in range(8)]


def test_blocks_longer_than_a_part_are_parts_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing_sample, "PART_TOKENS", 100)
    assert {len(part.rows) for part in sample_parts(corpus(2), 10_000, seed=0)} == {1}


def test_a_part_is_read_as_it_was_published(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = ScoredPart(
        rows_R=np.array([3, 5]),
        places_N=np.arange(7),
        documents_N=np.arange(7) // 2,
        scores_KN=rng.normal(size=(2, 7)).astype(np.float32),
        features_ND=rng.normal(size=(7, 3)).astype(np.float32),
    )
    part.save(tmp_path / "part.npz")
    again: dict[str, Any] = asdict(ScoredPart.load(tmp_path / "part.npz"))
    for name, value in asdict(part).items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].dtype == value.dtype
