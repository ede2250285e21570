"""Each stage of a config on given machines: its FLOP, seconds, storage and memory, as `job.StageEstimate`.

FLOP come from the shapes of proxy and target (`ifguide.shapes`, `flops`). Packing and selection compute nothing to
speak of: they take a measured time per token and core. Memory is an upper bound by intent: weights, optimizer, what
grows with the batch.

It does not know of networks, queues for machines or failures (`bench.common.simulation` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ifguide.influence.head_derivatives import CHUNK_VALUES
from ifguide.influence.memory import USABLE, estimate_memory
from ifguide.influence.method import chosen_method
from ifguide.influence.smoothing import smoothing_layers
from ifguide.planning import flops
from ifguide.planning.job import Job, Pass, StageEstimate, by_core, computed, rows, set_rows
from ifguide.planning.measurements import efficiency, rates
from ifguide.planning.training_memory import checkpoint_bytes, training_memory
from ifguide.shapes import ModelShape, model_shape
from ifguide.student.encoder import encoder_source
from ifguide.student.sampling import audit_share
from ifguide.training.adapters import adapter_parameters

QUERY_TOKENS, PROMPT_TOKENS = 64, 16


def estimate(job: Job) -> list[StageEstimate]:
    """Every stage in the order of the pipeline."""
    return [
        _pack_corpus(job),
        _fit_factors(job),
        _build_query(job),
        *([_fit_student(job)] if job.config.score_corpus.uses_student else []),
        _score_corpus(job),
        _build_mask(job),
        pretrain_estimate(job, models=2 if job.config.baseline else 1),
        _evaluate(job),
    ]


def scoring_rates(job: Job) -> tuple[float, float, float]:
    """Tokens a second of one scoring actor: expected, low, high."""
    config, method = job.config.score_corpus, chosen_method(job.config.score_corpus)
    device = job.device(config.resources.gpus)
    efficient = efficiency("score", device, method.precision, job.proxy.tracked)
    peak = device.peak(method.precision) * (config.resources.gpus or config.resources.cpus)
    per_token = _scoring_flop(job)
    expected, low, high = (peak * value / per_token for value in (efficient.expected, efficient.low, efficient.high))
    return expected, low, high


def _scoring_flop(job: Job) -> float:
    config = job.config.score_corpus
    return flops.scoring(
        job.proxy,
        job.block,
        attribution=config.attribution,
        method=chosen_method(job.config.score_corpus),
        behaviours=1 + len(config.queries),
    )


def _pack_corpus(job: Job) -> StageEstimate:
    chunks = 4 * job.config.pack_corpus.chunk_megabytes * 1e6
    seconds, storage = 1 / rates()["tokenise"].value, rates()["corpus_bytes"].value
    return by_core(
        job, "pack_corpus", seconds, storage, memory=chunks + _shard(job), basis=("tokenise", "corpus_bytes")
    )


def _build_mask(job: Job) -> StageEstimate:
    seconds, storage = rates()["select"].value, rates()["mask_bytes"].value
    return by_core(job, "build_mask", seconds, storage, memory=_shard(job), basis=("select", "mask_bytes"))


def _shard(job: Job) -> float:
    """Bytes of what a worker holds of one shard."""
    return 12.0 * job.config.pack_corpus.blocks_per_shard * job.block


def _fit_factors(job: Job) -> StageEstimate:
    config, proxy = job.config.fit_factors, job.proxy
    tokens = min(job.tokens, config.sample_blocks * job.block)
    covariances, weights = _sums(proxy.linears)
    parts = np.array_split(np.array(proxy.linears), config.module_partitions)
    held = max(max(_sums(part.tolist())) for part in parts)
    largest = max(out * inner for out, inner in proxy.linears)
    batch = config.batch_size * job.block
    activations = 4.0 * batch * (3 * proxy.vocabulary + 8 * proxy.layers * proxy.hidden)
    again = 2 * (config.module_partitions - 1) * flops.traced(proxy, job.block)
    flop = tokens * (flops.covariance(proxy, job.block) + flops.lambda_(proxy, job.block) + again)
    device = job.device(config.resources.gpus)
    eigen = flops.eigendecomposition(proxy)
    if device.device == "gpu":
        eigen_seconds, name = eigen / (rates()["eigen_gpu"].value * device.float64), "eigen_gpu"
    else:
        eigen_seconds, name = eigen / (rates()["eigen"].value * config.resources.cpus), "eigen"
    return computed(
        job,
        "fit_factors",
        Pass("factors", flop, "float32", proxy.tracked),
        workers=config.data_partitions * config.module_partitions,
        resources=config.resources,
        memory=4.0 * proxy.parameters + held + 8.0 * config.batch_size * largest + activations,
        storage=covariances + weights,
        serial=(eigen_seconds, eigen / device.float64, name),
    )


def _sums(linears: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Bytes of the covariances and of the lambdas of maps of so many outputs and inputs."""
    return 4.0 * sum(out**2 + inner**2 for out, inner in linears), 4.0 * sum(out * inner for out, inner in linears)


