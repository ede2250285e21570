"""The training loss of one token: ordinary tokens are learned; masked ones are unlearned, ignored, or bounded.

With NLL_j = -log p(x_j | x_<j), p_j = exp(-NLL_j), lambda the penalty, and N ONE global count of predicted tokens,

    L = 1/N [ sum over unmasked j of NLL_j + lambda * sum over masked j of m(NLL_j) ]

    kind           m(NLL)                 m'(NLL)
    penalty        -NLL                   -1              Eq. 9 of IF-Guide (arXiv 2506.01790); unbounded below
    clipped        -min(NLL, c)           -1 if NLL < c   c = -log(floor_probability): stops once p is below the floor
    unlikelihood   -log(1 - p)            -p / (1 - p)    bounded below by 0 (Welleck et al., arXiv 1908.04319)
    ignore         0                      0               masked tokens carry no loss

N counts masked tokens too, over all ranks and all accumulation steps of an optimizer step, so the gradients of
micro-batches add to the gradient of the whole batch, whatever the kind. Cost: a few operations on (tokens,).

It does not know logits: `ifguide.training.lm_loss` makes NLL_j and carries m' back through the LM head.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ifguide.config.pretrain import ObjectiveKind


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Eq. 9 unless told otherwise. `penalty` is lambda, 0 or more; `floor_probability` is of `clipped` alone. Raises
    ValueError on other values."""

    kind: ObjectiveKind = "penalty"
    penalty: float = 1.0
    floor_probability: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveKind):
            raise ValueError(f"objective kind {self.kind!r}: choose one of {', '.join(get_args(ObjectiveKind))}")
        if self.penalty < 0:
            raise ValueError(f"penalty must be 0 or more, got {self.penalty}: masked tokens are subtracted already")
        if not 0 < self.floor_probability < 1:
            raise ValueError(f"floor_probability must lie between 0 and 1, got {self.floor_probability}")

    def of_tokens(self, nll_N: Tensor, masked_N: Tensor) -> tuple[Tensor, Tensor]:
        """(value_N, slope_N): each token's loss and its derivative by NLL, in nats. No value leaves the device."""
        value_N, slope_N = self._of_masked(nll_N)
        return (
            torch.where(masked_N, self.penalty * value_N, nll_N),
            torch.where(masked_N, self.penalty * slope_N, torch.ones_like(nll_N)),
        )

    def _of_masked(self, nll_N: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "ignore":
            return torch.zeros_like(nll_N), torch.zeros_like(nll_N)
        if self.kind == "unlikelihood":
            # p rounds to 1 below this, where 1 - p would be 0
            nll_N = nll_N.clamp(min=torch.finfo(nll_N.dtype).eps)
            return -torch.log(-torch.expm1(-nll_N)), -1 / torch.expm1(nll_N)
        if self.kind == "clipped":
            ceiling = -math.log(self.floor_probability)
            return -nll_N.clamp(max=ceiling), -(nll_N < ceiling).to(nll_N.dtype)
        return -nll_N, -torch.ones_like(nll_N)
