"""`fit_student`: a student of the token scores, from a random sample of the corpus that is scored exactly.

A part of the sample is one piece of work and the unit of resuming; the student is fitted on all of them in one task,
which begins anew where it was ended.
What was tried on the blocks that were held out, and the one that was chosen, is in `student/student.json`. How good the
student is, only the audit of `score_corpus` says.
"""

from __future__ import annotations

from typing import Any

from ifguide.artifacts import MANIFEST, Manifest
from ifguide.config import check_student
from ifguide.config.resources import ONE_CPU
from ifguide.distributed.session import require_resources
from ifguide.distributed.shards import LEDGER, Pool, ShardResults, run_shards
from ifguide.distributed.tasks import run_task
from ifguide.influence.decision import METHOD
from ifguide.models import source_fingerprint
from ifguide.run import Run
from ifguide.stages.scoring import SCORING, ScoringInputs, scoring_options
from ifguide.student.encoder import require_apart
from ifguide.student.pretrained import require_readable
from ifguide.student.said import NAMED
from ifguide.student.sample_fit import fit_on_parts
from ifguide.student.sample_worker import (
    TRANSFORMS,
    SamplePart,
    SampleSettings,
    ScoreSample,
    fit_transforms,
    require_blocks,
)
from ifguide.student.sampling import Sampling, require_audit
from ifguide.student.scorers import FACTS, STUDENT
from ifguide.telemetry import log

VERB = "fit_student"
ENCODER = "encoder"  # among the inputs of a student: the model whose body is trained further


def fit_student(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `student/`.

    Raises:
        ConfigError: a student cannot learn what the config asks for, or this machine is too small.
        MismatchError: the query is of another proxy, or a student that was begun of another encoder. FileNotFoundError:
            there is no such encoder. ValueError: it cannot read the corpus, or keep documents apart and is to; or the
            sample or the audit is too small. StageError: a part failed.
    """
    check_student(run.config)  # the config asks for none where scores are exact
    config, resources = run.config.fit_student, run.config.score_corpus.resources
    if dry_run:
        log(
            VERB,
            f"would score {100 * config.sample_fraction:g}% of the corpus' blocks exactly, in {config.partitions}"
            f" parts, and fit a student of kind {config.kind}",
        )
        return None
    given, encoder = ScoringInputs.of(run, VERB), config.encoder.source if config.kind == "encoder" else None
    inputs = dict(given.inputs) if encoder is None else {**given.inputs, ENCODER: source_fingerprint(encoder)}
    extra = {SCORING: scoring_options(run.config)}
    sampling = Sampling(fraction=config.sample_fraction, held_out=config.held_out, seed=run.config.seed)
    if not (run.student / MANIFEST).exists():
        _require_fit(given, sampling, encoder)
    artifact = run.open(run.student, VERB, inputs=inputs, extra=extra)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.summary['chosen']}")
        return artifact.manifest
    require_resources(run.config.cluster, "score_corpus", resources)
    settings = SampleSettings(
        scoring=given.settings(VERB, run.student, resources),
        kind=config.kind,
        sampling=sampling,
        partitions=min(config.partitions, given.packed.num_shards),
        encoder=config.encoder,
        vocabulary=given.proxy.vocab_size,
    )
    if config.kind == "head" and not (run.student / TRANSFORMS).exists():
        run_task(fit_transforms, settings, resources=resources)
    parts = [SamplePart(key=f"part-{number:05d}", number=number) for number in range(settings.partitions)]
    pool = Pool(size=len(parts), resources=resources)
    results = run_shards(VERB, parts, ScoreSample, settings, folder=run.student, pool=pool, unit="parts")
    sample = _sample(results)
    chosen = run_task(fit_on_parts, settings, sample, resources=resources)
    files = [run.student / name for name in (STUDENT, FACTS, METHOD)]
    rows = {name: sample[name] for name in ("blocks", "tokens")}
    unsampled = {name: sample[name] for name in ("unsampled_sources", "unsampled")}
    summary = {"kind": config.kind, "chosen": chosen, **unsampled}
    scratch = (LEDGER, TRANSFORMS, *(settings.part(part.number).name for part in parts))
    manifest = artifact.finish(files, rows=rows, summary=summary, remove=scratch)
    log(
        VERB,
        f"{config.kind} student of {rows['tokens']:,} tokens: finds {chosen['recall']:.3f} of the highest scores of"
        f" the blocks that it was chosen by in its own top 10%; {run.student}",
    )
    return manifest


def _require_fit(given: ScoringInputs, sampling: Sampling, encoder: str | None) -> None:
    """Refuse what no student can be fitted or audited on. It comes before the plan, which would hold what is to be set
    otherwise.

    Raises:
        ValueError: the sample or the audit is too small, or the encoder cannot read the corpus or keep documents apart.
    """
    config, corpus = given.run.config, given.packed
    require_audit(config.score_corpus.audit_fraction, corpus.num_blocks)
    if encoder is not None:
        require_readable(encoder, given.run.tokenizer_source, corpus.block_size)
        if given.beginning.of_documents:
            run_task(require_apart, encoder, resources=ONE_CPU)
    require_blocks(corpus, sampling, config.fit_student.kind)


def _sample(results: ShardResults) -> dict[str, Any]:
    """What the parts' sample holds, and of the sources that it does not the number and the first names."""
    counts = {name: sum(part[name] for part in results.values()) for name in ("blocks", "held", "tokens", "halvings")}
    named, sampled = (
        {source for part in results.values() for source in part[name]} for name in ("sources", "sampled_sources")
    )
    unsampled = sorted(named - sampled)
    return {
        **counts,
        "sources": len(named),
        "unsampled_sources": len(unsampled),
        "unsampled": unsampled[:NAMED],
    }
