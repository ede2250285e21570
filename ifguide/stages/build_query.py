"""`build_query`: two sets of prompts with completions -> the preconditioned direction V per tracked module.

Rows are classified in one task; gradients are summed over a fixed number of partitions, each a task, so that
the result does not depend on the number of workers; the sum is preconditioned with the EK-FAC factors, and refined
where the config says so. How far scores depend on which queries were drawn is measured on a few blocks of the corpus.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ifguide.artifacts import MANIFEST, Manifest, file_digest, json_digest, read_manifest, require, require_same
from ifguide.config import ConfigError
from ifguide.config.resources import ONE_CPU
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, run_shards
from ifguide.distributed.tasks import run_task
from ifguide.influence.factor_worker import draw_sample
from ifguide.influence.null_worker import build_nulls
from ifguide.influence.proxy import Beginning, ProxyFacts
from ifguide.influence.query_file import DIRECTION, HELD_OUT, NULLS, QUERIES, QueryRow, read_queries, write_queries
from ifguide.influence.query_worker import (
    PARTIAL,
    FactorsFolder,
    QueryPart,
    QuerySettings,
    SumGradients,
    judge_held_out,
    judge_queries,
    precondition_parts,
    refine_parts,
)
from ifguide.interchange import check_proxy_factors
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus
from ifguide.stages.proxy import read_proxy
from ifguide.storage import location
from ifguide.telemetry import log
from ifguide.toxicity import QuerySets, choose_queries, classifier_inputs, read_prompt_rows

VERB = "build_query"
ROWS = "rows_sha256"  # in the summary: no input, since unfinished work goes on with a table that was edited
RELIABILITY_TOKENS = 4096  # of the corpus, that both halves score: the correlation is then known to 0.02


def build_query(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `query/`.

    Raises:
        ConfigError: no prompts. MismatchError: the factors are of another proxy, or a finished query is of other
            prompts. ValueError: an empty set, factors that do not fit the proxy, or a proxy that does not read the
            corpus' tokens.
    """
    config = run.config.build_query
    sources = [source for source in (config.prompts, config.pairs, config.positive, config.negative) if source]
    if not sources:
        raise ConfigError("build_query: name `prompts` for a classifier, `pairs`, or `positive` and `negative` tables")
    if dry_run:
        paths = " and ".join(source.path for source in sources)
        by = f", classified by {config.classifier.name}" if config.prompts else ""
        log(VERB, f"would take up to {config.max_positive:,} + {config.max_negative:,} queries from {paths}{by}")
        return None
    if config.prompts is None:
        digest = json_digest(asdict(choose_queries(config, run.config.seed)))
        training = {}
    else:
        digest = json_digest([asdict(row) for row in read_prompt_rows(config.prompts, "build_query.prompts")])
        training = classifier_inputs({"build_query.classifier": config.classifier})
    if config.factors is None:
        require(run.factors, "fit_factors")
    run.require_proxy()
    connect(run.config.cluster)
    proxy, beginning = read_proxy(run, VERB)
    factors = _require_factors(run, proxy, beginning)
    inputs = {"factors": factors.fingerprint, "proxy": proxy.fingerprint, **beginning.inputs(), **training}
    if config.refine_steps:
        inputs["corpus"] = require(run.corpus, "pack_corpus").fingerprint
    artifact = run.open(run.query, VERB, inputs=inputs)
    if artifact.manifest:
        require_same(
            f"the table that {run.query} was made from",
            artifact.manifest.summary.get(ROWS, digest),
            f"what {' and '.join(source.path for source in sources)} holds now",
            digest,
            f"set another run_dir, or delete {run.query} and what was made from it",
        )
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    require_resources(run.config.cluster, VERB, config.resources)
    summary = _select(run)
    settings = QuerySettings(
        folder=run.query,
        proxy=run.proxy_source,
        proxy_fingerprint=proxy.fingerprint,
        tokenizer=run.tokenizer_source,
        module_names=proxy.module_names,
        beginning=beginning,
        options=config,
    )
    # Prompts that were edited since an interrupted run, or classified otherwise, make other queries.
    queries = file_digest(run.query / QUERIES)[:16]
    parts = [QueryPart(key=f"part-{i:04d}-{queries}", partition=i) for i in range(config.partitions)]
    pool = Pool(size=config.partitions, resources=config.resources)
    results = run_shards(
        VERB,
        parts,
        SumGradients,
        settings,
        folder=run.query,
        pool=pool,
        unit="partitions",
    )
    used = sum(result["queries"] for result in results.values())
    assert used == summary["positive"] + summary["negative"], (used, summary)
    norms, refinement = _direction(run, settings, factors, parts, queries)
    files = [run.query / DIRECTION, run.query / QUERIES]
    if config.nulls:
        summary["null_norm"] = run_task(build_nulls, settings, factors, run.config.seed, resources=config.resources)
        files.append(run.query / NULLS)
    summary |= _reliability(run, settings, factors)
    if config.held_out:
        summary["held_out"] = _held_out(run, settings)
        files.append(run.query / HELD_OUT)
    manifest = artifact.finish(
        files,
        rows={"queries": used, "modules": len(norms)},
        summary={**summary, **refinement, "direction_norm": norms, ROWS: digest},
        remove=(LEDGER, PARTIAL),
    )
    log(VERB, f"{summary['positive']} positive and {summary['negative']} negative queries -> {run.query / DIRECTION}")
    return manifest


