"""`compare`: the run's models beside those of other methods: other masks, DPO, reward-augmented decoding.

A method with a mask gets a run directory of its own in `compare/<name>`, for the method's mask and model; the rest is
this run's. It is trained as this run's models were: the same blocks in the same order, the same initial weights. What
DPO and RAD need is made by `stages.preference_methods`. `compare/report/` holds the figures of all models, with the
run's own first, as `comparison.md`, `comparison.json`, `comparison.png`, `metrics.json` and as a page, `index.html`.
Continuations that `evaluate` has sampled from the run's own models are not sampled again. Running it again resumes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ifguide.artifacts import MANIFEST, Manifest, publish, read_manifest, require, write_json
from ifguide.config import OWN, ConfigError, Pretrain
from ifguide.config.compare import Dpo, Method, Rad
from ifguide.distributed.shards import LEDGER
from ifguide.evaluation.figures import measured_files
from ifguide.evaluation.generations import has_generations
from ifguide.evaluation.prompts import chosen_sets
from ifguide.methods.masks import VERB, check_method, make_method_mask
from ifguide.methods.preferences import (
    check_preferences,
    make_dpo_model,
    make_reward_model,
    make_samples,
    rad_fingerprint,
)
from ifguide.report.comparison import as_json, as_markdown, draw, rows_of
from ifguide.report.data import comparison_data
from ifguide.report.figures import Made, masked_loss, model_rows
from ifguide.report.page import REPORT_FILES, write_report
from ifguide.run import BASELINE, PENALISED, Run
from ifguide.stages.build_mask import build_mask
from ifguide.stages.build_query import build_query
from ifguide.stages.evaluate import METRICS, measure_models, measured_inputs, models_to_evaluate
from ifguide.stages.pretrain import pretrain
from ifguide.stages.score_corpus import score_corpus
from ifguide.telemetry import log


def compare(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `compare/`, for a run that has its mask and its models.

    Raises:
        ConfigError: no methods, or one that this run cannot have. FileNotFoundError: the run is not finished.
    """
    methods = run.config.compare.methods
    if not methods:
        raise ConfigError("compare.methods: name some, `name: {mask: ..., penalty: ...}`; see configs/demo.yaml")
    for name, method in methods.items():
        if method.mask is not None:
            check_method(run, name, method)
        else:
            check_preferences(run.config, f"compare.methods.{name}")
    if dry_run:
        for name, method in methods.items():
            log(VERB, f"would {'sample with' if method.rad else 'train'} {name}: {_describe(run, method)}")
        return None
    require(run.model(BASELINE), "pretrain --set pretrain.use_mask=false")
    grid = _Grid(run)
    for name, method in methods.items():
        grid.add(name, method)
    return _measure(run, grid)


class _Grid:
    """The models of a comparison, the run's own first, and how each was made."""

    def __init__(self, run: Run):
        self.run = run
        self.models = models_to_evaluate(run)
        self.made = {name: _own(run, name) for name in (BASELINE, PENALISED) if name in self.models}
        self.guides: dict[str, dict[str, Any]] = {}
        self.children: dict[str, Run] = {}

    def add(self, name: str, method: Method) -> None:
        """Train the method's model, or say how it decodes another's."""
        if method.dpo:
            self._add_dpo(name, method.dpo)
        elif method.rad:
            self._add_rad(name, method.rad)
        else:
            self._add_mask(name, method)

    def _add_mask(self, name: str, method: Method) -> None:
        child = method_run(self.run, name, method)
        mask = _mask(self.run, child, method)
        pretrain(child)
        self.children[name] = child
        self.models[name] = _model(child.model(PENALISED) / "hf", read_manifest(child.model(PENALISED)))
        self.made[name] = _trained(child, mask, method.describe())
        log(VERB, f"{name}: {mask.summary['tokens_masked']:,} tokens masked ({_share(mask):.2%}), trained")

    def _add_dpo(self, name: str, method: Dpo) -> None:
        samples = make_samples(self.run, self.models[BASELINE])
        start = self._start(name, "dpo", method.model)
        self.models[name] = _model(*make_dpo_model(self.run, name, method, start, samples))
        self.made[name] = replace(self.made[method.model], by=f"DPO of {method.model}")

    def _add_rad(self, name: str, method: Rad) -> None:
        samples = make_samples(self.run, self.models[BASELINE])
        folder, reward = make_reward_model(self.run, self.models[BASELINE], samples)
        start = self._start(name, "rad", method.model)
        self.models[name] = (start[0], rad_fingerprint(method, start, reward))
        self.guides[name] = {"reward": str(folder), "beta": method.beta, "top_k": method.top_k}
        self.made[name] = replace(self.made[method.model], by=f"RAD of {method.model}", decodes=method.model)

    def _start(self, name: str, kind: str, model: str) -> tuple[str, str]:
        if model not in self.models:
            raise ConfigError(f"compare.methods.{name}.{kind}.model: this run has no finished model {model}")
        return self.models[model]


