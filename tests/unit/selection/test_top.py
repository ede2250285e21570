"""ifguide.selection.top against a sort of all scores, for any sharding, with ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide import schemas
from ifguide.selection.top import ScoredCorpus, select_top
from ifguide.spans.tables import PackedCorpus, shard_name
from tests.sharded import in_any_order


def scored(folder: Path, values: np.ndarray, *, block_size: int, blocks_per_shard: int) -> ScoredCorpus:
    """Tables of the scores (n,) of a stream; the last block is padded."""
    corpus = PackedCorpus(
        folder=folder, block_size=block_size, blocks_per_shard=blocks_per_shard, num_tokens=len(values)
    )
    padded = np.zeros((corpus.num_blocks, block_size), np.float32)
    padded.reshape(-1)[: len(values)] = values
    schema = schemas.scores(block_size)
    for shard in range(corpus.num_shards):
        rows = slice(shard * blocks_per_shard, (shard + 1) * blocks_per_shard)
        column = schemas.per_token_column(padded[rows], schema, "token_score")
        table = pa.Table.from_arrays([pa.array(np.arange(corpus.num_blocks)[rows]), column], schema=schema)
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"shard-{shard_name(shard)}.parquet")
    return ScoredCorpus(corpus=corpus, scores=folder)


def by_sorting(values: np.ndarray, block_size: int, count: int) -> np.ndarray:
    predicted = np.flatnonzero(np.arange(len(values)) % block_size)
    order = sorted(predicted.tolist(), key=lambda place: (-float(values[place]), place))
    flags = np.zeros(len(values), bool)
    flags[order[:count]] = True
    return flags


def masked(case: ScoredCorpus, folder: Path) -> np.ndarray:
    return case.corpus.read(folder, "shard", "masked", 0, case.corpus.num_tokens)


@settings(max_examples=40)
@given(data=st.data())
def test_the_tokens_of_highest_score_ties_by_position(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    block_size, blocks_per_shard = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    few = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0, float(np.nextafter(np.float32(3), np.float32(4)))])
    scores = data.draw(
        st.lists(few | st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=60)
    )
    values = np.array(scores, np.float32)
    # what has no prediction is not read
    values[::block_size] = np.nan
    predicted = int(np.count_nonzero(np.arange(len(values)) % block_size))
    count = data.draw(st.integers(0, predicted))
    folder = tmp_path_factory.mktemp("top")
    case = scored(folder / "scores", values, block_size=block_size, blocks_per_shard=blocks_per_shard)
    counts = select_top(case, folder / "mask", count, in_any_order())
    np.testing.assert_array_equal(masked(case, folder / "mask"), by_sorting(values, block_size, count))
    assert counts[:3] == (case.corpus.num_blocks, count, predicted)


def test_more_tokens_than_there_are_and_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    case = scored(tmp_path / "scores", values, block_size=4, blocks_per_shard=2)
    with pytest.raises(ValueError, match=r"8 tokens are to be masked, .* has 7"):
        select_top(case, tmp_path / "mask", 8, in_any_order())
    values[5] = np.inf
    case = scored(tmp_path / "scores", values, block_size=4, blocks_per_shard=2)
    with pytest.raises(ValueError, match="score of block 1 is inf"):
        select_top(case, tmp_path / "mask", 2, in_any_order())
