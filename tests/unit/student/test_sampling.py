"""Which blocks are scored exactly: the sample, the audit, and what a cascade rechecks."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ifguide.artifacts import read_manifest
from ifguide.config import ConfigError, config_from_mapping
from ifguide.spans.tables import PackedCorpus
from ifguide.stages.fit_student import _sample
from ifguide.stages.score_corpus import _drawn_by
from ifguide.student.recheck import LEAST, block_counts, histogram_of, least_count
from ifguide.student.sample_worker import Scorers, _Tally, label, require_blocks
from ifguide.student.sampling import (
    AUDITED_BLOCKS,
    Sampling,
    ShardBlocks,
    audit_share,
    audited_rows,
    read_blocks,
    require_audit,
)
from tests.exported import make_run
from tests.tokenizers import tokenizers
from tests.unit.selection.test_ensemble import TEXTS, T


def test_the_sample_takes_the_same_share_of_every_source_and_the_audit_none_of_it() -> None:
    sources_B = np.repeat([0, 1, 2], [600, 300, 7])
    taken = np.zeros(3)
    for shard in range(200):
        rows = Sampling(fraction=0.1, held_out=0.25, seed=3).rows(sources_B, shard)
        assert (np.diff(rows) > 0).all()
        taken += np.bincount(sources_B[rows], minlength=3)
        audited = audited_rows(len(sources_B), rows, 0.05, 3, shard)
        assert not np.intersect1d(rows, audited).size
        assert len(audited) in (45, 46)
    np.testing.assert_allclose(taken / 200 / [600, 300, 7], 0.1, rtol=0.1)


def test_a_sample_is_that_of_its_seed_and_shard() -> None:
    sources_B, sampling = np.zeros(500, np.int64), Sampling(fraction=0.1, held_out=0.25, seed=3)
    np.testing.assert_array_equal(sampling.rows(sources_B, 4), sampling.rows(sources_B, 4))
    other = Sampling(fraction=0.1, held_out=0.25, seed=4)
    assert (sampling.rows(sources_B, 4) != sampling.rows(sources_B, 5)).any()
    assert (sampling.rows(sources_B, 4) != other.rows(sources_B, 4)).any()


def test_a_quarter_is_held_out_of_few_and_of_many() -> None:
    sampling = Sampling(fraction=0.1, held_out=0.25, seed=0)
    assert sum(sampling.held(1, shard).sum() for shard in range(4000)) == pytest.approx(1000, abs=100)
    for shard in range(20):
        assert sampling.held(400, shard).sum() in (100, 101)


def counted(shards: Sequence[np.ndarray]) -> Callable[[int | None], np.ndarray]:
    """The sum of the shards' histograms."""
    return lambda bucket: functools.reduce(np.add, (histogram_of(counts_B, bucket) for counts_B in shards))


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.1, 0.5, 1.0])
def test_as_many_blocks_are_rechecked_as_the_share_allows(share: float) -> None:
    rng = np.random.default_rng(0)
    shards = [np.float32(rng.gamma(0.5, size=size)) for size in (300, 1, 700)]
    counts = np.concatenate(shards)
    least = least_count(counted(shards), share)
    assert (counts >= least).sum() == int(share * 1001)


def test_blocks_that_tie_are_all_left_out_where_they_do_not_all_fit_and_empty_ones_always() -> None:
    shards = [np.array([0, 0, 5, 1], np.float32), np.array([5, 5, 9, 0], np.float32)]
    assert least_count(counted(shards), 0.5) > 1
    for share, chosen in ((0.25, [9]), (0.5, [5, 5, 5, 9]), (0.74, [1, 5, 5, 5, 9]), (1.0, [1, 5, 5, 5, 9])):
        least = least_count(counted(shards), share)
        assert sorted(np.concatenate(shards)[np.concatenate(shards) >= least]) == chosen
    assert least_count(counted(shards), 0.1) > 9
    assert least_count(counted(shards), 1.0) == LEAST


