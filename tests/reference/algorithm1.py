"""Algorithm 1 of IF-Guide as the literal sequential loop, in Python floats (float64): the oracle.

One pass over everything, one token at a time, nothing merged. `blocks[b]` are the scores of the real tokens of
block b (no padding), `documents` the half-open stream intervals of the documents in order. The tokens of `excluded`
blocks score minus infinity once tau is known. With a `prior` a unit's count and sum are divided by its predicted tokens
and the prior. A `tau` that is given replaces the quantile.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np


def select(
    blocks: Sequence[Sequence[float]],
    documents: Sequence[tuple[int, int]],
    block_size: int,
    *,
    quantile: float,
    window: int,
    max_fraction: float,
    unit: str,
    prior: int | None = None,
    tau: float | None = None,
    excluded: Collection[int] = (),
) -> tuple[float, list[float], set[tuple[int, int]]]:
    """tau, the rank score of every unit by id, and the masked (block, index) pairs."""
    document_of: dict[int, int] = {}
    for number, (begin, end) in enumerate(documents):
        for position in range(begin, end):
            document_of[position] = number

    predicted = [(b, i) for b, block in enumerate(blocks) for i in range(1, len(block))]
    if tau is None:
        tau = float(np.quantile(np.array([blocks[b][i] for b, i in predicted], dtype=np.float64), quantile))

    blocks = [[-math.inf] * len(block) if b in excluded else block for b, block in enumerate(blocks)]

    def unit_of(b: int, i: int) -> int:
        return b if unit == "block" else document_of[b * block_size + i]

    num_units = len(blocks) if unit == "block" else len(documents)
    tokens: list[list[tuple[int, int]]] = [[] for _ in range(num_units)]
    for b, i in predicted:
        if blocks[b][i] > tau:
            tokens[unit_of(b, i)].append((b, i))

    counts = [float(len(selected)) for selected in tokens]
    sums = []
    for selected in tokens:
        total = 0.0
        for block in sorted({b for b, _ in selected}):
            piece = 0.0
            for b, i in selected:
                if b == block:
                    piece += blocks[b][i]
            total += piece
        sums.append(total)

    if prior is not None:
        sizes = [0] * num_units
        for b, i in predicted:
            sizes[unit_of(b, i)] += 1
        counts = [count / max(size + prior, 1) for count, size in zip(counts, sizes, strict=True)]
        sums = [total / max(size + prior, 1) for total, size in zip(sums, sizes, strict=True)]
    s, f = normalise(counts), normalise(sums)
    rank_score = [2 * x * y / (x + y) if x + y > 0 else 0.0 for x, y in zip(s, f, strict=True)]
    order = sorted(range(num_units), key=lambda number: (-rank_score[number], number))

    max_tokens = math.floor(max_fraction * len(predicted))
    masked: set[tuple[int, int]] = set()
    for number in order:
        for b, i in tokens[number]:
            for neighbour in range(i - window, i + window + 1):
                if len(masked) == max_tokens:
                    return tau, rank_score, masked
                inside = 1 <= neighbour < len(blocks[b])
                if inside and document_of[b * block_size + neighbour] == document_of[b * block_size + i]:
                    masked.add((b, neighbour))
    return tau, rank_score, masked


def normalise(values: list[float]) -> list[float]:
    """Min-max; 0 where all values are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
