"""Training an `encoder` student on blocks that have exact scores, until it finds no more of the highest held-out ones.

One transformer learns all transforms of the score at once (`head_fit.TRANSFORMS`: cut, root, rank, top), a linear map
for each, by the squared error of the standardised targets. Of a score's top 2% the last is as much of the loss as any,
so half of what is learnt is about the top. After each epoch every map, and the mean of all, ranks the tokens of the
blocks that were held out. Of all epochs and maps the one is kept that finds most of the highest exact scores. Its
figures are too good, for it was chosen by them. Its scores are then put on the line to the exact ones (`calibration`).

AdamW; the learning rate rises over the first twentieth of all steps and falls as a cosine to a tenth; gradients are
clipped to a norm of 1. There is no dropout, of no family. Orders and first weights come from the seed: on a CPU the
same threads give the same bytes.

Memory: weights, gradients and two moments, and the sample: 9 bytes a token. Cost: 6 N FLOP for each fitted token and
epoch, N the parameters of the blocks, and a pass over the embeddings at each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ifguide.config import Encoder, ModelSource
from ifguide.student.calibration import calibrate
from ifguide.student.encoder import EncoderStudent, TokenRegression, low_precision
from ifguide.student.fidelity import TOP_SHARE, fidelity
from ifguide.student.head_fit import TRANSFORMS, Transforms
from ifguide.telemetry import Progress
from ifguide.training.schedule import epoch_order, parameter_groups

WARM_UP, LOWEST, CLIPPING, WEIGHT_DECAY = 0.05, 0.1, 1.0, 0.01
MEAN = "mean"  # of all transforms
BATCH_TOKENS = 1 << 14  # of a pass without gradients
Floats = NDArray[np.floating]


class LabelledBlocks(NamedTuple):
    """Token ids, where there is a score, and exact scores, (B, T) each."""

    tokens_BT: NDArray[np.int32]
    known_BT: NDArray[np.bool_]
    scores_BT: NDArray[np.float32]

    def take(self, rows: Any) -> LabelledBlocks:
        """Some of them."""
        return LabelledBlocks(*(own[rows] for own in self))

    @property
    def tokens(self) -> int:
        return self.tokens_BT.size

    @classmethod
    def joined(cls, parts: Sequence[LabelledBlocks]) -> LabelledBlocks:
        """All of some, in order."""
        return cls(*(np.concatenate(own) for own in zip(*parts, strict=True)))


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What is trained, how, and where. `apart`: documents of a block do not see each other."""

    options: Encoder
    source: ModelSource
    seed: int
    device: str = "cpu"
    apart: bool = False
    low_precision: bool = False


class FittedEncoder(NamedTuple):
    """The student, the figures of all epochs and maps, which of them it is, and the edge of the top `TOP_SHARE` of its
    scores in the blocks that were held out."""

    student: EncoderStudent
    chosen: dict[str, Any]
    tried: list[dict[str, Any]]
    edge: float


