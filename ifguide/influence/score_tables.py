"""A shard of token scores as a table: one column for each behaviour, whatever the scores come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish


def write_scores(path: Path, block_ids: pa.Array | pa.ChunkedArray, scores: Mapping[str, np.ndarray]) -> None:
    """Publish `schemas.scores` of float32 (B, T) by behaviour, the run's own first.

    Raises:
        ValueError: a score is not finite; names shard, token and block.
    """
    block_size = next(iter(scores.values())).shape[1]
    schema = schemas.scores(block_size, list(scores))
    columns = []
    for behaviour, scores_BT in scores.items():
        _require_finite(scores_BT, block_ids, path.name)
        columns.append(schemas.per_token_column(scores_BT, schema, schemas.score_column(behaviour)))
    with publish(path) as part:
        # Hardly two scores are equal: a dictionary of them is longer than they are.
        pq.write_table(pa.Table.from_arrays([block_ids, *columns], schema=schema), part, use_dictionary=False)


def _require_finite(scores_BT: np.ndarray, block_ids: pa.Array | pa.ChunkedArray, shard: str) -> None:
    broken = np.argwhere(~np.isfinite(scores_BT))
    if len(broken):
        block = block_ids[int(broken[0][0])].as_py()
        value = scores_BT[tuple(broken[0])]
        raise ValueError(
            f"scores of {shard}: {len(broken)} are not finite, the first is {value} at token {broken[0][1]} of"
            f" block {block}; the proxy or the query overflows, check both for NaN"
        )
