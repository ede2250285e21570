"""A finished student as what scores blocks, whatever its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ifguide.artifacts import verified
from ifguide.influence.memory import MAX_TOKENS
from ifguide.influence.query_file import read_direction
from ifguide.influence.scorer import TokenScorer
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
    """What a cascade needs to know of a student. `edge`: of the top of its scores. `figures`: what it reached on the
    blocks that it was chosen by, and how it was chosen."""

    kind: str
    sampling: Sampling
    edge: float
    figures: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> StudentFacts:
        """Those of a finished student. Raises ValueError when the file has changed since."""
        content = json.loads(verified(folder, FACTS).read_bytes())
        return cls(
            kind=content["kind"],
            sampling=Sampling(**content["sampling"]),
            edge=content["edge"],
            figures=content["chosen"],
        )


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
        return _Encoded(EncoderStudent.load(path, device=settings.device, low_precision=low_precision))
    model = settings.model()
    if kind == "suffix":
        student, (query,) = SuffixStudent.load(path), settings.queries.values()
        own = suffix_scorer(settings, model, read_direction(query), student)
        return _Suffix(student, own, settings.decision.micro_batch_blocks)
    if low_precision:
        model = model.bfloat16()
    scorer = HeadScorer(model, HeadStudent.load(path), beginning=settings.beginning.token)
    return _Reader(scorer, settings.decision.micro_batch_blocks)


class _Lookup:
    def __init__(self, student: NgramStudent):
        self.student = student

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray:
        tokens, lengths, documents = tensors(tokens_BT, lengths_B, document_BT, slice(None))
        known_BT = predicted_positions(tokens, lengths, documents).numpy()
        return np.where(known_BT, self.student.score(tokens_BT), np.float32(0))


class _Reader:
    def __init__(self, scorer: HeadScorer, size: int):
        self.scorer, self.size = scorer, size

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray:
        def of(rows: slice, usual_blocks: int) -> np.ndarray:
            scores = self.scorer.score(*tensors(tokens_BT, lengths_B, document_BT, rows))
            return scores.float().cpu().numpy()

        return np.concatenate([part for _, part, _ in in_micro_batches(len(tokens_BT), self.size, of)])


class _Suffix:
    def __init__(self, student: SuffixStudent, scorer: TokenScorer, size: int):
        self.student, self.scorer, self.size = student, scorer, size

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray:
        def of(rows: slice, usual_blocks: int) -> np.ndarray:
            tokens, lengths, documents = tensors(tokens_BT, lengths_B, document_BT, rows)
            scores = self.scorer.score(tokens, lengths, documents, usual_blocks=usual_blocks).float().cpu().numpy()
            return np.where(predicted_positions(tokens, lengths, documents).numpy(), self.student.scores(scores), 0)

        parts = [part for _, part, _ in in_micro_batches(len(tokens_BT), self.size, of)]
        return np.concatenate(parts).astype(np.float32, copy=False)


class _Encoded:
    def __init__(self, student: EncoderStudent):
        self.student = student

    def score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, document_BT: np.ndarray | None) -> np.ndarray:
        def of(rows: slice, usual_blocks: int) -> np.ndarray:
            return self.student.score(*tensors(tokens_BT, lengths_B, document_BT, rows)).cpu().numpy()

        size = max(1, MAX_TOKENS[self.student.device.type] // tokens_BT.shape[1])
        return np.concatenate([part for _, part, _ in in_micro_batches(len(tokens_BT), size, of)])
