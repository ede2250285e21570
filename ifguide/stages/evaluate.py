"""`evaluate`: continuations, perplexity and last-word accuracy of every model, their figures, and the report page.

Work is cut into (model, prompt set, shard) pieces over a pool of actors. Continuations are kept in `generations/`, an
artifact of their own, and with their scores in `report/continuations/`, so that another classifier needs no other
generation: delete `report/`, or name another folder with `evaluate.report`. `report/metrics.json` holds every figure
with its interval, and what differs between the models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ifguide.artifacts import MANIFEST, Manifest, file_digest, json_digest, read_manifest, write_json
from ifguide.config import Config, ConfigError, Input, to_mapping
from ifguide.corpus.reading import HUB_PREFIX, list_chunks
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.evaluation.figures import headline, measure, measured_files
from ifguide.evaluation.generations import VERB, finish_generations, generation_pieces, open_generations
from ifguide.evaluation.prompts import PROMPTS, chosen_sets
from ifguide.evaluation.worker import EvaluateModel
from ifguide.report.data import report_data
from ifguide.report.page import REPORT_FILES, write_report
from ifguide.run import BASELINE, PENALISED, Run
from ifguide.storage import file_sizes, local_copy
from ifguide.telemetry import log
from ifguide.tokenizer import locate

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
    inputs = measured_inputs(run, models, sets)
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
    metrics = measure(run, list(models), sets, results["prompt-groups"])
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
    pieces = generation_pieces(generations, sources, sets, config)
    connect(run.config.cluster)
    require_resources(run.config.cluster, VERB, config.resources)
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
        pool=Pool(size=config.actors, resources=config.resources),
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
    """name -> (source, fingerprint) of the models this run has trained and those of `evaluate.models`.

    The first is what the others are compared with: the run's baseline, else what is given."""
    own = {
        name: (str(run.model(name) / "hf"), read_manifest(run.model(name)).fingerprint)
        for name in (BASELINE, PENALISED)
        if (run.model(name) / MANIFEST).exists()
    }
    given = {}
    for name, source in run.config.evaluate.models.items():
        if name in own:
            raise ConfigError(f"evaluate.models.{name}: this run has a model of that name; choose another")
        given[name] = (source, source_fingerprint(source))
    models = own | given if BASELINE in own else given | own
    if not models:
        raise FileNotFoundError(f"{run.folder / 'model'} holds no finished model; run `ifguide pretrain` first")
    return models


def source_fingerprint(source: str) -> str:
    """Of a model's files, if it is a local or remote one; of a hub id, the commit that it stands for now, and where
    neither the hub nor this machine's cache says that, its name.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    place, options = locate(source, None, False)
    path = Path(place)
    if "gguf_file" in options:
        return file_digest(path / options["gguf_file"])
    if path.is_dir():
        return json_digest({name: file_digest(path / name) for name in file_sizes(path) if not name.startswith(".")})
    try:
        return Path(hf_hub_download(source, "config.json")).parent.name  # its snapshot, as `from_pretrained` finds it
    except (OSError, ValueError) as error:
        log(VERB, f"{source} is told by its name, as its commit is not known: {error}", level=logging.WARNING)
        return json_digest(source)


def measured_inputs(
    run: Run, models: Mapping[str, tuple[str, str]], sets: Mapping[str, Sequence[Any]]
) -> dict[str, str]:
    """Digests of what the figures are measured of, by name: models, prompts, held-out and cloze texts."""
    config = run.config.evaluate
    texts = {f"heldout[{i}]": source for i, source in enumerate(config.heldout)}
    if config.cloze:
        texts["cloze"] = config.cloze
    return {
        **{f"model/{name}": fingerprint for name, (_, fingerprint) in models.items()},
        **{f"prompts/{name}": json_digest([vars(row) for row in rows]) for name, rows in sets.items()},
        **{name: _input_digest(source, f"evaluate.{name}") for name, source in texts.items()},
    }


def _input_digest(source: Input, dotted_key: str) -> str:
    """Of an input's files in order; a hub dataset is told by its name."""
    if source.path.startswith(HUB_PREFIX):
        return json_digest(source.path)
    chunks = list_chunks(source, 0, chunk_bytes=2**62, dotted_key=f"{dotted_key}.path")
    return json_digest([file_digest(local_copy(chunk.path)) for chunk in chunks])


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
