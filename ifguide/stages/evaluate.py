"""`evaluate`: continuations, perplexity and last-word accuracy of every model, their figures, and the report page.

Work is cut into (model, prompt set, shard) pieces over a pool of actors. Continuations are kept in `generations/`, an
artifact of their own, and with their scores in `report/continuations/`, so that another classifier needs no other
generation: delete `report/`, or name another folder with `evaluate.report`. `report/metrics.json` holds every figure
with its interval, and what differs between the models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ifguide.artifacts import MANIFEST, Manifest, read_manifest, write_json
from ifguide.config import Config, ConfigError, to_mapping
from ifguide.report.page import REPORT_FILES, write_report
from ifguide.stages.evaluation_figures import headline, measure, measured_files
from ifguide.stages.evaluation_prompts import PROMPTS, chosen_sets
from ifguide.stages.evaluation_worker import EvaluateModel
from ifguide.stages.generations import VERB, finish_generations, generation_pieces, open_generations
from ifguide.stages.report_data import report_data
from ifguide.stages.run import BASELINE, PENALISED, Run, connect
from ifguide.stages.shards import LEDGER, Pool, StageError, run_shards
from ifguide.telemetry import log

METRICS = "metrics.json"


def evaluate(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `generations/` and `report/`.

    Raises:
        ConfigError: no prompts, or a classifier that cannot score text. FileNotFoundError: no model, or a missing
            input. MismatchError: a folder was made with other options, models or prompts.
    """
    config = run.config.evaluate
    _check(config)
    if dry_run:
        assert config.prompts is not None
        log(
            VERB,
            f"would sample {config.continuations} x {config.max_new_tokens} tokens per prompt of"
            f" {', '.join([config.prompts.path, *config.prompt_sets])} and classify them with"
            f" {', '.join([config.classifier.name, *config.classifiers])}",
        )
        return None
    models = models_to_evaluate(run)
    sets = chosen_sets(run.config)
    inputs = {f"model/{name}": fingerprint for name, (_, fingerprint) in models.items()}
    for name, folder in (("mask", run.mask), ("scores", run.scores)):
        if (folder / MANIFEST).exists():
            inputs[name] = read_manifest(folder).fingerprint
    artifact = run.open(run.report, VERB, keys=("evaluate", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {run.report / 'index.html'}")
        return artifact.manifest
    _, metrics = measure_models(run, models, sets)
    write_json(run.report / METRICS, metrics)
    data, figures = report_data(run, list(models), metrics)
    for name, further in headline(metrics).items():
        figures[name] |= further
    write_report(data, run.report)
    files = [run.report / name for name in (*REPORT_FILES, METRICS)] + measured_files(run.report)
    prompts = sum(map(len, sets.values()))
    manifest = artifact.finish(
        files,
        rows={"continuations": prompts * config.continuations * len(models), "prompts": prompts},
        summary=figures,
        remove=(LEDGER,),
    )
    log(VERB, f"{len(models)} models on {manifest.rows['prompts']} prompts; report: {run.report / 'index.html'}")
    return manifest


def measure_models(
    run: Run,
    models: dict[str, tuple[str, str]],
    sets: Mapping[str, Sequence[Any]],
    guides: Mapping[str, Mapping[str, Any]] = {},
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Generate, classify and measure, in the folders `run.generations` and `run.report`: the pieces' results by key,
    and the figures of `evaluation_figures.measure`. `models`: name -> (source, fingerprint), the first is the base.
    `guides`: as in `continue_prompts`.

    Raises:
        StageError: a piece failed, or continuations are missing.
    """
    results = continue_prompts(run, models, sets, guides)
    metrics = measure(run, list(models), sets, np.array(results["prompt-groups"]["flagged"], dtype=bool))
    return results, metrics


def continue_prompts(
    run: Run,
    models: dict[str, tuple[str, str]],
    sets: Mapping[str, Sequence[Any]],
    guides: Mapping[str, Mapping[str, Any]] = {},
) -> dict[str, dict[str, Any]]:
    """The part of `measure_models` that is done by workers: the pieces' results by key.

    `guides`: model -> `reward` (folder), `beta` and `top_k` of reward-augmented decoding. Decoding changes neither
    perplexity nor last words, so of those models they are not measured.
    """
    config = run.config.evaluate
    sources = {name: source for name, (source, _) in models.items()}
    generations = open_generations(run, models, sets)
    pieces = generation_pieces(generations, sources, sets, prompts_per_shard=config.prompts_per_shard)
    connect(run.config)
    results = run_shards(
        VERB,
        _descriptors(run.config, pieces, list(models), guides),
        EvaluateModel,
        {
            "config": to_mapping(run.config),
            "models": sources,
            "folder": str(run.report),
            "generations": {name: str(run.generations(name)) for name in models},
            "guides": dict(guides),
        },
        folder=run.report,
        pool=Pool(
            size=config.actors,
            cpus=config.cpus_per_actor,
            gpus=config.gpus_per_actor,
            max_attempts=config.max_attempts,
        ),
        unit="pieces",
    )
    finish_generations(generations, sets, config.continuations)
    scored = sum(result.get("continuations", 0) for result in results.values())
    expected = sum(map(len, sets.values())) * config.continuations * len(models)
    if scored != expected:
        raise StageError(f"{VERB}: {scored} continuations where {expected} were asked for")
    return results


def _check(config: Any) -> None:
    if config.prompts is None:
        raise ConfigError("evaluate.prompts: name a JSONL or Parquet file in RealToxicityPrompts' schema")
    for key, source in {"classifier": config.classifier, **config.classifiers}.items():
        if source.name == "labels":
            where = key if key == "classifier" else f"classifiers.{key}"
            raise ConfigError(f"evaluate.{where}: labels cannot score new text; choose another classifier")


def models_to_evaluate(run: Run) -> dict[str, tuple[str, str]]:
    """name -> (source, fingerprint): the models this run has trained, then those of `evaluate.models`."""
    models = {}
    for name in (BASELINE, PENALISED):
        if (run.model(name) / MANIFEST).exists():
            models[name] = (str(run.model(name) / "hf"), read_manifest(run.model(name)).fingerprint)
    for name, source in run.config.evaluate.models.items():
        if name in models:
            raise ConfigError(f"evaluate.models.{name}: this run has a model of that name; choose another")
        models[name] = (source, hashlib.sha256(source.encode()).hexdigest())
    if not models:
        raise FileNotFoundError(f"{run.folder / 'model'} holds no finished model; run `ifguide pretrain` first")
    return models


def _descriptors(
    config: Config, pieces: list[dict[str, Any]], models: list[str], guides: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """All pieces of work, model by model, so that an actor seldom changes its model."""
    descriptors: list[dict[str, Any]] = []
    for model in models:
        if config.evaluate.heldout and model not in guides:
            descriptors.append({"key": f"{model}-heldout", "model": model, "kind": "heldout"})
        if config.evaluate.cloze and model not in guides:
            descriptors.append({"key": f"{model}-cloze", "model": model, "kind": "cloze"})
        for piece in pieces:
            if piece["model"] == model:
                key = f"{model}-{piece['number']:07d}"
                key = key if piece["set"] == PROMPTS else f"{key}-{piece['set']}"
                descriptors.append({"key": key, "kind": "prompts", **piece})
    descriptors.append({"key": "prompt-groups", "model": None, "kind": "groups"})
    return descriptors
