"""Mean ranks of several runs' scores against an oracle in float64, and a mask by them against the literal loop."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide import schemas
from ifguide.artifacts import file_digest
from ifguide.influence.agreement import ranks
from ifguide.selection.distributed import select
from ifguide.selection.ensemble import COUNTS, Member, _write_counts, count_scores, mean_ranks, write_ranks
from ifguide.selection.quantiles import high_histogram
from tests.reference.test_algorithm1 import MEMORY, assert_equal_to_loop, corpora
from tests.sharded import in_any_order, rules_of, write_shards


def bucket(value: float) -> int:
    """The number, of the same order, that the upper half of a float32's bits stands for."""
    (bits,) = struct.unpack(">I", struct.pack(">f", value + 0.0))
    return -((bits & 0x7FFFFFFF) // 65536) - 1 if bits >> 31 else bits // 65536


def oracle(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean ranks of tokens, by counting each token against all others, run by run."""
    found = []
    for token in range(len(runs[0])):
        total = 0.0
        for scores in runs:
            lower = sum(bucket(other) < bucket(scores[token]) for other in scores)
            same = sum(bucket(other) == bucket(scores[token]) for other in scores)
            total += (lower + same / 2) / len(scores)
        found.append(total / len(runs))
    return found


values = st.one_of(
    st.sampled_from([-1.0, -0.0, 0.0, 1e-40, -1e-40, 0.25, 0.2500001, 3.0]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@settings(deadline=None)
@given(tokens=st.lists(st.tuples(values, values, values), min_size=1, max_size=40), number=st.integers(1, 3))
def test_mean_ranks_are_counted(tokens, number) -> None:
    runs = np.array(tokens, np.float32).T[:number]
    expected = oracle([[float(value) for value in scores] for scores in runs])
    np.testing.assert_allclose(mean_ranks(list(runs)), expected, rtol=1e-6)


@settings(deadline=None)
@given(tokens=st.lists(st.tuples(values, values), min_size=1, max_size=60))
def test_with_a_value_to_a_bucket_they_are_the_ranks_of_a_sort(tokens) -> None:
    """bfloat16 has the upper half of a float32's bits. `ranks` counts from 0 to N - 1."""
    runs = torch.tensor(tokens, dtype=torch.float32).bfloat16().float().nan_to_num(posinf=1e38, neginf=-1e38).T
    runs = runs.bfloat16().float()
    size = runs.shape[1]
    expected = (torch.stack([ranks(scores) for scores in runs]).mean(dim=0) + 0.5) / size
    np.testing.assert_allclose(mean_ranks([scores.numpy() for scores in runs]), expected.numpy(), rtol=1e-6)


def test_they_are_off_those_of_a_sort_by_half_of_a_bucket_at_most() -> None:
    rng = np.random.default_rng(0)
    runs = [rng.standard_t(3, size=100_000).astype(np.float32), 1e-4 * rng.normal(size=100_000).astype(np.float32)]
    exact = (torch.stack([ranks(torch.from_numpy(scores)) for scores in runs]).mean(dim=0) + 0.5) / 100_000
    widest = max(high_histogram(scores).max() for scores in runs) / 100_000
    assert widest < 0.003
    off = np.abs(mean_ranks(runs) - exact.numpy())
    assert 0 < off.max() <= widest / 2
    assert off[exact.numpy() > 0.99].max() < 3e-4


@settings(max_examples=60, deadline=None)
@given(
    corpus=corpora(),
    runs=st.integers(1, 3),
    unit=st.sampled_from(["document", "block"]),
    seed=st.integers(0, 99),
)
def test_a_mask_by_mean_ranks_of_any_sharding_equals_the_literal_loop(corpus, runs, unit, seed) -> None:
    scores, lengths, documents, cuts, _ = corpus
    valid = (np.arange(scores.shape[1]) >= 1) & (np.arange(scores.shape[1]) < lengths[:, None])
    rng = np.random.default_rng(seed)
    scorings = [scores, *(np.where(np.isnan(scores), np.nan, rng.permuted(scores, axis=0)) for _ in range(runs - 1))]
    scorings = [np.where(valid & np.isnan(each), np.float32(0.5), each).astype(np.float32) for each in scorings]
    expected = np.full_like(scores, np.nan)
    expected[valid], expected[:, 0] = mean_ranks([each[valid] for each in scorings]), 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        places = [Path(folder) / str(run) for run in range(runs)]
        of_runs = [
            write_shards(place, each, lengths, documents, cuts) for place, each in zip(places, scorings, strict=True)
        ]
        tasks, ensemble = in_any_order(seed), Path(folder) / "ensemble"
        ensemble.mkdir()
        shards = [
            (files[0].corpus, tuple(Member(file.scores, file_digest(file.scores), ("token_score",)) for file in files))
            for files in zip(*of_runs, strict=True)
        ]
        _write_counts(ensemble / COUNTS, sum(tasks(count_scores, shards)))
        targets = [ensemble / files.scores.name for files in of_runs[0]]
        calls = [(*shard, ("own",), target) for shard, target in zip(shards, targets, strict=True)]
        written = list(tasks(write_ranks, calls))
        assert [sum(column) for column in zip(*written, strict=True)] == [len(scores), valid.sum()]
        found = np.concatenate([schemas.per_token_array(schemas.read_table(path), "token_score") for path in targets])
        np.testing.assert_array_equal(found[valid], expected[valid])
        assert not found[~valid].any()

        rules = rules_of(Path(folder), quantile=0.7, unit=unit)
        files = [own._replace(scores=target) for own, target in zip(of_runs[0], targets, strict=True)]
        selection = select(rules, files, tasks)
        assert_equal_to_loop(selection, rules, expected, lengths, documents)
