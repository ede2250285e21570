"""Scores of several runs as one: the mean of each token's ranks in them.

A score is a noisy measurement of one token in one context. Another checkpoint of the proxy measures it again, and so
does another proxy that reads the same tokens. Their scales differ, so ranks are averaged. Of the N predicted tokens
of a run, one of score x has the rank

    r(x) = (tokens in lower buckets + half of those in its own) / N,    0 < r < 1

in the 65,536 buckets of `quantiles.high_histogram`. A bucket is 2^-7 wide at most, relatively, so r is off by less than
half of its share of the tokens. Equal scores share a rank.

The artifact looks as scores do: a shard for each of the corpus, and a column `schemas.score_column` for each behaviour
that all runs have scored, of float32 means of ranks. A selection reads it in their place. `counts.parquet` beside the
shards has the histograms. Near 1 float32 tells ranks apart that are 6e-8 apart; nearer ones tie.

Cost: two passes over the scores, as independent tasks that sort nothing: 22 and 30 ns a score on one core. A task
holds the means of one shard, a few blocks of each run's scores, and the histograms, 512 KiB for each run and
behaviour. 4 bytes a token and behaviour stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.artifacts import (
    MANIFEST,
    Manifest,
    data_files,
    open_artifact,
    publish,
    read_manifest,
    require,
    require_same,
    sound,
    verify_digest,
)
from ifguide.config import BuildMask, ConfigError
from ifguide.selection.algorithm import Floats, ScoreShard
from ifguide.selection.distributed import RunTasks
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.measures import column_of
from ifguide.selection.quantiles import BUCKETS, Ints, high_histogram, order_preserving_uint32
from ifguide.selection.shards import CHUNK_TOKENS
from ifguide.storage import location
from ifguide.telemetry import log

VERB = "build_mask"
COUNTS = "counts.parquet"


def rank_table(histogram: Ints) -> Floats:
    """(65536,) the rank of the scores in each bucket, from `high_histogram` of all scores of a run."""
    return (np.cumsum(histogram) - histogram / 2) / max(int(histogram.sum()), 1)


def ranks(values: NDArray[np.float32], table: Floats) -> Floats:
    """The ranks of finite scores (...), by the table of their run."""
    return table[order_preserving_uint32(values) >> 16]


def mean_ranks(scorings: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """(N,) from 0 to 1: the mean of each token's ranks in several scorings (N,) of the same tokens, in this process.

    Raises:
        ValueError: the scorings differ in length, or a score is not finite.
    """
    if len({len(scores) for scores in scorings}) != 1:
        raise ValueError(f"scorings of {[len(scores) for scores in scorings]} tokens; all must be of the same tokens")
    total = np.zeros(len(scorings[0]))
    for number, scores in enumerate(scorings):
        if not np.isfinite(scores).all():
            raise ValueError(f"scoring {number} holds a score that is not finite")
        values = np.asarray(scores, np.float32)
        total += ranks(values, rank_table(high_histogram(values)))
    return (total / len(scorings)).astype(np.float32)


class Member(NamedTuple):
    """A shard of the scores of one run: the file, its digest, and the column of each behaviour."""

    path: Path
    sha256: str
    columns: tuple[str, ...]


Scored = tuple[Path, Manifest]


def other_scores(options: BuildMask) -> dict[str, Scored]:
    """Folder and manifest of each of `build_mask.others`, as `others[0]` and so on.

    Raises:
        ConfigError: one is no folder of finished token scores, or holds the same ones as another; names the key.
        MismatchError: two are of different corpora; names both.
    """
    scores: dict[str, Scored] = {}
    for index, value in enumerate(options.others):
        scores[f"others[{index}]"] = find_scores(f"others[{index}]", value, scores)
    return scores


def find_scores(own: str, value: str, earlier: Mapping[str, Scored]) -> Scored:
    """The scores that one of `build_mask.others` names, beside earlier ones. Raises as `other_scores`."""
    folder = location(value)
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"{VERB}.{own}: {folder} holds no finished scores; name the scores/ folder of a run on this corpus"
        )
    manifest = read_manifest(folder)
    if "corpus" not in manifest.inputs or not scored_in(folder, manifest):
        raise ConfigError(f"{VERB}.{own}: {folder} holds no token scores, but what {manifest.verb} made")
    for name, (place, other) in earlier.items():
        require_other_scores(own, folder, manifest, f"{name}, {place}", other)
        require_one_corpus(f"{own}, {folder}", manifest, f"that of {name}, {place}", other.inputs["corpus"])
    return folder, manifest


def require_other_scores(own: str, folder: Path, manifest: Manifest, name: str, other: Manifest) -> None:
    """Refuse scores that are the same as those called `name`: they would only weigh twice."""
    if manifest.fingerprint == other.fingerprint:
        raise ConfigError(
            f"{VERB}.{own}: {folder} holds the same scores as {name}; name those of another proxy or checkpoint"
        )


def require_one_corpus(own: str, manifest: Manifest, name: str, fingerprint: str) -> None:
    """Refuse scores of a corpus that is not the one called `name`."""
    require_same(
        f"the corpus of {VERB}.{own}",
        manifest.inputs["corpus"],
        name,
        fingerprint,
        "ranks are of the same tokens, so all runs must score one corpus, in one tokenizer, which every proxy reads",
    )


def scored_in(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """The behaviours that a finished artifact holds scores of; none where it holds no scores."""
    names = manifest.names()
    return schemas.scored_behaviours(schemas.read_schema(folder / names[0])) if names else ()


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Scores that fit together. `runs`: by name, `scores` the run's own; `behaviours`: those that all have scored;
    `shards`: of the corpus, with those of each run."""

    runs: Mapping[str, Scored]
    behaviours: tuple[str, ...]
    shards: tuple[tuple[Path, tuple[Member, ...]], ...]


