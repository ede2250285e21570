"""Algorithm 1 over a corpus in shards, exactly, where no process holds corpus-sized data.

`select` runs the passes of `ifguide.selection.passes` and `ifguide.selection.ranking` as independent tasks and keeps,
between them, one small tuple per shard, two histograms of 65,536 counts, and a sample of a thousandth of the ranking.
What a pass knows of its shard goes to the next through scratch tables in the mask's folder.

The result equals the sequential algorithm bit for bit for any sharding, and the ranking and mask files are the same
bytes for any number of workers and any order in which tasks end.

Cost: two reads of the scores, one of the tokens; then the tokens above tau, a hundredth of the corpus at the default
quantile, twice, and the units with such a token four times. `bench/selection_scale.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ifguide.selection.algorithm import NO_TOKENS, NOTHING_CUT, Cutoff, Extremes, Ints, token_budget
from ifguide.selection.fdr import Discoveries, Spread, discoveries, fit_spread
from ifguide.selection.passes import Scan, fill, find_end, keep_candidates, scan, scan_nulls, unit_statistics
from ifguide.selection.quantiles import BUCKETS, quantile_buckets, quantile_from_histograms
from ifguide.selection.ranking import Part, count_run, sort_run, splitters, write_ranking
from ifguide.selection.shards import Carried, Extent, Rules, Shard, ShardFiles

# Calls the function once with each tuple of arguments, anywhere; results in any order.
RunTasks = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was selected. `outliers`: number of listed `blocks`, of `high_mass` and `repeated` among them.
    `largest_unit`: id (-1: there is none) and masked tokens of the unit with the most of these. `spread`: of z-scores;
    `discoveries`: of a false-discovery rate."""

    tau: float
    median_mass: float
    predicted_tokens: int
    budget: int
    num_blocks: int
    num_units: int
    ranked_units: int
    units_masked: int
    tokens_masked: int
    largest_unit: tuple[int, int]
    score_range: tuple[float, float]
    outliers: dict[str, int]
    excluded_blocks: int
    spread: Spread | None
    discoveries: Discoveries | None


def select(rules: Rules, files: Sequence[ShardFiles], run_tasks: RunTasks) -> Selection:
    """Write the tables of `rules.ranking` and `rules.mask`; `files` are the shards in stream order.

    Raises:
        ValueError: a score is NaN or infinite (names the block); scores and corpus hold other blocks; blocks or
            documents do not cover one stream, once; a shard was rewritten between two passes.
    """
    rules = _with_spread(rules, files, run_tasks)
    wanted = {"score": rules.quantile, "mass": 0.5}
    scans, high = _scan(rules, files, run_tasks)
    shards = place_shards(files, [scans[item.name].extent for item in files])
    discovered = discoveries(high["score"], high["null"], len(rules.measure.nulls), rules.fdr) if rules.fdr else None
    buckets = {name: quantile_buckets(high[name], wanted[name]) for name in wanted}
    if discovered:
        buckets["score"] = (discovered.bucket,)
    low = {name: {bucket: np.zeros(BUCKETS, np.int64) for bucket in buckets[name]} for name in wanted}
    for histograms in run_tasks(keep_candidates, ((rules, item, buckets) for item in files)):
        for name, of_bucket in low.items():
            for bucket, total in of_bucket.items():
                total += histograms[name][bucket]
    median_mass = quantile_from_histograms(high["mass"], low["mass"], wanted["mass"])
    tau = discovered.threshold if discovered else quantile_from_histograms(high["score"], low["score"], wanted["score"])
    predicted, num_blocks = int(high["score"].sum()), int(high["mass"].sum())
    num_units = num_blocks if rules.unit == "block" else sum(shard.extent.num_documents for shard in shards)

    statistics = {x.name: x for x in run_tasks(unit_statistics, ((rules, s, tau, median_mass) for s in shards))}
    units = [statistics[shard.name].units for shard in shards]
    extremes = Extremes() if sum(units) == num_units else NO_TOKENS
    for of_shard in statistics.values():
        extremes = extremes.join(of_shard.extremes)
    budget = token_budget(rules.max_fraction, predicted)
    ranked = _rank(rules, shards, units, extremes, budget, run_tasks)
    cutoff = _cutoff(rules, shards, tau, ranked, run_tasks)
    filled = list(run_tasks(fill, ((rules, shard, tau, extremes, cutoff) for shard in shards)))
    blocks, tokens = (sum(column) for column in zip(*filled, strict=True))
    expected = (num_blocks, min(budget, ranked.masked))
    if (blocks, tokens) != expected:
        raise ValueError(f"filled {blocks} blocks with {tokens} tokens, expected {expected}: was a shard rewritten?")
    outliers = [of_shard.outliers for of_shard in statistics.values()]
    return Selection(
        tau=tau,
        median_mass=median_mass,
        predicted_tokens=predicted,
        budget=budget,
        num_blocks=num_blocks,
        num_units=num_units,
        ranked_units=sum(units),
        units_masked=ranked.units_masked,
        tokens_masked=tokens,
        largest_unit=ranked.largest,
        score_range=(min(x.score_range[0] for x in scans.values()), max(x.score_range[1] for x in scans.values())),
        outliers={name: sum(counts[name] for counts in outliers) for name in outliers[0]},
        excluded_blocks=sum(x.repeated for x in scans.values()) if rules.exclude_repeated else 0,
        spread=rules.measure.spread,
        discoveries=discovered,
    )


