"""`build_mask`: token scores -> document ranking and token mask, by Algorithm 1, exactly.

Blocks that stand out, of great score mass or of repeated tokens, are listed beside the ranking (`ifguide.outliers`).
Every pass is a task per score shard; only histograms, per-piece statistics and counts come back. Nothing of
the passes is stored: they are cheap beside scoring, and a rerun computes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ifguide import schemas, selection
from ifguide.artifacts import Manifest, data_files, publish, require, require_same
from ifguide.config import BuildMask, ConfigError
from ifguide.outliers import Outliers, block_mass, find_outliers
from ifguide.quantiles import BUCKETS, high_histogram, low_histogram, quantile_buckets, quantile_from_histograms
from ifguide.stages.pack_corpus import document_table
from ifguide.stages.run import Run, connect
from ifguide.stages.shards import StageError
from ifguide.telemetry import log

VERB = "build_mask"


def build_mask(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `ranking/` and `mask/`.

    Raises:
        MismatchError: the scores are of another corpus. ConfigError: `behaviour` was not scored.
        ValueError: a score is NaN or infinite (names the block).
    """
    config = run.config.build_mask
    if dry_run:
        log(
            VERB,
            f"would mask up to {config.max_fraction:.2%} of the tokens, those above the {config.quantile} quantile"
            f" and {config.window} neighbours, {config.unit} by {config.unit}",
        )
        return None
    corpus, scores = require(run.corpus, "pack_corpus"), require(run.scores, "score_corpus")
    require_same(
        f"the corpus of {run.scores}",
        scores.inputs["corpus"],
        f"{run.corpus}",
        corpus.fingerprint,
        "score this corpus, or name the scores' own",
    )
    require_behaviour(run)
    inputs = {"corpus": corpus.fingerprint, "scores": scores.fingerprint}
    ranking_artifact = run.open(run.ranking, VERB, keys=("build_mask",), inputs=inputs)
    artifact = run.open(run.mask, VERB, keys=("build_mask",), inputs=inputs)
    if artifact.manifest and ranking_artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.summary}")
        return artifact.manifest
    connect(run.config)
    passes = _Passes(run)
    tau, median_mass = passes.quantiles()
    outliers = passes.find_outliers(median_mass)
    ranking, cutoff, counts = passes.rank(tau)
    masked = passes.fill(tau, cutoff)
    if masked["tokens"] != cutoff.masked_tokens or masked["blocks"] != corpus.rows["blocks"]:
        raise StageError(f"{VERB}: filled {masked}, expected {cutoff.masked_tokens} tokens in {corpus.rows['blocks']}")
    summary = {
        "tau": tau,
        "predicted_tokens": passes.predicted_tokens,
        "tokens_masked": cutoff.masked_tokens,
        "token_budget": passes.budget,
        "units_above_tau": len(ranking.doc_id),
        "units_masked": len(cutoff.whole) + (cutoff.cut is not None),
        "unit": config.unit,
        "behaviour": config.behaviour,
        "score_min": passes.score_min,
        "score_max": passes.score_max,
        "median_block_mass": median_mass,
        "high_mass_blocks": int(np.sum(outliers.column("high_mass"))),
        "repeated_blocks": int(np.sum(outliers.column("repeated"))),
        "excluded_blocks": len(passes.excluded),
    }
    tables = {"ranking.parquet": _ranking_table(ranking, counts, cutoff), "outliers.parquet": outliers}
    for name, table in tables.items():
        with publish(run.ranking / name) as part:
            pq.write_table(table, part)
    if not ranking_artifact.manifest:
        rows = {"units": len(ranking.doc_id), "outliers": len(outliers)}
        ranking_artifact.finish([run.ranking / name for name in tables], rows=rows, summary=summary)
    manifest = artifact.manifest or artifact.finish(data_files(run.mask), rows=masked, summary=summary)
    share = cutoff.masked_tokens / max(passes.predicted_tokens, 1)
    log(
        VERB,
        f"tau {tau:.6g}; {summary['units_masked']:,} of {passes.num_units:,} {config.unit}s touched,"
        f" {cutoff.masked_tokens:,} tokens masked ({share:.2%} of the corpus); `ifguide inspect` shows them",
    )
    log(VERB, outlier_line(summary, artifact.plan["options"][VERB]))
    return manifest


