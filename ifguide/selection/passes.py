"""Algorithm 1 on one shard of a corpus: the passes that `ifguide.selection.distributed` runs as tasks.

A pass reads its shard a few blocks at a time, writes one small scratch table under a name that the shard fixes, and
returns scalars and histograms. In order:

- `scan` reads scores and tokens: histograms of the high digits, and per block its mass and share of distinct bigrams;
- `keep_candidates` reads the scores once more: histograms of the low digits, and the tokens that tau cannot be above.
  No later pass reads a score shard;
- `unit_statistics`: s, f and tokens to mask of the units that the shard owns. A document belongs to the shard in
  which it begins; where it goes on, its owner reads on in the candidates of the shards that follow;
- `find_end`: the stream position at which the budget ends within the cut unit, by its owner;
- `fill`: the mask of the shard.

Cost, on one core, for a token: 37 ns in all (scan 17, candidates 5, statistics 4, mask 10), and 12 bytes of scratch
for a candidate. Memory: a chunk of `CHUNK_TOKENS` tokens, the tokens above tau of a chunk, the documents of the shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.artifacts import publish, sound, verify_digest
from ifguide.selection.algorithm import (
    Bools,
    Cutoff,
    Documents,
    Extremes,
    Floats,
    Ints,
    Layout,
    ScoreShard,
    UnitTotals,
    check_lengths,
    divisors,
    rank_scores,
)
from ifguide.selection.fdr import null_variance
from ifguide.selection.outliers import block_mass, distinct_bigram_share, find_outliers
from ifguide.selection.quantiles import BUCKETS, high_histogram, least_of, low_histogram
from ifguide.selection.shards import Extent, Rules, Shard, ShardFiles
from ifguide.storage import readable

BLOCKS = pa.schema(
    [("block_id", pa.int64()), ("length", pa.int64()), ("mass", pa.float32()), ("bigram_share", pa.float64())]
)
CANDIDATES = pa.schema([("position", pa.int64()), ("score", pa.float32())])  # a row group for each chunk
UNITS = pa.schema(
    [
        ("unit_id", pa.int64()),
        ("count", pa.int64()),
        ("sum", pa.float64()),
        ("masked", pa.int64()),
        ("divisor", pa.float64()),
    ]
)


def scan_nulls(rules: Rules, files: ShardFiles) -> Ints:
    """Before the first pass, of a measure with nulls: the histogram of the tokens' null variances."""
    head = schemas.read_table(files.corpus, columns=["block_id", "length"])
    lengths, total = head.column("length").to_numpy(), np.zeros(BUCKETS, np.int64)
    row = 0
    for nulls_KBT in _arrays(rules, files.scores, rules.measure.nulls):
        index = np.arange(nulls_KBT[0].shape[1])
        valid = (index >= 1) & (index < lengths[row : row + len(nulls_KBT[0]), None])
        total += high_histogram(null_variance(np.stack([array[valid] for array in nulls_KBT])))
        row += len(nulls_KBT[0])
    return total


class Scan(NamedTuple):
    """What `scan` returns; `high` holds histograms of `score` and `mass`, and with `Rules.fdr` of the `null`s."""

    name: str
    extent: Extent
    high: dict[str, Ints]
    score_range: tuple[float, float]
    repeated: int


