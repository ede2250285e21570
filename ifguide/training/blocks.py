"""The corpus' blocks and their mask as training workers read them: flat files, mapped, any block by its index.

Parquet gives no single row of a shard without decoding its row group, and a copy in every worker's memory takes 5 bytes
a token each. So the shards are written out once, one after the other, beside the model in training; the workers of a
machine share the pages that they read. Cost: 5 bytes a token of disk (4 without a mask) until the training is done,
and 8 bytes a document where documents do not see each other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ifguide import schemas
from ifguide.artifacts import (
    damaged_files,
    file_entry,
    fsync_tree,
    remove_tree,
    unsealed,
    verified_files,
    write_sealed,
)
from ifguide.corpus.tables import corpus_block_size, document_table
from ifguide.telemetry import log
from ifguide.training.schedule import PADDING

BLOCKS = "blocks"  # folder of a model in training
TOKENS, LENGTHS, MASKED = "tokens.npy", "lengths.npy", "masked.npy"
STARTS = "starts.npy"  # where each document begins in the stream of tokens, ascending
DIGESTS = "digests.json"  # of these, as they were written


def flatten_blocks(corpus: Path, mask: Path | None, folder: Path, *, documents: bool = False) -> None:
    """Write the blocks of all shards, in order, and their mask if there is one, to `folder`; with `documents` also
    where each begins.

    What an earlier attempt wrote there is kept, if it is as it was written.

    Raises:
        ValueError: a file of the corpus or the mask has changed since it was made, or the mask is of other blocks than
            the corpus; names the file.
    """
    if _is_whole(folder):
        return
    block_size, files = corpus_block_size(corpus), list(verified_files(corpus))
    lengths_N = np.concatenate([_read(path, "length").column("length").to_numpy() for path in files])
    part = folder.with_name(f"{folder.name}.part")
    remove_tree(part)
    part.mkdir(parents=True)
    np.save(part / LENGTHS, lengths_N)
    shape = (len(lengths_N), block_size)
    _write(part / TOKENS, shape, np.int32, (schemas.per_token_array(_read(path, "tokens"), "tokens") for path in files))
    if mask is not None:
        _write(part / MASKED, shape, np.bool_, _masks(files, mask, block_size))
    if documents:
        np.save(part / STARTS, document_table(corpus).column("token_start").to_numpy())
    write_sealed(part / DIGESTS, {path.name: file_entry(path) for path in part.iterdir()})
    fsync_tree(part)
    remove_tree(folder)
    part.rename(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the flat files are there and have the digests that they were written with."""
    if not folder.exists():
        return False
    try:
        path = folder / DIGESTS
        if not damaged_files(folder, unsealed(json.loads(path.read_text(encoding="utf-8")), path)):
            return True
    except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    log("pretrain", f"{folder} is not as it was written: it is made again", level=logging.WARNING)
    return False


class Blocks(NamedTuple):
    """Some blocks: int64 tokens and lengths, their mask (bool) or None, and the number of each token's document (int64)
    or None: whoever has it lets no token see another document."""

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    mask_BT: np.ndarray | None
    document_BT: np.ndarray | None


class TrainingBlocks:
    """What `flatten_blocks` wrote: `tokens` (N, T) int32, `lengths` (N,), `masked` (N, T) bool, or None, and `starts`,
    or None."""

    def __init__(self, folder: Path):
        self.tokens = np.load(folder / TOKENS, mmap_mode="r")
        self.lengths = np.load(folder / LENGTHS)
        self.masked = np.load(folder / MASKED, mmap_mode="r") if (folder / MASKED).exists() else None
        self.starts = np.load(folder / STARTS, mmap_mode="r") if (folder / STARTS).exists() else None

    def take(self, indices: np.ndarray) -> Blocks:
        """These blocks; padding ones have length 0."""
        padding = indices == PADDING
        lengths = np.where(padding, 0, self.lengths[indices]).astype(np.int64)
        masked = None if self.masked is None else self.masked[indices]
        return Blocks(self.tokens[indices].astype(np.int64), lengths, masked, self._documents(indices))

    def predicted_tokens(self, indices: np.ndarray) -> int:
        """Tokens of these blocks that carry a loss: all but each block's first, and each document's, where documents do
        not see each other; none of the padding."""
        taken = indices[indices != PADDING]
        lengths = self.lengths[taken]
        predicted = int(np.maximum(lengths - 1, 0).sum())
        if self.starts is None:
            return predicted
        first = taken * self.tokens.shape[1]
        begun = np.searchsorted(self.starts, first + lengths) - np.searchsorted(self.starts, first, side="right")
        return predicted - int(np.maximum(begun, 0).sum())

    def _documents(self, indices: np.ndarray) -> np.ndarray | None:
        if self.starts is None:
            return None
        block_size = self.tokens.shape[1]
        place_BT = np.maximum(indices, 0)[:, None] * block_size + np.arange(block_size)
        return np.searchsorted(self.starts, place_BT, side="right")


def _read(path: Path, column: str) -> pa.Table:
    return schemas.read_table(path, columns=[column])


def _write(path: Path, shape: tuple[int, int], dtype: Any, shards: Iterator[np.ndarray]) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    start = 0
    for shard in shards:
        out[start : start + len(shard)] = shard
        start += len(shard)
    assert start == len(out), (start, len(out))
    out.flush()


def _masks(files: list[Path], mask: Path, block_size: int) -> Iterator[np.ndarray]:
    schema = schemas.mask(block_size)
    for path, corpus_path in zip(verified_files(mask), files, strict=True):
        table = schemas.read_table(path, schema)
        if not table.column("block_id").equals(_read(corpus_path, "block_id").column("block_id")):
            raise ValueError(f"{path} holds other blocks than the corpus shard of that number")
        yield schemas.per_token_array(table, "masked")
