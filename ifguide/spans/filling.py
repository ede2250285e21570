"""The mask of a corpus from character spans of the same documents, a task for each shard, resumed.

So a target with another tokenizer than the scored corpus gets the mask of the run, and a method that marks text gets
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts import FileEntry, Manifest, data_files, open_artifact, require, require_same
from ifguide.config import Cluster
from ifguide.config.resources import Resources
from ifguide.distributed.session import connect
from ifguide.distributed.shards import LEDGER, Pool, ShardResults, StageError, run_shards
from ifguide.spans.tables import SPANS, MaskJob, PackedCorpus, mask_jobs, write_mask
from ifguide.storage import location
from ifguide.telemetry import log


@dataclass(frozen=True, kw_only=True)
class MaskShards:
    """What the shards of a mask came to: blocks, masked tokens, tokens that have a prediction; `files` as written.
    `shared` masked tokens are in the mask too that this one is drawn beside."""

    blocks: int
    masked: int
    predicted: int
    files: Mapping[str, FileEntry]
    shared: int | None = None

    @classmethod
    def of(cls, results: ShardResults, corpus: PackedCorpus, verb: str) -> MaskShards:
        """From what `write_mask_shard` gave for every shard of `corpus`.

        Raises:
            StageError: they have not as many blocks as the corpus.
        """
        blocks, masked, predicted = (
            sum(result[name] for result in results.values()) for name in ("blocks", "masked", "predicted")
        )
        if blocks != corpus.num_blocks:
            raise StageError(f"{verb}: {blocks} blocks were masked, {corpus.folder} has {corpus.num_blocks}")
        return cls(blocks=blocks, masked=masked, predicted=predicted, files=results.files)

    @property
    def rows(self) -> dict[str, int]:
        """What a mask's manifest counts."""
        return {"blocks": self.blocks, "tokens": self.masked}

    @property
    def summary(self) -> dict[str, int]:
        """What a mask's manifest says of them."""
        shared = {} if self.shared is None else {"tokens_shared": self.shared}
        return {"tokens_masked": self.masked, "predicted_tokens": self.predicted, **shared}


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Of `MaskShard`: the corpus to mask, the folder of the spans, and that of the mask."""

    corpus: PackedCorpus
    spans: str
    mask: str


class MaskShard:
    """Worker: one shard of a corpus -> its mask."""

    def __init__(self, settings: MaskSettings):
        self.corpus = settings.corpus
        self.spans, self.mask = location(settings.spans), location(settings.mask)

    def process(self, shard: MaskJob) -> dict[str, Any]:
        return write_mask(self.corpus, self.spans, self.mask, shard)


def fill_mask(corpus: PackedCorpus, spans: Path, mask: Path, *, verb: str, pool: Pool) -> MaskShards:
    """Write every shard of the `mask` of `corpus`: the tokens that overlap a span of the folder `spans`.

    Raises:
        ValueError: the spans are of other documents. StageError: a shard failed.
    """
    settings = MaskSettings(corpus=corpus, spans=str(spans), mask=str(mask))
    jobs = list(mask_jobs(corpus, spans))
    results = run_shards(verb, jobs, MaskShard, settings, folder=mask, pool=pool, unit="shards masked")
    return MaskShards.of(results, corpus, verb)


def mask_other_tokens(
    *, source: Path, source_mask: Path, corpus: Path, mask: Path, cluster: Cluster, resources: Resources, config: str
) -> Manifest:
    """Make the artifact `mask` of `corpus`, which holds the documents of the corpus `source` in another tokenizer's
    tokens: every token that overlaps a span of `source_mask`. `config` is the YAML to keep beside it.

    Raises:
        FileNotFoundError: a corpus or the source's mask is missing. MismatchError: the mask is of another corpus.
        ValueError: it has no spans, or the documents differ. StageError: a shard failed.
    """
    verb = "pretrain"
    scored, packed = require(source, "pack_corpus"), require(corpus, "pack_corpus")
    masked = require(source_mask, "build_mask")
    require_same(
        f"the corpus of {source_mask}",
        masked.inputs["corpus"],
        f"{source}",
        scored.fingerprint,
        "build the mask of this corpus",
    )
    if not data_files(source_mask, SPANS):
        raise ValueError(
            f"{source_mask} has no character spans, which a target with another tokenizer needs: delete it and run"
            " `ifguide build_mask` again (an imported mask has none)"
        )
    inputs = {"corpus": packed.fingerprint, "mask": masked.fingerprint}
    artifact = open_artifact(mask, verb=verb, options={"mask_of": "spans"}, inputs=inputs, config_yaml=config)
    if artifact.manifest:
        return artifact.manifest
    connect(cluster)
    pool = Pool.filling_cluster(resources)
    shards = fill_mask(PackedCorpus.of(corpus, packed), source_mask, mask, verb=verb, pool=pool)
    shares = (item["tokens_masked"] / max(item["predicted_tokens"], 1) for item in (shards.summary, masked.summary))
    log(verb, "{:,} of the target's tokens are masked ({:.2%}; {:.2%} of the corpus')".format(shards.masked, *shares))
    return artifact.finish(
        data_files(mask), rows=shards.rows, summary=shards.summary, digests=shards.files, remove=(LEDGER,)
    )