def _with_spread(rules: Rules, files: Sequence[ShardFiles], run_tasks: RunTasks) -> Rules:
    """The rules with the spread of the measure's nulls, where it has any."""
    if not rules.measure.nulls:
        assert not rules.fdr, "a false-discovery rate wants nulls"
        return rules
    total = np.zeros(BUCKETS, np.int64)
    for histogram in run_tasks(scan_nulls, ((rules, item) for item in files)):
        total += histogram
    return replace(rules, measure=replace(rules.measure, spread=fit_spread(total, len(rules.measure.nulls))))


def _scan(rules: Rules, files: Sequence[ShardFiles], run_tasks: RunTasks) -> tuple[dict[str, Scan], dict[str, Ints]]:
    """The scans by name, their histograms taken out, and the sums of the histograms."""
    high: dict[str, Ints] = {}
    scans = {}
    for of_shard in run_tasks(scan, ((rules, item) for item in files)):
        for name, counts in of_shard.high.items():
            high[name] = high[name] + counts if name in high else counts
        scans[of_shard.name] = of_shard._replace(high={})
    return scans, high


def place_shards(files: Sequence[ShardFiles], extents: Sequence[Extent]) -> list[Shard]:
    """The shards with the documents that go over their edges.

    Raises:
        ValueError: blocks or documents do not cover the stream from 0 on, once and in order; names the file.
    """
    shards: list[Shard] = []
    following: dict[str, list[str]] = {}
    end, last = 0, Carried(doc_id=-1, begin=0, end=0, owner="")
    for item, extent in zip(files, extents, strict=True):
        if extent.begin != end:
            raise ValueError(
                f"{item.corpus} begins at stream position {extent.begin}, the shard before it ends at {end}: only the"
                " last block of a corpus may be short, and no shard may be missing; pack the corpus again"
            )
        end = extent.end
        carried = last if last.end > extent.begin else None
        if carried is not None:
            following.setdefault(last.owner, []).append(item.name)
        if extent.num_documents:
            if (extent.first_document, extent.documents_begin) != (last.doc_id + 1, last.end):
                raise ValueError(
                    f"{item.documents} begins with document {extent.first_document} at {extent.documents_begin}, where"
                    f" {last.doc_id + 1} at {last.end} is expected: the document table belongs to another corpus"
                )
            doc_id = extent.first_document + extent.num_documents - 1
            last = Carried(doc_id=doc_id, begin=extent.last_begin, end=extent.documents_end, owner=item.name)
        if last.end < end or extent.last_begin >= end:
            raise ValueError(f"{item.corpus} ends at {end}, its documents at {last.end}: they belong to another corpus")
        shards.append(Shard(files=item, extent=extent, carried=carried))
    if last.end != end:
        raise ValueError(f"the documents end at {last.end}, the corpus at {end}: they belong to another corpus")
    return [replace(shard, following=tuple(following.get(shard.name, ()))) for shard in shards]


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """`masked`: tokens that all units would mask; `cut`: score, id and left tokens of the unit that is cut; `largest`:
    id and masked tokens of the unit with the most of these."""

    masked: int
    units_masked: int
    cut: tuple[Any, int] | None
    largest: tuple[int, int]


