"""Blocks of a corpus with people's labels of their tokens: a sample, by seed, to learn from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ifguide.spans.tables import PackedCorpus, document_numbers

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def labelled_blocks(corpus: PackedCorpus, tokens: int, seed: int) -> tuple[list[list[int]], list[Bools], list[Ints]]:
    """Token ids, annotations (T,) and documents (T,) of blocks that hold about `tokens` annotated tokens, or all of
    them, and of as many blocks without any.

    Shards are read in random order until they hold enough. Raises ValueError where the corpus has no annotated token.
    """
    rng = np.random.default_rng(seed)
    marked: list[tuple[int, int]] = []  # shard, block within it
    plain: list[tuple[int, int]] = []
    annotated_tokens: list[int] = []
    for shard in rng.permutation(corpus.num_shards).tolist():
        begin, end = corpus.extent(shard)
        annotated = corpus.read(corpus.folder, "shard", "annotated", begin, end)
        counts = np.add.reduceat(annotated.astype(np.int64), np.arange(0, end - begin, corpus.block_size))
        for block in rng.permutation(len(counts)).tolist():
            (marked if counts[block] else plain).append((shard, block))
            annotated_tokens += [int(counts[block])] if counts[block] else []
        if sum(annotated_tokens) >= tokens:
            break
    if not annotated_tokens:
        raise ValueError(f"{corpus.folder} has no annotated token; mask span_probe needs documents with spans")
    enough = int(np.searchsorted(np.cumsum(annotated_tokens), tokens)) + 1
    chosen = sorted([*marked[:enough], *plain[: min(enough, len(marked))]])
    blocks, labels, documents = [], [], []
    for shard in sorted({shard for shard, _ in chosen}):
        begin, end = corpus.extent(shard)
        ids, flags = (corpus.read(corpus.folder, "shard", name, begin, end) for name in ("tokens", "annotated"))
        numbers = document_numbers(corpus, shard)
        for block in [block for of_shard, block in chosen if of_shard == shard]:
            own = slice(block * corpus.block_size, (block + 1) * corpus.block_size)
            blocks.append(ids[own].tolist())
            labels.append(flags[own])
            documents.append(numbers[own])
    return blocks, labels, documents
