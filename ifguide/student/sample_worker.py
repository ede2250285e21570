"""The work of `fit_student` on workers: score a part of the sample exactly, and keep what a student is fitted on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ifguide.artifacts import publish
from ifguide.config import Encoder
from ifguide.influence.memory import keep_memory
from ifguide.influence.query_file import read_direction
from ifguide.influence.score_tables import require_finite
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.scoring_worker import ScoringSettings, in_micro_batches, layers_of, tensors
from ifguide.models import predicted_positions
from ifguide.spans.tables import PackedCorpus
from ifguide.storage import local_copy
from ifguide.student.head_fit import NO_BLOCKS, Transforms
from ifguide.student.parts import (
    EncoderPart,
    HeadPart,
    Labelled,
    NgramPart,
    Part,
    SuffixPart,
)
from ifguide.student.sampling import Sampling, ShardBlocks, read_blocks
from ifguide.student.suffix import SuffixStudent, first_of_suffix, suffix_scorer

TRANSFORMS = "transforms.npz"
RANGE_TOKENS = 1 << 15  # of which the transforms of the scores are taken
Kind = Literal["head", "suffix", "encoder", "ngram"]


@dataclass(frozen=True, kw_only=True)
class SamplePart:
    """Every so many-th shard of the corpus, from number `number` on."""

    key: str
    number: int


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What a sample is scored with and a student fitted. `scoring.scores` is the student's folder; it has the run's own
    query alone. `encoder` and `vocabulary`, the number of token ids, are of kind `encoder`."""

    scoring: ScoringSettings
    kind: Kind
    sampling: Sampling
    partitions: int
    encoder: Encoder
    vocabulary: int

    @property
    def folder(self) -> Path:
        return self.scoring.scores

    def part(self, number: int) -> Path:
        """Where a part is published."""
        return self.folder / f"part-{number:05d}.npz"


class ScoreSample:
    """Worker: the sampled blocks of a part in, what a student is fitted on out."""

    def __init__(self, settings: SampleSettings):
        keep_memory()
        self.settings, self.scorers = settings, Scorers.of(settings)
        self.transforms = read_transforms(settings.folder) if settings.kind == "head" else None

    def process(self, part: SamplePart) -> dict[str, Any]:
        settings, tally = self.settings, _Tally()
        out = self._part()
        for shard in range(part.number, settings.scoring.corpus.num_shards, settings.partitions):
            blocks = read_blocks(settings.scoring.corpus, shard)
            sampled = _sampled(blocks, settings.sampling, shard)
            tally.add(blocks, sampled)
            for held_out, rows in ((False, ~sampled.held_B), (True, sampled.held_B)):
                for labelled, halvings in label(settings, self.scorers, sampled.blocks.take(np.flatnonzero(rows))):
                    out.add(labelled, held_out=held_out)
                    tally.halvings += halvings
        out.save(settings.part(part.number))
        return tally.result()

    def _part(self) -> Part:
        """An empty one."""
        if self.transforms is not None:
            return HeadPart(self.transforms, layers_of(self.scorers.exact), self.settings.partitions)
        if self.scorers.suffix is not None:
            return SuffixPart(self.scorers.student(), self.settings.partitions)
        return EncoderPart() if self.settings.kind == "encoder" else NgramPart(self.settings.partitions)


class Scorers(NamedTuple):
    """What scores a sample: exactly, and for a `suffix` by that as well. Both share a model."""

    exact: TokenScorer
    suffix: TokenScorer | None

    @classmethod
    def of(cls, settings: SampleSettings) -> Scorers:
        """Those of a kind. Raises ValueError, as `suffix_scorer`."""
        (query,) = settings.scoring.queries.values()
        direction = read_direction(query)
        exact = settings.scoring.scorer([direction])
        if settings.kind != "suffix":
            return cls(exact, None)
        begun = SuffixStudent(first=first_of_suffix(len(exact.blocks)))
        return cls(exact, suffix_scorer(settings.scoring, exact.model, direction, begun))

    def student(self) -> SuffixStudent:
        """The `suffix`, not yet calibrated."""
        assert self.suffix is not None
        return SuffixStudent(first=first_of_suffix(len(self.exact.blocks)), steps=tuple(self.suffix.steps or ()))


def require_blocks(corpus: PackedCorpus, sampling: Sampling, kind: Kind) -> None:
    """Refuse a sample that no student of a kind can be fitted on. Reads shards until it knows: mostly one.

    Raises:
        ValueError: no block is held out, or (a `suffix` needs none) no other is sampled; says what to set.
    """
    fitted, held = kind == "suffix", False
    for shard in range(corpus.num_shards):
        held_B = _sampled(read_blocks(corpus, shard), sampling, shard).held_B
        fitted, held = fitted or not held_B.all(), held or bool(held_B.any())
        if fitted and held:
            return
    raise ValueError(NO_BLOCKS)