def _build_query(job: Job) -> StageEstimate:
    config, proxy = job.config.build_query, job.proxy
    named = {"pairs": config.pairs, "positive": config.positive, "negative": config.negative}
    given: list[tuple[str, Any]] = [(name, source) for name, source in named.items() if source]
    given = given or [("prompts", config.prompts)]
    candidates = sum(rows(job, source, f"build_query.{name}") * (1 + (name == "pairs")) for name, source in given)
    queries = min(candidates, config.max_positive + config.max_negative)
    judged = min(queries, 2 * config.reliability_queries)
    passes = queries * (2 if config.nulls else 1) + judged
    solves = 1 + config.nulls + (2 if judged else 0) + config.refine_steps
    refined = min(job.tokens, (config.refine_blocks or job.config.fit_factors.sample_blocks) * job.block)
    flop = (
        passes * QUERY_TOKENS * flops.query_gradient(proxy, QUERY_TOKENS)
        + solves * flops.preconditioning(proxy)
        + config.refine_steps * refined * flops.gauss_newton(proxy, job.block)
    )
    weights = 4.0 * sum(out * inner for out, inner in proxy.linears)
    kind = "cuda" if job.device(config.resources.gpus).device == "gpu" else "cpu"
    logits = min(config.batch_tokens * proxy.vocabulary, max(CHUNK_VALUES[kind], proxy.vocabulary))
    activations = 4.0 * (3 * logits + config.batch_tokens * 16 * proxy.layers * proxy.hidden)
    held = 8 if config.refine_steps else 2 + config.nulls
    return computed(
        job,
        "build_query",
        Pass("train", flop, "float32", proxy.tracked),
        workers=config.partitions,
        resources=config.resources,
        memory=4.0 * proxy.parameters + held * weights + activations,
        storage=(1 + config.nulls) * weights,
        notes=(
            f"{queries:,} queries of {QUERY_TOKENS} tokens assumed"
            + (f"; classifying {candidates:,} rows is not counted" if given[0][0] == "prompts" else ""),
        ),
    )


def _fit_student(job: Job) -> StageEstimate:
    config, proxy = job.config.fit_student, job.proxy
    sample = math.ceil(job.tokens * config.sample_fraction)
    width = float(len(smoothing_layers(proxy.layers)) * proxy.hidden) if config.kind == "head" else 0.0
    flop = sample * (_scoring_flop(job) + (_student_flop(job) if config.kind == "suffix" else 0.0))
    besides = {"head": _head_sums, "encoder": _encoder_training}.get(config.kind)
    return computed(
        job,
        "fit_student",
        Pass("score", flop, chosen_method(job.config.score_corpus).precision, proxy.tracked),
        workers=config.partitions,
        resources=job.config.score_corpus.resources,
        memory=8.0 * proxy.parameters + 6 * 8.0 * width**2 + _shard(job),
        storage=config.partitions * 16.0 * width**2 + (9.0 * sample if config.kind == "encoder" else 0.0) + 64e6,
        serial=besides(job, sample) if besides else None,
        notes=(f"{sample:,} tokens are scored exactly",),
    )


