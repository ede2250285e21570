"""The corpus' blocks and their mask as a training worker holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ifguide import schemas
from ifguide.artifacts import data_files
from ifguide.stages.pack_corpus import corpus_block_size
from ifguide.training import PADDING


class TrainingBlocks:
    """The corpus' blocks in memory, (N, T) int32, with their mask if there is one; taken by index."""

    def __init__(self, corpus: Path, mask: Path | None):
        self.block_size = corpus_block_size(corpus)
        tables = [schemas.read_table(path) for path in data_files(corpus)]
        self.tokens = np.concatenate([schemas.per_token_array(table, "tokens") for table in tables])
        self.lengths = np.concatenate([table.column("length").to_numpy() for table in tables])
        self.masked = self._read_mask(mask, tables) if mask else None

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(tokens_BT int64, lengths_B int64, masked_BT bool or None); padding blocks have length 0."""
        padding = indices == PADDING
        lengths = np.where(padding, 0, self.lengths[indices]).astype(np.int64)
        masked = None if self.masked is None else self.masked[indices]
        return self.tokens[indices].astype(np.int64), lengths, masked

    def predicted_tokens(self, indices: np.ndarray) -> int:
        """Tokens of these blocks that carry a loss: all but each block's first, none of the padding."""
        return int(np.maximum(self.lengths[indices[indices != PADDING]] - 1, 0).sum())

    def _read_mask(self, mask: Path, corpus_tables: list[Any]) -> np.ndarray:
        schema = schemas.mask(self.block_size)
        parts = []
        for path, blocks in zip(data_files(mask), corpus_tables, strict=True):
            table = schemas.read_table(path, schema)
            if not table.column("block_id").equals(blocks.column("block_id")):
                raise ValueError(f"{path} holds other blocks than the corpus shard of that number")
            parts.append(schemas.per_token_array(table, "masked"))
        return np.concatenate(parts)
