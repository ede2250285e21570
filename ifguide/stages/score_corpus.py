"""`score_corpus`: one influence score per token, a corpus shard per descriptor over a pool of Ray Data actors.

An actor loads proxy and directions once, reads a corpus shard, writes the scores shard of the same name, and
returns a ledger row; while it computes, it reads the next shard and writes the last one. The bytes do not depend
on the number of actors, on order, or on retries: method, steps, threads and micro-batch are decided once
(`influence.decision`). A shard that had to halve its micro-batch says so. Smoothed scores (`influence.smoothing`) come
from the same pass. What smooths them is fitted on a sample of the corpus, which is scored first and not again.

With a student (`score_corpus.scorer`) there are two passes: the student scores every block, then the exact method some
of them, which are a random audit and, of a cascade, those in which the student finds most.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ifguide.artifacts import MANIFEST, Manifest, require, require_same
from ifguide.config import Config, ScoreCorpus
from ifguide.config.resources import ONE_CPU
from ifguide.distributed.session import require_resources
from ifguide.distributed.shards import LEDGER, Pool, ShardResults, StageError, run_shards
from ifguide.distributed.tasks import run_task, run_tasks
from ifguide.influence.decision import METHOD, Decision
from ifguide.influence.method import chosen_method
from ifguide.influence.scoring_worker import SMOOTHER, CorpusShard, ScoreByProxy, ScoringSettings
from ifguide.influence.smoothing import Smoother
from ifguide.influence.smoothing_sample import SAMPLE, SamplePart, fit_on_parts, part_path, sample_parts
from ifguide.influence.smoothing_worker import ScoreSample
from ifguide.run import Run
from ifguide.stages.scoring import SCORING, ScoringInputs, scoring_options
from ifguide.storage import local_copy
from ifguide.student.auditing import certify_files
from ifguide.student.cascade_worker import (
    FIRST_PASS,
    CascadeSettings,
    Recheck,
    ScoreByStudent,
    count_blocks,
    first_pass,
)
from ifguide.student.certificate import Certificate
from ifguide.student.recheck import least_count
from ifguide.student.said import SUMMARY, listed
from ifguide.student.sampling import audit_share, require_audit
from ifguide.student.scorers import StudentFacts
from ifguide.telemetry import log

VERB = "score_corpus"
COUNTED_SHARDS = 64  # of one task: a shard is a small column to read


def score_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `scores/`.

    Raises:
        MismatchError: the query is of another proxy. StageError: a shard failed (NaN scores name shard and block).
            ValueError: the audit of a student would hold hardly a block, or it misses too much; says what to do.
    """
    config = run.config.score_corpus
    method = chosen_method(config)
    if dry_run:
        how = "" if not config.uses_student else f" by a {config.scorer} of kind {run.config.fit_student.kind},"
        how += " smoothed," if config.smooth and not config.uses_student else ""
        log(
            VERB,
            f"would score every token ({config.attribution}, {method.precision}, rank {method.rank or 'full'}) of"
            f" {1 + len(config.queries)} behaviours,{how} with"
            f" {config.min_actors} to {config.max_actors} actors of"
            f" {config.resources.cpus:g} CPU, {config.resources.gpus:g} GPU",
        )
        return None
    given = ScoringInputs.of(run, VERB)
    inputs = dict(given.inputs)
    if config.uses_student:
        inputs["student"] = require_student(given).fingerprint
        if not (run.scores / MANIFEST).exists():  # before the plan, which would hold the fraction that is to be raised
            require_audit(config.audit_fraction, given.packed.num_blocks)
    artifact = run.open(run.scores, VERB, inputs=inputs, extra=_drawn_by(run.config))
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    require_resources(run.config.cluster, VERB, config.resources)
    corpus = given.corpus
    shards = [
        CorpusShard(key=name.removesuffix(".parquet"), name=name, number=number, bytes=corpus.files[name]["bytes"])
        for number, name in enumerate(corpus.names())
    ]
    smoothed = config.smooth is not None and not config.uses_student
    settings = given.settings(VERB, run.scores, config.resources, smoothed=smoothed)
    scored = _by_student(given, settings, shards) if config.uses_student else _exactly(given, settings, shards)
    rows = {name: sum(result[name] for result in scored.results.values()) for name in ("blocks", "tokens")}
    expected = {name: corpus.rows[name] for name in rows}
    if rows != expected:
        raise StageError(f"{VERB}: scored {rows} of a corpus of {expected}")
    summary = {"attribution": config.attribution, **_summary(settings.decision, scored.results), **scored.summary}
    files = [*(run.scores / shard.name for shard in shards), run.scores / METHOD, *scored.files]
    manifest = artifact.finish(
        files, rows=rows, summary=summary, remove=(LEDGER, FIRST_PASS, SAMPLE), digests=scored.results.files
    )
    log(VERB, f"{rows['tokens']:,} tokens, {summary['tokens_per_second_per_actor']:,.0f} tok/s per actor, {run.scores}")
    return manifest


