"""The pieces of an evaluation over a pool of actors, and the figures of what they made.

Work is cut into (model, prompt set, shard) pieces. Continuations are kept in artifacts of their own, and with their
scores in the report's folder, so that another classifier needs no other generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ifguide.config import Cluster
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import Pool, StageError, run_shards
from ifguide.evaluation.figures import measure
from ifguide.evaluation.generations import GenerationShard, finish_generations, generation_shards, open_generations
from ifguide.evaluation.subjects import VERB, Evaluation
from ifguide.evaluation.worker import EvaluateModel, Fluency, Harness, Piece, PromptGroups, WorkerSettings


def measure_models(evaluation: Evaluation, cluster: Cluster) -> dict[str, Any]:
    """Generate, classify and measure: the figures of `figures.measure`.

    Raises:
        StageError: a piece failed, or continuations are missing.
    """
    results = continue_prompts(evaluation, cluster)
    metrics = measure(evaluation, results[PromptGroups().key])
    for model, figures in metrics["models"].items():
        if (benchmarks := results.get(Harness(model=model).key)) is not None:
            figures["lm_eval"] = benchmarks
    return metrics


def continue_prompts(evaluation: Evaluation, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The part of `measure_models` that is done by workers: the pieces' results by key.

    Raises:
        StageError: a piece failed, or continuations are missing.
    """
    options = evaluation.options
    generations = open_generations(evaluation)
    pieces = list(_pieces(evaluation, generation_shards(evaluation, generations)))
    connect(cluster)
    require_resources(cluster, VERB, options.resources)
    settings = WorkerSettings(
        options=options,
        seed=evaluation.seed,
        block_size=evaluation.block_size,
        sources={name: model.source for name, model in evaluation.models.items()},
        report=evaluation.report,
        generations=dict(evaluation.generations),
        guides=dict(evaluation.guides),
        digests=dict(evaluation.digests),
    )
    pool = Pool(size=options.actors, resources=options.resources)
    results = run_shards(VERB, pieces, EvaluateModel, settings, folder=evaluation.report, pool=pool, unit="pieces")
    finish_generations(evaluation, generations)
    scored = sum(result.get("continuations", 0) for result in results.values())
    expected = evaluation.num_continuations * len(evaluation.models)
    if scored != expected:
        raise StageError(f"{VERB}: {scored} continuations where {expected} were asked for")
    return results


def _pieces(evaluation: Evaluation, shards: Sequence[GenerationShard]) -> Iterator[Piece]:
    """All pieces of work, model by model, so that an actor seldom changes its model.

    Of guided models nothing is measured on given texts, nor by benchmarks: both are of a model's own probabilities, and
    decoding does not change those."""
    for model in evaluation.models:
        if model not in evaluation.guides:
            if evaluation.options.heldout:
                yield Fluency(model=model, kind="heldout")
            if evaluation.options.annotated:
                yield Fluency(model=model, kind="annotated")
            if evaluation.options.cloze:
                yield Fluency(model=model, kind="cloze")
            if evaluation.options.lm_eval:
                yield Harness(model=model)
        yield from (shard for shard in shards if shard.model == model)
    yield PromptGroups()
