"""`fit_factors`: EK-FAC factors of the proxy, one kronfluence partition of data and modules per Ray task.

Covariances of every partition, then the eigendecomposition of every module, then lambda of every partition. A
partition, or a module, is the unit of resume. The sample is drawn by seed without replacement, or is the whole
of a smaller corpus.
"""

from __future__ import annotations

from dataclasses import replace

from ifguide.artifacts import Manifest, require
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, run_shards
from ifguide.distributed.tasks import run_task
from ifguide.influence.factor_worker import SAMPLE, FitPartition, FitPiece, FitSettings, draw_sample, finish_fit
from ifguide.influence.factors import STEPS
from ifguide.influence.proxy import proxy_name
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus
from ifguide.stages.proxy import read_proxy
from ifguide.telemetry import log

VERB = "fit_factors"
WORK = "partitions"
UNITS = {"covariance": "covariance partitions", "eigen": "eigendecompositions", "lambda": "lambda partitions"}


def fit_factors(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `factors/`, in kronfluence's own file format.

    Raises:
        ValueError: too little of the proxy is tracked, or it does not read the corpus' tokens.
    """
    config = run.config.fit_factors
    if dry_run:
        log(
            VERB,
            f"would fit EK-FAC on at most {config.sample_blocks:,} blocks of the corpus,"
            f" {config.data_partitions} partitions of them and {config.module_partitions} of the modules, of the proxy"
            f" {proxy_name(run.proxy_source)}",
        )
        return None
    corpus = require(run.corpus, "pack_corpus")
    run.require_proxy()
    connect(run.config.cluster)
    proxy, beginning = read_proxy(run, VERB)
    inputs = {"corpus": corpus.fingerprint, "proxy": proxy.fingerprint, **beginning.inputs()}
    artifact = run.open(run.factors, VERB, inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    num_blocks = min(config.sample_blocks, corpus.rows["blocks"])
    partitions = min(config.data_partitions, num_blocks)
    require_resources(run.config.cluster, VERB, config.resources)
    packed, work = PackedCorpus.of(run.corpus, corpus), run.factors / WORK
    on_cpus = replace(config.resources, gpus=0.0)
    drawn = packed, corpus.rows["blocks"], num_blocks, run.config.seed, work / SAMPLE, beginning.of_documents
    run_task(draw_sample, *drawn, resources=on_cpus)
    settings = FitSettings(
        proxy=run.proxy_source,
        proxy_fingerprint=proxy.fingerprint,
        beginning=beginning,
        module_names=proxy.module_names,
        work=work,
        num_partitions=partitions,
        module_partitions=config.module_partitions,
        batch_size=config.batch_size,
        seed=run.config.seed,
        gpus=config.resources.gpus,
    )
    pool = Pool(size=partitions * config.module_partitions, resources=config.resources)
    for step in STEPS:
        pieces = [FitPiece(key=f"{step}-{i:05d}", step=step, index=i) for i in range(settings.pieces(step))]
        run_shards(VERB, pieces, FitPartition, settings, folder=run.factors, pool=pool, unit=UNITS[step])
    # a task, not a pool: Ray gives it the process that described the proxy, which has imported all it needs
    run_task(finish_fit, settings, run.factors, resources=on_cpus)
    files = [*run.factors.glob("*.safetensors"), run.factors / "factor_arguments.json"]
    rows = {"blocks": num_blocks, "modules": len(proxy.module_names)}
    summary = {"coverage": proxy.coverage, "untracked": [list(item) for item in proxy.untracked]}
    manifest = artifact.finish(files, rows=rows, summary=summary, remove=(LEDGER, WORK))
    log(VERB, f"{len(proxy.module_names)} modules from {num_blocks:,} blocks in {run.factors}")
    return manifest