def find_ensemble(options: BuildMask, folders: SelectionFolders) -> Ensemble:
    """What `make_ensemble` averages: the scores in `folders.scores` and in `build_mask.others`.

    Raises:
        ConfigError: one is no folder of finished token scores, lacks the behaviour, or holds the same ones as another.
        MismatchError: one is of another corpus than `folders.corpus`; names both.
        ValueError: one lacks a shard of the corpus; names both.
    """
    corpus, own = require(folders.corpus, "pack_corpus"), require(folders.scores, "score_corpus")
    runs = {"scores": (folders.scores, own)}
    for name, (folder, manifest) in other_scores(options).items():
        require_other_scores(name, folder, manifest, str(folders.scores), own)
        require_one_corpus(f"{name}, {folder}", manifest, str(folders.corpus), corpus.fingerprint)
        runs[name] = (folder, require(folder, "score_corpus"))
    scored = {name: scored_in(folder, manifest) for name, (folder, manifest) in runs.items()}
    for name, present in scored.items():
        if options.behaviour not in present:
            raise ConfigError(
                f"build_mask.behaviour: {options.behaviour!r} is not in {runs[name][0]}, {name}, which holds"
                f" {', '.join(present)}"
            )
    behaviours = tuple(name for name in scored["scores"] if all(name in present for present in scored.values()))
    columns = {name: _columns(folder, manifest, options, behaviours) for name, (folder, manifest) in runs.items()}
    shards = []
    for shard in corpus.names():
        members = []
        for name, (folder, manifest) in runs.items():
            if shard not in manifest.files:
                raise ValueError(f"{VERB}: {folder} has no {shard}, which {folders.corpus} has; score the corpus again")
            members.append(Member(folder / shard, manifest.files[shard]["sha256"], columns[name]))
        shards.append((folders.corpus / shard, tuple(members)))
    return Ensemble(runs=runs, behaviours=behaviours, shards=tuple(shards))


def _columns(folder: Path, manifest: Manifest, options: BuildMask, behaviours: Sequence[str]) -> tuple[str, ...]:
    present = schemas.read_schema(folder / manifest.names()[0]).names
    return tuple(column_of(behaviour, options.smoothed, folder, present) for behaviour in behaviours)


def make_ensemble(
    ensemble: Ensemble, options: BuildMask, folders: SelectionFolders, *, config_yaml: str, run_tasks: RunTasks
) -> Manifest:
    """Make `folders.ensemble`, or find it complete.

    Raises:
        ValueError: a score is not finite, or a shard has changed since it was made; names the file.
        MismatchError: the folder holds an ensemble of other scores.
    """
    corpus, behaviours, shards = require(folders.corpus, "pack_corpus"), ensemble.behaviours, ensemble.shards
    inputs = {name: manifest.fingerprint for name, (_, manifest) in ensemble.runs.items()}
    artifact = open_artifact(
        folders.ensemble,
        verb=VERB,
        options={VERB: {"others": list(options.others), "smoothed": options.smoothed}},
        inputs={"corpus": corpus.fingerprint, **inputs},
        config_yaml=config_yaml,
    )
    if artifact.manifest:
        return artifact.manifest
    counts = np.zeros((len(inputs), len(behaviours), BUCKETS), np.int64)
    for of_shard in run_tasks(count_scores, shards):
        counts += of_shard
    _write_counts(folders.ensemble / COUNTS, counts)
    written = list(run_tasks(write_ranks, ((*shard, behaviours, folders.ensemble / shard[0].name) for shard in shards)))
    blocks, tokens = (sum(column) for column in zip(*written, strict=True))
    if (blocks, {tokens}) != (corpus.rows["blocks"], set(counts.sum(axis=-1).ravel().tolist())):
        raise ValueError(
            f"{VERB}: ranks of {blocks} blocks and {tokens} tokens, where {folders.corpus} has"
            f" {corpus.rows['blocks']} blocks; was a shard rewritten?"
        )
    folders_of_runs = zip(ensemble.runs.values(), shards[0][1], strict=True)
    manifest = artifact.finish(
        [*data_files(folders.ensemble), folders.ensemble / COUNTS],
        rows={"blocks": blocks, "tokens": tokens},
        summary={
            "behaviours": list(behaviours),
            "runs": [{"folder": str(folder), "columns": list(own.columns)} for (folder, _), own in folders_of_runs],
        },
    )
    log(VERB, f"mean ranks of {tokens:,} tokens in the scores of {len(inputs)} runs: {folders.ensemble}")
    return manifest


