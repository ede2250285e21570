"""The stream of a corpus: all its documents end to end, cut into blocks and shards, planned from counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ifguide import schemas
from ifguide.config import Input, PackCorpus, redact
from ifguide.config.sources import HUB_PREFIX
from ifguide.corpus.packing import stream_order
from ifguide.corpus.reading import Chunk, hub_name
from ifguide.records.files import short_names
from ifguide.spans.tables import shard_name

TOKENS = "tokens"  # scratch folder of tokenised chunks


class TokenFile(NamedTuple):
    """A tokenised chunk: its scratch table's key, the input file's name, that file's rows before it, its documents."""

    key: str
    source: str
    first_row: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What packing any shard needs: the files of each input in reading order, and its number of documents."""

    folder: str
    block_size: int
    files: tuple[tuple[TokenFile, ...], ...]
    counts: tuple[int, ...]
    interleave: bool
    annotate: bool
    eos: int


@dataclass(frozen=True, kw_only=True)
class StreamShard:
    """A shard of the stream: its blocks, the document that it begins within, and its documents as (input, lo, hi) of
    every input that has any, so that thousands of inputs make no larger shards than few."""

    key: str
    first_block: int
    num_tokens: int
    first_doc_id: int
    first_token_start: int
    ranges: tuple[tuple[int, int, int], ...]


class StreamPlan:
    """Where every document lies in the stream, from the token counts alone.

    `tokenised` has a result of `TokeniseChunk` for each chunk, by key and in reading order.

    Raises:
        ValueError: there are no documents, or fewer tokens than one block.
    """

    def __init__(
        self,
        folder: Path,
        config: PackCorpus,
        chunks: Sequence[Chunk],
        tokenised: Mapping[str, Mapping[str, Any]],
        tokenizer: Any,
    ):
        self.folder, self.config = folder, config
        self.eos, self.vocab_size = tokenizer.eos_token_id, len(tokenizer)
        self.annotate = any(source.spans_column for source in config.inputs)
        self.files: list[list[TokenFile]] = [[] for _ in config.inputs]
        lengths: list[list[np.ndarray]] = [[] for _ in config.inputs]
        names = short_names(sorted({chunk.path for chunk in chunks if chunk.kind != "hub"}))
        on_hub = _hub_names(config.inputs)
        for chunk, (key, result) in zip(chunks, tokenised.items(), strict=True):
            source = redact(names.get(chunk.path) or on_hub[chunk.input_index])  # the manifest has the paths
            self.files[chunk.input_index].append(TokenFile(key, source, result["first_row"], result["documents"]))
            table = schemas.read_table(folder / TOKENS / f"{key}.parquet", columns=["num_tokens"])
            lengths[chunk.input_index].append(table.column(0).to_numpy())
        per_input = [np.concatenate([*arrays, np.zeros(0, np.int64)]) for arrays in lengths]
        self.counts = [len(array) for array in per_input]
        self.inputs, self.indices = stream_order(self.counts, interleave=config.interleave)
        self.num_documents = len(self.inputs)
        if not self.num_documents:
            raise ValueError(f"pack_corpus.inputs: no document in {', '.join(i.path for i in config.inputs)}")
        offsets = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)
        num_tokens = np.concatenate(per_input)[offsets[self.inputs] + self.indices]
        self.bounds = np.concatenate([[0], np.cumsum(num_tokens)])
        self.num_tokens = int(self.bounds[-1])
        if self.num_tokens < config.block_size:
            raise ValueError(
                f"the corpus has {self.num_tokens} tokens, fewer than one block of pack_corpus.block_size ="
                f" {config.block_size}: lower it or add documents"
            )
        self.num_blocks = -(-self.num_tokens // config.block_size)

    @property
    def rows(self) -> dict[str, int]:
        """Blocks, documents and tokens of the stream."""
        return {"blocks": self.num_blocks, "documents": self.num_documents, "tokens": self.num_tokens}

    def settings(self) -> PackSettings:
        """What every `PackShard` needs."""
        return PackSettings(
            folder=str(self.folder),
            block_size=self.config.block_size,
            files=tuple(tuple(files) for files in self.files),
            counts=tuple(self.counts),
            interleave=self.config.interleave,
            annotate=self.annotate,
            eos=self.eos,
        )

    def shards(self) -> list[StreamShard]:
        """The shards, each of `blocks_per_shard` blocks but the last."""
        shards = []
        for number, first_block in enumerate(range(0, self.num_blocks, self.config.blocks_per_shard)):
            start = first_block * self.config.block_size
            stop = min(start + self.config.blocks_per_shard * self.config.block_size, self.num_tokens)
            lo = int(np.searchsorted(self.bounds, start, side="right")) - 1
            hi = int(np.searchsorted(self.bounds, stop, side="left"))
            shards.append(
                StreamShard(
                    key=shard_name(number),
                    first_block=first_block,
                    num_tokens=stop - start,
                    first_doc_id=lo,
                    first_token_start=int(self.bounds[lo]),
                    ranges=self._ranges(lo, hi),
                )
            )
        return shards

    def _ranges(self, lo: int, hi: int) -> tuple[tuple[int, int, int], ...]:
        """The documents [lo, hi) of the stream per input that has any; those of one input keep their order there."""
        inputs, firsts, counts = np.unique(self.inputs[lo:hi], return_index=True, return_counts=True)
        begins = self.indices[lo + firsts]
        return tuple(zip(inputs.tolist(), begins.tolist(), (begins + counts).tolist(), strict=True))


def _hub_names(inputs: Sequence[Input]) -> dict[int, str]:
    """The name of each dataset of the hub, by its index: its path, and where that stands for several subsets or splits
    `hf://name/subset:split`."""
    parts = {
        index: (source.path, source.subset, *hub_name(source)) for index, source in enumerate(inputs) if source.on_hub
    }
    several = {path for path, count in Counter(path for path, *_ in set(parts.values())).items() if count > 1}
    return {
        index: f"{HUB_PREFIX}{name}{f'/{subset}' if subset else ''}:{split}" if path in several else path
        for index, (path, subset, name, split) in parts.items()
    }
