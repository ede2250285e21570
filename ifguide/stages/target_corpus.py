"""What `pretrain` trains on when its target has another tokenizer than the corpus: the same documents, in its tokens.

`target/corpus` is packed from the same inputs by `pack_corpus`; `target/mask` masks every token of it that overlaps a
character span of the run's mask, a task for each shard. They lie beside the corpus and the mask that they are made of,
another run's where those are lent. Both are artifacts like any other: resumed, and refused when they belong to
something else. Documents are the same when inputs and rows are: their number, their sizes on disk
and every document's number of characters are checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ifguide import artifacts
from ifguide.artifacts import MismatchError, data_files, require, require_same
from ifguide.config import Config, to_yaml
from ifguide.distributed.session import connect
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.run import Run
from ifguide.spans.tables import SPANS, MaskJob, PackedCorpus, mask_jobs, shard_name, write_mask
from ifguide.stages.pack_corpus import pack_corpus
from ifguide.storage import location
from ifguide.telemetry import log

VERB = "pretrain"
TARGET = "target"  # the folder of both, beside what they are made of


def training_config(run: Run) -> Config:
    """The config of the corpus that is trained on: the run's own, or that of the target's tokenizer in `target/`."""
    config, train = run.config, run.config.pretrain
    if not train.has_own_tokenizer or train.tokenizer == config.tokenizer_source:
        return config
    return replace(
        config,
        run_dir=str(run.corpus.parent / TARGET),
        tokenizer=train.tokenizer,
        pack_corpus=replace(config.pack_corpus, train_tokenizer=train.train_tokenizer),
        pretrain=replace(train, tokenizer=None, train_tokenizer=None),
    )


def training_run(run: Run) -> Run:
    """The run whose `corpus` and `mask` are trained on, made if they are not there yet.

    Raises:
        FileNotFoundError: the run's own corpus or mask is missing. MismatchError: the inputs have changed since they
            were packed. ValueError: a document has.
    """
    config = training_config(run)
    if config is run.config:
        return run
    target = Run(config=config, lent={"mask": run.mask.parent / TARGET / "mask"})
    pack_corpus(target)
    _require_same_inputs(run, target)
    if run.config.pretrain.use_mask:
        _mask_target(run, target)
    return target


def _require_same_inputs(run: Run, target: Run) -> None:
    source, packed = require(run.corpus, "pack_corpus"), require(target.corpus, "pack_corpus")
    if (source.options["files"], source.rows["documents"]) != (packed.options["files"], packed.rows["documents"]):
        raise MismatchError(
            f"{run.corpus} was packed from {source.rows['documents']:,} documents of {source.options['files']},"
            f" {target.corpus} from {packed.rows['documents']:,} of {packed.options['files']}: the inputs have changed."
            f" Restore them and delete {target.corpus}, or pack and score the corpus again"
        )


def _mask_target(run: Run, target: Run) -> None:
    """Make `target/mask` of the run's mask."""
    source, mask = require(run.corpus, "pack_corpus"), require(run.mask, "build_mask")
    packed = require(target.corpus, "pack_corpus")
    require_same(
        f"the corpus of {run.mask}",
        mask.inputs["corpus"],
        f"{run.corpus}",
        source.fingerprint,
        "build the mask of this corpus",
    )
    if not data_files(run.mask, SPANS):
        raise ValueError(
            f"{run.mask} has no character spans, which a target with another tokenizer needs: delete it and run"
            " `ifguide build_mask` again (an imported mask has none)"
        )
    artifact = artifacts.open_artifact(
        target.mask,
        verb=VERB,
        options={"mask_of": "spans"},
        inputs={"corpus": packed.fingerprint, "mask": mask.fingerprint},
        config_yaml=to_yaml(run.config),
    )
    if artifact.manifest:
        return
    connect(run.config.cluster)
    corpus = PackedCorpus.of(target.corpus, packed)
    jobs = {job.shard: job for job in mask_jobs(corpus, run.mask)}
    results = run_shards(
        VERB,
        [{"key": shard_name(shard), "job": list(job)} for shard, job in jobs.items()],
        MaskShard,
        {"corpus": corpus, "source_mask": str(run.mask), "folder": str(target.mask)},
        folder=target.mask,
        pool=Pool.filling_cluster(run.config.build_mask.resources),
        unit="shards masked",
    )
    counts = {name: sum(result[name] for result in results.values()) for name in ("blocks", "masked", "predicted")}
    if counts["blocks"] != packed.rows["blocks"]:
        raise StageError(f"{VERB}: {counts['blocks']} blocks were masked, {target.corpus} has {packed.rows['blocks']}")
    summary = {"tokens_masked": counts["masked"], "predicted_tokens": counts["predicted"]}
    artifact.finish(
        [target.mask / f"shard-{shard_name(shard)}.parquet" for shard in jobs],
        rows={"blocks": counts["blocks"], "tokens": counts["masked"]},
        summary=summary,
        remove=(LEDGER,),
    )
    share, before = (item["tokens_masked"] / max(item["predicted_tokens"], 1) for item in (summary, mask.summary))
    log(VERB, f"{counts['masked']:,} of the target's tokens are masked ({share:.2%}; {before:.2%} of the corpus')")


class MaskShard:
    """Worker: one shard of the target's corpus -> its mask."""

    def __init__(self, corpus: PackedCorpus, source_mask: str, folder: str):
        self.corpus, self.source_mask, self.folder = corpus, location(source_mask), location(folder)

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        return write_mask(self.corpus, self.source_mask, self.folder, MaskJob(*descriptor["job"]))