def _model(folder: Path, manifest: Manifest) -> tuple[str, str]:
    return str(folder), manifest.fingerprint


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
    config = replace(run.config, run_dir=str(run.folder / VERB / name), pretrain=_training(run, method))
    return Run(config=config).borrow(run, "corpus", *(["mask"] if method.mask == "influence" else []))


def _mask(run: Run, child: Run, method: Method) -> Manifest:
    if method.mask == "plain_influence":
        return _plain_influence(run, child)
    if method.mask != "influence":
        return make_method_mask(run, child, method)
    return require(run.mask, "build_mask")


def _plain_influence(run: Run, child: Run) -> Manifest:
    """The mask of the same selection from scores of the toxic queries alone, with this run's factors and proxy."""
    config = child.config
    config = replace(
        config,
        build_query=replace(config.build_query, differential=False),
        score_corpus=replace(config.score_corpus, queries={}),
        build_mask=replace(config.build_mask, behaviour=OWN),
    )
    plain = replace(child, config=config).borrow(run, "model/baseline", "factors")
    build_query(plain)
    score_corpus(plain)
    mask = build_mask(plain)
    assert mask is not None
    return mask


def _measure(run: Run, grid: _Grid) -> Manifest:
    models = grid.models
    evaluation = replace(run.config.evaluate, report="report")
    whole = Run(config=replace(run.config, run_dir=str(run.folder / VERB), evaluate=evaluation))
    sets = chosen_sets(run.config)
    inputs = measured_inputs(run, models, sets)
    artifact = whole.open(whole.report, VERB, keys=("evaluate", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {whole.report / 'index.html'}")
        return artifact.manifest
    own = [name for name, (_, fingerprint) in models.items() if has_generations(run, name, fingerprint, sets)]
    whole = whole.borrow(run, *(f"generations/{name}" for name in own))
    results, metrics = measure_models(whole, models, sets, grid.guides)
    write_json(whole.report / METRICS, metrics)
    measured = model_rows(metrics, grid.made)
    rows = rows_of(measured)
    write_json(whole.report / "comparison.json", as_json(rows))
    with publish(whole.report / "comparison.md") as part:
        part.write_text(as_markdown(rows), encoding="utf-8")
    with publish(whole.report / "comparison.png") as part:
        draw(measured, part)
    write_report(comparison_data(run, measured, metrics, grid.children), whole.report)
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
    counted = int(np.sum([result.get("continuations", 0) for result in results.values()]))
    manifest = artifact.finish(files, rows={"continuations": counted}, summary=summary, remove=(LEDGER,))
    log(VERB, f"{len(models)} models; {whole.report / 'index.html'}, comparison.md and comparison.png")
    return manifest


def _share(mask: Manifest) -> float:
    summary: dict[str, Any] = mask.summary
    return float(summary["tokens_masked"]) / max(int(summary["predicted_tokens"]), 1)


def _own(run: Run, name: str) -> Made:
    """How one of the run's own models was made."""
    if name == BASELINE or not (run.mask / MANIFEST).exists():
        return Made(by="pretraining")
    return _trained(run, read_manifest(run.mask), "influence masked")


def _trained(run: Run, mask: Manifest, by: str) -> Made:
    train = run.config.pretrain
    return Made(by=by, masked_share=_share(mask), objective=train.objective.kind, penalty=train.penalty)