def count_scores(corpus: Path, members: Sequence[Member]) -> Ints:
    """First pass, on a shard: (members, behaviours, 65536) `high_histogram` of the predicted tokens' scores.

    Raises:
        ValueError: a score is not finite, blocks of scores and corpus differ, a file has changed. Names the file.
    """
    head = _head(corpus)
    counts = np.zeros((len(members), len(members[0].columns), BUCKETS), np.int64)
    for row, member in enumerate(members):
        verify_digest(member.path, member.sha256, "score_corpus")
        scored = schemas.read_table(member.path, columns=["block_id"]).column("block_id")
        if scored.to_pylist() != head.column("block_id").to_pylist():
            raise ValueError(f"{member.path} holds other blocks than {corpus}")
        for column, name in enumerate(member.columns):
            for shard in _read(head, member.path, name):
                counts[row, column] += high_histogram(shard.predicted)
    return counts


def write_ranks(corpus: Path, members: Sequence[Member], behaviours: Sequence[str], target: Path) -> tuple[int, int]:
    """Second pass, on a shard: publish `target`; returns blocks and predicted tokens."""
    head = _head(corpus)
    tables = _read_tables(target.parent / COUNTS, len(members), len(behaviours))
    block_size = schemas.read_schema(corpus).field("tokens").type.list_size
    columns, tokens = {}, 0
    for number, behaviour in enumerate(behaviours):
        total = np.zeros((head.num_rows, block_size))
        for member, of_behaviours in zip(members, tables, strict=True):
            row = tokens = 0
            for shard in _read(head, member.path, member.columns[number]):
                valid = shard.valid
                total[row : row + len(valid)][valid] += ranks(shard.scores[valid], of_behaviours[number])
                row, tokens = row + len(valid), tokens + int(np.count_nonzero(valid))
        columns[schemas.score_column(behaviour)] = (total / len(members)).astype(np.float32)
    schema = schemas.scores(block_size, behaviours)
    arrays = [schemas.per_token_column(columns[name], schema, name) for name in schema.names[1:]]
    with publish(target) as part:
        pq.write_table(
            pa.Table.from_arrays([head.column("block_id"), *arrays], schema=schema), part, use_dictionary=False
        )
    return head.num_rows, tokens


def _head(corpus: Path) -> pa.Table:
    return schemas.read_table(sound(corpus.parent, corpus.name), columns=["block_id", "length"])


def _read(head: pa.Table, path: Path, column: str) -> Iterator[ScoreShard]:
    """A column of a shard of scores, a few blocks at a time."""
    block_ids, lengths = (head.column(name).to_numpy().astype(np.int64) for name in ("block_id", "length"))
    block_size = schemas.read_schema(path).field(column).type.list_size
    row = 0
    for table in schemas.read_batches(path, column, max(1, CHUNK_TOKENS // block_size)):
        scores = schemas.per_token_array(table, column)
        try:
            yield ScoreShard(first_block=int(block_ids[row]), scores=scores, lengths=lengths[row : row + len(scores)])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        row += len(scores)


def _write_counts(path: Path, counts: Ints) -> None:
    names = [f"{member}.{behaviour}" for member in range(counts.shape[0]) for behaviour in range(counts.shape[1])]
    table = pa.table(dict(zip(names, counts.reshape(-1, BUCKETS), strict=True)))
    with publish(path) as part:
        pq.write_table(table, part)


def _read_tables(path: Path, members: int, behaviours: int) -> list[list[Floats]]:
    table = schemas.read_table(path)
    return [
        [rank_table(table.column(f"{member}.{behaviour}").to_numpy()) for behaviour in range(behaviours)]
        for member in range(members)
    ]
