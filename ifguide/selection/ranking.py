"""The ranking of units as an external sort: no process holds more than a part of it.

`sort_run` ranks the units of some consecutive shards and writes them in order, a run. Every `sample_units`-th unit of
each run is a sample; samples of all runs, sorted, give splitters of the order (rank score descending, id ascending),
in which no two units are equal, so that ties split too. `count_run` counts units and tokens between splitters.
Then rank and tokens before every splitter are known, and `write_ranking` writes any `file_units` ranks from the few
parts that hold them. The files hold fixed ranks, so they are the same bytes however units were grouped into runs.

Cost: a unit is sorted twice and written twice, 48 bytes each. With R runs a file opens R runs. Memory: a run, or
for a file `1.5 * file_units + R * sample_units` units at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish
from ifguide.selection.algorithm import Extremes, Floats, Ints
from ifguide.selection.passes import UNITS, rank_units
from ifguide.selection.shards import Rules
from ifguide.storage import readable

GROUP_UNITS = 1 << 14  # what is read of a run at least

RUN = pa.schema([("rank_score", pa.float64()), *UNITS])


class Splitter(NamedTuple):
    """A place in the ranking: at the unit with this score and id."""

    rank_score: float
    unit_id: int

    def up_to(self, rank_score: Floats, unit_id: Ints) -> int:
        """How many of the units (K,), in ranking order, rank up to here, the unit itself included."""
        falling = -rank_score
        tied = slice(*(int(np.searchsorted(falling, -self.rank_score, side=side)) for side in ("left", "right")))
        return tied.start + int(np.searchsorted(unit_id[tied], self.unit_id, side="right"))


def sort_run(rules: Rules, number: int, names: Sequence[str], extremes: Extremes) -> tuple[Floats, Ints]:
    """Write run `number` from the units of consecutive shards; returns rank score and id of its samples."""
    units = pa.concat_tables([schemas.read_table(rules.table("units", name), UNITS) for name in names])
    units = units.combine_chunks()
    score = rank_units(units, extremes)
    order = np.argsort(-score, kind="stable")  # ids ascend already
    run = units.take(pa.array(order)).add_column(0, RUN.field(0), pa.array(score[order]))
    with publish(rules.table("run", f"{number:05d}")) as part:
        pq.write_table(run, part, row_group_size=GROUP_UNITS)
    pa.default_memory_pool().release_unused()
    every = slice(rules.sample_units - 1, None, rules.sample_units)
    return score[order][every], run.column("unit_id").to_numpy()[every]


def splitters(samples: Sequence[tuple[Floats, Ints]], apart: int) -> list[Splitter]:
    """Every `apart`-th of the samples of all runs, in ranking order."""
    scores, ids = (np.concatenate(column) for column in zip(*samples, strict=True))
    order = np.lexsort((ids, -scores))[apart - 1 :: apart]
    return [Splitter(*pair) for pair in zip(scores[order].tolist(), ids[order].tolist(), strict=True)]


def count_run(rules: Rules, number: int, between: Sequence[Splitter]) -> tuple[Ints, Ints]:
    """Units of a run, and the tokens they would mask, up to each splitter and then in all, (splitters + 1,)."""
    run = schemas.read_table(rules.table("run", f"{number:05d}"), columns=["rank_score", "unit_id", "masked"])
    scores, ids = run.column("rank_score").to_numpy(), run.column("unit_id").to_numpy()
    ends = np.array([*(splitter.up_to(scores, ids) for splitter in between), len(ids)])
    return ends, np.concatenate([[0], np.cumsum(run.column("masked").to_numpy())])[ends]


class Part(NamedTuple):
    """The units after `low` up to `high` (None: no limit); `rank` is the first's, `masked` what earlier ones mask."""

    low: Splitter | None
    high: Splitter | None
    rank: int
    masked: int


class Written(NamedTuple):
    """What `write_ranking` returns. `cut`: score and id of the unit at which the budget ends, if it is in the file,
    and how many of its tokens are masked still. `largest`: of the unit with the most masked tokens, the first of
    those that tie, these, its negative rank and its id."""

    units_masked: int
    cut: tuple[Splitter, int] | None
    largest: tuple[int, int, int]


def write_ranking(rules: Rules, number: int, runs: int, part: Part, budget: int) -> Written:
    """Write `rules.file_units` ranks, from `number * rules.file_units` on, which must lie in the part."""
    units = _read_part(rules, runs, part)
    ids, masked = units.column("unit_id").to_numpy(), units.column("masked").to_numpy()
    before = part.masked + np.cumsum(masked) - masked
    taken = np.clip(budget - before, 0, masked)
    first = number * rules.file_units - part.rank
    rows = slice(first, min(first + rules.file_units, len(ids)))
    ranks = pa.array(part.rank + np.arange(rows.start, rows.stop))
    columns = [units.column(name).slice(first, len(ranks)) for name in ("unit_id", "rank_score", "count", "sum")]
    table = pa.Table.from_arrays(
        [columns[0], ranks, *columns[1:], pa.array(taken[rows])], names=schemas.RANKING.names
    ).combine_chunks()
    with publish(rules.ranking / f"ranking-{number:05d}.parquet") as path:
        pq.write_table(table.cast(schemas.RANKING), path)
    pa.default_memory_pool().release_unused()
    cut = None
    for row in np.flatnonzero(taken[rows] < masked[rows])[:1] + first:
        if before[row] <= budget:
            score = units.column("rank_score")[row].as_py()
            cut = Splitter(score, int(ids[row])), int(taken[row])
    largest = (0, 0, -1)
    if len(ranks):
        row = int(np.argmax(taken[rows]))
        largest = (int(taken[rows][row]), -(part.rank + rows.start + row), int(ids[rows][row]))
    return Written(int(np.count_nonzero(taken[rows])), cut, largest)


def _read_part(rules: Rules, runs: int, part: Part) -> pa.Table:
    """The units of a part from all runs, in ranking order."""
    pieces = [RUN.empty_table()]
    for number in range(runs):
        pieces += _read_run(rules, number, part)
    units = pa.concat_tables(pieces).combine_chunks()
    order = np.lexsort((units.column("unit_id").to_numpy(), -units.column("rank_score").to_numpy()))
    return units.take(pa.array(order))


def _read_run(rules: Rules, number: int, part: Part) -> Iterator[pa.Table]:
    with pq.ParquetFile(readable(rules.table("run", f"{number:05d}"))) as file:
        for group in range(file.num_row_groups):
            if not file.metadata.row_group(group).num_rows:
                continue
            scores = file.metadata.row_group(group).column(0).statistics
            if part.low is not None and scores.min > part.low.rank_score:
                continue
            if part.high is not None and scores.max < part.high.rank_score:
                return
            table = file.read_row_group(group, use_threads=False)
            keys = table.column("rank_score").to_numpy(), table.column("unit_id").to_numpy()
            begin = 0 if part.low is None else part.low.up_to(*keys)
            end = len(table) if part.high is None else part.high.up_to(*keys)
            yield table.slice(begin, end - begin)
