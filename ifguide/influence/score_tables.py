"""A shard of token scores as a table: one column for each behaviour, whatever the scores come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish


def write_scores(
    path: Path,
    block_ids: pa.Array | pa.ChunkedArray,
    scores: Mapping[str, np.ndarray],
    nulls: Mapping[str, Sequence[np.ndarray]] = {},
    smoothed: Mapping[str, np.ndarray] = {},
) -> None:
    """Publish `schemas.scores` of float32 (B, T) by behaviour, the run's own first; `smoothed` ones of the same
    behaviours, or none; and the nulls of each.

    Raises:
        ValueError: a score is not finite; names shard, token and block.
    """
    block_size = next(iter(scores.values())).shape[1]
    numbers = {behaviour: len(of_behaviour) for behaviour, of_behaviour in nulls.items()}
    schema = schemas.scores(block_size, list(scores), numbers, smoothed=bool(smoothed))
    named = [(schemas.score_column(behaviour), scores_BT) for behaviour, scores_BT in scores.items()]
    named += [(schemas.smoothed_column(behaviour), scores_BT) for behaviour, scores_BT in smoothed.items()]
    for behaviour, of_behaviour in nulls.items():
        named += [(schemas.null_column(behaviour, k), nulls_BT) for k, nulls_BT in enumerate(of_behaviour)]
    columns = []
    for name, scores_BT in named:
        require_finite(scores_BT, block_ids, path.name)
        columns.append(schemas.per_token_column(scores_BT, schema, name))
    with publish(path) as part:
        # Hardly two scores are equal: a dictionary of them is longer than they are.
        pq.write_table(pa.Table.from_arrays([block_ids, *columns], schema=schema), part, use_dictionary=False)


def require_finite(scores_BT: np.ndarray, block_ids: pa.Array | pa.ChunkedArray, of: str) -> None:
    """Raise ValueError where a score is not finite; names token, block and what it is a score `of`, such as a shard."""
    broken = np.argwhere(~np.isfinite(scores_BT))
    if len(broken):
        block = block_ids[int(broken[0][0])].as_py()
        value = scores_BT[tuple(broken[0])]
        raise ValueError(
            f"scores of {of}: {len(broken)} are not finite, the first is {value} at token {broken[0][1]} of"
            f" block {block}; the proxy or the query overflows, check both for NaN"
        )
