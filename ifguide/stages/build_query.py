"""`build_query`: two sets of prompts with completions -> the preconditioned direction V per tracked module.

Rows are classified in one task; gradients are summed over a fixed number of partitions, each a task, so that
the result does not depend on the number of workers; the sum is preconditioned with the EK-FAC factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import load_file, save_file

from ifguide.artifacts import MANIFEST, Manifest, file_digest, publish, require, require_same
from ifguide.config import ConfigError, to_mapping
from ifguide.distributed.session import require_resources
from ifguide.distributed.shards import LEDGER, Pool, run_shards
from ifguide.influence.query import load_factors, mean_completion_gradient, precondition, tokenise_query
from ifguide.influence.query_file import QUERIES, QueryRow, read_queries, write_queries
from ifguide.interchange import check_factors
from ifguide.run import Run
from ifguide.stages.proxy import ProxyFacts, describe_proxy, load_proxy
from ifguide.storage import local_copy, location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import make_classifier, read_prompt_rows, select_queries

VERB = "build_query"
DIRECTION = "direction.safetensors"
PARTIAL = "partial"


def build_query(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `query/`.

    Raises:
        ConfigError: no prompts. MismatchError: the factors are of another proxy. ValueError: an empty set, or
            factors that do not fit the proxy.
    """
    config = run.config.build_query
    if config.prompts is None:
        raise ConfigError("build_query.prompts: name a JSONL or Parquet file in RealToxicityPrompts' schema")
    if dry_run:
        log(
            VERB,
            f"would take up to {config.max_positive:,} + {config.max_negative:,} queries from {config.prompts.path},"
            f" classified by {config.classifier.name}",
        )
        return None
    read_prompt_rows(config.prompts, "build_query.prompts")
    if config.factors is None:
        require(run.factors, "fit_factors")
    proxy = describe_proxy(run, VERB)
    factors = _require_factors(run, proxy)
    inputs = {"factors": factors.fingerprint, "proxy": proxy.fingerprint}
    artifact = run.open(run.query, VERB, keys=("build_query", "tokenizer", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.summary}")
        return artifact.manifest
    require_resources(run.config.cluster, VERB, config.resources)
    summary = _select(run)
    pool = Pool(size=config.partitions, resources=config.resources)
    settings = {
        "folder": str(run.query),
        "proxy": to_mapping(run.proxy_source),
        "tokenizer": run.config.tokenizer_source,
        "module_names": list(proxy.module_names),
        "options": to_mapping(config),
        "gpus": config.resources.gpus,
    }
    # Prompts that were edited since an interrupted run, or classified otherwise, make other queries.
    queries = file_digest(run.query / QUERIES)[:16]
    descriptors = [{"key": f"part-{i:04d}-{queries}", "partition": i} for i in range(config.partitions)]
    results = run_shards(
        VERB,
        descriptors,
        SumGradients,
        settings,
        folder=run.query,
        pool=pool,
        unit="partitions",
    )
    used = sum(result["queries"] for result in results.values())
    assert used == summary["positive"] + summary["negative"], (used, summary)
    task = ray.remote(num_cpus=config.resources.cpus, num_gpus=config.resources.gpus)(_precondition)
    norms = ray.get(task.remote(str(run.query), factors, list(results), to_mapping(config)))
    files = [run.query / DIRECTION, run.query / QUERIES]
    manifest = artifact.finish(
        files,
        rows={"queries": used, "modules": len(norms)},
        summary={**summary, "direction_norm": norms},
        remove=(LEDGER, PARTIAL),
    )
    log(VERB, f"{summary['positive']} positive and {summary['negative']} negative queries -> {run.query / DIRECTION}")
    return manifest


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A folder of factors; `names`: module of the proxy -> its name in the files."""

    folder: Path
    fingerprint: str
    names: dict[str, str]


def _require_factors(run: Run, proxy: ProxyFacts) -> Factors:
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
        names = {name: name for name in proxy.module_names}
        return Factors(folder=folder, fingerprint=manifest.fingerprint, names=names)
    task = ray.remote(num_cpus=1)(_check_factors)
    fingerprint, names = ray.get(task.remote(str(folder), to_mapping(run.proxy_source), proxy.module_names))
    log(VERB, f"factors of {len(names)} modules from {folder}; it does not say of which weights they are")
    return Factors(folder=folder, fingerprint=fingerprint, names=names)


def _check_factors(folder: str, proxy: dict[str, Any], names: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    model = load_proxy(proxy, gpus=0)
    shapes = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear), name
        shapes[name] = (module.out_features, module.in_features + (module.bias is not None))
    return check_factors(local_copy(folder), shapes)


def _select(run: Run) -> dict[str, Any]:
    """Classify and choose the queries in a task; publishes them as JSONL, with their scores."""
    config = run.config.build_query
    task = ray.remote(num_cpus=config.resources.cpus, num_gpus=config.resources.gpus)(_select_rows)
    rows, summary = ray.get(task.remote(run.config))
    write_queries(run.query, rows)
    log(VERB, f"classified with {config.classifier.name}: {summary}")
    return summary


def _select_rows(config: Any) -> tuple[list[QueryRow], dict[str, Any]]:
    options = config.build_query
    rows = read_prompt_rows(options.prompts, "build_query.prompts")
    classifier = make_classifier(options.classifier, gpus=options.resources.gpus)
    sets = select_queries(
        rows,
        classifier,
        positive_threshold=options.positive_threshold,
        negative_threshold=options.negative_threshold,
        max_positive=options.max_positive,
        max_negative=options.max_negative,
        seed=config.seed,
    )
    used = [(True, sets.positive, sets.positive_scores)]
    if options.differential:
        used.append((False, sets.negative, sets.negative_scores))
    queries = [
        QueryRow(row=row.row, positive=positive, score=score, prompt=row.prompt, completion=row.continuation)
        for positive, chosen, scores in used
        for row, score in zip(chosen, scores, strict=True)
    ]
    counts = {name: getattr(sets, name) for name in ("positive_rows", "negative_rows", "undecided", "unusable")}
    negative = len(queries) - len(sets.positive)
    return queries, {"rows": len(rows), "positive": len(sets.positive), "negative": negative, **counts}


class SumGradients:
    """Worker: the weighted gradient sum of one partition of the queries."""

    def __init__(
        self,
        folder: str,
        proxy: dict[str, Any],
        tokenizer: str,
        module_names: list[str],
        options: dict[str, Any],
        gpus: float,
    ):
        self.folder, self.names, self.options = location(folder), module_names, options
        self.model = load_proxy(proxy, gpus=gpus)
        self.tokenizer = load_tokenizer(tokenizer)

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        rows = read_queries(self.folder)
        positive = sum(row.positive for row in rows)
        negative = len(rows) - positive
        weight = {True: 1 / positive, False: -1 / negative if negative else 0.0}
        mine = rows[descriptor["partition"] :: self.options["partitions"]]
        queries = [
            tokenise_query(self.tokenizer, row.prompt, row.completion, max_tokens=self.options["max_tokens"])
            for row in mine
        ]
        gradient = mean_completion_gradient(
            self.model,
            self.names,
            queries,
            [weight[row.positive] for row in mine],
            batch_tokens=self.options["batch_tokens"],
        )
        with publish(self.folder / PARTIAL / f"{descriptor['key']}.safetensors") as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in gradient.items()}, part)
        return {"queries": len(queries), "tokens": sum(len(query.token_ids) for query in queries)}


def _precondition(folder: str, factors: Factors, parts: list[str], options: dict[str, Any]) -> dict[str, float]:
    """Add the partial sums in order, precondition, publish V; returns the norm of V per module."""
    total: dict[str, torch.Tensor] = {}
    for key in parts:
        for name, tensor in load_file(local_copy(location(folder) / PARTIAL / f"{key}.safetensors")).items():
            total[name] = total[name] + tensor if name in total else tensor
    loaded = load_factors(local_copy(factors.folder), [factors.names[name] for name in total])
    direction = precondition(
        total,
        {name: loaded[factors.names[name]] for name in total},
        damping=options["damping"],
        damping_scale=options["damping_scale"],
    )
    with publish(location(folder) / DIRECTION) as part:
        save_file({name: tensor.contiguous() for name, tensor in sorted(direction.items())}, part)
    return {name: float(tensor.norm()) for name, tensor in direction.items()}