def scan(rules: Rules, files: ShardFiles) -> Scan:
    """First pass.

    Raises:
        ValueError: a score is not finite, blocks of scores and corpus differ, documents leave a gap, the scores or
            the corpus have changed since they were made. Names the file.
    """
    if files.scores_sha256 is not None:
        verify_digest(files.scores, files.scores_sha256, files.made_by)
    sound(files.corpus.parent, files.corpus.name)
    head = schemas.read_table(files.corpus, columns=["block_id", "length"])
    block_ids, lengths = head.column("block_id").to_numpy(), head.column("length").to_numpy().astype(np.int64)
    scored = schemas.read_table(files.scores, columns=["block_id"]).column("block_id").to_numpy()
    if not np.array_equal(scored, block_ids):
        raise ValueError(f"{files.scores} holds other blocks than {files.corpus}")
    block_size = pq.read_schema(readable(files.corpus)).field("tokens").type.list_size
    check_lengths(int(block_ids[0]), lengths, block_size)
    high = {name: np.zeros(BUCKETS, np.int64) for name in ("score", "mass", *(["null"] if rules.fdr else []))}
    low, most = np.inf, -np.inf
    masses, shares = [], []
    chunks = _score_chunks(rules, files.scores, int(block_ids[0]), lengths)
    for (shard, nulls_KBT), tokens in zip(chunks, _chunks(rules, files.corpus, "tokens"), strict=True):
        masses.append(block_mass(shard))
        shares.append(distinct_bigram_share(tokens, shard.lengths))
        predicted = shard.predicted
        high["score"] += high_histogram(predicted)
        high["mass"] += high_histogram(masses[-1])
        if rules.fdr:
            high["null"] += high_histogram(nulls_KBT[:, shard.valid].reshape(-1))
        low, most = min(low, predicted.min(initial=np.inf)), max(most, predicted.max(initial=-np.inf))
    mass, share = np.concatenate(masses), np.concatenate(shares)
    _write(rules.table("blocks", files.name), BLOCKS, [block_ids, lengths, mass, share])
    extent = _extent(files, block_size, int(block_ids[0]), lengths)
    repeated = int(np.count_nonzero(share < rules.outlier_bigram_share))
    return Scan(files.name, extent, high, (float(low), float(most)), repeated)


def _extent(files: ShardFiles, block_size: int, first_block: int, lengths: Ints) -> Extent:
    begin = first_block * block_size
    place = (block_size, first_block, len(lengths), begin, begin + int(lengths.sum()))
    documents = own_documents(files)
    if documents is None:
        return Extent(*place, 0, 0, 0, 0, 0)
    number, (first, last) = len(documents.token_start), documents.span
    return Extent(*place, documents.first_id, number, first, int(documents.token_start[-1]), last)


def own_documents(files: ShardFiles) -> Documents | None:
    """The documents that begin in a shard; None where there is none."""
    path = sound(files.documents.parent, files.documents.name)
    table = schemas.read_table(path, columns=["doc_id", "token_start", "num_tokens"])
    ids, begins, sizes = (table.column(name).to_numpy() for name in ("doc_id", "token_start", "num_tokens"))
    if not len(ids):
        return None
    if (np.diff(ids) != 1).any():
        raise ValueError(f"{files.documents}: doc_id does not go up by one; pack the corpus again")
    return Documents(token_start=begins, num_tokens=sizes, first_id=int(ids[0]))