def test_a_block_counts_its_scores_at_the_edge_and_less_than_one_for_how_far_they_are_above() -> None:
    scores_BT = np.array([[0, 3, -1, 2.5], [0, 1, 2, 0], [0, -5, 0, 0]], np.float32)
    np.testing.assert_allclose(block_counts(scores_BT, 2.0), [2 + 0.375 / 1.375, 1, 0])
    np.testing.assert_array_equal(block_counts(scores_BT, -4.0) // 1, [3, 2, 0])
    outlier, two, nearer = (block_counts(np.array([own], np.float32), 2.0) for own in ([90, 1], [2, 2], [3, 1]))
    assert two > outlier > nearer


def test_an_audit_is_no_larger_than_intervals_pay() -> None:
    assert audit_share(0.01, 1000) == 0.01
    assert audit_share(0.01, 10_000_000) * 10_000_000 == pytest.approx(AUDITED_BLOCKS)


def test_an_audit_of_hardly_a_block_is_refused_before_anything_is_scored() -> None:
    require_audit(0.01, 500)
    with pytest.raises(
        ValueError, match=r"audit_fraction: 0\.01 of 60 blocks is an audit of 0\.6, .* set it to 0\.084"
    ):
        require_audit(0.01, 60)
    require_audit(0.084, 60)
    sections = {"score_corpus": {"scorer": "cascade"}, "fit_student": {"sample_fraction": 1}}
    with pytest.raises(ConfigError, match=r"fit_student\.sample_fraction: 1 leaves no block to audit the cascade by"):
        config_from_mapping(sections)


def test_a_sample_needs_a_block_that_is_held_out_and_but_for_a_suffix_another(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TEXTS[:8], tokenizers()["bytes"], block_size=T, blocks_per_shard=12) / "corpus"
    corpus, found = PackedCorpus.of(folder, read_manifest(folder)), set[tuple[bool, bool]]()
    sources_S = [read_blocks(corpus, shard).sources_BT[:, 0] for shard in range(corpus.num_shards)]
    assert len(sources_S) > 1
    for seed in range(12):
        sampling = Sampling(fraction=2 / corpus.num_blocks, held_out=0.5, seed=seed)
        rows_S = [sampling.rows(sources_B, shard) for shard, sources_B in enumerate(sources_S)]
        held_B = np.concatenate([sampling.held(len(rows), shard) for shard, rows in enumerate(rows_S)])
        held, others = bool(held_B.any()), not held_B.all()
        found.add((held, others))
        for kind, suffices in (("head", held and others), ("suffix", held)):
            with contextlib.nullcontext() if suffices else pytest.raises(ValueError, match="raise fit_student"):
                require_blocks(corpus, sampling, cast("Any", kind))
    assert found >= {(True, True), (True, False), (False, True)}


def test_scores_say_their_seed_where_something_is_drawn_by_it() -> None:
    smoothed = config_from_mapping({"seed": 3, "score_corpus": {"smooth": {}}})
    assert _drawn_by(smoothed) == {"seed": 3}
    assert _drawn_by(replace(smoothed, seed=0)) == {}
    assert _drawn_by(replace(smoothed, score_corpus=replace(smoothed.score_corpus, smooth=None))) == {}


def test_padding_of_the_last_block_is_of_no_source() -> None:
    sampled_rows = SimpleNamespace(sources_BT=np.array([[1, 1, 2, 2], [1, 1, 0, 0]]), lengths_B=np.array([4, 2]))
    tally = _Tally()
    tally.add(
        cast("Any", SimpleNamespace(sources=("a", "b", "c"))),
        cast("Any", SimpleNamespace(blocks=sampled_rows, held_B=np.array([False, True]))),
    )
    assert tally.result()["sources"] == ["a", "b", "c"]
    assert tally.result()["sampled_sources"] == ["b", "c"]
    assert tally.result()["tokens"] == 6


@pytest.mark.parametrize("kind", ["head", "suffix", "ngram"])
def test_a_score_of_the_sample_that_is_not_finite_is_refused_by_token_and_block(kind: str) -> None:
    tokens_BT, broken = np.ones((3, 4), np.int32), torch.zeros(1, 4)
    broken[0, 2] = torch.nan

    def score(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        return broken[None] if len(tokens) == 1 else torch.zeros(1, *tokens.shape)

    def score_and_read(tokens: Tensor, *_: Any, **__: Any) -> Any:
        states = torch.zeros(*tokens.shape, 2)
        return score(tokens), [states], states[None]

    fine = SimpleNamespace(score=lambda tokens, *_, **__: torch.zeros(1, *tokens.shape), blocks=[None])
    whole = SimpleNamespace(score=score, score_and_read=score_and_read, blocks=[None])
    suffix = SimpleNamespace(score=lambda *arguments, **options: score(*arguments, **options)[0])
    scorers = Scorers(*cast("Any", (fine, suffix) if kind == "suffix" else (whole, None)))
    scoring = SimpleNamespace(apart=lambda _: None, decision=SimpleNamespace(micro_batch_blocks=2))
    blocks = ShardBlocks(
        ids_B=np.array([7, 8, 9]),
        tokens_BT=tokens_BT,
        lengths_B=np.array([4, 4, 4], np.int32),
        documents_BT=np.zeros((3, 4), np.int64),
        sources_BT=np.zeros((3, 4), np.int64),
        sources=("a",),
    )
    labelled = label(cast("Any", SimpleNamespace(kind=kind, scoring=scoring)), scorers, blocks)
    assert next(labelled)[0].scores_BT.shape == (2, 4)
    named = "the sample by the suffix" if kind == "suffix" else "the sample"
    with pytest.raises(
        ValueError, match=f"scores of {named}: 1 are not finite, the first is nan at token 2 of block 9"
    ):
        next(labelled)


def test_ten_of_the_sources_without_a_sampled_block_are_named_and_all_counted() -> None:
    counts = dict.fromkeys(("blocks", "held", "tokens", "halvings"), 1)
    names = [f"{i:02d}.txt" for i in range(40)]
    parts = {
        "a": {**counts, "sources": names[:30], "sampled_sources": names[:2]},
        "b": {**counts, "sources": names[20:], "sampled_sources": names[35:]},
    }
    sample = _sample(cast("Any", parts))
    assert (sample["blocks"], sample["sources"], sample["unsampled_sources"]) == (2, 40, 33)
    assert sample["unsampled"] == names[2:12]
