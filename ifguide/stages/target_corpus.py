"""What `pretrain` trains on when its target has another tokenizer than the corpus: the same documents, in its tokens.

`pack_corpus` packs `target/corpus` from the same inputs; `target/mask` masks every token of it that overlaps a
character span of the run's mask, a task for each shard. They lie beside the corpus and the mask that they are made of,
another run's where those are lent. Both are artifacts like any other: resumed, and refused when they belong to
something else. Documents are the same when inputs and rows are: their number, their sizes on disk
and every document's number of characters are checked.
"""

from __future__ import annotations

from typing import Any

from ifguide import artifacts
from ifguide.artifacts import data_files, require, require_same
from ifguide.config import to_yaml
from ifguide.corpus.tables import require_same_documents
from ifguide.distributed.session import connect
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.run import Run
from ifguide.spans.tables import SPANS, MaskJob, PackedCorpus, mask_jobs, shard_name, write_mask
from ifguide.storage import location
from ifguide.telemetry import log

VERB = "pretrain"


def training_run(run: Run) -> Run:
    """The run whose `corpus` and `mask` are trained on; its mask is made if it is not there yet.

    Raises:
        FileNotFoundError: a corpus or the run's own mask is missing. MismatchError: the inputs have changed since they
            were packed. ValueError: a document has.
    """
    target = run.target
    if target is run:
        return run
    source, packed = require(run.corpus, "pack_corpus"), require(target.corpus, "pack_corpus")
    require_same_documents(run.corpus, source, target.corpus, packed)
    if run.config.pretrain.use_mask:
        _mask_target(run, target)
    return target


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
        digests=results.files,
    )
    share, before = (item["tokens_masked"] / max(item["predicted_tokens"], 1) for item in (summary, mask.summary))
    log(VERB, f"{counts['masked']:,} of the target's tokens are masked ({share:.2%}; {before:.2%} of the corpus')")


class MaskShard:
    """Worker: one shard of the target's corpus -> its mask."""

    def __init__(self, corpus: PackedCorpus, source_mask: str, folder: str):
        self.corpus, self.source_mask, self.folder = corpus, location(source_mask), location(folder)

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        return write_mask(self.corpus, self.source_mask, self.folder, MaskJob(*descriptor["job"]))
