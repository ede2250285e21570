"""Parts of a labelled sample, as files that add up: what a student is fitted on.

A part holds sums over the blocks that are fitted on and over those that are held out, and some of the latter as they
are, for the figures of what is tried. Of an `encoder` it holds all blocks. The files of all parts together, in order,
give the student.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ifguide.artifacts import publish
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.smoothing import FoldSums
from ifguide.student.calibration import CalibrationSums
from ifguide.student.encoder import EncoderStudent
from ifguide.student.encoder_fit import EncoderSettings, LabelledBlocks, fit_encoder
from ifguide.student.fidelity import TOP_SHARE, fidelity
from ifguide.student.head import HeadStudent
from ifguide.student.head_fit import NO_BLOCKS, HeadSample, HeldBlocks, Transforms, best_head, fit_head
from ifguide.student.ngrams import NgramStudent, NgramSums, best_ngram, choose_ngrams
from ifguide.student.suffix import SuffixStudent

HELD_FEATURES = 1 << 15  # tokens of all parts whose features are kept
HELD_TOKENS = 1 << 22  # of all parts whose ids and scores are


class Labelled(NamedTuple):
    """Blocks with exact scores of where `known_BT`, (B, T) each; for a `head`, states and final tangents as well, for a
    `suffix` its scores."""

    tokens_BT: Tensor
    known_BT: Tensor
    scores_BT: Tensor
    features_BTF: Tensor | None = None
    tangents_BTD: Tensor | None = None
    suffix_BT: Tensor | None = None


class Part(Protocol):
    """That of a student of some kind."""

    def add(self, blocks: Labelled, *, held_out: bool) -> None:
        """Add some blocks."""

    def save(self, path: Path) -> None:
        """Publish what the student is fitted on."""


class Fitted(NamedTuple):
    """A student, which of what was tried it is, all of that, and the edge of the top `TOP_SHARE` of its own scores in
    blocks that were held out."""

    student: HeadStudent | SuffixStudent | EncoderStudent | NgramStudent
    chosen: dict[str, Any]
    tried: list[dict[str, Any]]
    edge: float


class HeadPart:
    """That of a `head` student."""

    def __init__(self, transforms: Transforms, layers: tuple[int, ...], partitions: int):
        self.sample = HeadSample(transforms, layers, most_held=-(-HELD_FEATURES // partitions))

    def add(self, blocks: Labelled, *, held_out: bool) -> None:
        """Add some blocks."""
        assert blocks.features_BTF is not None
        assert blocks.tangents_BTD is not None
        self.sample.add(*blocks[:3], blocks.features_BTF, blocks.tangents_BTD, held_out=held_out)

    def save(self, path: Path) -> None:
        """Publish what `fit_head_parts` reads."""
        sums = self.sample.sums
        arrays: dict[str, Any] = {} if sums is None else vars(sums)
        held = {
            f"held_{name}": torch.cat([getattr(own, name) for own in self.sample.held]).cpu().numpy()
            for name in (HeldBlocks._fields if self.sample.held else ())
        }
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, **arrays | held)


class NgramPart:
    """That of an `ngram` student."""

    def __init__(self, partitions: int):
        self.most_held = -(-HELD_TOKENS // partitions)
        self.sums: dict[bool, NgramSums] = {}
        self.held: list[tuple[np.ndarray, ...]] = []

    def add(self, blocks: Labelled, *, held_out: bool) -> None:
        """Add some blocks."""
        arrays = tuple(own.cpu().numpy() for own in blocks[:3])
        tokens_BT, known_BT, scores_BT = arrays
        part = NgramSums.of(tokens_BT, scores_BT, known_BT)
        self.sums[held_out] = self.sums[held_out] + part if held_out in self.sums else part
        if held_out and sum(own[0].size for own in self.held) < self.most_held:
            self.held.append(arrays)

    def save(self, path: Path) -> None:
        """Publish what `fit_ngram_parts` reads."""
        arrays = {
            f"{kind}_{name}": value
            for kind, held in (("fitted", False), ("held", True))
            for name, value in (vars(self.sums[held]) if held in self.sums else {}).items()
        }
        if self.held:
            names = ("blocks_tokens", "blocks_known", "blocks_scores")
            arrays |= {name: np.concatenate(own) for name, own in zip(names, zip(*self.held, strict=True), strict=True)}
        with publish(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)


class SuffixPart:
    """That of a `suffix` student, which is calibrated on all blocks; `student` is that without a calibration."""

    def __init__(self, student: SuffixStudent, partitions: int):
        self.student, self.most_held, self.held_tokens = student, -(-HELD_TOKENS // partitions), 0
        self.sums = CalibrationSums.of(np.zeros(0), np.zeros(0))
        self.held: list[np.ndarray] = []

    def add(self, blocks: Labelled, *, held_out: bool) -> None:
        """Add some blocks."""
        assert blocks.suffix_BT is not None
        pair_2N = torch.stack([blocks.scores_BT, blocks.suffix_BT])[:, blocks.known_BT].float().cpu().numpy()
        self.sums += CalibrationSums.of(*pair_2N)
        if held_out and self.held_tokens < self.most_held:
            self.held.append(pair_2N)
            self.held_tokens += pair_2N.shape[1]

    def save(self, path: Path) -> None:
        """Publish what `fit_suffix_parts` reads."""
        held = np.concatenate([np.zeros((2, 0), np.float32), *self.held], axis=1)
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, **vars(self.sums), held=held, first=self.student.first, steps=np.array(self.student.steps))


class EncoderPart:
    """That of an `encoder` student: all blocks."""

    def __init__(self) -> None:
        self.blocks: dict[bool, list[LabelledBlocks]] = {False: [], True: []}

    def add(self, blocks: Labelled, *, held_out: bool) -> None:
        """Add some blocks."""
        tokens_BT, known_BT, scores_BT = (own.cpu().numpy() for own in blocks[:3])
        labelled = LabelledBlocks(tokens_BT.astype(np.int32), known_BT, scores_BT.astype(np.float32))
        self.blocks[held_out].append(labelled)

    def save(self, path: Path) -> None:
        """Publish what `fit_encoder_parts` reads."""
        arrays = {
            f"{kind}_{name}": own
            for kind, held in (("fitted", False), ("held", True))
            if self.blocks[held]
            for name, own in LabelledBlocks.joined(self.blocks[held])._asdict().items()
        }
        with publish(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)


def fit_suffix_parts(paths: Iterable[Path]) -> Fitted:
    """The student of all parts.

    Raises:
        ValueError: no blocks were held out.
    """
    sums, held, students = CalibrationSums.of(np.zeros(0), np.zeros(0)), [], []
    for path in paths:
        with np.load(path) as saved:
            held.append(saved["held"])
            students.append(SuffixStudent(first=int(saved["first"]), steps=tuple(saved["steps"].tolist())))
            sums += CalibrationSums(**{name: saved[name].item() for name in vars(sums)})
    exact_N, suffix_N = np.concatenate(held, axis=1)
    if not len(exact_N):
        raise ValueError(NO_BLOCKS)
    line = sums.fit()
    student = students[0].calibrated(line)
    tried: dict[str, Any] = {"first": student.first, "slope": line.slope, **fidelity(exact_N, suffix_N)}
    return Fitted(student, tried, [tried], _edge(student.scores(suffix_N)))


def fit_encoder_parts(paths: Iterable[Path], settings: EncoderSettings) -> Fitted:
    """The student of all parts. Of the blocks that are held out, what is beyond `HELD_TOKENS` is fitted on.

    Raises:
        ValueError: no blocks were held out, or none are left to be fitted on; and as `fit_encoder`.
    """
    blocks: dict[str, list[LabelledBlocks]] = {"fitted": [], "held": []}
    for path in paths:
        with np.load(path) as saved:
            for kind, own in blocks.items():
                names = [f"{kind}_{name}" for name in LabelledBlocks._fields]
                if names[0] in saved.files:
                    own.append(LabelledBlocks(*(saved[name] for name in names)))
    if not all(blocks.values()):
        raise ValueError(NO_BLOCKS)
    held = LabelledBlocks.joined(blocks["held"])
    most = max(1, HELD_TOKENS // held.tokens_BT.shape[1])
    fitted = LabelledBlocks.joined([*blocks["fitted"], held.take(slice(most, None))])
    return Fitted(*fit_encoder(fitted, held.take(slice(most)), settings))


def fit_head_parts(
    paths: Iterable[Path],
    transforms: Transforms,
    layers: tuple[int, ...],
    head: HeadDerivatives,
    device: torch.device,
) -> Fitted:
    """The student of all parts; `device` is that of the head. Raises ValueError, as `fit_head`."""
    sample = HeadSample(transforms, layers)
    for path in paths:
        with np.load(path) as saved:
            arrays = {name: saved[name] for name in saved.files}
        held = {name: arrays.pop(f"held_{name}") for name in HeldBlocks._fields if f"held_{name}" in arrays}
        if arrays:
            sample.add_sums(FoldSums(**arrays))
        if held:
            sample.held.append(HeldBlocks(*(torch.from_numpy(own).to(device) for own in held.values())))
    fit = fit_head(sample, head)
    return Fitted(fit.student, best_head(fit.tried), fit.tried, _edge(fit.held_N))


def fit_ngram_parts(paths: Iterable[Path]) -> Fitted:
    """The student of all parts.

    Raises:
        ValueError: no blocks were held out, or none were fitted on.
    """
    sums: dict[str, NgramSums] = {}
    held: list[tuple[np.ndarray, ...]] = []
    for path in paths:
        with np.load(path) as saved:
            for kind in ("fitted", "held"):
                if f"{kind}_total" in saved.files:
                    part = NgramSums.read(saved, f"{kind}_")
                    sums[kind] = sums[kind] + part if kind in sums else part
            if "blocks_tokens" in saved.files:
                held.append(tuple(saved[f"blocks_{name}"] for name in ("tokens", "scores", "known")))
    if "fitted" not in sums or not held:
        raise ValueError(NO_BLOCKS)
    tokens_BT, scores_BT, known_BT = (np.concatenate(own) for own in zip(*held, strict=True))
    student, tried = choose_ngrams(sums["fitted"], tokens_BT, scores_BT, known_BT)
    edge = _edge(student.score(tokens_BT)[known_BT])
    whole = replace(student, sums=student.sums + sums["held"])
    return Fitted(whole, dict(best_ngram(tried)), list(tried), edge)


def _edge(scores_N: np.ndarray) -> float:
    return float(np.quantile(scores_N.astype(np.float64), 1 - TOP_SHARE))