def _direction(
    run: Run, settings: QuerySettings, factors: FactorsFolder, parts: list[QueryPart], queries: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Publish V; returns its norm per module, and what refinement did, for the manifest."""
    config = settings.options
    if not config.refine_steps:
        return run_task(precondition_parts, run.query, factors, parts, config, resources=config.resources), {}
    blocks = _corpus_blocks(run, config.refine_blocks or run.config.fit_factors.sample_blocks)
    state = run.query / PARTIAL / f"refinement-{queries}.safetensors"
    norms, steps = run_task(refine_parts, settings, factors, parts, blocks, state, resources=config.resources)
    residual, cosine = steps["residual"], steps["cosine"]
    log(VERB, f"refined in {len(cosine)} steps: residual {residual[-1]:.3g}, cosine with EK-FAC's V {cosine[-1]:.3f}")
    return norms, {"refinement": steps}


def _reliability(run: Run, settings: QuerySettings, factors: FactorsFolder) -> dict[str, Any]:
    """How far scores depend on which queries were drawn, for the manifest; empty where it is not measured."""
    config = settings.options
    if not config.reliability_queries:
        return {}
    if not (run.corpus / MANIFEST).exists():
        log(VERB, f"no corpus in {run.corpus}: the reliability of the queries is not measured")
        return {}
    blocks = _corpus_blocks(run, -(-RELIABILITY_TOKENS // run.config.pack_corpus.block_size))
    judged = run_task(judge_queries, settings, factors, blocks, run.config.seed, resources=config.resources)
    if judged is None:
        log(VERB, "a set of a single query has no halves: the reliability of the queries is not measured")
        return {}
    log(
        VERB,
        f"reliability of scores by these queries {judged.reliability:.2f}; by halves of {judged.positive:,} +"
        f" {judged.negative:,} of them, scores of {judged.tokens:,} tokens correlate with {judged.spearman:.2f}",
    )
    return {"reliability": round(judged.reliability, 4), "reliability_measured": asdict(judged)}


def _held_out(run: Run, settings: QuerySettings) -> dict[str, Any]:
    """How many queries V is not made of, and how well scores along it tell their sets apart, for the manifest."""
    kinds = [row.positive for row in read_queries(run.query, HELD_OUT)]
    auroc = run_task(judge_held_out, settings, resources=settings.options.resources)
    counts = {"positive": sum(kinds), "negative": len(kinds) - sum(kinds)}
    if auroc is None:
        log(VERB, f"held out {counts}: without either kind nothing is told apart")
        return counts
    log(
        VERB, f"scores along V tell {counts['positive']:,} + {counts['negative']:,} held-out queries apart: {auroc:.3f}"
    )
    return {**counts, "auroc": round(auroc, 4)}


def _corpus_blocks(run: Run, count: int) -> Path:
    """A table of `count` blocks of the corpus, or all of a smaller one, drawn by seed as those of the factors are."""
    corpus = read_manifest(run.corpus)
    blocks = min(count, corpus.rows["blocks"])
    path: Path = run.query / PARTIAL / f"blocks-{blocks}.parquet"
    arguments = PackedCorpus.of(run.corpus, corpus), corpus.rows["blocks"], blocks, run.config.seed, path
    run_task(draw_sample, *arguments, run.config.pretrain.document_attention, resources=ONE_CPU)
    return path


def _require_factors(run: Run, proxy: ProxyFacts, beginning: Beginning) -> FactorsFolder:
    """The factors to precondition with: an artifact, of this run or another, or a folder of kronfluence's."""
    named = run.config.build_query.factors
    folder = run.factors if named is None else location(named)
    if named is None or (folder / MANIFEST).exists():
        manifest = require(folder, "fit_factors")
        require_same(
            f"the proxy of {folder}",
            manifest.inputs["proxy"],
            f"the proxy {run.proxy_source.source}",
            proxy.fingerprint,
            "fit the factors of this proxy, or name the factors' own",
        )
        beginning.require_of(folder, manifest.inputs)
        names = {name: name for name in proxy.module_names}
        return FactorsFolder(folder=folder, fingerprint=manifest.fingerprint, names=names)
    fingerprint, names = run_task(check_proxy_factors, folder, run.proxy_source, proxy.module_names, resources=ONE_CPU)
    log(VERB, f"factors of {len(names)} modules from {folder}; it does not say of which weights they are")
    return FactorsFolder(folder=folder, fingerprint=fingerprint, names=names)


def _select(run: Run) -> dict[str, Any]:
    """Classify and choose the queries in a task; publishes them, and returns the counts for the manifest."""
    config = run.config.build_query
    sets = run_task(choose_queries, config, run.config.seed, resources=config.resources)
    if config.held_out:
        sets, held_out = sets.hold_out(config.held_out, run.config.seed, differential=config.differential)
        write_queries(run.query, _rows(held_out, negative=True), HELD_OUT)
    queries = _rows(sets, negative=config.differential)
    write_queries(run.query, queries)
    counts = {name: getattr(sets, name) for name in ("positive_rows", "negative_rows", "undecided", "unusable")}
    positive = len(sets.positive)
    summary = {"rows": sum(counts.values()), "positive": positive, "negative": len(queries) - positive, **counts}
    by = "tables of either set" if config.prompts is None else f"classified with {config.classifier.name}"
    log(VERB, f"{by}: {summary}")
    return summary


def _rows(sets: QuerySets, *, negative: bool) -> list[QueryRow]:
    used = [(True, sets.positive, sets.positive_scores, sets.positive_weights)]
    if negative:
        used.append((False, sets.negative, sets.negative_scores, sets.negative_weights))
    return [
        QueryRow(row=row.row, positive=kind, score=score, prompt=row.prompt, completion=row.continuation, weight=weight)
        for kind, chosen, scores, weights in used
        for row, score, weight in zip(chosen, scores, weights, strict=True)
    ]
