"""A micro-batch, its loss, and sums of losses over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class MicroBatch(NamedTuple):
    """What a rank computes at once, on its device, in the order of `LanguageModelLoss.forward`.

    `tokens_BT` and `lengths_B` (real tokens of each block) int64; `mask_BT` bool, label aligned, or None; `token_count`
    the predicted tokens of the whole step: all ranks, all micro-batches."""

    tokens_BT: Tensor
    lengths_B: Tensor
    mask_BT: Tensor | None
    token_count: int


@dataclass(frozen=True, eq=False)
class Loss:
    """`loss` carries the gradient; the rest is detached, for logs. All are scalars on the model's device.

    The sums are plain sums of NLL in nats; the counts (int64) are this batch's: their sum over the global batch is the
    `token_count` that divides `loss`.
    """

    loss: Tensor
    benign_sum: Tensor
    masked_sum: Tensor
    benign_count: Tensor
    masked_count: Tensor


SUMMED = tuple(field.name for field in fields(Loss))


class LossTotals(NamedTuple):
    """`Loss` summed, as numbers; and how many ranks were asked to end."""

    loss: float
    benign_sum: float
    masked_sum: float
    benign_count: float
    masked_count: float
    stopping: float = 0.0

    @property
    def benign(self) -> float:
        """Mean NLL of the tokens that are learned, in nats; 0 if there are none."""
        return self.benign_sum / max(self.benign_count, 1)

    @property
    def masked(self) -> float | None:
        """Mean NLL of the masked tokens; None if there are none."""
        return self.masked_sum / self.masked_count if self.masked_count else None


class LossSums:
    """Losses added up where they are made: nothing leaves the device until `totals`. In float64."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)

    def add(self, loss: Loss) -> None:
        """Add one micro-batch's."""
        self._sums += torch.stack([getattr(loss, name).detach().double() for name in SUMMED])

    def totals(self, world_size: int, *, stopping: bool = False) -> LossTotals:
        """Of all ranks together, which all call it: so all know when one of them is `stopping`."""
        sums = torch.cat([self._sums, self._sums.new_tensor([float(stopping)])])
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        return LossTotals(*sums.tolist())