def _drawn_by(config: Config) -> dict[str, int]:
    """The seed where a sample or an audit is drawn by it; 0 is not said, nor was any by earlier versions."""
    scoring = config.score_corpus
    return {"seed": config.seed} if config.seed and (scoring.smooth or scoring.uses_student) else {}


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What the shards came to, and what there is beside them."""

    results: ShardResults
    files: Sequence[Path] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)


def _exactly(given: ScoringInputs, settings: ScoringSettings, shards: Sequence[CorpusShard]) -> _Scored:
    """Every block by the chosen method."""
    config, folder = given.run.config.score_corpus, settings.scores
    if not config.smooth:
        return _Scored(results=_run(given, shards, ScoreByProxy, settings))
    parts = sample_parts(given.packed, config.smooth.tokens, given.run.config.seed)
    sampled = _sample(given, parts, settings)
    if not (folder / SMOOTHER).exists():
        _fit_smoother(settings, config, parts)
    results = _run(given, [_with_parts(shard, parts) for shard in shards], ScoreByProxy, settings)
    by_number = {shard.number: results[shard.key] for shard in shards}
    for part in parts:
        for name in ("seconds", "halvings"):
            by_number[part.number][name] += sampled[part.key][name]
    smoothing = Smoother.load(local_copy(folder / SMOOTHER)).summary(list(given.queries))
    return _Scored(results=results, files=[folder / SMOOTHER], summary={"smoothing": smoothing})


def _with_parts(shard: CorpusShard, parts: Sequence[SamplePart]) -> CorpusShard:
    own = [part for part in parts if part.number == shard.number]
    return replace(shard, parts=tuple(part.key for part in own), sampled=sum(len(part.rows) for part in own))


def _by_student(given: ScoringInputs, settings: ScoringSettings, shards: Sequence[CorpusShard]) -> _Scored:
    """Every block by the student, then some of them exactly, and the certificate.

    Raises:
        ValueError: the certificate falls short of `score_corpus.min_recall`; says what to do.
    """
    config, folder, student = given.run.config.score_corpus, settings.scores, given.run.student
    cascade = CascadeSettings(
        scoring=settings,
        student=student,
        facts=StudentFacts.read(student),
        audit_fraction=audit_share(config.audit_fraction, given.packed.num_blocks),
        seed=given.run.config.seed,
        replaces=config.scorer == "cascade",
    )
    passed = _run(given, [first_pass(shard) for shard in shards], ScoreByStudent, cascade)
    numbers = [shard.number for shard in shards]
    least = least_count(lambda bucket: _count_blocks(cascade, numbers, bucket), config.recheck_fraction)
    log(VERB, f"the student's pass is done; blocks that count {least:g} or more are rechecked")
    results = _run(given, shards, Recheck, replace(cascade, least=least))
    audits = [cascade.audit(number) for number in numbers]
    sources = sorted({source for result in results.values() for source in result["sources"]})
    certificate: Certificate = run_task(certify_files, audits, sources, resources=ONE_CPU)
    said = {"scorer": config.scorer, "kind": cascade.facts.kind, **_blocks(results), **certificate.as_json()}
    settings.decision.write(folder, certificate=said)
    log(VERB, f"audit of {said['audited_blocks']:,} blocks: {certificate}")
    if shortfalls := certificate.shortfalls(config.min_recall, cascade=cascade.replaces):
        raise ValueError(
            f"{VERB}: the student misses too much: {listed(shortfalls, between='; ')}."
            " Raise fit_student.sample_fraction"
            + (" or score_corpus.recheck_fraction" if cascade.replaces else "")
            + " (in another run_dir, or delete scores/ and student/), audit_fraction where"
            " the interval is wide, take scorer: exact, or accept it by a lower score_corpus.min_recall"
        )
    return _Scored(results=_added(results, passed), files=audits, summary={SUMMARY: said})


def _count_blocks(cascade: CascadeSettings, shards: Sequence[int], bucket: int | None) -> np.ndarray:
    """The sum of `count_blocks` over all shards, `COUNTED_SHARDS` a task."""
    parts = [shards[first : first + COUNTED_SHARDS] for first in range(0, len(shards), COUNTED_SHARDS)]
    counted = run_tasks(ONE_CPU)(count_blocks, ((cascade, part, bucket) for part in parts))
    return functools.reduce(np.add, counted)


def require_student(given: ScoringInputs) -> Manifest:
    """The run's student, of the same corpus, proxy, query and exact scores.

    Raises:
        FileNotFoundError: there is none. MismatchError: it is of others; names them.
    """
    folder = given.run.student
    student = require(folder, "fit_student")
    for name, fingerprint in given.inputs.items():
        made = student.inputs.get(name, "none")
        require_same(f"the {name} of {folder}", made, "this run's", fingerprint, "fit the student again")
    given.beginning.require_of(folder, student.inputs)
    for name, value in scoring_options(given.run.config).items():
        learnt = student.options[SCORING].get(name)
        require_same(f"score_corpus.{name} of {folder}", str(learnt), "this run's", str(value), "fit the student again")
    return student


def _run(given: ScoringInputs, shards: Sequence[CorpusShard], make_worker: Any, settings: Any) -> ShardResults:
    """A pass over the corpus."""
    tokens_per_byte = given.corpus.rows["tokens"] / sum(shard.bytes for shard in shards)
    block = given.packed.block_size
    return run_shards(
        VERB,
        shards,
        make_worker,
        settings,
        folder=given.run.scores,
        pool=_pool(given),
        unit="tokens",
        amount=lambda shard: max(0.0, shard.bytes * tokens_per_byte - shard.sampled * block),  # those are scored
    )


def _pool(given: ScoringInputs) -> Pool:
    config = given.run.config.score_corpus
    return Pool(size=config.max_actors, min_size=config.min_actors, resources=config.resources, in_flight=2)


def _blocks(results: ShardResults) -> dict[str, int]:
    """How many blocks were scored exactly, are those that a cascade rechecks, and were audited."""
    names = ("exact_blocks", "rechecked_blocks", "audited_blocks")
    return {name: sum(result[name] for result in results.values()) for name in names}


def _added(results: ShardResults, passed: ShardResults) -> ShardResults:
    """The second pass' results, with the time of the first one."""
    for key, result in results.items():
        result["seconds"] += passed[f"{FIRST_PASS}-{key}"]["seconds"]
    return results


