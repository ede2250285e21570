"""`compare`: the run's models beside those of other methods: other masks, DPO, reward-augmented decoding.

A method with a mask gets a run directory of its own in `compare/<name>`, for the method's mask and model; the rest is
this run's. It is trained as this run's models were: the same blocks in the same order, the same initial weights.
`compare.trainings` of them are trained at once. DPO and RAD learn from scored continuations in `compare/samples`; RAD's
reward model is `compare/reward`, a DPO method's model `compare/<name>/model/dpo`. `compare/report/` holds the figures
of all models, with the run's own first, as `comparison.md`, `comparison.json`, `comparison.png`, `metrics.json` and as
a page, `index.html`. Continuations that `evaluate` has sampled from the run's own models are not sampled again. Running
it again resumes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ifguide import interrupts
from ifguide.artifacts import (
    MANIFEST,
    Manifest,
    MismatchError,
    json_digest,
    made_from,
    publish,
    read_manifest,
    require,
    write_json,
)
from ifguide.config import ConfigError, Pretrain, to_yaml
from ifguide.config.compare import SCORED, Dpo, Method, Rad
from ifguide.config.methods import check_method
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER
from ifguide.evaluation.figures import METRICS, measured_files
from ifguide.evaluation.generations import has_generations
from ifguide.evaluation.measuring import measure_models
from ifguide.evaluation.prompts import chosen_sets
from ifguide.evaluation.reward_decoding import Guidance
from ifguide.evaluation.subjects import OF_MODEL, Model, measured_inputs, models_to_evaluate
from ifguide.folders import BASELINE, CORPUS, EXPORT, GENERATIONS, MASK, PENALISED, QUERY, RANKING, REPORT, SCORES
from ifguide.methods.preferences import DPO, DpoTraining, RewardTraining
from ifguide.methods.sampling import drawn_prompts
from ifguide.models import source_fingerprint
from ifguide.report.comparison import as_json, as_markdown, draw, rows_of
from ifguide.report.data import ReportSources, comparison_data
from ifguide.report.figures import Made, masked_loss, model_rows
from ifguide.report.page import REPORT_FILES, write_report
from ifguide.run import Run
from ifguide.stages.evaluate import block_options, check_evaluation, evaluation_of
from ifguide.stages.method_masks import VERB, method_mask
from ifguide.stages.method_samples import BaselineSamples
from ifguide.stages.pretrain import pretrain, training_data
from ifguide.telemetry import log


def compare(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `compare/`, for a run that has its mask and its models.

    Raises:
        ConfigError: no methods, one that this run cannot have, no plain model, no prompts to evaluate or learn from.
        FileNotFoundError: the run is not finished. MismatchError: `compare/report` is of other models.
    """
    methods = run.config.compare.methods
    if not methods:
        raise ConfigError("compare.methods: name some, `name: {mask: ..., penalty: ...}`; see configs/demo.yaml")
    absent = run.absent
    for name in methods:
        check_method(run.config, name, absent)
    run.require_plain_model()
    check_evaluation(run.config.evaluate)
    if dry_run:
        for name, method in methods.items():
            log(VERB, f"would {'sample with' if method.rad else 'train'} {name}: {_describe(run, method)}")
        return None
    if any(method.mask is None for method in methods.values()):
        drawn_prompts(run.config)  # refused here, before anything is trained
    require(run.model(BASELINE), "pretrain --set pretrain.use_mask=false")
    grid = _Grid(run)
    _require_report_of(run.comparison / REPORT, [*grid.own, *methods])
    masked = {name: method for name, method in methods.items() if method.mask is not None}
    for number, (name, method) in enumerate(masked.items(), start=1):
        log(VERB, f"mask {number}/{len(masked)}: {name}: {_describe(run, method)}")
        grid.add_mask(name, method)
    grid.train()
    for name, method in methods.items():
        if name not in masked:
            log(VERB, f"{name}: {_describe(run, method)}")
            grid.add_preference(name, method)
    return _measure(run, grid)


def _require_report_of(folder: Path, models: Sequence[str]) -> None:
    """Refuse a report of other models before any is trained."""
    if not (inputs := made_from(folder)["inputs"]):
        return
    reported = [name.removeprefix(OF_MODEL) for name in inputs if name.startswith(OF_MODEL)]
    new, gone = sorted(set(models) - set(reported)), sorted(set(reported) - set(models))
    if new or gone:
        parts = [f"{what} {', '.join(names)}" for what, names in (("lacks", new), ("has also", gone)) if names]
        raise MismatchError(
            f"{folder} {' and '.join(parts)}: delete it, and compare again; trained models and continuations stay"
        )


