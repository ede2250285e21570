"""`analyse`: logit lens, linear probes and adversarial suffixes of the models that `evaluate` compares.

`analyses/analyses.json` holds every figure with its interval (`ifguide.analyses.figures`); beside it `analyses.md` and
a PNG for each analysis. Each model's lens and probes, and each attack, is a piece of work of its own; running again
resumes.
"""

from __future__ import annotations

from ifguide.analyses.figures import collect
from ifguide.analyses.inputs import check_options, check_queries, lens_prompts, probe_texts, tasks, text_digests
from ifguide.analyses.summary import as_markdown, draw_gcg, draw_lens, draw_probes
from ifguide.analyses.worker import AnalyseModel, AnalysisSettings
from ifguide.artifacts import Artifact, Manifest, publish, require, verified, write_json, write_text
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, run_shards
from ifguide.evaluation import Bootstrap
from ifguide.evaluation.generations import takes_special_tokens
from ifguide.evaluation.subjects import OF_MODEL, models_to_evaluate
from ifguide.influence.query_file import QUERIES, read_queries
from ifguide.run import Run
from ifguide.telemetry import log
from ifguide.toxicity import classifier_inputs

VERB = "analyse"
DRAW = {"lens": draw_lens, "probes": draw_probes, "gcg": draw_gcg}


def analyse(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `analyses/`, of a run that has its query and a model.

    Raises:
        ConfigError: no prompts, a classifier that cannot score text, or too few texts of a kind. FileNotFoundError: no
            model, or no query. StageError: a piece failed, with its reason: a model without a last norm.
    """
    options, seed = run.config.analyse, run.config.seed
    check_options(options, run.config.evaluate)
    if dry_run:
        log(VERB, f"would make {', '.join(options.methods)} of the models that evaluate compares")
        return None
    models = models_to_evaluate(run.models, run.config.evaluate.models)
    query = require(run.query, "build_query")
    verified(run.query, QUERIES)
    queries = read_queries(run.query)
    check_queries(options, run.config.evaluate.word_list, queries)
    probed = probe_texts(options, queries, seed) if "probes" in options.methods else []
    prompts = lens_prompts(options, run.config.evaluate, seed) if "lens" in options.methods else []
    inputs = {f"{OF_MODEL}{name}": fingerprint for name, (_, fingerprint) in models.items()}
    inputs |= {"query": query.fingerprint, **text_digests(options, prompts, probed)}
    inputs |= classifier_inputs({"evaluate.classifier": run.config.evaluate.classifier})
    artifact = run.open(run.analyses, VERB, inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {run.analyses / 'analyses.md'}")
        return artifact.manifest
    settings = AnalysisSettings(
        options=options,
        models={name: source for name, (source, _) in models.items()},
        special_tokens=frozenset(name for name in models if takes_special_tokens(run.config.evaluate, name)),
        queries=tuple(queries),
        probed=tuple(probed),
        prompts=tuple(row.prompt for row in prompts),
        word_list=run.config.evaluate.word_list,
        classifier=run.config.evaluate.classifier,
        max_new_tokens=run.config.evaluate.max_new_tokens,
        bootstrap=Bootstrap(samples=run.config.evaluate.bootstrap_samples, seed=seed),
        seed=seed,
    )
    manifest = _analyse(run, artifact, settings)
    log(VERB, f"{len(models)} models; {run.analyses / 'analyses.md'}")
    return manifest


def _analyse(run: Run, artifact: Artifact, settings: AnalysisSettings) -> Manifest:
    options, models = run.config.analyse, list(settings.models)
    connect(run.config.cluster)
    require_resources(run.config.cluster, VERB, options.resources)
    results = run_shards(
        VERB,
        tasks(options, models, sum(row.positive for row in settings.queries), run.config.seed),
        AnalyseModel,
        settings,
        folder=run.analyses,
        pool=Pool(size=options.actors, resources=options.resources),
        unit="analyses",
    )
    content = collect(results, models, settings.bootstrap)
    write_json(run.analyses / "analyses.json", content)
    write_text(run.analyses / "analyses.md", as_markdown(content["models"]))
    pictures = {method: run.analyses / f"{method}.png" for method in options.methods}
    for method, path in pictures.items():
        with publish(path) as part:
            DRAW[method](content["models"], part)
    return artifact.finish(
        [run.analyses / "analyses.json", run.analyses / "analyses.md", *pictures.values()],
        rows={"models": len(models), "pieces": len(results)},
        summary={},
        remove=(LEDGER,),
    )
