"""A micro-batch, its loss, and sums of losses over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class MicroBatch(NamedTuple):
    """What a rank computes at once, on its device, in the order of `LanguageModelLoss.forward`.

    `tokens_BT` and `lengths_B` (real tokens of each block) int64; `mask_BT` bool, label aligned, or None; `token_count`
    the predicted tokens of the whole step: all ranks, all micro-batches; `document_BT` int64, the number of each
    token's document, ascending, where documents do not see each other, or None."""

    tokens_BT: Tensor
    lengths_B: Tensor
    mask_BT: Tensor | None
    token_count: int
    document_BT: Tensor | None = None


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
    """`Loss` summed, as numbers."""

    loss: float
    benign_sum: float
    masked_sum: float
    benign_count: float
    masked_count: float

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
        self.values = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)

    def add(self, loss: Loss) -> None:
        """Add one micro-batch's."""
        self.values += torch.stack([getattr(loss, name).detach().double() for name in SUMMED])

    def totals(self, world_size: int) -> LossTotals:
        """Of all ranks together, which all call it."""
        return _totals([self.values], world_size)[0]


class StepLosses(NamedTuple):
    """What one step gave: its number, its losses over all ranks, the gradient's norm (None: the engine told none)."""

    step: int
    totals: LossTotals
    gradient_norm: float | None


class LossHistory:
    """The losses of steps, left on the device until they are read: a read waits for the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, Tensor, Tensor | float | None]] = []

    def add(self, step: int, sums: LossSums, gradient_norm: Tensor | float | None) -> None:
        """Keep a step's; nothing is read."""
        self._steps.append((step, sums.values, gradient_norm))

    def read(self, world_size: int) -> list[StepLosses]:
        """Those since the last read, in order. Every rank calls it after the same step."""
        kept, self._steps = self._steps, []
        totals = _totals([values for _, values, _ in kept], world_size)
        return [
            StepLosses(step, total, None if norm is None else float(norm))
            for (step, _, norm), total in zip(kept, totals, strict=True)
        ]


def _totals(values: list[Tensor], world_size: int) -> list[LossTotals]:
    sums = torch.stack(values)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return [LossTotals(*row) for row in sums.tolist()]
