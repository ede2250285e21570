"""The sample that a smoother is fitted on: its draw, and its parts on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ifguide.influence import smoothing_sample
from ifguide.influence.scorer import Pass
from ifguide.influence.scoring_worker import Blocks
from ifguide.influence.smoothing import Smoother
from ifguide.influence.smoothing_sample import (
    PART_TOKENS,
    SAMPLED_SHARDS,
    ScoredPart,
    sample_parts,
    smoothed_part,
)
from ifguide.influence.smoothing_worker import ScoreSample
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
    assert {part.most for part in parts} == {max(len(part.rows) for part in parts)}
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


class Scorer:
    """Gives a token its own id for a score, and for its state the id and 1; keeps the sizes of the batches."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def score_and_read(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, layers: Any, documents: Any, *, usual_blocks: int
    ) -> Pass:
        self.sizes.append((len(tokens_BT), usual_blocks))
        scores_BT = tokens_BT.float().masked_fill(torch.arange(tokens_BT.shape[1]) == 0, 0.0)
        states = [torch.stack([tokens_BT.float(), torch.ones(tokens_BT.shape)], dim=-1)]
        return Pass(scores_BT[None].masked_fill(scores_BT == 99, torch.nan), states, None)


def worker(scorer: Scorer, micro_batch: int) -> ScoreSample:
    made: Any = object.__new__(ScoreSample)
    made.settings = SimpleNamespace(decision=SimpleNamespace(micro_batch_blocks=micro_batch), apart=lambda _: None)
    made.scorer, made.layers = scorer, (1,)
    sample: ScoreSample = made
    return sample


def blocks(tokens_BT: np.ndarray) -> Blocks:
    ids, lengths_B = pa.chunked_array([np.arange(len(tokens_BT)) + 40]), np.full(len(tokens_BT), tokens_BT.shape[1])
    return Blocks(ids, tokens_BT, lengths_B, np.arange(tokens_BT.size).reshape(tokens_BT.shape) // 3)


def test_a_part_is_not_padded_to_the_micro_batch_of_a_whole_shard() -> None:
    tokens_BT, rows = np.arange(20).reshape(5, 4) + 1, np.array([2, 3, 5, 7, 8])
    for micro_batch, sizes in ((64, [(5, 6)]), (2, [(2, 2), (2, 2), (1, 2)])):
        scorer = Scorer()
        part, _ = worker(scorer, micro_batch)._score(blocks(tokens_BT), rows, "shard-00000.parquet", size=6)
        assert scorer.sizes == sizes
        expected = tokens_BT[:, 1:].reshape(-1)
        np.testing.assert_array_equal(part.scores_KN, [expected])
        np.testing.assert_array_equal(part.features_ND, np.stack([expected, np.ones(15)], axis=1))
        np.testing.assert_array_equal(part.places_N, (rows[:, None] * 4 + np.arange(1, 4)).reshape(-1))
        np.testing.assert_array_equal(part.documents_N, (np.arange(20).reshape(5, 4)[:, 1:] // 3).reshape(-1))


def test_a_score_that_is_not_finite_names_shard_and_block() -> None:
    tokens_BT = np.arange(20).reshape(5, 4)
    tokens_BT[3, 2] = 99
    with pytest.raises(ValueError, match=r"shard-00007\.parquet: 1 are not finite.* token 2 of block 43"):
        worker(Scorer(), 2)._score(blocks(tokens_BT), np.arange(5), "shard-00007.parquet", size=5)


def test_a_part_is_smoothed_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    smoother = Smoother(
        weights_SKD=rng.normal(size=(1, 2, 3)),
        biases_SK=rng.normal(size=(1, 2)),
        ranges_S2=np.array([[-1.0, 1.0]]),
        own_weight=0.1,
        ridges_R=np.array([1.0]),
        explained_SR=np.array([[0.5]]),
    )
    part = ScoredPart(
        rows_R=np.array([0]),
        places_N=np.arange(7),
        documents_N=np.arange(7),
        scores_KN=rng.normal(size=(2, 7)).astype(np.float32),
        features_ND=rng.normal(size=(7, 3)).astype(np.float32),
    )
    whole = smoothed_part(part, smoother)
    monkeypatch.setattr(smoothing_sample, "AT_ONCE", 3)
    np.testing.assert_allclose(smoothed_part(part, smoother), whole, rtol=1e-6)
    assert whole.shape == (1, 7)
