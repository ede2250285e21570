"""`fit_factors`: EK-FAC factors of the proxy, one kronfluence partition of data and modules per Ray task.

Covariances of every partition, then the eigendecomposition of every module, then lambda of every partition. A
partition, or a module, is the unit of resume. The sample is drawn by seed without replacement, or is the whole
of a smaller corpus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ifguide import schemas
from ifguide.artifacts import Manifest, publish, require
from ifguide.config import to_mapping
from ifguide.distributed.session import require_resources
from ifguide.distributed.shards import LEDGER, Pool, run_shards
from ifguide.influence.factors import (
    FactorSample,
    aggregate_lambdas,
    eigendecompose,
    export_factors,
    fit_covariance_partition,
    fit_lambda_partition,
    gather_eigenvectors,
)
from ifguide.models import check_vocabulary
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus, shard_name
from ifguide.stages.proxy import describe_proxy, load_proxy
from ifguide.storage import Mirror, location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer

VERB = "fit_factors"
WORK = "partitions"
SAMPLE = "sample.parquet"  # in WORK: the blocks that the factors are fitted on


def fit_factors(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `factors/`, in kronfluence's own file format.

    Raises:
        ValueError: too little of the proxy is tracked, or it does not know the corpus' vocabulary.
    """
    config = run.config.fit_factors
    if dry_run:
        log(
            VERB,
            f"would fit EK-FAC on at most {config.sample_blocks:,} blocks of the corpus,"
            f" {config.data_partitions} partitions of them and {config.module_partitions} of the modules, of the proxy"
            f" {run.proxy_source.source or 'from architecture'}",
        )
        return None
    corpus = require(run.corpus, "pack_corpus")
    proxy = describe_proxy(run, VERB)
    tokenizer = load_tokenizer(run.config.tokenizer_source)
    check_vocabulary(
        proxy.vocab_size,
        tokenizer,
        model_name=run.proxy_source.source or "proxy",
        tokenizer_name=run.config.tokenizer_source,
    )
    inputs = {"corpus": corpus.fingerprint, "proxy": proxy.fingerprint}
    artifact = run.open(run.factors, VERB, keys=("fit_factors", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.summary}")
        return artifact.manifest
    num_blocks = min(config.sample_blocks, corpus.rows["blocks"])
    partitions = min(config.data_partitions, num_blocks)
    tasks = partitions * config.module_partitions
    pool = Pool(size=tasks, resources=config.resources)
    require_resources(run.config.cluster, VERB, config.resources)
    packed = PackedCorpus.of(run.corpus, corpus)
    draw = ray.remote(num_cpus=config.resources.cpus)(draw_sample)
    ray.get(draw.remote(packed, corpus.rows["blocks"], num_blocks, run.config.seed, str(run.factors / WORK / SAMPLE)))
    settings = {
        "proxy": to_mapping(run.proxy_source),
        "module_names": list(proxy.module_names),
        "work": str(run.factors / WORK),
        "sample": {
            "num_partitions": partitions,
            "module_partitions": config.module_partitions,
            "batch_size": config.batch_size,
            "seed": run.config.seed,
        },
        "gpus": config.resources.gpus,
    }

    def fit(step: str, count: int, unit: str) -> None:
        descriptors = [{"key": f"{step}-{i:05d}", "step": step, "index": i} for i in range(count)]
        run_shards(VERB, descriptors, FitPartition, settings, folder=run.factors, pool=pool, unit=unit)

    fit("covariance", tasks, "covariance partitions")
    fit("eigen", len(proxy.module_names), "eigendecompositions")
    fit("lambda", tasks, "lambda partitions")
    # a task, not a pool: Ray gives it the process that described the proxy, which has imported all it needs
    ray.get(ray.remote(num_cpus=config.resources.cpus)(_gather).remote(settings | {"gpus": 0}, str(run.factors)))
    files = [*run.factors.glob("*.safetensors"), run.factors / "factor_arguments.json"]
    summary = {"coverage": proxy.coverage, "untracked": [list(item) for item in proxy.untracked]}
    manifest = artifact.finish(
        files, rows={"blocks": num_blocks, "modules": len(proxy.module_names)}, summary=summary, remove=(LEDGER, WORK)
    )
    log(VERB, f"{len(proxy.module_names)} modules from {num_blocks:,} blocks in {run.factors}")
    return manifest


class FitPartition:
    """Worker: one step of kronfluence, on one partition of data and modules or on one module."""

    def __init__(self, proxy: dict[str, Any], module_names: list[str], work: str, sample: dict[str, int], gpus: float):
        self.model = load_proxy(proxy, gpus=gpus)
        self.names, self.work = module_names, Mirror(location(work))
        blocks = schemas.read_table(location(work) / SAMPLE)
        self.sample = FactorSample(
            blocks_NT=schemas.per_token_array(blocks, "tokens"),
            lengths_N=blocks.column("length").to_numpy(),
            num_partitions=sample["num_partitions"],
            batch_size=sample["batch_size"],
            seed=sample["seed"],
            module_partitions=sample["module_partitions"],
        )

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"module_names": self.names, "workdir": self.work.local}
        step, index = descriptor["step"], descriptor["index"]
        if step == "eigen":
            part = self.sample.module_partition(self.names, self.names[index])
            self.work.pull(lambda name: "covariance" in name and f"_module_partition{part}." in name)
            eigendecompose(self.model, self.sample, self.names[index], **options)
        else:
            fit = {"covariance": fit_covariance_partition, "lambda": fit_lambda_partition}[step]
            data_partition, module_partition = divmod(index, self.sample.module_partitions)
            modules = tuple(f"modules/{name}/" for name in self.sample.modules(self.names, module_partition))
            own = f"_data_partition{data_partition}_module_partition{module_partition}."
            self.work.pull(lambda name: (step in name and own in name) or name.startswith(modules))
            fit(self.model, self.sample, data_partition, module_partition=module_partition, **options)
        self.work.push()
        return {}

    def gather(self, out: Path) -> None:
        """Write the factors of all modules to `out`, once every partition is there."""
        work, exported = self.work, Mirror(out)
        work.pull(lambda name: "lambda" in name or name.startswith("modules/"))
        gather_eigenvectors(self.model, self.sample, module_names=self.names, workdir=work.local)
        counts = {"num_partitions": self.sample.num_partitions, "module_partitions": self.sample.module_partitions}
        aggregate_lambdas(work.local, **counts)
        export_factors(work.local, exported.local)
        exported.push()


def _gather(settings: dict[str, Any], out: str) -> None:
    FitPartition(**settings).gather(location(out))


def draw_sample(corpus: PackedCorpus, blocks: int, count: int, seed: int, path: str) -> None:
    """Publish `count` of the corpus' blocks by seed, ascending by id, as one table; one that is there is kept."""
    if location(path).exists():
        return
    chosen = np.sort(np.random.default_rng(seed).choice(blocks, size=count, replace=False))
    shards, firsts = np.unique(chosen // corpus.blocks_per_shard, return_index=True)
    tables = []
    for shard, here in zip(shards, np.split(chosen % corpus.blocks_per_shard, firsts[1:]), strict=True):
        file = corpus.folder / f"shard-{shard_name(shard)}.parquet"
        tables.append(schemas.read_table(file, columns=["block_id", "length", "tokens"]).take(here))
    with publish(location(path)) as part:
        pq.write_table(pa.concat_tables(tables), part)
