"""A run's mask in files that other trainers read: `ifguide export-mask`.

    format  files                           of what
    spans   spans.parquet                   each document: where it came from, and its masked characters
    npy     tokens, mask, lengths (.npy)    each block: int32 (N, T), uint8 (N, T), int32 (N,)
    hf      a folder of `datasets`          each block: input_ids, labels, loss_weight
    paper   mask.pt, tokens.pt              each block: bool (N, T) and int32 (N, T), as the paper's code loads them

Entry j of a block's mask speaks of the loss of predicting token j. The first token of a block has no prediction, and
padding, in the last block alone, has none: neither is masked, both have the label -100. `spans` are of characters and
so for any tokenizer; every other format is of the corpus' own blocks.

Where the run keeps documents apart (`pretrain.document_attention`), `hf` and `npy` also hold `position_ids`. They count
from each document's first token, as transformers wants packed documents; that token's label is -100.

A corpus of a target with another tokenizer lies with its mask in RUN/target, which can be exported as a run can.

The folder appears by one rename when all is written and counted. Cost: one reading of corpus and mask, and for the
time of the export 5 bytes a token of disk; memory is one shard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from ifguide import schemas
from ifguide.artifacts import (
    PLAN,
    Manifest,
    file_digest,
    fsync_tree,
    open_artifact,
    publish_folder,
    remove_tree,
    require,
    require_same,
    verified,
)
from ifguide.artifacts.manifest import CONFIG
from ifguide.documents import positions_in_document
from ifguide.folders import CORPUS, MASK
from ifguide.lm_head import chunks
from ifguide.models import IGNORE, predicted_positions
from ifguide.spans.tables import PackedCorpus, shard_name, write_spans
from ifguide.storage import is_remote
from ifguide.telemetry import log
from ifguide.training.blocks import MASKED, TOKENS, Blocks, TrainingBlocks, flatten_blocks
from ifguide.training.signed_loss import MASKED_ZERO

SCRATCH = "scratch"  # in the folder that is being made
TOKENS_AT_ONCE = 1 << 20  # of a table of blocks
SPANS = pa.schema(
    [
        *(schemas.DOCUMENTS.field(name) for name in ("doc_id", "source", "row")),
        *(schemas.SPANS.field(name) for name in ("num_chars", "spans")),
    ]
)
ALIGNMENT = "entry j of a block masks the loss of predicting token j"


def export_mask(run_dir: Path, out: Path, *, kind: str, penalty: float = 1.0) -> Manifest:
    """Make the folder `out` of the mask in `run_dir`, in one of `FORMATS`; returns its manifest.

    penalty: minus what a masked token weighs in the `loss_weight` of `hf`; ordinary tokens weigh 1.

    Raises:
        FileNotFoundError: the run has no mask. FileExistsError: `out` is there already.
        ValueError: an unknown format; a file that has changed since it was made; documents without characters.
        MismatchError: the mask is of another corpus.
    """
    if kind not in FORMATS:
        raise ValueError(f"--format {kind}: choose one of {', '.join(FORMATS)}")
    if penalty < 0:
        raise ValueError(f"--penalty {penalty:g}: must be 0 or more; a masked token's weight is minus this")
    mask, corpus = require(run_dir / MASK, "build_mask"), require(run_dir / CORPUS, "pack_corpus")
    require_same(
        f"the corpus of {run_dir / MASK}",
        mask.inputs["corpus"],
        f"{run_dir / CORPUS}",
        corpus.fingerprint,
        "build the mask of this corpus again",
    )
    if is_remote(out):
        raise ValueError(f"{out}: export to a local folder, and copy that")
    if out.exists():
        raise FileExistsError(f"{out} exists; name a folder that does not, or remove it")
    with publish_folder(out) as part:
        return _write(part, run_dir, corpus, mask, kind, penalty)


def _write(part: Path, run_dir: Path, corpus: Manifest, mask: Manifest, kind: str, penalty: float) -> Manifest:
    config = (run_dir / MASK / CONFIG).read_text(encoding="utf-8")
    artifact = open_artifact(
        part,
        verb="export_mask",
        options={"export_mask": {"format": kind, **({"penalty": penalty} if kind == "hf" else {})}},
        inputs={"corpus": corpus.fingerprint, "mask": mask.fingerprint},
        config_yaml=config,
    )
    write_blocks = FORMATS[kind]
    if write_blocks is None:
        rows = _write_spans(part, run_dir, corpus)
        expected = {"documents": corpus.rows["documents"], "masked": mask.rows["tokens"]}
    else:
        apart = bool((yaml.safe_load(config).get("pretrain") or {}).get("document_attention"))
        if apart and kind == "paper":
            log(
                "export_mask",
                "the paper's files cannot say that documents do not see each other",
                level=logging.WARNING,
            )
        flatten_blocks(run_dir / CORPUS, run_dir / MASK, part / SCRATCH, documents=apart)
        blocks = TrainingBlocks(part / SCRATCH)
        assert blocks.masked is not None
        write_blocks(part, blocks, penalty)
        rows = {"blocks": len(blocks.tokens), "masked": int(np.count_nonzero(blocks.masked))}
        expected = {"blocks": corpus.rows["blocks"], "masked": mask.rows["tokens"]}
    if rows != expected:
        raise ValueError(f"{run_dir}: {rows} were exported where {expected} are expected; build the mask again")
    remove_tree(part / SCRATCH)
    fsync_tree(part)
    files = [path for path in part.rglob("*") if path.is_file() and path.name not in (CONFIG, PLAN)]
    summary = {"alignment": ALIGNMENT, "block_size": corpus.summary["block_size"], "tokens": corpus.rows["tokens"]}
    return artifact.finish(files, rows=rows, summary=summary | {"tokenizer": corpus.summary["tokenizer"]})


def _write_spans(part: Path, run_dir: Path, corpus: Manifest) -> dict[str, int]:
    """`spans.parquet`; counts of documents and masked tokens."""
    inputs = corpus.options["pack_corpus"]["inputs"]
    if any(source.get("tokens_column") for source in inputs):
        raise ValueError(
            "--format spans: documents that came as token ids have no characters; export npy, hf or paper, which are of"
            " the same tokens"
        )
    packed, masked, documents = PackedCorpus.of(run_dir / CORPUS, corpus), 0, 0
    (part / SCRATCH).mkdir()
    with pq.ParquetWriter(part / "spans.parquet", SPANS, compression="zstd") as writer:
        for shard in range(packed.num_shards):
            counts = write_spans(packed, run_dir / MASK, shard, folder=part / SCRATCH)
            spans = schemas.read_table(part / SCRATCH / f"spans-{shard_name(shard)}.parquet", schemas.SPANS)
            origins = schemas.read_table(verified(run_dir / CORPUS, f"documents-{shard_name(shard)}.parquet"))
            joined = {name: (origins if name in ("source", "row") else spans).column(name) for name in SPANS.names}
            writer.write_table(pa.table(joined, schema=SPANS))
            documents, masked = documents + counts.documents, masked + counts.tokens
    return {"documents": documents, "masked": masked}


def _write_npy(part: Path, blocks: TrainingBlocks, _: float) -> None:
    np.save(part / "tokens.npy", blocks.tokens)
    np.save(part / "mask.npy", blocks.masked.view(np.uint8))  # type: ignore[union-attr]
    np.save(part / "lengths.npy", blocks.lengths)
    if blocks.starts is not None:
        shape = blocks.tokens.shape
        positions = np.lib.format.open_memmap(part / "position_ids.npy", mode="w+", dtype=np.int32, shape=shape)
        for rows in _some_rows(blocks):
            positions[rows] = _positions(_taken(blocks, rows))
        positions.flush()


def _write_paper(part: Path, blocks: TrainingBlocks, _: float) -> None:
    for name, source in (("mask.pt", MASKED), ("tokens.pt", TOKENS)):
        values = np.load(part / SCRATCH / source, mmap_mode="c")  # torch warns of arrays that cannot be written
        torch.save(torch.from_numpy(values), part / name)


def _write_hf(part: Path, blocks: TrainingBlocks, penalty: float) -> None:
    """A masked token x has the label -101 - x, as `ifguide.objective` takes it and an ordinary loss does not."""
    import datasets

    kinds = {"input_ids": "int32", "labels": "int32", "loss_weight": "float32"}
    if blocks.starts is not None:
        kinds["position_ids"] = "int32"
    features = datasets.Features({name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()})
    schema, block_size = features.arrow_schema, blocks.tokens.shape[1]
    table = part / SCRATCH / "table.arrow"
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for rows in _some_rows(blocks):
            taken = _taken(blocks, rows)
            assert taken.mask_BT is not None
            tokens_BT, masked_BT, predicted_BT = taken.tokens_BT.astype(np.int32), taken.mask_BT, _predicted(taken)
            labels_BT = np.where(masked_BT, MASKED_ZERO - tokens_BT, tokens_BT)
            weights_BT = np.where(masked_BT, -penalty, 1.0) * predicted_BT
            columns = [tokens_BT, np.where(predicted_BT, labels_BT, IGNORE), weights_BT.astype(np.float32)]
            columns += [] if taken.document_BT is None else [_positions(taken)]
            bounds = pa.array(np.arange(len(tokens_BT) + 1) * block_size, pa.int32())
            arrays = [pa.ListArray.from_arrays(bounds, np.ascontiguousarray(column).ravel()) for column in columns]
            stream.write_table(pa.Table.from_arrays(arrays, schema=schema))
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        content = datasets.table.MemoryMappedTable.from_file(str(table))
        datasets.Dataset(content, fingerprint=file_digest(table)[:16]).save_to_disk(
            part
        )  # its own would be of the time
    finally:
        if shown:
            datasets.enable_progress_bars()


def _some_rows(blocks: TrainingBlocks) -> Iterator[slice]:
    yield from chunks(len(blocks.tokens), max(1, TOKENS_AT_ONCE // blocks.tokens.shape[1]))


def _taken(blocks: TrainingBlocks, rows: slice) -> Blocks:
    return blocks.take(np.arange(rows.start, rows.stop))


def _predicted(blocks: Blocks) -> np.ndarray:
    """Boolean (B, T): the tokens that `pretrain` has a loss of."""
    documents = None if blocks.document_BT is None else torch.from_numpy(blocks.document_BT)
    tokens, lengths = torch.from_numpy(blocks.tokens_BT), torch.from_numpy(blocks.lengths_B)
    return predicted_positions(tokens, lengths, documents).numpy()


def _positions(blocks: Blocks) -> np.ndarray:
    """int32 (B, T): the place of each token in its document, where these do not see each other."""
    return positions_in_document(torch.from_numpy(blocks.document_BT)).numpy().astype(np.int32)


FORMATS: dict[str, Callable[[Path, TrainingBlocks, float], None] | None] = {
    "spans": None,  # of documents, not of blocks
    "npy": _write_npy,
    "hf": _write_hf,
    "paper": _write_paper,
}