def _rank(
    rules: Rules, shards: Sequence[Shard], units: Sequence[int], extremes: Extremes, budget: int, run_tasks: RunTasks
) -> _Ranked:
    """Write the ranking, from its runs."""
    groups = list(_groups([shard.name for shard in shards], units, rules.run_units))
    samples = list(run_tasks(sort_run, ((rules, i, group, extremes) for i, group in enumerate(groups))))
    # Four to a file: what is read for a file begins and ends at a splitter.
    between = splitters(samples, max(1, rules.file_units // rules.sample_units // 4))
    ranks, masked = np.zeros((2, len(between) + 1), np.int64)
    for counted in run_tasks(count_run, ((rules, i, between) for i in range(len(groups)))):
        ranks += counted[0]
        masked += counted[1]

    def part(number: int) -> Part:
        """The least part that holds all ranks of a file."""
        begin, end = number * rules.file_units, min((number + 1) * rules.file_units, int(ranks[-1]))
        low = int(np.searchsorted(ranks[:-1], begin, side="right")) - 1
        high = int(np.searchsorted(ranks[:-1], end, side="left"))
        upper = between[high] if high < len(between) else None
        return Part(between[low], upper, int(ranks[low]), int(masked[low])) if low >= 0 else Part(None, upper, 0, 0)

    files = range(max(1, -(-int(ranks[-1]) // rules.file_units)))  # one without rows where no unit is ranked
    written = list(run_tasks(write_ranking, ((rules, i, len(groups), part(i), budget) for i in files)))
    most, _, unit_id = max(x.largest for x in written)
    cuts = [x.cut for x in written if x.cut is not None]
    assert len(cuts) == (masked[-1] > budget), (cuts, masked[-1], budget)
    return _Ranked(
        masked=int(masked[-1]),
        units_masked=sum(x.units_masked for x in written),
        cut=cuts[0] if cuts else None,
        largest=(unit_id, most),
    )


def _groups(names: Sequence[str], sizes: Sequence[int], most: int) -> Iterator[list[str]]:
    """Consecutive names whose sizes add up to `most`, or single ones that are larger."""
    group: list[str] = []
    total = 0
    for name, size in zip(names, sizes, strict=True):
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def _cutoff(rules: Rules, shards: Sequence[Shard], tau: float, ranked: _Ranked, run_tasks: RunTasks) -> Cutoff:
    if ranked.cut is None:
        return NOTHING_CUT
    (score, unit_id), left = ranked.cut
    if not left:
        return Cutoff(rank_score=score, unit_id=unit_id, end=0)
    name = "first_block" if rules.unit == "block" else "first_document"
    owners = [s for s in shards if rules.unit == "block" or s.extent.num_documents]
    owner = owners[int(np.searchsorted([getattr(s.extent, name) for s in owners], unit_id, side="right")) - 1]
    (end,) = run_tasks(find_end, [(rules, owner, tau, unit_id, left)])
    return Cutoff(rank_score=score, unit_id=unit_id, end=end)
