"""The work of `fit_factors` on workers: one piece of a step of `factors.EkfacFit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish, record, verified
from ifguide.config import ModelSource
from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factors import EkfacFit, Step
from ifguide.influence.proxy import Beginning, load_same_proxy
from ifguide.spans.tables import PackedCorpus, document_numbers, in_blocks, shard_name
from ifguide.storage import Mirror

DOCUMENTS = "documents"  # column of a sample: the number of each token's document
SAMPLE = "sample.parquet"  # in the work folder: the blocks that the factors are fitted on


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What a worker fits with: the proxy (`proxy_fingerprint` is of the driver's), its tracked modules, and the fields
    of `FactorSample` beside the blocks of `work`/sample.parquet."""

    proxy: ModelSource
    proxy_fingerprint: str
    module_names: Sequence[str]
    beginning: Beginning
    work: Path
    num_partitions: int
    module_partitions: int
    batch_size: int
    seed: int
    gpus: float

    def pieces(self, step: Step) -> int:
        """Of how many pieces a step is: partitions, or modules."""
        return len(self.module_names) if step == "eigen" else self.num_partitions * self.module_partitions


@dataclass(frozen=True, kw_only=True)
class FitPiece:
    """Piece number `index` of a step: a partition of data and modules, or a module."""

    key: str
    step: Step
    index: int


class FitPartition:
    """Worker: the pieces of a fit, in a local mirror of the work folder. Raises MismatchError where another proxy lies
    on its node."""

    def __init__(self, settings: FitSettings):
        self.work = Mirror(settings.work)
        blocks = schemas.read_table(settings.work / SAMPLE)
        self.fit = EkfacFit(
            model=load_same_proxy(settings.proxy, gpus=settings.gpus, fingerprint=settings.proxy_fingerprint),
            sample=FactorSample(
                blocks_NT=schemas.per_token_array(blocks, "tokens"),
                lengths_N=blocks.column("length").to_numpy(),
                num_partitions=settings.num_partitions,
                batch_size=settings.batch_size,
                seed=settings.seed,
                module_partitions=settings.module_partitions,
                beginning=settings.beginning.token,
                documents_NT=sampled_documents(blocks),
            ),
            module_names=settings.module_names,
            workdir=self.work.local,
        )

    def process(self, piece: FitPiece) -> dict[str, Any]:
        """Do a piece, whatever lies in its place: the ledger says what is done, and that is not."""
        sample, names = self.fit.sample, self.fit.module_names
        if piece.step == "eigen":
            part = sample.module_partition(names, names[piece.index])
            self.work.pull(lambda name: "covariance" in name and f"_module_partition{part}." in name)
        else:
            _, module_partition = sample.partitions[piece.index]
            modules = tuple(f"modules/{name}/" for name in sample.modules(names, module_partition))
            self.work.pull(lambda name: name.startswith(modules))
        published = self.fit.do(piece.step, piece.index, keep=False)
        self.work.push()
        for path in published:
            record(self.work.folder / path.relative_to(self.work.local).as_posix(), path)
        return {}

    def finish(self, out: Path) -> None:
        """Write the factors of all modules to `out`, once every partition is there."""
        exported = Mirror(out)
        self.work.pull(lambda name: "lambda" in name or name.startswith("modules/"))
        self.fit.finish(exported.local)
        exported.push()


def finish_fit(settings: FitSettings, out: Path) -> None:
    """`FitPartition.finish`, on the CPU whatever the pieces took."""
    FitPartition(replace(settings, gpus=0)).finish(out)


def draw_sample(corpus: PackedCorpus, blocks: int, count: int, seed: int, path: Path, documents: bool = False) -> None:
    """Publish `count` of the corpus' `blocks` blocks, by seed, ascending by id; with `documents` the number of each
    token's document as well. A table that is there is kept."""
    if path.exists():
        return
    chosen = np.sort(np.random.default_rng(seed).choice(blocks, size=count, replace=False))
    shards, firsts = np.unique(chosen // corpus.blocks_per_shard, return_index=True)
    tables = []
    for shard, rows in zip(shards, np.split(chosen % corpus.blocks_per_shard, firsts[1:]), strict=True):
        file = verified(corpus.folder, f"shard-{shard_name(shard)}.parquet")
        table = schemas.read_table(file, columns=["block_id", "length", "tokens"])
        if documents:
            numbers_NT = in_blocks(document_numbers(corpus, int(shard)), schemas.per_token_array(table, "tokens"))
            values = pa.array(numbers_NT.reshape(-1))
            table = table.append_column(DOCUMENTS, pa.FixedSizeListArray.from_arrays(values, numbers_NT.shape[1]))
        tables.append(table.take(rows))
    with publish(path) as part:
        pq.write_table(pa.concat_tables(tables), part)


def sampled_documents(sample: pa.Table) -> np.ndarray | None:
    """The number of each token's document, (N, T), of a sample that was drawn with them."""
    return schemas.per_token_array(sample, DOCUMENTS) if DOCUMENTS in sample.column_names else None
