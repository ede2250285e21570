"""The documents of `bench/student.py` with all that one exact pass gives, in the shapes that students learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.scorer import TokenScorer
from ifguide.influence.smoothing import smoothing_layers
from ifguide.models import predicted_positions
from ifguide.student.encoder_fit import LabelledBlocks
from ifguide.student.head import read_features
from ifguide.telemetry import Progress

BATCH = 16  # documents of like length
PACKED = 256  # tokens of a block that an encoder learns from
TEST_SHARE = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Documents of like length: their numbers, ids, and all that one exact pass gives; `read_BTF` are the features as
    the student's own pass reads them."""

    numbers: list[int]
    tokens_BT: Tensor
    known_BT: Tensor
    scores_BT: Tensor
    features_BTF: Tensor
    tangents_BTD: Tensor
    read_BTF: Tensor

    def of(self, wanted: set[int]) -> Batch | None:
        """The documents among them that are wanted."""
        rows = [row for row, number in enumerate(self.numbers) if number in wanted]
        if not rows:
            return None
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, numbers=[self.numbers[row] for row in rows], **tensors)


class LabelledDocuments:
    """Documents (T,) of token ids with their exact scores. `test` are the numbers of those for testing, `learnable` of
    the others."""

    def __init__(self, ids: Sequence[np.ndarray], scorer: TokenScorer, reader: PreTrainedModel):
        """reader: what reads the features as a student's own pass does."""
        self.sizes, self.layers = np.array([len(own) for own in ids]), smoothing_layers(len(scorer.blocks))
        self.batches = list(self._read(ids, scorer, reader))
        order = np.random.default_rng(0).permutation(len(ids))
        cut = round((1 - TEST_SHARE) * len(order))
        self.learnable, self.test = order[:cut], np.sort(order[cut:])

    def _read(self, ids: Sequence[np.ndarray], scorer: TokenScorer, reader: PreTrainedModel) -> Iterator[Batch]:
        order, progress = np.argsort(self.sizes, kind="stable"), Progress("exact", float(self.sizes.sum()), "tokens")
        for begin in range(0, len(order), BATCH):
            numbers = order[begin : begin + BATCH].tolist()
            lengths_B = torch.from_numpy(self.sizes[numbers])
            tokens_BT = torch.zeros(len(numbers), int(lengths_B.max()), dtype=torch.int64)
            for row, number in enumerate(numbers):
                tokens_BT[row, : self.sizes[number]] = torch.from_numpy(ids[number])
            scores, states, tangents = scorer.score_and_read(tokens_BT, lengths_B, self.layers, tangents=True)
            assert tangents is not None
            yield Batch(
                numbers=numbers,
                tokens_BT=tokens_BT,
                known_BT=predicted_positions(tokens_BT, lengths_B),
                scores_BT=scores[0],
                features_BTF=torch.cat(states, dim=-1).float(),
                tangents_BTD=tangents[0].float(),
                read_BTF=read_features(reader, tokens_BT, self.layers).to(reader.dtype),
            )
            progress.advance(float(lengths_B.sum()))

    def padded(self, wanted: set[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, scores and where there is one, of documents in one array."""
        parts, longest = list(self.of(wanted)), int(self.sizes.max())
        arrays = []
        for name in ("tokens_BT", "scores_BT", "known_BT"):
            tensors = [getattr(own, name) for own in parts]
            padded = [torch.nn.functional.pad(own, (0, longest - own.shape[1])) for own in tensors]
            arrays.append(torch.cat(padded).numpy())
        return arrays[0], arrays[1], arrays[2]

    def of(self, wanted: set[int]) -> Iterator[Batch]:
        return (own for batch in self.batches if (own := batch.of(wanted)) is not None)

    def of_test(self, score: Callable[[Batch], Tensor]) -> list[np.ndarray]:
        """(T,) of each document for testing, in the order of their numbers."""
        scores: dict[int, np.ndarray] = {}
        for batch in self.of(set(self.test.tolist())):
            scores_BT = score(batch).float().numpy()
            scores |= {number: scores_BT[row, : self.sizes[number]] for row, number in enumerate(batch.numbers)}
        return [scores[number] for number in self.test.tolist()]

    def packed(self, wanted: set[int]) -> LabelledBlocks:
        """Documents end to end in blocks, where the first token of each and of a block has no score. What does not fill
        the last block is padding, without a score."""
        parts = [own for batch in self.of(wanted) for own in self._rows(batch)]
        streams = [np.concatenate(own) for own in zip(*parts, strict=True)]
        missing = -len(streams[0]) % PACKED
        tokens_BT, known_BT, scores_BT = (np.pad(own, (0, missing)).reshape(-1, PACKED) for own in streams)
        known_BT[:, 0] = False
        return LabelledBlocks(tokens_BT.astype(np.int32), known_BT, scores_BT.astype(np.float32))

    def _rows(self, batch: Batch) -> Iterator[tuple[np.ndarray, ...]]:
        """Ids, where there is a score, and scores of each document, (T,) each."""
        for row, number in enumerate(batch.numbers):
            own = slice(0, self.sizes[number])
            yield tuple(of[row, own].numpy() for of in (batch.tokens_BT, batch.known_BT, batch.scores_BT))

    def lengths(self, batch: Batch) -> Tensor:
        return torch.from_numpy(self.sizes[batch.numbers])