def _sample(given: ScoringInputs, parts: Sequence[SamplePart], settings: ScoringSettings) -> ShardResults:
    """A pass over the sample that the smoother is fitted on."""
    block = settings.corpus.block_size
    tokens = min(sum(len(part.rows) for part in parts) * block, settings.corpus.num_tokens)
    log(VERB, f"{tokens:,} tokens are scored first: what the scores are smoothed by is fitted on them")
    return run_shards(
        VERB,
        parts,
        ScoreSample,
        settings,
        folder=settings.scores / SAMPLE,
        pool=_pool(given),
        unit="tokens",
        amount=lambda part: len(part.rows) * block,
    )


def _fit_smoother(settings: ScoringSettings, config: ScoreCorpus, parts: Sequence[SamplePart]) -> None:
    """Fit it on a worker. Raises ValueError, as `fit_on_parts`."""
    paths = [part_path(settings.scores, part.key) for part in parts]
    behaviours, smoother = list(settings.queries), settings.scores / SMOOTHER
    fits = run_task(fit_on_parts, paths, behaviours, config.smooth, smoother, resources=config.resources)
    for behaviour, fit in fits.items():
        if fit["used"]:
            log(VERB, f"{behaviour}: hidden states explain {fit['explained']:.3f} of the scores' variance")
        else:
            reason = "hidden states predict the scores of other documents no better than their mean does"
            log(VERB, f"{behaviour}: {reason}; its scores are not smoothed", level=logging.WARNING)


def _summary(decision: Decision, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    decided = asdict(decision)
    tokens, seconds = (sum(result[name] for result in results.values()) for name in ("tokens", "seconds"))
    return {
        **{name: decided[name] for name in ("method", "engine", "steps", "micro_batch_blocks", "threads", "check")},
        "energy": {name: decided["energy"][name] for name in ("least", "mean")},
        "shards_with_halved_micro_batch": sorted(key for key, result in results.items() if result["halvings"]),
        "score_min": min(result["score_min"] for result in results.values()),
        "score_max": max(result["score_max"] for result in results.values()),
        "tokens_per_second_per_actor": round(tokens / seconds, 1),
    }
