"""A small run of which scores are exported and into which masks are imported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.artifacts import open_artifact
from ifguide.config import OWN

T, LENGTHS = 6, (6, 6, 6, 6, 4)
NUM_BLOCKS = len(LENGTHS)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two shards with a corpus and scores, the scores of two behaviours."""
    generator = np.random.default_rng(0)
    index = np.arange(T)
    for name, verb, inputs in (("corpus", "pack_corpus", {}), ("scores", "score_corpus", {"corpus": "c" * 64})):
        folder = tmp_path / "run" / name
        artifact = open_artifact(folder, verb=verb, options={}, inputs=inputs, config_yaml="")
        for shard, rows in enumerate((range(3), range(3, NUM_BLOCKS))):
            ids = pa.array(rows, pa.int64())
            lengths = np.array([LENGTHS[row] for row in rows], np.int32)
            if name == "corpus":
                schema = schemas.blocks(T, annotated=False)
                tokens = generator.integers(3, 40, (len(rows), T)).astype(np.int32)
                arrays = [ids, pa.array(lengths), schemas.per_token_column(tokens, schema, "tokens")]
            else:
                schema = schemas.scores(T, [OWN, "insult"])
                valid = (index >= 1) & (index < lengths[:, None])
                values = [
                    np.where(valid, generator.normal(size=(len(rows), T)), 0).astype(np.float32) for _ in range(2)
                ]
                columns = zip(schema.names[1:], values, strict=True)
                arrays = [ids, *(schemas.per_token_column(array, schema, column) for column, array in columns)]
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / f"shard-{shard:05d}.parquet")
        summary = {"block_size": T} if name == "corpus" else {"attribution": "position"}
        artifact.finish(folder.glob("*.parquet"), rows={"blocks": NUM_BLOCKS}, summary=summary)
    return tmp_path / "run"
