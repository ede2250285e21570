"""A student that reads the proxy's hidden states in one ordinary forward pass: two regressions, and what they say.

With z_j the states of several layers after token j has been read, the top one h_j last, and x_j the token,

    direct_j  = w . z_j + b                                      a regression of (a transform of) the score itself
    tangent_j = dNLL(h_{j-1}, x_j) along W z_{j-1} + c           a regression of the final hidden tangent h'
    score_j   = offset + (1 - mix) direct_j / direct_scale + mix tangent_j / tangent_scale

The exact score is the derivative of the loss along h' (`influence.head_derivatives`), so a student of h' needs to know
nothing of the vocabulary. It costs the LM head, which `direct` does without. Scales and offset are such that a score is
the least-squares estimate of the exact one (`calibrated`), so that both can stand in one table.

Cost: 2N FLOP a token for the body's N parameters and 2 F for F features; with a mix above 0 further 2 F D + 4 D V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.artifacts import publish
from ifguide.documents import begun, known_documents
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.states import taken_states
from ifguide.models import predicted_positions, transformer_blocks
from ifguide.student.calibration import calibrate

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadStudent:
    """Both regressions on the states of `layers` side by side, F features, the last D of them of the top layer."""

    layers: tuple[int, ...]
    weights_F: Floats
    bias: float
    tangent_weights_DF: Floats
    tangent_biases_D: Floats
    mix: float
    direct_scale: float
    tangent_scale: float
    offset: float = 0.0

    def direct(self, features_BTF: Tensor) -> Tensor:
        """(B, T) w . z + b."""
        weights_F = torch.from_numpy(self.weights_F).to(features_BTF)
        return features_BTF @ weights_F + self.bias

    def tangent(self, features_BTF: Tensor, tokens_BT: Tensor, head: HeadDerivatives) -> Tensor:
        """(B, T) the derivative of each token's NLL along the predicted tangent; entry 0 is 0."""
        weights_DF, biases_D = (
            torch.from_numpy(own).to(features_BTF) for own in (self.tangent_weights_DF, self.tangent_biases_D)
        )
        before_NF = features_BTF[:, :-1].flatten(0, 1)
        tangents_ND = before_NF @ weights_DF.T + biases_D
        scores_KN = head.tangents(before_NF[:, -len(biases_D) :], tangents_ND[None], tokens_BT[:, 1:].flatten())
        return F.pad(scores_KN.view(len(tokens_BT), -1), (1, 0))

    def scores(self, features_BTF: Tensor, tokens_BT: Tensor, head: HeadDerivatives) -> Tensor:
        """(B, T) label-aligned; what has no prediction holds anything. What the mix leaves out is not computed."""
        score_BT = torch.full_like(features_BTF[..., 0], self.offset)
        if self.mix < 1:
            score_BT += (1 - self.mix) / self.direct_scale * self.direct(features_BTF)
        if self.mix > 0:
            score_BT += self.mix / self.tangent_scale * self.tangent(features_BTF, tokens_BT, head)
        return score_BT

    def calibrated(self, exact_N: Floats, own_N: Floats) -> HeadStudent:
        """The student whose scores are offset + slope times these, nearest to the exact scores of N tokens by least
        squares. As it is where its scores do not rise with them."""
        slope, offset = calibrate(exact_N, own_N)
        return replace(
            self,
            direct_scale=self.direct_scale / slope,
            tangent_scale=self.tangent_scale / slope,
            offset=offset + slope * self.offset,
        )

    def save(self, path: Path) -> None:
        """Publish what `load` reads."""
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, **{**vars(self), "layers": np.array(self.layers)})

    @classmethod
    def load(cls, path: Path) -> HeadStudent:
        """What `save` wrote."""
        with np.load(path) as saved:
            arrays = {name: saved[name] for name in saved.files}
        numbers = {name: float(own) for name, own in arrays.items() if own.ndim == 0}
        return cls(**arrays | numbers | {"layers": tuple(arrays["layers"].tolist())})


class HeadScorer:
    """Scores packed blocks with a student of `model`, which may be a copy of the proxy in another precision than it was
    fitted in. It leaves the model as it is.

    `beginning`: a BOS that the model reads before every block, which has no score.

    Raises ValueError when the model's LM head is not one that is understood."""

    def __init__(self, model: PreTrainedModel, student: HeadStudent, *, beginning: int | None = None):
        self.model, self.student, self.beginning = model, student, beginning
        self.head = HeadDerivatives(model)
        if student.mix > 0:
            self.head.check(model)

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """Scores (B, T), label-aligned and with documents as `TokenScorer.score`: what has no prediction is exactly
        0."""
        tokens_BT, lengths_B = tokens_BT.to(self.model.device), lengths_B.to(self.model.device)
        document_BT = None if document_BT is None else document_BT.to(self.model.device)
        features_BTF = read_features(self.model, tokens_BT, self.student.layers, document_BT, beginning=self.beginning)
        scores_BT = self.student.scores(features_BTF, tokens_BT, self.head)
        return scores_BT.masked_fill(~predicted_positions(tokens_BT, lengths_B, document_BT), 0.0)


@torch.no_grad()
def read_features(
    model: PreTrainedModel,
    tokens_BT: Tensor,
    layers: Sequence[int],
    document_BT: Tensor | None = None,
    *,
    beginning: int | None = None,
) -> Tensor:
    """(B, T, F) the hidden states of `layers` side by side, of one pass of the body, float32 at least; entry t has read
    the tokens up to t, and the `beginning` before them. document_BT: as `TokenScorer.score`."""
    lengths_B = torch.full((len(tokens_BT),), tokens_BT.shape[1], device=tokens_BT.device)
    read = begun(tokens_BT, lengths_B, document_BT, beginning)
    with (
        taken_states(model, transformer_blocks(model)[1], layers, lambda states, layer: states) as states,
        known_documents(read.document_BU) as places,
    ):
        model.base_model(read.tokens_BU, use_cache=False, **places)
    features_BTF = torch.cat([read.own(states[layer], 0) for layer in layers], dim=-1)
    return features_BTF.to(torch.promote_types(features_BTF.dtype, torch.float32))