def outlier_line(summary: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """One line on a mask's outlying blocks, from its manifest's summary and options."""
    excluded = f", {summary['excluded_blocks']:,} excluded" if options["exclude_repeated"] else ""
    return (
        f"outliers: {summary['high_mass_blocks']:,} blocks of over {options['outlier_mass_ratio']:g} times the median"
        f" score mass, {summary['repeated_blocks']:,} of repeated tokens{excluded}; ranking/outliers.parquet lists them"
    )


def require_behaviour(run: Run) -> None:
    """Refuse a `build_mask.behaviour` that the scores do not hold, naming those they do."""
    behaviour = run.config.build_mask.behaviour
    behaviours = schemas.scored_behaviours(pq.read_schema(data_files(run.scores)[0]))
    if behaviour is not None and behaviour not in behaviours:
        raise ConfigError(
            f"build_mask.behaviour: {behaviour!r} is not in {run.scores}, which holds"
            f" {', '.join(behaviours) or 'no further behaviour'} beside the run's own query (null)"
        )


class _Passes:
    """The passes of Algorithm 1 over the shards of one run."""

    def __init__(self, run: Run):
        self.config: BuildMask = run.config.build_mask
        self.corpus_files, self.score_files = data_files(run.corpus), data_files(run.scores)
        if [p.name for p in self.corpus_files] != [p.name for p in self.score_files]:
            raise StageError(f"{VERB}: {run.corpus} and {run.scores} hold different shards")
        self.mask_folder = run.mask
        table = document_table(run.corpus)
        self.documents = selection.Documents(
            token_start=table.column("token_start").to_numpy(), num_tokens=table.column("num_tokens").to_numpy()
        )
        self.num_units = 0
        self.predicted_tokens = self.budget = 0
        self.score_min, self.score_max = np.inf, -np.inf
        self.excluded = np.array([], np.int64)

    def quantiles(self) -> tuple[float, float]:
        """tau and the median block's mass, both exact, in two histogram passes."""
        wanted = {"score": self.config.quantile, "mass": 0.5}
        high = {name: np.zeros(BUCKETS, np.int64) for name in wanted}
        for counts, (low_end, high_end) in self._map(_high_histograms):
            for name in wanted:
                high[name] += counts[name]
            self.score_min, self.score_max = min(self.score_min, low_end), max(self.score_max, high_end)
        num_blocks, self.predicted_tokens = int(high["mass"].sum()), int(high["score"].sum())
        self.num_units = num_blocks if self.config.unit == "block" else len(self.documents.token_start)
        self.budget = selection.token_budget(self.config.max_fraction, self.predicted_tokens)
        buckets = {name: quantile_buckets(high[name], wanted[name]) for name in wanted}
        low = {name: {bucket: np.zeros(BUCKETS, np.int64) for bucket in buckets[name]} for name in wanted}
        for histograms in self._map(_low_histograms, buckets):
            for name, of_bucket in low.items():
                for bucket, total in of_bucket.items():
                    total += histograms[name][bucket]
        tau, median_mass = (quantile_from_histograms(high[name], low[name], wanted[name]) for name in wanted)
        return tau, median_mass

    def find_outliers(self, median_mass: float) -> pa.Table:
        """The outlying blocks in block order; with `exclude_repeated` the repeated ones are excluded from here on."""
        limits = {
            "median_mass": median_mass,
            "mass_ratio": self.config.outlier_mass_ratio,
            "bigram_share": self.config.outlier_bigram_share,
        }
        parts = sorted(self._map(_find_outliers, limits), key=lambda part: part[0])
        columns = {
            name: np.concatenate([getattr(part, name) for _, part in parts])
            for name in ("block_id", "mass", "distinct_bigram_share", "repeated", "high_mass")
        }
        with np.errstate(divide="ignore"):  # a block of repeated tokens may have no mass: 0 of a median of 0 is 0
            over = np.divide(
                columns["mass"], median_mass, out=np.zeros(len(columns["mass"])), where=columns["mass"] > 0
            )
        if self.config.exclude_repeated:
            self.excluded = columns["block_id"][columns["repeated"]]
        columns["mass_over_median"] = over
        arrays = [pa.array(columns[field.name], field.type) for field in schemas.OUTLIERS]
        return pa.Table.from_arrays(arrays, schema=schemas.OUTLIERS)

    def rank(self, tau: float) -> tuple[selection.Ranking, selection.Cutoff, list[selection.MaskedCounts]]:
        """The ranking of units and where the token budget ends."""
        parts = list(self._map(_statistics, tau, self.config.window, self.config.unit))
        ranking = selection.rank_units(selection.merge_statistics([part[0] for part in parts]), self.num_units)
        counts = [part[1] for part in parts]
        return ranking, selection.find_cutoff(ranking, counts, self.budget), counts

    def fill(self, tau: float, cutoff: selection.Cutoff) -> dict[str, int]:
        """Publish every mask shard; returns blocks and masked tokens written."""
        settings = (tau, self.config.window, self.config.unit, cutoff, self.mask_folder)
        done = list(self._map(_fill, *settings))
        return {"blocks": sum(blocks for blocks, _ in done), "tokens": sum(tokens for _, tokens in done)}

    def _map(self, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        """`function(files, shard, documents, *arguments)` for every shard as a task, in any order."""
        remote = ray.remote(_on_shard).options(num_cpus=self.config.cpus_per_task)
        shared = [ray.put(argument) for argument in arguments]
        excluded = ray.put(self.excluded)
        pending = []
        for corpus_file, score_file in zip(self.corpus_files, self.score_files, strict=True):
            first, last = _block_range(corpus_file)
            documents = self.documents.meeting(first, last)
            files = (corpus_file, score_file, schemas.score_column(self.config.behaviour))
            pending.append(remote.remote(function, files, documents, excluded, *shared))
            if len(pending) >= 256:  # bounds what waits in the object store
                ready, pending = ray.wait(pending, num_returns=1)
                yield ray.get(ready[0])
        while pending:
            ready, pending = ray.wait(pending, num_returns=1)
            yield ray.get(ready[0])


def _block_range(corpus_file: Path) -> tuple[int, int]:
    """Stream positions [begin, end) of the blocks of a corpus shard, from two small columns."""
    table = pq.read_table(corpus_file, columns=["block_id", "length"], partitioning=None)
    block_size = pq.read_schema(corpus_file).field("tokens").type.list_size
    begin = table.column("block_id")[0].as_py() * block_size
    return begin, begin + int(table.column("length").to_numpy().sum())


Files = tuple[Path, Path, str]  # corpus shard, score shard, column of scores


def _on_shard(function: Any, files: Files, documents: Any, excluded: np.ndarray, *arguments: Any) -> Any:
    corpus_file, score_file, column = files
    blocks = schemas.read_table(corpus_file, columns=["block_id", "length"])
    table = schemas.read_table(score_file, columns=["block_id", column])
    if not table.column("block_id").equals(blocks.column("block_id")):
        raise ValueError(f"{score_file} holds other blocks than {corpus_file}")
    shard = selection.ScoreShard(
        first_block=blocks.column("block_id")[0].as_py(),
        scores=schemas.per_token_array(table, column),
        lengths=blocks.column("length").to_numpy().astype(np.int64),
        excluded=np.isin(blocks.column("block_id").to_numpy(), excluded),
    )
    return function(files, shard, documents, *arguments)


def _values(shard: selection.ScoreShard) -> dict[str, np.ndarray]:
    return {"score": shard.scores[shard.valid], "mass": block_mass(shard)}


def _high_histograms(files: Files, shard: selection.ScoreShard, documents: selection.Documents) -> Any:
    values = _values(shard)
    extremes = (float(values["score"].min(initial=np.inf)), float(values["score"].max(initial=-np.inf)))
    return {name: high_histogram(array) for name, array in values.items()}, extremes


def _low_histograms(
    files: Files, shard: selection.ScoreShard, documents: selection.Documents, buckets: dict[str, tuple[int, ...]]
) -> Any:
    values = _values(shard)
    return {name: {bucket: low_histogram(values[name], bucket) for bucket in buckets[name]} for name in values}


def _find_outliers(
    files: Files, shard: selection.ScoreShard, documents: selection.Documents, limits: dict[str, float]
) -> tuple[int, Outliers]:
    tokens_BT = schemas.per_token_array(schemas.read_table(files[0], columns=["tokens"]), "tokens")
    return shard.first_block, find_outliers(shard, tokens_BT, **limits)


def _statistics(
    files: Files, shard: selection.ScoreShard, documents: selection.Documents, tau: float, window: int, unit: Any
) -> Any:
    return (
        selection.piece_statistics(shard, documents, tau=tau, unit=unit),
        selection.masked_counts(shard, documents, tau=tau, window=window, unit=unit),
    )


def _fill(
    files: Files,
    shard: selection.ScoreShard,
    documents: selection.Documents,
    tau: float,
    window: int,
    unit: Any,
    cutoff: selection.Cutoff,
    folder: Path,
) -> tuple[int, int]:
    masked_BT = selection.fill_mask(shard, documents, tau=tau, window=window, unit=unit, cutoff=cutoff)
    schema = schemas.mask(masked_BT.shape[1])
    block_ids = pa.array(shard.first_block + np.arange(len(masked_BT)), pa.int64())
    table = pa.Table.from_arrays([block_ids, schemas.per_token_column(masked_BT, schema, "masked")], schema=schema)
    with publish(folder / files[1].name) as part:
        pq.write_table(table, part)
    return len(masked_BT), int(masked_BT.sum())


def _ranking_table(
    ranking: selection.Ranking, counts: list[selection.MaskedCounts], cutoff: selection.Cutoff
) -> pa.Table:
    masked: dict[int, int] = {}
    for part in counts:
        for unit_id, count in zip(part.doc_id.tolist(), part.count.tolist(), strict=True):
            masked[unit_id] = masked.get(unit_id, 0) + count
    whole = set(cutoff.whole.tolist())
    cut_tokens = sum(cutoff.quota.values())
    tokens_masked = [
        masked[unit_id] if unit_id in whole else cut_tokens if unit_id == cutoff.cut else 0
        for unit_id in ranking.doc_id.tolist()
    ]
    return pa.Table.from_arrays(
        [
            pa.array(ranking.doc_id, pa.int64()),
            pa.array(np.arange(len(ranking.doc_id)), pa.int64()),
            pa.array(ranking.rank_score, pa.float64()),
            pa.array(ranking.count, pa.int64()),
            pa.array(ranking.sum, pa.float64()),
            pa.array(tokens_masked, pa.int64()),
        ],
        schema=schemas.RANKING,
    )
