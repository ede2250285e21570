"""ifguide.schemas: token columns come back as they were written, and a damaged table is named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.config import OWN

T = 8
COLUMNS = [
    (schemas.blocks(T, annotated=True), "tokens", np.int32),
    (schemas.blocks(T, annotated=True), "annotated", np.bool_),
    (schemas.scores(T), "token_score", np.float32),
    (schemas.mask(T), "masked", np.bool_),
]


def values(rows: int, kind: type) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(scale=100, size=(rows, T))
    return drawn > 0 if kind is np.bool_ else drawn.astype(kind)


def score_table(rows: int = 5) -> pa.Table:
    schema = schemas.scores(T)
    column = schemas.per_token_column(values(rows, np.float32), schema, "token_score")
    return pa.Table.from_arrays([pa.array(range(rows), pa.int64()), column], schema=schema)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("schema", "name", "kind"), COLUMNS)
def test_per_token_column_round_trips_by_value_and_dtype(schema, name, kind, rows):
    written = values(rows, kind)
    column = schemas.per_token_column(written, schema, name)
    table = pa.Table.from_arrays([column], schema=pa.schema([schema.field(name)]))
    found = schemas.per_token_array(table, name)
    assert found.dtype == kind
    assert found.shape == (rows, T)
    assert (found == written).all()


@pytest.mark.parametrize(("schema", "name", "kind"), COLUMNS)
def test_transposed_array_is_written_in_row_order(schema, name, kind):
    written = values(T, kind).T
    table = pa.table([schemas.per_token_column(written, schema, name)], names=[name])
    assert (schemas.per_token_array(table, name) == written).all()


def test_slices_and_several_chunks_give_their_own_rows():
    table = score_table()
    written = values(5, np.float32)
    assert (schemas.per_token_array(table.slice(1, 3), "token_score") == written[1:4]).all()
    chunked = pa.concat_tables([table.slice(3), table.slice(0, 2)])
    assert (schemas.per_token_array(chunked, "token_score") == written[[3, 4, 0, 1]]).all()
    taken = table.take(pa.array([4, 2]))
    assert (schemas.per_token_array(taken, "token_score") == written[[4, 2]]).all()


def test_column_of_another_block_size_is_a_programming_error():
    with pytest.raises(AssertionError):
        schemas.per_token_column(np.zeros((2, T + 1), np.float32), schemas.scores(T), "token_score")


@pytest.mark.parametrize("annotated", [False, True])
def test_annotated_is_a_column_only_when_asked_for(annotated):
    assert ("annotated" in schemas.blocks(T, annotated=annotated).names) == annotated


def test_table_round_trips_through_parquet_with_its_exact_schema(tmp_path):
    path = tmp_path / "seed=3" / "shard.parquet"  # a folder name that a reader could take for a column
    path.parent.mkdir()
    pq.write_table(score_table(), path)
    assert schemas.read_table(path, schemas.scores(T)).equals(score_table())


def test_continuations_round_trip_through_parquet(tmp_path):
    row = {"model": "m", "prompt_row": 1, "sample": 0, "prompt": "p", "continuation": "c", "scores": [("x", 0.5)]}
    table = pa.Table.from_pylist([row], schema=schemas.CONTINUATIONS)
    pq.write_table(table, tmp_path / "c.parquet")
    assert schemas.read_table(tmp_path / "c.parquet", schemas.CONTINUATIONS).to_pylist() == [row]


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_parquet_is_named_and_what_to_do(tmp_path, keep):
    path = tmp_path / "shard.parquet"
    pq.write_table(score_table(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard\.parquet cannot be read as Parquet .*run its stage again"):
        schemas.read_table(path)


def test_missing_parquet_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.parquet does not exist"):
        schemas.read_table(tmp_path / "none.parquet")


@pytest.mark.parametrize("schema", [schemas.scores(T + 1), schemas.mask(T), schemas.blocks(T, annotated=False)])
def test_table_with_other_columns_is_refused(tmp_path, schema):
    path = tmp_path / "shard.parquet"
    pq.write_table(score_table(), path)
    with pytest.raises(ValueError, match=r"shard\.parquet has columns(.|\n)*another version made it"):
        schemas.read_table(path, schema)


def test_each_further_behaviour_has_its_own_score_column(tmp_path):
    behaviours = [OWN, "insult", "list", "a.b"]  # "list" and the dot would be parts of a nested column's path
    schema = schemas.scores(T, behaviours)
    assert schema.names == ["block_id", "token_score", *(f"token_score.{name}" for name in behaviours[1:])]
    smoothed = schemas.scores(T, behaviours, smoothed=True)
    assert smoothed.names == [*schema.names, "smoothed_score", *(f"smoothed_score.{name}" for name in behaviours[1:])]
    assert schemas.scored_behaviours(schema) == tuple(behaviours)
    written = {schemas.score_column(name): values(3, np.float32) + i for i, name in enumerate(behaviours)}
    columns = [schemas.per_token_column(array, schema, name) for name, array in written.items()]
    pq.write_table(pa.Table.from_arrays([pa.array(range(3), pa.int64()), *columns], schema=schema), tmp_path / "s")
    for name, array in written.items():
        table = schemas.read_table(tmp_path / "s", columns=["block_id", name])
        assert (schemas.per_token_array(table, name) == array).all()


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    pq.write_table(score_table(), tmp_path / "shard.parquet")
    with pytest.raises(ValueError, match=r"shard\.parquet has no column masked, only block_id, token_score"):
        schemas.read_table(tmp_path / "shard.parquet", columns=["masked"])