class _Grid:
    """The models of a comparison, the run's own first, and how each was made."""

    def __init__(self, run: Run):
        self.run = run
        self.models = models_to_evaluate(run.models, run.config.evaluate.models)
        self.own = tuple(self.models)
        self.made = {name: _own(run, name) for name in (BASELINE, PENALISED) if name in self.models}
        self.guides: dict[str, Guidance] = {}
        self.children: dict[str, Run] = {}
        self.masks: dict[tuple[str | float | None, ...], Run] = {}  # what made a mask first
        self.scored: dict[str, Run] = {}  # what scored the corpus by a kind of mask first
        self.samples: BaselineSamples | None = None

    def add_mask(self, name: str, method: Method) -> None:
        """Make the method's mask, for `train`."""
        child, kind = method_run(self.run, name, method), method.mask_options()
        if kind in self.masks:  # another loss on the same mask
            child = child.borrow(self.masks[kind], QUERY, SCORES, RANKING, MASK)
        elif method.mask in self.scored:  # another selection of the same scores
            child = child.borrow(self.scored[method.mask], SCORES)
        mask = method_mask(self.run, child, method)
        _, trained = training_data(child)  # in the target's tokens: models that share it may be trained side by side
        self.masks.setdefault(kind, child)
        if method.mask in SCORED:
            self.scored.setdefault(method.mask, child)
        self.children[name] = child
        by, shared = method.describe(), mask.summary.get("tokens_shared")
        if shared is not None:
            by += f", {shared / max(mask.rows['tokens'], 1):.0%} of them in the run's own mask"
        self.made[name] = _trained(child, trained or mask, by)
        log(VERB, f"{name}: {mask.summary['tokens_masked']:,} tokens masked ({_share(mask):.2%})")

    def train(self) -> None:
        """Train the models of all masks."""
        config = self.run.config
        train, at_once = config.pretrain, min(config.compare.trainings, len(self.children))
        if at_once > 1:  # what one of them takes, `pretrain` asks for
            connect(config.cluster)
            workers = train.workers * at_once
            require_resources(config.cluster, "pretrain", train.resources, workers, number="compare.trainings")
        trainings = {name: partial(pretrain, child, name=name) for name, child in self.children.items()}
        _side_by_side(trainings, at_once=at_once)
        for name, child in self.children.items():
            folder = child.model(PENALISED)
            self.models[name] = _model(folder / EXPORT, read_manifest(folder))

    def add_preference(self, name: str, method: Method) -> None:
        """Train the method's model by preference, or say how it decodes another's."""
        if method.dpo:
            self._add_dpo(name, method.dpo, method_run(self.run, name, method).model(DPO))
        elif method.rad:
            self._add_rad(name, method.rad)

    def _add_dpo(self, name: str, method: Dpo, folder: Path) -> None:
        start, samples = self._start(name, "dpo", method.model), self._samples()
        training = DpoTraining(
            name=name,
            start=start[0],
            samples=samples.files,
            options=method,
            seed=self.run.config.seed,
            folder=folder,
            resources=self.run.config.compare.resources,
        )
        options, inputs = {"dpo": result_part(method)}, {f"{OF_MODEL}{method.model}": start[1]}
        manifest = samples.teach(training, options, inputs, count="pairs")
        self.models[name] = _model(folder / EXPORT, manifest)
        self.made[name] = replace(self.made[method.model], by=f"DPO of {method.model}")

    def _add_rad(self, name: str, method: Rad) -> None:
        start = self._start(name, "rad", method.model)
        folder, reward = self._reward_model()
        decoding = [start[1], reward.fingerprint, method.beta, method.top_k, "nucleus first"]
        self.models[name] = Model(start[0], json_digest(decoding))
        self.guides[name] = Guidance(reward=str(folder), beta=method.beta, top_k=method.top_k)
        self.made[name] = replace(self.made[method.model], by=f"RAD of {method.model}", decodes=method.model)

    def _reward_model(self) -> tuple[Path, Manifest]:
        baseline, samples = self.models[BASELINE], self._samples()
        folder, config = self.run.comparison / "reward", self.run.config
        training = RewardTraining(
            baseline=baseline[0],
            samples=samples.files,
            options=config.compare.reward,
            seed=config.seed,
            folder=folder,
            resources=config.compare.resources,
        )
        options, inputs = {"reward": result_part(config.compare.reward)}, {f"{OF_MODEL}{BASELINE}": baseline[1]}
        if config.compare.reward.source is not None:
            inputs["reward.source"] = source_fingerprint(config.compare.reward.source)
        manifest = samples.teach(training, options, inputs, count="texts")
        return folder / EXPORT, manifest

    def _samples(self) -> BaselineSamples:
        if self.samples is None:
            self.samples = BaselineSamples(self.run, self.models[BASELINE])
        return self.samples

    def _start(self, name: str, kind: str, model: str) -> Model:
        if model not in self.models:
            raise ConfigError(f"compare.methods.{name}.{kind}.model: this run has no finished model {model}")
        return self.models[model]


def _side_by_side(trainings: Mapping[str, Callable[[], object]], *, at_once: int) -> None:
    """Train in threads, so many at once; one after the other in this one. Where one fails, or a signal comes, no other
    is begun; those that train are finished, or saved as the signal asks, and then the first error is raised."""
    if at_once <= 1:
        for training in trainings.values():
            training()
        return
    failed = threading.Event()

    def train(name: str) -> None:
        if failed.is_set() or interrupts.requested():
            return
        try:
            trainings[name]()
        except BaseException as error:
            failed.set()
            if not interrupts.requested():
                log(VERB, f"{name} failed: {error}; what trains beside it is finished first", level=logging.ERROR)
            raise

    with interrupts.deferring(), ThreadPoolExecutor(at_once, "training") as pool:
        ended = [pool.submit(train, name) for name in trainings]
    for future in ended:
        future.result()


