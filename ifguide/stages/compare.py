"""`compare`: models whose training differs in what is masked and in nothing else, measured side by side.

Every method of `compare.methods` gets a run directory of its own in `compare/<name>`, with this run's corpus and the
method's mask, and is trained as this run's models were: the same blocks in the same order, the same initial weights.
`compare/report/` holds the figures of all of them, with the run's own models first, as `comparison.md`,
`comparison.json`, `comparison.png`, `metrics.json` and as a page, `index.html`. Running it again resumes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ifguide.artifacts import MANIFEST, Manifest, publish, read_manifest, require, write_json
from ifguide.comparison import as_json, as_markdown, draw, rows_of
from ifguide.config import ConfigError, Method
from ifguide.report import REPORT_FILES, write_report
from ifguide.report_figures import model_rows
from ifguide.stages.evaluate import METRICS, measure_models, models_to_evaluate
from ifguide.stages.evaluation_prompts import chosen_sets
from ifguide.stages.method_masks import VERB, check_method, make_method_mask
from ifguide.stages.pretrain import pretrain
from ifguide.stages.report_data import comparison_data
from ifguide.stages.run import BASELINE, PENALISED, Run, link
from ifguide.stages.shards import LEDGER
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
        check_method(run, name, method)
    if dry_run:
        for name, method in methods.items():
            log(VERB, f"would train {name}: {method.mask} masked, penalty {_penalty(run, method):g}")
        return None
    require(run.model(BASELINE), "pretrain --set pretrain.use_mask=false")
    models = models_to_evaluate(run)
    children = {name: method_run(run, name, method) for name, method in methods.items()}
    trained = {name: _trained(run, name) for name in (BASELINE, PENALISED) if name in models}
    for name, method in methods.items():
        child = children[name]
        mask = _mask(run, child, method)
        pretrain(child)
        manifest = read_manifest(child.model(PENALISED))
        models[name] = (str(child.model(PENALISED) / "hf"), manifest.fingerprint)
        trained[name] = (_share(mask), _penalty(run, method))
        log(VERB, f"{name}: {mask.summary['tokens_masked']:,} tokens masked ({_share(mask):.2%}), trained")
    return _measure(run, models, trained, children)


def method_run(run: Run, name: str, method: Method) -> Run:
    """The run of one method, in a directory of its own with this run's corpus in it."""
    config = replace(
        run.config,
        run_dir=str(run.folder / VERB / name),
        pretrain=replace(run.config.pretrain, use_mask=True, penalty=_penalty(run, method)),
    )
    child = Run(config=config)
    child.folder.mkdir(parents=True, exist_ok=True)
    link(child.corpus, run.corpus)
    return child


def _mask(run: Run, child: Run, method: Method) -> Manifest:
    if method.mask != "influence":
        return make_method_mask(run, child, method)
    link(child.mask, run.mask)
    return require(run.mask, "build_mask")


def _measure(
    run: Run,
    models: dict[str, tuple[str, str]],
    trained: dict[str, tuple[float | None, float | None]],
    children: dict[str, Run],
) -> Manifest:
    # Generations of the run itself are of other models: this folder has its own.
    evaluation = replace(run.config.evaluate, report="report")
    whole = Run(config=replace(run.config, run_dir=str(run.folder / VERB), evaluate=evaluation))
    sets = chosen_sets(run.config)
    inputs = {f"model/{name}": fingerprint for name, (_, fingerprint) in models.items()}
    artifact = whole.open(whole.report, VERB, keys=("evaluate", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {whole.report / 'index.html'}")
        return artifact.manifest
    results, metrics = measure_models(whole, models, sets)
    write_json(whole.report / METRICS, metrics)
    measured = model_rows(metrics, trained)
    rows = rows_of(measured)
    write_json(whole.report / "comparison.json", as_json(rows))
    with publish(whole.report / "comparison.md") as part:
        part.write_text(as_markdown(rows), encoding="utf-8")
    draw(measured, whole.report / "comparison.png")
    write_report(comparison_data(run, measured, metrics, children), whole.report)
    names = (METRICS, "comparison.json", "comparison.md", "comparison.png", *REPORT_FILES)
    files = [whole.report / name for name in names]
    files += [path for folder in ("continuations", "fluency") for path in (whole.report / folder).rglob("*.parquet")]
    summary = {row.model: {"emt": row.emt[0], "tp": row.tp[0], "perplexity_ratio": row.ratio} for row in rows}
    counted = int(np.sum([result.get("continuations", 0) for result in results.values()]))
    manifest = artifact.finish(files, rows={"continuations": counted}, summary=summary, remove=(LEDGER,))
    log(VERB, f"{len(models)} models; {whole.report / 'index.html'}, comparison.md and comparison.png")
    return manifest


def _penalty(run: Run, method: Method) -> float:
    return run.config.pretrain.penalty if method.penalty is None else method.penalty


def _share(mask: Manifest) -> float:
    summary: dict[str, Any] = mask.summary
    return float(summary["tokens_masked"]) / max(int(summary["predicted_tokens"]), 1)


def _trained(run: Run, name: str) -> tuple[float | None, float | None]:
    """Masked share and penalty of one of the run's own models."""
    if name == BASELINE or not (run.mask / MANIFEST).exists():
        return None, None
    return _share(read_manifest(run.mask)), run.config.pretrain.penalty