def keep_candidates(
    rules: Rules, files: ShardFiles, buckets: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, Ints]]:
    """Second pass; returns the low histograms of the high `buckets` of `score` and `mass`."""
    blocks = schemas.read_table(rules.table("blocks", files.name), BLOCKS)
    lengths, share = blocks.column("length").to_numpy(), blocks.column("bigram_share").to_numpy()
    mass = blocks.column("mass").to_numpy()
    low = {bucket: np.zeros(BUCKETS, np.int64) for bucket in buckets["score"]}
    first_block, least = blocks.column("block_id")[0].as_py(), float(least_of(min(buckets["score"])))
    path = rules.table("candidates", files.name)
    with publish(path) as part, pq.ParquetWriter(part, CANDIDATES) as writer:
        for shard, _ in _score_chunks(rules, files.scores, first_block, lengths):
            positions, scores = shard.tokens_from(least)
            for bucket, total in low.items():
                total += low_histogram(scores, bucket)
            if rules.exclude_repeated:
                # After the histograms: excluding a block moves no other token across tau.
                repeated = share < rules.outlier_bigram_share
                kept = ~repeated[positions // shard.scores.shape[1] - first_block]
                positions, scores = positions[kept], scores[kept]
            writer.write_table(pa.Table.from_arrays([pa.array(positions), pa.array(scores)], schema=CANDIDATES))
    return {"score": low, "mass": {bucket: low_histogram(mass, bucket) for bucket in buckets["mass"]}}


class Statistics(NamedTuple):
    """What `unit_statistics` returns: of the units with a token above tau, their number and extremes."""

    name: str
    units: int
    extremes: Extremes
    outliers: dict[str, int]


def unit_statistics(rules: Rules, shard: Shard, tau: float, median_mass: float) -> Statistics:
    """Third pass: the units that the shard owns, and its outlying blocks."""
    extent, layout = shard.extent, _layout(rules, shard)
    if rules.unit == "block":
        totals = UnitTotals(extent.first_block, extent.num_blocks)
    else:
        totals = UnitTotals(extent.first_document, extent.num_documents)
    for positions, scores in _tokens_of_units(rules, shard, tau):
        totals.add(positions, scores, layout, rules.window)
    rows = np.flatnonzero(totals.count)
    ids, count, sums = totals.first_id + rows, totals.count[rows], totals.sum[rows]
    divisor = divisors(layout, ids, rules.prior)
    _write(rules.table("units", shard.name), UNITS, [ids, count, sums, totals.masked[rows], divisor])
    extremes = Extremes.of(count / divisor, sums / divisor)
    return Statistics(shard.name, len(rows), extremes, _write_outliers(rules, shard, median_mass))


def rank_units(units: pa.Table, extremes: Extremes) -> Floats:
    """(K,) rank scores of the rows of a table of `UNITS`."""
    count, sums, divisor = (units.column(name).to_numpy() for name in ("count", "sum", "divisor"))
    return rank_scores(count / divisor, sums / divisor, extremes)


def _write_outliers(rules: Rules, shard: Shard, median_mass: float) -> dict[str, int]:
    blocks = schemas.read_table(rules.table("blocks", shard.name), BLOCKS)
    table = find_outliers(
        *(blocks.column(name).to_numpy() for name in ("block_id", "mass", "bigram_share")),
        median_mass=median_mass,
        mass_ratio=rules.outlier_mass_ratio,
        bigram_share=rules.outlier_bigram_share,
    )
    with publish(rules.ranking / f"outliers-{shard.name}.parquet") as part:
        pq.write_table(table, part)
    counts = {name: int(np.count_nonzero(table.column(name).to_numpy())) for name in ("high_mass", "repeated")}
    return {"blocks": table.num_rows, **counts}


def find_end(rules: Rules, shard: Shard, tau: float, unit_id: int, tokens: int) -> int:
    """The stream position before which the first `tokens` (at least 1) lie that `unit_id`, a unit that the shard
    owns, would mask."""
    assert tokens > 0
    layout, left = _layout(rules, shard), tokens
    for positions, _ in _tokens_of_units(rules, shard, tau):
        mine = positions[layout.units(positions) == unit_id]
        masked = layout.masked(mine, rules.window)
        if len(masked) >= left:
            return int(masked[left - 1]) + 1
        left -= len(masked)
    raise ValueError(f"unit {unit_id} masks fewer than {tokens} tokens: was a scratch table rewritten?")


def fill(rules: Rules, shard: Shard, tau: float, extremes: Extremes, cutoff: Cutoff) -> tuple[int, int]:
    """Last pass: publish the mask; returns blocks and masked tokens."""
    layout = _layout(rules, shard)
    unit_ids, whole = _units_in(rules, shard, extremes, cutoff)
    extent, schema = shard.extent, schemas.mask(shard.extent.block_size)
    step, tokens = _chunk_blocks(rules, extent.block_size), 0
    path = rules.mask / shard.files.scores.name
    with publish(path) as part, pq.ParquetWriter(part, schema) as writer:
        begins = range(extent.first_block, extent.first_block + extent.num_blocks, step)
        for first, (above, _) in zip(begins, _above(rules, shard.name, tau), strict=True):
            positions = layout.masked(above, rules.window)
            units = layout.units(positions)
            taken = whole[np.searchsorted(unit_ids, units)] if len(units) else np.zeros(0, bool)
            taken |= (units == cutoff.unit_id) & (positions < cutoff.end)
            masked_BT = np.zeros((min(step, extent.first_block + extent.num_blocks - first), extent.block_size), bool)
            masked_BT.ravel()[positions[taken] - first * extent.block_size] = True
            block_ids = pa.array(first + np.arange(len(masked_BT)), pa.int64())
            column = schemas.per_token_column(masked_BT, schema, "masked")
            writer.write_table(pa.Table.from_arrays([block_ids, column], schema=schema))
            tokens += int(np.count_nonzero(taken))
    return extent.num_blocks, tokens


def _units_in(rules: Rules, shard: Shard, extremes: Extremes, cutoff: Cutoff) -> tuple[Ints, Bools]:
    """Ids, ascending, of the units with a token above tau in the shard, and whether each is masked whole."""
    table = schemas.read_table(rules.table("units", shard.name), UNITS)
    if rules.unit == "document" and shard.carried is not None:
        carried = schemas.read_table(rules.table("units", shard.carried.owner), UNITS)
        row = int(np.searchsorted(carried.column("unit_id").to_numpy(), shard.carried.doc_id))
        table = pa.concat_tables([carried.slice(row, 1), table])  # the owner's last unit, if it is one at all
    unit_ids = table.column("unit_id").to_numpy()
    return unit_ids, cutoff.whole(unit_ids, rank_units(table, extremes))


def _layout(rules: Rules, shard: Shard) -> Layout:
    """Of the shard's own documents and the one that it begins within."""
    documents, carried = own_documents(shard.files), shard.carried
    if carried is not None:
        size = carried.end - carried.begin
        before = Documents(token_start=np.array([carried.begin]), num_tokens=np.array([size]), first_id=carried.doc_id)
        documents = before if documents is None else before.followed_by(documents)
    assert documents is not None, shard.name  # some document covers every token
    return Layout(documents=documents, block_size=shard.extent.block_size, unit=rules.unit)


def _tokens_of_units(rules: Rules, shard: Shard, tau: float) -> Iterator[tuple[Ints, Floats]]:
    """`_above` of the shard, then of its last document where that goes on."""
    yield from _above(rules, shard.name, tau)
    end = shard.extent.documents_end
    for name in shard.following if rules.unit == "document" else ():
        for positions, scores in _above(rules, name, tau):
            inside = positions < end
            yield positions[inside], scores[inside]
            if not inside.all():
                break


def _above(rules: Rules, name: str, tau: float) -> Iterator[tuple[Ints, Floats]]:
    """For each chunk of a shard the stream positions, ascending, and float64 scores of its tokens above tau."""
    with pq.ParquetFile(readable(rules.table("candidates", name))) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            # In float32 a score equal to the rounded tau would be lost or won by the rounding.
            scores = table.column("score").to_numpy().astype(np.float64)
            above = scores > tau
            yield table.column("position").to_numpy()[above], scores[above]


def _chunk_blocks(rules: Rules, block_size: int) -> int:
    return max(1, rules.chunk_tokens // block_size)


def _chunks(rules: Rules, path: Path, column: str) -> Iterator[np.ndarray]:
    """A per-token column of a shard, (b, T) at a time."""
    block_size = pq.read_schema(readable(path)).field(column).type.list_size
    for table in schemas.read_batches(path, column, _chunk_blocks(rules, block_size)):
        yield schemas.per_token_array(table, column)


def _arrays(rules: Rules, path: Path, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """Some per-token columns of a shard, (b, T) of each at a time."""
    return zip(*(_chunks(rules, path, column) for column in columns), strict=True)


def _score_chunks(
    rules: Rules, path: Path, first_block: int, lengths: Ints
) -> Iterator[tuple[ScoreShard, NDArray[np.float32]]]:
    """What tokens are ranked by, and the same of their nulls (K, b, T), a few blocks at a time."""
    row = 0
    for arrays in _arrays(rules, path, rules.measure.columns):
        measured = rules.measure.of(arrays)
        of_chunk = lengths[row : row + len(arrays[0])]
        yield ScoreShard(first_block=first_block + row, scores=measured[0], lengths=of_chunk), measured[1:]
        row += len(arrays[0])


def _write(path: Path, schema: pa.Schema, columns: Sequence[Any]) -> None:
    with publish(path) as part:
        pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema), part)
