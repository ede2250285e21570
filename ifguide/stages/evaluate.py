"""`evaluate`: continuations, perplexity and last-word accuracy of every model, their figures, and the report page.

Continuations are kept in `generations/`, an artifact of their own, and with their scores in `report/continuations/`, so
that another classifier needs no other generation: delete `report/`, or name another folder with `evaluate.report`.
`report/metrics.json` holds every figure with its interval, and what differs between the models. Of behaviours that were
scored and not trained with, `report/behaviours/` holds the rankings and masks that the page shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ifguide import schemas
from ifguide.artifacts import MANIFEST, Manifest, data_files, read_manifest, write_json
from ifguide.config import OWN, Config, ConfigError, Evaluate, to_yaml
from ifguide.config.resources import WorkerResources
from ifguide.distributed.shards import LEDGER
from ifguide.distributed.tasks import run_tasks
from ifguide.evaluation.figures import METRICS, headline, measured_files
from ifguide.evaluation.measuring import measure_models
from ifguide.evaluation.prompts import chosen_sets
from ifguide.evaluation.subjects import VERB, Evaluation, Model, Prompts, measured_inputs, models_to_evaluate
from ifguide.folders import GENERATIONS
from ifguide.report.data import ReportSources, Selected, report_data
from ifguide.report.page import REPORT_FILES, write_report
from ifguide.run import Run
from ifguide.selection.masks import VERB as MASKING
from ifguide.selection.masks import make_mask, shown_options
from ifguide.telemetry import log

COUNTING = WorkerResources(gpus=0.0)  # of a task that counts the tokens of one shard


def evaluate(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `generations/` and `report/`.

    Raises:
        ConfigError: no prompts, or a classifier that cannot score text. FileNotFoundError: no model, or a missing
            input. MismatchError: a folder was made with other options, models or prompts.
    """
    options = run.config.evaluate
    check_evaluation(options)
    if dry_run:
        assert options.prompts is not None
        log(
            VERB,
            f"would sample {options.continuations} x {options.max_new_tokens} tokens per prompt of"
            f" {', '.join([options.prompts.path, *options.prompt_sets])} and classify them with"
            f" {', '.join([options.classifier.name, *options.classifiers])}",
        )
        return None
    models = models_to_evaluate(run.models, options.models)
    sets = chosen_sets(options, run.config.seed)
    inputs = measured_inputs(models, sets, options)
    evaluation = evaluation_of(run, models, sets, digests=inputs)
    for name, folder in (("mask", run.mask), ("scores", run.scores)):
        if (folder / MANIFEST).exists():
            inputs[name] = read_manifest(folder).fingerprint
    artifact = run.open(run.report, VERB, inputs=inputs, extra=block_options(run.config))
    if artifact.manifest:
        log(VERB, f"complete: {run.report / 'index.html'}")
        return artifact.manifest
    metrics = measure_models(evaluation, run.config.cluster)
    write_json(run.report / METRICS, metrics)
    data, figures = report_data(
        _sources(run, evaluation),
        metrics,
        list(_behaviours(run)),
        run_tasks=run_tasks(COUNTING),
        run_classifier=run_tasks(options.resources),
    )
    for name, further in headline(metrics).items():
        figures[name] |= further
    write_report(data, run.report)
    files = [run.report / name for name in (*REPORT_FILES, METRICS)] + measured_files(run.report)
    rows = {
        "continuations": evaluation.num_continuations * len(models),
        "prompts": sum(map(len, evaluation.sets.values())),
    }
    manifest = artifact.finish(files, rows=rows, summary=figures, remove=(LEDGER,))
    log(VERB, f"{len(models)} models on {manifest.rows['prompts']} prompts; report: {run.report / 'index.html'}")
    return manifest


def check_evaluation(options: Evaluate) -> None:
    """Raises ConfigError, naming the key, where there are no prompts, or a classifier cannot score text."""
    if options.prompts is None:
        raise ConfigError("evaluate.prompts: name a JSONL or Parquet file in RealToxicityPrompts' schema")
    for key, source in {"classifier": options.classifier, **options.classifiers}.items():
        if source.name == "labels":
            where = key if key == "classifier" else f"classifiers.{key}"
            raise ConfigError(f"evaluate.{where}: labels cannot score new text; choose another classifier")


def block_options(config: Config) -> dict[str, Any]:
    """What held-out perplexity depends on beside `evaluate`: how long the blocks are."""
    return {"pack_corpus": {"block_size": config.pack_corpus.block_size}} if config.evaluate.heldout else {}


def evaluation_of(run: Run, models: Mapping[str, Model], sets: Mapping[str, Prompts], **changes: Any) -> Evaluation:
    """The evaluation of models in a run's folders, as its config says."""
    evaluation = Evaluation(
        options=run.config.evaluate,
        seed=run.config.seed,
        block_size=run.config.pack_corpus.block_size,
        models=models,
        sets=sets,
        report=run.report,
        generations={name: run.generations(name) for name in models},
        config_yaml=to_yaml(run.config),
    )
    return replace(evaluation, **changes)


def _sources(run: Run, evaluation: Evaluation) -> ReportSources:
    continuations = {
        f"{GENERATIONS}/{model}/{name}": folder / name
        for model, folder in evaluation.generations.items()
        for name in evaluation.sets
    }
    return ReportSources(
        title=f"IF-Guide report: {run.folder.name}",
        options=run.config.evaluate,
        seed=run.config.seed,
        config_yaml=evaluation.config_yaml,
        artifacts=run.artifact_folders() | continuations,
        trained={name: run.model(name) for name in evaluation.models},
    )


def _behaviours(run: Run) -> Iterator[Selected]:
    """Every behaviour that the scores hold, the mask's first; the masks of the others are made here.

    They are made by the same options, but by scores where z-scores are wanted and there are no nulls. Nothing is
    trained with them.
    """
    if not (run.mask / MANIFEST).exists():
        return
    trained, own = run.config.build_mask.behaviour, run.config.evaluate.behaviour
    sources = (run.scores, run.ensemble) if run.config.build_mask.others else (run.scores,)
    tables = [data_files(folder) for folder in sources]
    files = tables[-1] if all(tables) else []  # none where somebody has removed them after build_mask
    columns = schemas.read_schema(files[0]) if files else pa.schema([])
    scored = schemas.scored_behaviours(columns)
    names = dict(zip(scored, scored, strict=True)) | {OWN: f"{own} (own query)" if own in scored else own}
    yield Selected(name=names.get(trained, trained), trained=True, folders=run.selection)
    if read_manifest(run.mask).verb != MASKING:
        return  # an imported mask follows no scores
    for behaviour in scored:
        if behaviour != trained:
            options = shown_options(run.config.build_mask, behaviour, columns)
            plain = options != replace(run.config.build_mask, behaviour=behaviour)
            if plain:
                log(VERB, f"{behaviour}: no null scores, so the mask that the page shows goes by scores, not z-scores")
            folders = run.behaviour(behaviour)
            config = replace(run.config, run_dir=str(folders.mask.parent), build_mask=options)
            make_mask(options, folders, config_yaml=to_yaml(config), run_tasks=run_tasks(options.resources))
            yield Selected(name=names[behaviour], trained=False, plain=plain, folders=folders)
