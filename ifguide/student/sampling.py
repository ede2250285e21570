"""Which blocks of a corpus are scored exactly: to fit a student on, and to audit it.

Both samples are drawn shard by shard, from the seed and the shard's number alone, so that whoever asks gets the same
blocks. The sample that a student is fitted on takes the same share of every source. The audit is a simple random sample
of the blocks that are not in it: a student is not judged by what it was fitted on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.artifacts import verified
from ifguide.spans.tables import PackedCorpus, document_numbers, in_blocks, read_documents, shard_name

AUDITED_BLOCKS = 2000  # at most: beyond these an interval hardly narrows, and the bootstrap takes minutes
LEAST_AUDITED = 5  # blocks, on average
SAMPLE, HELD_OUT, AUDIT = 1, 2, 3  # what a random stream is for
Integers = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`fraction` of the blocks of each source, `held_out` of which are."""

    fraction: float
    held_out: float
    seed: int

    def rows(self, sources_B: Integers, shard: int) -> NDArray[np.intp]:
        """The sampled blocks of a shard, ascending. `sources_B`: the number of each block's source."""
        rng, chosen = np.random.default_rng([self.seed, shard, SAMPLE]), []
        for source in np.unique(sources_B):
            own = rng.permutation(np.flatnonzero(sources_B == source))
            chosen.append(own[: int(self.fraction * len(own) + rng.random())])
        return np.sort(np.concatenate(chosen))

    def held(self, count: int, shard: int) -> NDArray[np.bool_]:
        """Which of that many sampled blocks are held out, evenly spread."""
        start = np.random.default_rng([self.seed, shard, HELD_OUT]).random()
        return np.diff(np.floor(start + self.held_out * np.arange(count + 1))) > 0


def audit_share(fraction: float, blocks: int) -> float:
    """The share of a corpus' blocks that is audited."""
    return min(fraction, AUDITED_BLOCKS / blocks)


def require_audit(fraction: float, blocks: int) -> None:
    """Raise ValueError where so small a share of a corpus' blocks is audited that it may be none of them."""
    if fraction * blocks < LEAST_AUDITED:
        least = min(1.0, LEAST_AUDITED / blocks)
        raise ValueError(
            f"score_corpus.audit_fraction: {fraction:g} of {blocks:,} blocks is an audit of {fraction * blocks:.1f},"
            f" which tells nothing; set it to {math.ceil(1000 * least) / 1000:g} or more, or score with scorer: exact"
        )


def audited_rows(blocks: int, sampled: Integers, fraction: float, seed: int, shard: int) -> NDArray[np.intp]:
    """The audited blocks of a shard of so many, ascending: `fraction` of them, none of the `sampled` ones."""
    rng = np.random.default_rng([seed, shard, AUDIT])
    rest = rng.permutation(np.setdiff1d(np.arange(blocks), sampled))
    return np.sort(rest[: int(fraction * blocks + rng.random())])


class ShardBlocks(NamedTuple):
    """Blocks of one shard: token ids, documents' numbers and sources' (B, T), lengths, and the sources by number."""

    ids_B: NDArray[np.int64]
    tokens_BT: NDArray[np.int32]
    lengths_B: NDArray[np.int32]
    documents_BT: NDArray[np.int64]
    sources_BT: NDArray[np.int64]
    sources: tuple[str, ...]

    def take(self, rows: Integers) -> ShardBlocks:
        """Some of them."""
        return self._replace(
            ids_B=self.ids_B[rows],
            tokens_BT=self.tokens_BT[rows],
            lengths_B=self.lengths_B[rows],
            documents_BT=self.documents_BT[rows],
            sources_BT=self.sources_BT[rows],
        )


def read_blocks(corpus: PackedCorpus, shard: int) -> ShardBlocks:
    """All blocks of a shard of a finished corpus."""
    table = schemas.read_table(verified(corpus.folder, f"shard-{shard_name(shard)}.parquet"))
    tokens_BT = schemas.per_token_array(table, "tokens")
    numbers = document_numbers(corpus, shard)
    sources, of_document = _sources(corpus, shard, numbers)
    return ShardBlocks(
        ids_B=table.column("block_id").to_numpy(),
        tokens_BT=tokens_BT,
        lengths_B=table.column("length").to_numpy(),
        documents_BT=in_blocks(numbers, tokens_BT),
        sources_BT=in_blocks(of_document[numbers - numbers[0]], tokens_BT),
        sources=sources,
    )


def _sources(corpus: PackedCorpus, shard: int, numbers: Integers) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The sources of a shard, sorted, and the place among them of each document from the first on."""
    table = read_documents(corpus, shard)
    names = table.column("source").to_pylist()
    if not len(table) or table.column("doc_id")[0].as_py() > numbers[0]:  # the shard begins within a document
        names.insert(0, _source_before(corpus, shard))
    sources, places = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    return tuple(sources.tolist()), places.astype(np.int64)


def _source_before(corpus: PackedCorpus, shard: int) -> str:
    """That of the last document that begins before a shard."""
    for earlier in range(shard - 1, -1, -1):
        documents = read_documents(corpus, earlier)
        if len(documents):
            return str(documents.column("source")[-1].as_py())
    raise ValueError(f"{corpus.folder}: no document begins before shard {shard}; pack the corpus again")
