"""Token scores of texts of many lengths, several directions in a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.method import Attribution, Method, Precision
from ifguide.influence.products import bfloat16_pays
from ifguide.influence.scorer import TokenScorer
from ifguide.telemetry import Progress

PRECISION: Precision = "bfloat16" if bfloat16_pays(torch.device("cpu")) else "float32"
METHOD = Method(engine="difference", precision=PRECISION, rank=None)
BATCH_TOKENS = 2048


def score_blocks(
    model: PreTrainedModel,
    directions: Sequence[Mapping[str, Tensor]],
    blocks: Sequence[tuple[np.ndarray, Any, Any]],
    attribution: Attribution,
    fill: int,
    *,
    at_once: int = 4,
    method: Method = METHOD,
) -> list[list[np.ndarray]]:
    """Per direction, the label-aligned scores of every block; `at_once` directions share a pass."""
    order = sorted(range(len(blocks)), key=lambda i: len(blocks[i][0]))
    results: list[list[np.ndarray]] = []
    passes = -(-len(directions) // at_once)
    progress = Progress(attribution, passes * sum(len(block[0]) for block in blocks), "tokens")
    for begin in range(0, len(directions), at_once):
        scorer = TokenScorer(model, directions[begin : begin + at_once], attribution=attribution, method=method)
        part: list[list[np.ndarray]] = [[np.zeros(0)] * len(blocks) for _ in directions[begin : begin + at_once]]
        for batch in _batches(order, blocks):
            lengths = torch.tensor([len(blocks[i][0]) for i in batch])
            tokens = torch.full((len(batch), int(lengths.max())), fill)
            for row, i in enumerate(batch):
                tokens[row, : len(blocks[i][0])] = torch.from_numpy(blocks[i][0])
            scores_KBT = scorer.score(tokens, lengths).numpy()
            for k, of_direction in enumerate(part):
                for row, i in enumerate(batch):
                    of_direction[i] = scores_KBT[k, row, : len(blocks[i][0])]
            progress.advance(float(lengths.sum()))
        results += part
    return results


def _batches(order: Sequence[int], blocks: Sequence[Any]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(blocks[i][0]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
