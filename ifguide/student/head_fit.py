"""Fitting a `head` student: sums over a sample, every variant tried on blocks that were held out, the best one kept.

A sample is added in parts. What is fitted on goes into sums (`influence.smoothing.FoldSums`) of features times
features, and of features times targets: four transforms of the score, and the D entries of the final hidden tangent.

    cut     the score, cut to its quantiles .001 and .999: for a few are far out
    root    its signed square root
    rank    its place among the scores, from 0 to 1
    top     whether it is in the highest `TOP_SHARE`: all of the loss at the edge that a mask is cut at

All of them share one eigendecomposition for each choice of layers. The ridge of h' is that of the least held-out error.
Of each transform, ridge and mix with the tangent's score, the figures on the held-out blocks are recorded. The one that
finds most of the highest exact scores is fitted again, on all blocks, and put on the scale that it has on the held-out
ones without them. Its own held-out figures are too good, for it was chosen by them: how good it is, only an audit says
(`certificate`).

Memory: 3 F^2 * 8 bytes, and the features of the held-out blocks, on the device of the features. Cost: F^2
multiplications in float64 a token of the sample, there too; and on a CPU an eigendecomposition of F for each choice of
layers, three times for the chosen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.smoothing import CUT, FoldSums, fit_others, held_out_error, token_sums
from ifguide.student.fidelity import TOP_SHARE, fidelity
from ifguide.student.head import Floats, HeadStudent

TRANSFORMS = ("cut", "root", "rank", "top")
RIDGES = (0.003, 0.03, 0.3, 3.0)
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = 1024  # quantiles that a rank is read from
NO_BLOCKS = (
    "a student needs blocks to be fitted on and others that are held out; raise fit_student.sample_fraction, or its"
    " held_out"
)
FITTED, HELD_OUT, NO_FOLD = 0, 1, -1
FOLDS = 2
AT_ONCE = 1 << 13  # tokens: float64 features of a GPU's micro-batch would be large


@dataclass(frozen=True, kw_only=True, eq=False)
class Transforms:
    """Of scores like those that gave the `quantiles_Q`."""

    quantiles_Q: Floats

    @classmethod
    def of(cls, scores_N: NDArray[np.floating]) -> Transforms:
        """Of a sample of the scores, all predicted.

        Raises:
            ValueError: no score differs from another, or one is not finite.
        """
        if not len(scores_N) or not np.isfinite(scores_N).all() or scores_N.min() == scores_N.max():
            raise ValueError(
                "a student needs finite scores that differ from each other; raise fit_student.sample_fraction"
            )
        return cls(quantiles_Q=np.quantile(scores_N.astype(np.float64), np.linspace(0, 1, GRID + 1)))

    def __call__(self, scores_N: NDArray[np.floating]) -> Floats:
        """(N, 4) the targets, in the order of `TRANSFORMS`."""
        places_Q, s = np.linspace(0, 1, GRID + 1), scores_N.astype(np.float64)
        low, high, edge = np.interp([CUT, 1 - CUT, 1 - TOP_SHARE], places_Q, self.quantiles_Q)
        rank = np.interp(s, self.quantiles_Q, places_Q)
        return np.stack([s.clip(low, high), np.sign(s) * np.sqrt(np.abs(s)), rank, (s >= edge) * 1.0], axis=1)


class HeldBlocks(NamedTuple):
    """Blocks that were held out: their features, token ids, exact scores, and where there is a score."""

    features_BTF: Tensor
    tokens_BT: Tensor
    scores_BT: Tensor
    known_BT: Tensor


class HeadSample:
    """Adds up blocks that have exact scores. `layers` are those of the features, D each, the model's top one last."""

    def __init__(self, transforms: Transforms, layers: Sequence[int], *, most_held: int | None = None):
        """most_held: tokens whose features are kept, about; None: of all blocks that are held out."""
        self.transforms, self.layers, self.most_held = transforms, tuple(layers), most_held
        self._sums: dict[str, Tensor] = {}
        self.held: list[HeldBlocks] = []

    def add(
        self, tokens_BT: Tensor, known_BT: Tensor, scores_BT: Tensor, features_BTF: Tensor, tangents_BTD: Tensor, *,
        held_out: bool,
    ) -> None:  # fmt: skip
        """Blocks with their exact scores, where `known_BT`, states and tangents of the final ones, all of one pass
        (`TokenScorer.score_and_read`)."""
        transformed = torch.from_numpy(self.transforms(scores_BT[known_BT].double().cpu().numpy()))
        of_tokens = features_BTF[known_BT], tangents_BTD[known_BT], transformed.to(features_BTF.device)
        for features_NF, tangents_ND, transformed_N4 in zip(*(own.split(AT_ONCE) for own in of_tokens), strict=True):
            targets_NS = torch.cat([transformed_N4, tangents_ND.double()], dim=1)
            self._add_tokens(features_NF.double(), targets_NS, HELD_OUT if held_out else FITTED)
        if held_out and (self.most_held is None or sum(own.known_BT.numel() for own in self.held) < self.most_held):
            self.held.append(HeldBlocks(features_BTF, tokens_BT, scores_BT, known_BT))

    def _add_tokens(self, x_NF: Tensor, s_NS: Tensor, fold: int) -> None:
        if x_NF.device.type == "cpu":  # by NumPy, which computes half of a symmetric product and mirrors it
            sums = tuple(map(torch.from_numpy, token_sums(x_NF.numpy(), s_NS.numpy())))
        else:
            sums = token_sums(x_NF, s_NS)
        tokens = torch.tensor(float(len(x_NF)), dtype=torch.float64)
        for name, own in zip((field.name for field in fields(FoldSums)), (*sums, tokens), strict=True):
            if name not in self._sums:
                self._sums[name] = own.new_zeros((FOLDS, *own.shape))
            self._sums[name][fold] += own

    def add_sums(self, sums: FoldSums) -> None:
        """Add those of a part, whose arrays may be written to afterwards."""
        for name, own in vars(sums).items():
            if name in self._sums:
                self._sums[name] += torch.from_numpy(own)
            else:
                self._sums[name] = torch.from_numpy(own)

    @property
    def sums(self) -> FoldSums | None:
        """Over the blocks that are fitted on and over those that are held out; None where there are none of either."""
        if not self._sums:
            return None
        return FoldSums(**{name: own.cpu().numpy() for name, own in self._sums.items()})


