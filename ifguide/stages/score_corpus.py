"""`score_corpus`: one influence score per token, a corpus shard per descriptor over a pool of Ray Data actors.

An actor loads proxy and directions once, reads a corpus shard, writes the scores shard of the same name, and
returns a ledger row; while it computes, it reads the next shard and writes the last one. The bytes do not depend
on the number of actors, on order, or on retries: method, steps, threads and micro-batch are decided once
(`influence.decision`). A shard that had to halve its micro-batch says so. Smoothed scores (`influence.smoothing`) come
from the same pass; what smooths them is fitted on a sample of the corpus before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ifguide.artifacts import Manifest, require, require_same
from ifguide.config import OWN, ScoreCorpus
from ifguide.config.resources import ONE_CPU
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.distributed.tasks import run_task
from ifguide.influence.decision import METHOD, Decision, decide, describe_decision
from ifguide.influence.method import chosen_method
from ifguide.influence.proxy import Beginning, ProxyFacts, describe_proxy
from ifguide.influence.scoring_worker import SMOOTHER, CorpusShard, ScoreShard, ScoringSettings
from ifguide.influence.smoothing import Smoother
from ifguide.influence.smoothing_worker import fit_on_sample
from ifguide.models import check_vocabulary
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus
from ifguide.storage import local_copy, location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer

VERB = "score_corpus"


def score_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `scores/`.

    Raises:
        MismatchError: the query is of another proxy. StageError: a shard failed (NaN scores name shard and block).
    """
    config = run.config.score_corpus
    method = chosen_method(config)
    if dry_run:
        log(
            VERB,
            f"would score every token ({config.attribution}, {method.precision}, rank {method.rank or 'full'}) of"
            f" {1 + len(config.queries)} behaviours,{' smoothed,' if config.smooth else ''} with"
            f" {config.min_actors} to {config.max_actors} actors of"
            f" {config.resources.cpus:g} CPU, {config.resources.gpus:g} GPU",
        )
        return None
    corpus, query = require(run.corpus, "pack_corpus"), require(run.query, "build_query")
    run.require_proxy()
    connect(run.config.cluster)
    block_size, min_coverage = run.config.pack_corpus.block_size, run.config.fit_factors.min_coverage
    tokenizer = load_tokenizer(run.config.tokenizer_source)
    beginning = Beginning.of(
        tokenizer,
        is_baseline=run.config.proxy_is_baseline,
        of_documents=run.config.pretrain.document_attention,
    )
    proxy = run_task(describe_proxy, run.proxy_source, beginning, block_size, min_coverage, resources=ONE_CPU)
    log(VERB, str(proxy))
    check_vocabulary(proxy.vocab_size, tokenizer, model_name=proxy.name, tokenizer_name=run.config.tokenizer_source)
    queries, inputs = _queries(run, query, proxy, beginning)
    inputs |= {"corpus": corpus.fingerprint, "proxy": proxy.fingerprint, **beginning.inputs()}
    artifact = run.open(run.scores, VERB, keys=("score_corpus",), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    require_resources(run.config.cluster, VERB, config.resources)
    shards = [
        CorpusShard(key=name.removesuffix(".parquet"), name=name, number=number, bytes=corpus.files[name]["bytes"])
        for number, name in enumerate(corpus.names())
    ]
    packed = PackedCorpus.of(run.corpus, corpus)
    decision = Decision.read(run.scores) or _decide(run, beginning, queries, packed, shards[0].name)
    settings = ScoringSettings(
        corpus=packed,
        scores=run.scores,
        queries=queries,
        proxy=run.proxy_source,
        proxy_fingerprint=proxy.fingerprint,
        beginning=beginning,
        attribution=config.attribution,
        decision=decision,
        gpus=config.resources.gpus,
        smoothed=config.smooth is not None,
    )
    if config.smooth and not (run.scores / SMOOTHER).exists():
        _fit_smoother(settings, config, run.config.seed)
    pool = Pool(size=config.max_actors, min_size=config.min_actors, resources=config.resources, in_flight=2)
    tokens_per_byte = corpus.rows["tokens"] / sum(shard.bytes for shard in shards)
    results = run_shards(
        VERB,
        shards,
        ScoreShard,
        settings,
        folder=run.scores,
        pool=pool,
        unit="tokens",
        amount=lambda shard: shard.bytes * tokens_per_byte,
    )
    rows = {name: sum(result[name] for result in results.values()) for name in ("blocks", "tokens")}
    expected = {name: corpus.rows[name] for name in rows}
    if rows != expected:
        raise StageError(f"{VERB}: scored {rows} of a corpus of {expected}")
    summary = {"attribution": config.attribution, **_summary(decision, results)}
    files = [*(run.scores / shard.name for shard in shards), run.scores / METHOD]
    if config.smooth:
        summary["smoothing"] = Smoother.load(local_copy(run.scores / SMOOTHER)).summary(list(queries))
        files.append(run.scores / SMOOTHER)
    manifest = artifact.finish(files, rows=rows, summary=summary, remove=(LEDGER,), digests=results.files)
    log(VERB, f"{rows['tokens']:,} tokens, {summary['tokens_per_second_per_actor']:,.0f} tok/s per actor, {run.scores}")
    return manifest


def _queries(
    run: Run, query: Manifest, proxy: ProxyFacts, beginning: Beginning
) -> tuple[dict[str, Path], dict[str, str]]:
    """The query of each behaviour, the run's own first, and their fingerprints; all must be of the proxy."""
    require_same(
        f"the proxy of {run.query}",
        query.inputs["proxy"],
        f"the proxy {run.proxy_source.source}",
        proxy.fingerprint,
        "build the query of this proxy, or name the query's own",
    )
    beginning.require_of(run.query, query.inputs)
    queries, inputs = {OWN: run.query}, {"query": query.fingerprint}
    for name, folder in run.config.score_corpus.queries.items():
        further = require(location(folder), "build_query")
        require_same(
            f"the proxy of {folder}", further.inputs["proxy"], "this run's", proxy.fingerprint, "build it of this proxy"
        )
        beginning.require_of(location(folder), further.inputs)
        inputs[f"query.{name}"] = further.fingerprint
        queries[name] = location(folder)
    return queries, inputs


def _decide(
    run: Run, beginning: Beginning, queries: Mapping[str, Path], corpus: PackedCorpus, first_shard: str
) -> Decision:
    """Decide on a worker how the run scores, and publish it.

    Raises:
        ValueError: the chosen method does not agree with the exact one on the first blocks.
    """
    config = run.config.score_corpus
    folders = list(queries.values())
    decision, memory = run_task(
        decide, config, run.proxy_source, beginning, folders, corpus, first_shard, resources=config.resources
    )
    log(VERB, describe_decision(config, decision, memory))
    decision.require_agreement(config.min_agreement)
    decision.write(run.scores)
    return decision


def _fit_smoother(settings: ScoringSettings, config: ScoreCorpus, seed: int) -> None:
    """Fit it on a worker. Raises ValueError, as `fit_on_sample`."""
    assert config.smooth is not None
    tokens = min(config.smooth.tokens, settings.corpus.num_tokens)
    log(VERB, f"scoring {tokens:,} tokens of the corpus, to fit what the scores are smoothed by")
    fits = run_task(fit_on_sample, settings, config.smooth, seed, resources=config.resources)
    for behaviour, fit in fits.items():
        log(VERB, f"{behaviour}: hidden states explain {fit['explained']:.3f} of the scores' variance")


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
