"""A finished student as what scores blocks, whatever its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.artifacts import verified
from ifguide.influence.memory import MAX_TOKENS
from ifguide.influence.query_file import read_direction
from ifguide.influence.scoring_worker import ScoringSettings, in_micro_batches, tensors
from ifguide.models import predicted_positions
from ifguide.storage import local_copy
from ifguide.student.encoder import EncoderStudent
from ifguide.student.head import HeadScorer, HeadStudent
from ifguide.student.ngrams import NgramStudent
from ifguide.student.sampling import Sampling
from ifguide.student.suffix import SuffixStudent, suffix_scorer

STUDENT, FACTS = "student.npz", "student.json"  # in the folder of the student


@dataclass(frozen=True, kw_only=True)
class StudentFacts:
    """What a cascade needs to know of a student. `edge`: of the top of its scores."""

    kind: str
    sampling: Sampling
    edge: float

    @classmethod
    def read(cls, folder: Path) -> StudentFacts:
        """Those of a finished student. Raises ValueError when the file has changed since."""
        content = json.loads(verified(folder, FACTS).read_bytes())
        return cls(kind=content["kind"], sampling=Sampling(**content["sampling"]), edge=content["edge"])


class BlockScorer(Protocol):
    """Scores (B, T), float32, label-aligned; 0 where nothing is predicted. `document_BT`: as `TokenScorer.score`."""

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray: ...


def load_scorer(folder: Path, kind: str, settings: ScoringSettings) -> BlockScorer:
    """The student of a folder. One that reads the proxy loads it. Products are in the precision that the run scores in;
    those of an `encoder` on a GPU alone."""
    path = local_copy(verified(folder, STUDENT))
    low_precision = settings.decision.method.precision == "bfloat16"
    if kind == "ngram":
        return _Lookup(NgramStudent.load(path))
    if kind == "encoder":
        torch.set_num_threads(settings.decision.threads)
        encoder = EncoderStudent.load(path, device=settings.device, low_precision=low_precision)
        size = max(1, MAX_TOKENS[encoder.device.type] // settings.corpus.block_size)
        return _ByMicroBatch(lambda *blocks, usual_blocks: encoder.score(*blocks), size)
    model, size = settings.model(), settings.decision.micro_batch_blocks
    if kind == "suffix":
        student, (query,) = SuffixStudent.load(path), settings.queries.values()
        return _ByMicroBatch(suffix_scorer(settings, model, read_direction(query), student).score, size, student.scores)
    if low_precision:
        model = in_bfloat16(model)
    head = HeadScorer(model, HeadStudent.load(path), beginning=settings.beginning.token)
    return _ByMicroBatch(lambda *blocks, usual_blocks: head.score(*blocks), size)


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights in bfloat16. Buffers stay: in it the frequencies of rotary positions are others."""
    for weights in model.parameters():
        weights.data = weights.data.bfloat16()
    return model


class _Lookup:
    def __init__(self, student: NgramStudent):
        self.student = student

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray:
        tokens, lengths, documents = tensors(tokens_BT, lengths_B, document_BT, slice(None))
        known_BT = predicted_positions(tokens, lengths, documents).numpy()
        return np.where(known_BT, self.student.score(tokens_BT), np.float32(0))


class _ByMicroBatch:
    """What scores micro-batches of `size` blocks; `then` is done to the scores that are predicted."""

    def __init__(
        self, batch: Callable[..., Tensor], size: int, then: Callable[[np.ndarray], np.ndarray] = lambda scores: scores
    ):
        self.batch, self.size, self.then = batch, size, then

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray:
        def of(rows: slice, usual_blocks: int) -> np.ndarray:
            blocks = tensors(tokens_BT, lengths_B, document_BT, rows)
            scores = self.batch(*blocks, usual_blocks=usual_blocks).float().cpu().numpy()
            return np.where(predicted_positions(*blocks).numpy(), self.then(scores), np.float32(0))

        return np.concatenate([part for _, part, _ in in_micro_batches(len(tokens_BT), self.size, of)])