def _head_sums(job: Job, sample: float) -> tuple[float, float, str]:
    """Seconds of the sums in float64 that a `head` is fitted on, at best, and what the former rest on."""
    resources = job.config.score_corpus.resources
    units = job.at_once(job.config.fit_student.partitions, resources) * (resources.gpus or resources.cpus)
    least = sample * flops.head_sums(job.proxy) / (units * job.device(resources.gpus).float64)
    return least / rates()["head_sums"].value, least, "head_sums"


def _encoder_shape(job: Job) -> ModelShape:
    source = encoder_source(job.config.fit_student.encoder, job.proxy.vocabulary, job.block)
    return model_shape(source, "fit_student.encoder.source", traced=False)


def _encoder_training(job: Job, sample: float) -> tuple[float, float, str]:
    """Seconds of all epochs on one worker, at best, and what the former rest on."""
    config, scoring = job.config.fit_student, job.config.score_corpus
    shape, device = _encoder_shape(job), job.device(scoring.resources.gpus)
    precision = chosen_method(scoring).precision if device.device == "gpu" else "float32"
    epochs = 3.0 * (1 - config.held_out) + config.held_out  # a backward pass takes two; what is held out has none
    flop = config.encoder.epochs * sample * epochs * flops.encoder_student(shape, job.block)
    efficient = efficiency("train", device, precision, shape.tracked)
    least = flop / ((scoring.resources.gpus or scoring.resources.cpus) * device.peak(precision))
    return least / efficient.expected, least, efficient.basis[0]


def _student_flop(job: Job) -> float:
    """FLOP a token of a student's pass."""
    kind = job.config.fit_student.kind
    if kind == "head":
        return flops.head_student(job.proxy, job.block)
    if kind == "suffix":
        return flops.suffix_student(job.proxy, job.block, method=chosen_method(job.config.score_corpus))
    return flops.encoder_student(_encoder_shape(job), job.block) if kind == "encoder" else 0.0


def _student_pass(job: Job) -> tuple[float, float, tuple[float, float, str] | None]:
    """Of a scorer that is not `exact`: FLOP a token, the share of the tokens that is scored exactly besides, and the
    time of what is no FLOP."""
    config, kind = job.config.score_corpus, job.config.fit_student.kind
    exact = audit_share(config.audit_fraction, math.ceil(job.tokens / job.block)) + (
        config.recheck_fraction if config.scorer == "cascade" else 0.0
    )
    if kind != "ngram":
        return _student_flop(job), exact, None
    actors = job.at_once(config.max_actors, config.resources)  # each looks up on one core
    seconds = job.tokens / (rates()["lookup"].value * actors)
    return 0.0, exact, (seconds, seconds, "lookup")