def layer_choices(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """All of `layers`, the upper half, and the top one alone: the last is in each, for the LM head reads it."""
    return list(dict.fromkeys(tuple(layers[begin:]) for begin in (0, len(layers) // 2, len(layers) - 1)))


class HeadFit(NamedTuple):
    """The student; what was tried: `layers`, `target`, `ridge`, `mix`, and the figures of `fidelity`; and the scores
    (N,) of the blocks held out by one that was not fitted on them."""

    student: HeadStudent
    tried: list[dict[str, Any]]
    held_N: Floats


def fit_head(sample: HeadSample, head: HeadDerivatives) -> HeadFit:
    """The student of all blocks, on the scale that one of the others has on the blocks that are held out.

    Raises:
        ValueError: no blocks were held out, or none were fitted on.
    """
    if sample.sums is None or not sample.sums.tokens_K.all():
        raise ValueError(NO_BLOCKS)
    tried: list[dict[str, Any]] = []
    for layers in layer_choices(sample.layers):
        tried += _try(sample, layers, head)
    best = best_head(tried)
    sums, columns = _of_layers(sample, best["layers"])
    unseen, whole = (
        replace(
            _students(
                *fit_others(sums, fold, [best["ridge"], best["tangent_ridge"]]),
                best["layers"], TRANSFORMS.index(best["target"]), 0, 1,
            ),
            mix=best["mix"],
        )
        for fold in (HELD_OUT, NO_FOLD)
    )  # fmt: skip
    held = [block._replace(features_BTF=block.features_BTF[..., columns]) for block in sample.held]
    direct_N = _known(held, [unseen.direct(block.features_BTF) for block in held])
    tangent_N = _known(held, [unseen.tangent(*block[:2], head) for block in held])
    direct, tangent = _spread(direct_N), _spread(tangent_N)
    mixed_N = (1 - whole.mix) * direct_N / direct + whole.mix * tangent_N / tangent
    plain = replace(whole, direct_scale=direct, tangent_scale=tangent)
    student = plain.calibrated(_known(held, [block.scores_BT for block in held]), mixed_N)
    return HeadFit(student, tried, student.offset + mixed_N * direct / student.direct_scale)


def best_head(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one that is kept: what finds most of the highest exact scores."""
    return max(tried, key=lambda own: (own["recall"], own["overlap"]))


def _try(sample: HeadSample, layers: tuple[int, ...], head: HeadDerivatives) -> list[dict[str, Any]]:
    """The figures of all variants on these layers."""
    sums, columns = _of_layers(sample, layers)
    held = [block._replace(features_BTF=block.features_BTF[..., columns]) for block in sample.held]
    weights_SRF, biases_SR = fit_others(sums, HELD_OUT, RIDGES)
    errors_SR = held_out_error(sums, HELD_OUT, weights_SRF, biases_SR)
    tangent_ridge = int(np.argmin(errors_SR[len(TRANSFORMS) :].sum(axis=0)))
    exact_N = _known(held, [block.scores_BT for block in held])
    tried, tangent_N = [], None
    for target, transform in enumerate(TRANSFORMS):
        for number, ridge in enumerate(RIDGES):
            student = _students(weights_SRF, biases_SR, layers, target, number, tangent_ridge)
            direct_N = _known(held, [student.direct(block.features_BTF) for block in held])
            if tangent_N is None:  # the same for all: the LM head is what costs
                tangent_N = _known(held, [student.tangent(*block[:2], head) for block in held])
            for mix in MIXES if (target, number) == (0, 0) else MIXES[:-1]:  # of the tangent alone, one is enough
                score_N = (1 - mix) * direct_N / _spread(direct_N) + mix * tangent_N / _spread(tangent_N)
                tried.append(
                    {"layers": layers, "target": transform, "ridge": ridge, "tangent_ridge": RIDGES[tangent_ridge]}
                    | {"mix": mix, **fidelity(exact_N, score_N)}
                )
    return tried


def _of_layers(sample: HeadSample, layers: tuple[int, ...]) -> tuple[FoldSums, slice]:
    """The sums of the features of some layers, the last ones, and where these features are. The top one, of which there
    is a tangent, may have another width than the others, as OPT-350M's has."""
    sums = sample.sums
    assert sums is not None
    width, top = sums.features_KD.shape[1], sums.scores_KS.shape[1] - len(TRANSFORMS)
    other = (width - top) // max(1, len(sample.layers) - 1)
    columns = slice(width - top - other * (len(layers) - 1), width)
    return replace(
        sums,
        products_KDD=sums.products_KDD[:, columns, columns],
        features_KD=sums.features_KD[:, columns],
        moments_KDS=sums.moments_KDS[:, columns],
    ), columns


def _students(
    weights_SRF: Floats, biases_SR: Floats, layers: tuple[int, ...], target: int, ridge: int, tangent_ridge: int
) -> HeadStudent:
    """That of one target and two ridges, by number; its mix and scales are still to be found."""
    return HeadStudent(
        layers=layers,
        weights_F=weights_SRF[target, ridge],
        bias=float(biases_SR[target, ridge]),
        tangent_weights_DF=weights_SRF[len(TRANSFORMS) :, tangent_ridge],
        tangent_biases_D=biases_SR[len(TRANSFORMS) :, tangent_ridge],
        mix=0.0,
        direct_scale=1.0,
        tangent_scale=1.0,
    )


def _known(held: Sequence[HeldBlocks], of_blocks: Sequence[Tensor]) -> Floats:
    """(N,) what `of_blocks`, (B, T) each, say of the tokens that have a score."""
    parts = [own[block.known_BT].double().cpu().numpy() for block, own in zip(held, of_blocks, strict=True)]
    return np.concatenate(parts)


def _spread(values_N: Floats) -> float:
    """Their standard deviation; 1 where they are all the same."""
    return float(values_N.std()) or 1.0