def fit_encoder(fitted: LabelledBlocks, held: LabelledBlocks, settings: EncoderSettings) -> FittedEncoder:
    """Train on `fitted`, choose by `held`.

    Raises:
        ValueError: no scores differ, or the loss is no longer finite; says what to set.
    """
    transforms = Transforms.of(fitted.scores_BT[fitted.known_BT])
    training = _Training(transforms, settings)
    options, exact_N = settings.options, held.scores_BT[held.known_BT]
    tried: list[dict[str, Any]] = []
    batch = max(1, options.batch_tokens // fitted.tokens_BT.shape[1])
    total = options.epochs * math.ceil(len(fitted.tokens_BT) / batch)
    progress = Progress("fit_student", float(options.epochs * fitted.tokens), "tokens")
    for epoch in range(options.epochs):
        order, losses = epoch_order(len(fitted.tokens_BT), settings.seed, epoch), []
        for begin in range(0, len(order), batch):
            blocks = fitted.take(order[begin : begin + batch])
            losses.append(training.step(blocks, total))
            progress.advance(float(blocks.tokens), loss=losses[-1])
        rankings = dict(training.rankings(held))
        loss = float(np.mean(losses))
        for target, found_N in rankings.items():
            tried.append({"epoch": epoch + 1, "target": target, "loss": loss} | fidelity(exact_N, found_N))
        best = best_encoder(tried)
        if best["epoch"] == epoch + 1:
            chosen_N = rankings[best["target"]]
            weights = {name: own.detach().cpu().clone() for name, own in training.regression.state_dict().items()}
        if epoch + 1 - best["epoch"] >= options.patience:
            break
    line = calibrate(exact_N, chosen_N)
    student = _student(training.regression, weights, best["target"], line.slope, line.offset, settings)
    edge = float(np.quantile(line.offset + line.slope * chosen_N.astype(np.float64), 1 - TOP_SHARE))
    return FittedEncoder(student, best, tried, edge)


def best_encoder(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one that is kept: what finds most of the highest exact scores, of equals the first."""

    def order(figures: dict[str, Any]) -> tuple[float, float]:
        spearman = figures["spearman"]
        return figures["recall"], -1.0 if math.isnan(spearman) else spearman

    return max(tried, key=order)


class _Training:
    """The regression of all transforms, and its optimizer."""

    def __init__(self, transforms: Transforms, settings: EncoderSettings):
        self.settings, self.transforms, self.steps = settings, transforms, 0
        at_quantiles = transforms(transforms.quantiles_Q)
        self.mean_S, spread_S = at_quantiles.mean(axis=0), at_quantiles.std(axis=0)
        self.spread_S = np.where(spread_S > 0, spread_S, 1.0)
        self.regression = TokenRegression.begin(settings.source, len(TRANSFORMS), seed=settings.seed)
        self.regression.to(settings.device).requires_grad_(True)  # in eval mode, as it was loaded
        groups = parameter_groups(self.regression, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.options.learning_rate, betas=(0.9, 0.95))

    def step(self, blocks: LabelledBlocks, total: int) -> float:
        """One of `total` steps; the loss before it. Raises ValueError where that is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.options.learning_rate * rate(self.steps, total)
        self.steps += 1
        if not blocks.known_BT.any():
            return 0.0
        targets_NS = (self.transforms(blocks.scores_BT[blocks.known_BT]) - self.mean_S) / self.spread_S
        found_BTS = self._read(blocks)
        known_BT = torch.from_numpy(blocks.known_BT).to(found_BTS.device)
        wanted_NS = torch.from_numpy(targets_NS.astype(np.float32)).to(found_BTS.device)
        loss = (found_BTS[known_BT] - wanted_NS).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.regression.parameters(), CLIPPING)
        self.optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError("the encoder's loss is not finite; lower fit_student.encoder.learning_rate")
        return value

    @torch.no_grad()
    def rankings(self, held: LabelledBlocks) -> Iterator[tuple[str, Floats]]:
        """Of each map and of the mean of all, what it says (N,) of the tokens that have a score."""
        size, parts = max(1, BATCH_TOKENS // held.tokens_BT.shape[1]), []
        for begin in range(0, len(held.tokens_BT), size):
            blocks = held.take(slice(begin, begin + size))
            parts.append(self._read(blocks).cpu().numpy()[blocks.known_BT])
        found_NS = np.concatenate(parts)
        yield from zip(TRANSFORMS, found_NS.T, strict=True)
        yield MEAN, found_NS.mean(axis=1)

    def _read(self, blocks: LabelledBlocks) -> Tensor:
        """(B, T, S)."""
        device = torch.device(self.settings.device)
        tokens_BT = torch.from_numpy(blocks.tokens_BT.astype(np.int64)).to(device)
        document_BT = documents(blocks.known_BT).to(device) if self.settings.apart else None
        with low_precision(device, wanted=self.settings.low_precision):
            found_BTS: Tensor = self.regression(tokens_BT, document_BT)
        return found_BTS


def documents(known_BT: NDArray[np.bool_]) -> Tensor:
    """(B, T) the number of each token's document, where documents do not see each other: then just the first token of
    each has no score. Tokens of the padding are documents of their own."""
    return torch.from_numpy(np.cumsum(~known_BT, axis=1))


def rate(step: int, total: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, total - warm_up)
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _student(
    regression: TokenRegression, weights: dict[str, Tensor], target: str, slope: float, offset: float,
    settings: EncoderSettings,
) -> EncoderStudent:  # fmt: skip
    """The regression of one map, or of the mean, with those weights, on that line."""
    regression.load_state_dict(weights)
    shares_S = torch.tensor([1.0 if target == name else 1 / len(TRANSFORMS) * (target == MEAN) for name in TRANSFORMS])
    width = regression.head.in_features // 2
    one = TokenRegression(regression.body.requires_grad_(False), width, 1).to(settings.device).requires_grad_(False)
    shares_S = shares_S.to(regression.head.weight)
    one.head.weight.copy_(slope * (shares_S @ regression.head.weight))
    one.head.bias.copy_(offset + slope * (shares_S @ regression.head.bias))
    return EncoderStudent(one, low_precision=settings.low_precision)