def _score_corpus(job: Job) -> StageEstimate:
    config, proxy, method = job.config.score_corpus, job.proxy, chosen_method(job.config.score_corpus)
    device = job.device(config.resources.gpus)
    behaviours = 1 + len(config.queries)
    memory = estimate_memory(
        proxy.skeleton,
        list(proxy.module_names),
        engine="backward" if config.attribution == "position" else method.engine,
        precision=method.precision,
        rank=method.rank,
        behaviours=behaviours,
        block_size=job.block,
    )
    blocks = config.micro_batch_blocks or max(1, (65_536 if device.device == "gpu" else 2048) // job.block)
    if config.micro_batch_blocks is None and device.memory:
        blocks = max(1, min(blocks, int(USABLE * device.memory - memory.fixed) // memory.per_block))
    shard_tokens = job.config.pack_corpus.blocks_per_shard * job.block
    shards = math.ceil(job.tokens / shard_tokens)
    rounds = math.ceil(shards / config.max_actors)
    stretch = min(rounds * shard_tokens, job.tokens) * config.max_actors / job.tokens
    sample = min(config.smooth.tokens, job.tokens) if config.smooth and not config.uses_student else 0
    flop, serial, notes = job.tokens * _scoring_flop(job), None, []
    if config.uses_student:
        by_student, exact, serial = _student_pass(job)
        flop = job.tokens * (by_student + exact * _scoring_flop(job))
        notes.append(
            f"{config.scorer} of kind {job.config.fit_student.kind}: {by_student:.3g} FLOP a token, and {exact:.1%} of"
            f" the tokens exactly at {_scoring_flop(job):.3g}"
        )
    if stretch > 1.1:
        notes.append(
            f"{shards:,} shards for {config.max_actors:,} actors leave some idle at the end ({stretch:.2f}x): lower"
            " pack_corpus.blocks_per_shard"
        )
    return computed(
        job,
        "score_corpus",
        Pass("score", flop, method.precision, proxy.tracked),
        workers=config.max_actors,
        resources=config.resources,
        memory=float(memory.fixed + blocks * memory.per_block),
        storage=job.tokens
        * rates()["score_bytes"].value
        * behaviours
        * (2 if config.smooth or config.uses_student else 1)
        + 4.0 * sample * len(smoothing_layers(proxy.layers)) * proxy.hidden,
        serial=serial,
        stretch=max(1.0, stretch),
        notes=tuple(notes),
    )


def pretrain_estimate(job: Job, *, models: int) -> StageEstimate:
    """Training of one model, or of two: the penalised one and the baseline."""
    config, target = job.config.pretrain, job.target
    adapters = None if config.lora is None else adapter_parameters(target.skeleton, config.lora)
    per_token = target.training_flop(job.block, recomputed=config.activation_checkpointing, adapters=adapters)
    kept = config.keep_last + (config.keep_best if config.heldout_blocks else 0)
    checkpoints = (models * kept + 1) * checkpoint_bytes(config, target)  # a new one is whole before an old one goes
    host = job.tokens * 5.0
    return computed(
        job,
        "pretrain",
        Pass("train", models * config.epochs * job.tokens * per_token, config.dtype, target.tracked),
        workers=config.workers,
        resources=config.resources,
        memory=training_memory(config, target, job.block).total,
        storage=4.0 * models * target.parameters + checkpoints,
        repeats=models,
        notes=(
            f"{models} models of {config.epochs:g} epochs; while one trains, its workers map flat files of the corpus"
            f" and its mask: {host / 1e9:,.1f} GB more of disk",
        ),
    )


def _evaluate(job: Job) -> StageEstimate:
    config, target = job.config.evaluate, job.target
    models = (2 if job.config.baseline else 1) + len(config.models)
    prompts = rows(job, config.prompts, "evaluate.prompts")
    if config.max_prompts is not None:
        prompts = min(prompts, config.max_prompts)
    prompts += sum(set_rows(job, source, f"evaluate.prompt_sets.{name}") for name, source in config.prompt_sets.items())
    length = PROMPT_TOKENS + config.max_new_tokens
    continuations = models * prompts * config.continuations
    batch = config.batch_size * config.continuations * length
    cache = 8.0 * batch * target.layers * target.attention_width + 8.0 * batch / length * target.vocabulary
    scored = 8.0 * config.batch_size * job.block * target.vocabulary if config.heldout or config.annotated else 0.0
    return computed(
        job,
        "evaluate",
        Pass("generate", continuations * length * target.forward_flop(length), "float32", target.tracked),
        workers=config.actors,
        resources=config.resources,
        memory=4.0 * target.parameters + max(cache, scored),
        storage=continuations * rates()["continuation_bytes"].value,
        notes=(f"{continuations:,} continuations of {models} models; a large classifier's own time is not counted",),
    )
