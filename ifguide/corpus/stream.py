"""The stream of a corpus: all its documents end to end, cut into blocks and shards, planned from counts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ifguide import schemas
from ifguide.corpus.reading import Chunk, stream_order
from ifguide.run import Run

TOKENS = "tokens"  # scratch folder of tokenised chunks


class StreamPlan:
    """Where every document lies in the stream, from the token counts alone."""

    def __init__(self, run: Run, chunks: list[Chunk], tokenised: dict[str, dict[str, Any]], tokenizer: Any):
        config = run.config.pack_corpus
        self.block_size, self.blocks_per_shard = config.block_size, config.blocks_per_shard
        self.interleave, self.eos, self.vocab_size = config.interleave, tokenizer.eos_token_id, len(tokenizer)
        self.annotate = any(source.spans_column for source in config.inputs)
        self.files: list[list[tuple[str, str, int, int]]] = [[] for _ in config.inputs]
        lengths: list[list[np.ndarray]] = [[] for _ in config.inputs]
        for chunk, (key, result) in zip(chunks, tokenised.items(), strict=True):
            # the name alone: the same files in another folder make the same corpus; the manifest has the paths
            source = chunk.path if chunk.kind == "hub" else Path(chunk.path).name
            self.files[chunk.input_index].append((key, source, result["first_row"], result["documents"]))
            table = schemas.read_table(run.corpus / TOKENS / f"{key}.parquet", columns=["num_tokens"])
            lengths[chunk.input_index].append(table.column(0).to_numpy())
        per_input = [np.concatenate([*arrays, np.zeros(0, np.int64)]) for arrays in lengths]
        self.counts = [len(array) for array in per_input]
        self.inputs, self.indices = stream_order(self.counts, interleave=self.interleave)
        self.num_documents = len(self.inputs)
        if not self.num_documents:
            raise ValueError(f"pack_corpus.inputs: no document in {', '.join(i.path for i in config.inputs)}")
        offsets = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)
        num_tokens = np.concatenate(per_input)[offsets[self.inputs] + self.indices]
        self.bounds = np.concatenate([[0], np.cumsum(num_tokens)])
        self.num_tokens = int(self.bounds[-1])
        if self.num_tokens < self.block_size:
            raise ValueError(
                f"the corpus has {self.num_tokens} tokens, fewer than one block of pack_corpus.block_size ="
                f" {self.block_size}: lower it or add documents"
            )
        self.num_blocks = -(-self.num_tokens // self.block_size)

    def settings(self) -> dict[str, Any]:
        """What every `PackShard` needs."""
        names = ("files", "counts", "interleave", "annotate", "eos")
        return {name: getattr(self, name) for name in names}

    def shard_descriptors(self) -> list[dict[str, Any]]:
        """One small descriptor per shard of `blocks_per_shard` blocks."""
        descriptors = []
        for number, first_block in enumerate(range(0, self.num_blocks, self.blocks_per_shard)):
            start = first_block * self.block_size
            stop = min(start + self.blocks_per_shard * self.block_size, self.num_tokens)
            lo = int(np.searchsorted(self.bounds, start, side="right")) - 1
            hi = int(np.searchsorted(self.bounds, stop, side="left"))
            descriptors.append(
                {
                    "key": f"{number:05d}",
                    "first_block": first_block,
                    "num_tokens": stop - start,
                    "first_doc_id": lo,
                    "first_token_start": int(self.bounds[lo]),
                    "ranges": [self._range(index, lo, hi) for index in range(len(self.counts))],
                }
            )
        return descriptors

    def _range(self, input_index: int, lo: int, hi: int) -> list[int]:
        indices = self.indices[lo:hi][self.inputs[lo:hi] == input_index]
        return [int(indices[0]), int(indices[-1]) + 1] if len(indices) else [0, 0]