class _Sampled(NamedTuple):
    blocks: ShardBlocks
    held_B: np.ndarray


def _sampled(blocks: ShardBlocks, sampling: Sampling, shard: int) -> _Sampled:
    rows = sampling.rows(blocks.sources_BT[:, 0], shard)
    return _Sampled(blocks.take(rows), sampling.held(len(rows), shard))


class _Tally:
    """What a part has come to."""

    def __init__(self) -> None:
        self.started, self.halvings = time.monotonic(), 0
        self.blocks = self.held = self.tokens = 0
        self.sources: set[str] = set()
        self.sampled: set[str] = set()

    def add(self, blocks: ShardBlocks, sampled: _Sampled) -> None:
        self.blocks += len(sampled.held_B)
        self.held += int(sampled.held_B.sum())
        self.tokens += int(sampled.blocks.lengths_B.sum())
        self.sources |= set(blocks.sources)
        sources_BT, lengths_B = sampled.blocks.sources_BT, sampled.blocks.lengths_B
        own_BT = np.arange(sources_BT.shape[1]) < lengths_B[:, None]  # behind them is padding
        self.sampled |= {blocks.sources[place] for place in np.unique(sources_BT[own_BT])}

    def result(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("blocks", "held", "tokens", "halvings")},
            "sources": sorted(self.sources),
            "sampled_sources": sorted(self.sampled),
            "seconds": time.monotonic() - self.started,
        }


def label(settings: SampleSettings, scorers: Scorers, blocks: ShardBlocks) -> Iterator[tuple[Labelled, int]]:
    """Blocks with their exact scores, and how often the micro-batch was halved for them.

    Raises:
        ValueError: a score is not finite; names token and block.
    """
    apart_BT = settings.scoring.apart(blocks.documents_BT)
    layers = layers_of(scorers.exact)

    def score(rows: slice, usual_blocks: int) -> Labelled:
        tokens, lengths, documents = tensors(blocks.tokens_BT, blocks.lengths_B, apart_BT, rows)
        predicted = predicted_positions(tokens, lengths, documents)
        if settings.kind != "head":
            scores = scorers.exact.score(tokens, lengths, documents, usual_blocks=usual_blocks)[0]
            suffix = None
            if scorers.suffix is not None:
                suffix = scorers.suffix.score(tokens, lengths, documents, usual_blocks=usual_blocks)
            return Labelled(tokens, predicted.to(scores.device), scores, suffix_BT=suffix)
        scores, states, tangents = scorers.exact.score_and_read(
            tokens, lengths, layers, documents, usual_blocks=usual_blocks, tangents=True
        )
        assert tangents is not None
        features = torch.cat(states, dim=-1).float()
        on = scores.device
        return Labelled(tokens.to(on), predicted.to(on), scores[0], features, tangents[0].float())

    for rows, labelled, halvings in in_micro_batches(
        len(blocks.ids_B), settings.scoring.decision.micro_batch_blocks, score
    ):
        ids, known_BT = pa.array(blocks.ids_B[rows]), labelled.known_BT
        for of, scores_BT in (("the sample", labelled.scores_BT), ("the sample by the suffix", labelled.suffix_BT)):
            if scores_BT is not None:
                require_finite(scores_BT.where(known_BT, 0).float().cpu().numpy(), ids, of)
        yield labelled, halvings


def fit_transforms(settings: SampleSettings) -> None:
    """Publish the transforms of the scores of the sample's first blocks, which every part uses.

    Raises:
        ValueError: the sample is too small; says what to set.
    """
    scorers, scores, count = Scorers.of(settings), [], 0
    corpus, sampling = settings.scoring.corpus, settings.sampling
    shards = np.random.default_rng([sampling.seed, corpus.num_shards]).permutation(corpus.num_shards).tolist()
    for shard in shards:
        for labelled, _ in label(settings, scorers, _sampled(read_blocks(corpus, shard), sampling, shard).blocks):
            scores.append(labelled.scores_BT[labelled.known_BT].cpu().numpy())
            count += len(scores[-1])
            if count >= RANGE_TOKENS:
                break
        if count >= RANGE_TOKENS:
            break
    transforms = Transforms.of(np.concatenate([np.zeros(0, np.float32), *scores]))
    with publish(settings.folder / TRANSFORMS) as part, part.open("wb") as file:
        np.savez(file, **vars(transforms))


def read_transforms(folder: Path) -> Transforms:
    """Those that `fit_transforms` has published in the student's folder."""
    with np.load(local_copy(folder / TRANSFORMS)) as saved:
        return Transforms(quantiles_Q=saved["quantiles_Q"])