def _model(folder: Path, manifest: Manifest) -> Model:
    return Model(str(folder), manifest.fingerprint)


def _describe(run: Run, method: Method) -> str:
    if method.mask is None:
        return method.describe()
    training = _training(run, method)
    return f"{method.describe()}, {masked_loss(training.objective.kind, training.penalty)}"


def _training(run: Run, method: Method) -> Pretrain:
    """The run's training, with the method's own loss of masked tokens."""
    own = run.config.pretrain
    return replace(
        own,
        use_mask=True,
        objective=replace(own.objective, kind=method.objective or own.objective.kind),
        penalty=own.penalty if method.penalty is None else method.penalty,
    )


def method_run(run: Run, name: str, method: Method) -> Run:
    """The run of one method, in a directory of its own, on this run's corpus."""
    config = replace(run.config, run_dir=str(run.comparison / name), pretrain=_training(run, method))
    return Run(config=config).borrow(run, CORPUS, *([MASK] if method.keeps_mask else []))


def _measure(run: Run, grid: _Grid) -> Manifest:
    in_order = (*grid.own, *run.config.compare.methods)  # they were made in another one
    models = {name: grid.models[name] for name in in_order}
    evaluation = replace(run.config.evaluate, report=REPORT)
    whole = Run(config=replace(run.config, run_dir=str(run.comparison), evaluate=evaluation))
    sets = chosen_sets(run.config.evaluate, run.config.seed)
    inputs = measured_inputs(models, sets, run.config.evaluate)
    artifact = whole.open(whole.report, VERB, keys=("evaluate", "seed"), inputs=inputs, extra=block_options(run.config))
    if artifact.manifest:
        log(VERB, f"complete: {whole.report / 'index.html'}")
        return artifact.manifest
    of_run = evaluation_of(run, models, sets)
    own = [name for name in models if has_generations(of_run, name)]
    whole = whole.borrow(run, *(f"{GENERATIONS}/{name}" for name in own))
    of_all = evaluation_of(whole, models, sets, guides=grid.guides, digests=inputs, reference=PENALISED)
    metrics = measure_models(of_all, run.config.cluster)
    write_json(whole.report / METRICS, metrics)
    measured = model_rows(metrics, grid.made)
    rows = rows_of(measured)
    write_json(whole.report / "comparison.json", as_json(rows))
    with publish(whole.report / "comparison.md") as part:
        part.write_text(as_markdown(rows), encoding="utf-8")
    with publish(whole.report / "comparison.png") as part:
        draw(measured, part)
    write_report(comparison_data(_sources(run, grid), metrics, measured), whole.report)
    names = (METRICS, "comparison.json", "comparison.md", "comparison.png", *REPORT_FILES)
    files = [whole.report / name for name in names] + measured_files(whole.report)
    summary = {
        row.model: {
            "emt": row.emt[0],
            "tp": row.tp[0],
            "perplexity_ratio": row.ratio,
            "benign_perplexity_ratio": row.benign_ratio,
        }
        for row in rows
    }
    counts = {"continuations": of_all.num_continuations * len(models)}
    manifest = artifact.finish(files, rows=counts, summary=summary, remove=(LEDGER,))
    log(VERB, f"{len(models)} models; {whole.report / 'index.html'}, comparison.md and comparison.png")
    return manifest


def _sources(run: Run, grid: _Grid) -> ReportSources:
    trained = run.models | {name: child.model(PENALISED) for name, child in grid.children.items()}
    artifacts = run.artifact_folders()
    for name, child in grid.children.items():
        made = {"scores": child.scores, "mask": child.mask, "model": child.model(PENALISED)}
        artifacts |= {f"{run.comparison.name}/{name}/{kind}": folder for kind, folder in made.items()}
    return ReportSources(
        title=f"IF-Guide comparison: {run.folder.name}",
        options=run.config.evaluate,
        seed=run.config.seed,
        config_yaml=to_yaml(run.config),
        artifacts=artifacts,
        trained={name: trained[name] for name in (*grid.own, *grid.children) if name in trained},
    )


def _share(mask: Manifest) -> float:
    summary: dict[str, Any] = mask.summary
    return float(summary["tokens_masked"]) / max(int(summary["predicted_tokens"]), 1)


def _own(run: Run, name: str) -> Made:
    """How one of the run's own models was made."""
    if name == BASELINE or not (run.mask / MANIFEST).exists():
        return Made(by="pretraining")
    trained = run.target.mask if (run.target.mask / MANIFEST).exists() else run.mask
    return _trained(run, read_manifest(trained), "influence masked")


def _trained(run: Run, mask: Manifest, by: str) -> Made:
    train = run.config.pretrain
    return Made(by=by, masked_share=_share(mask), objective=train.objective.kind, penalty=train.penalty)
