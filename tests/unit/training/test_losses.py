"""Sums of losses are added in float64, detached, and read once."""

import pytest
import torch

from ifguide.training.losses import Loss, LossSums, LossTotals


def loss(value: float, benign: int, masked: int) -> Loss:
    total = torch.tensor(value, requires_grad=True)
    counts = torch.tensor(benign), torch.tensor(masked)
    return Loss(total * 1, torch.tensor(2.0 * benign), torch.tensor(3.0 * masked), *counts)


def test_micro_batches_add_up_to_means_of_their_tokens() -> None:
    sums = LossSums(torch.device("cpu"))
    sums.add(loss(0.5, 6, 2))
    sums.add(loss(0.25, 4, 0))
    totals = sums.totals(world_size=1)
    assert totals == LossTotals(loss=0.75, benign_sum=20, masked_sum=6, benign_count=10, masked_count=2)
    assert (totals.benign, totals.masked) == (2.0, 3.0)


def test_of_no_tokens_there_is_no_mean() -> None:
    sums = LossSums(torch.device("cpu"))
    sums.add(loss(0.0, 0, 0))
    totals = sums.totals(world_size=1)
    assert (totals.benign, totals.masked) == (0.0, None)


def test_many_small_losses_are_added_without_rounding() -> None:
    sums = LossSums(torch.device("cpu"))
    for value in (1e8, *[1.0] * 8):
        sums.add(loss(value, 1, 1))  # in float32 the ones would be lost
    assert sums.totals(world_size=1).loss == pytest.approx(1e8 + 8, abs=1e-6)


def test_ranks_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
    sums = LossSums(torch.device("cpu"))
    sums.add(loss(0.5, 6, 2))
    assert sums.totals(world_size=3) == LossTotals(1.5, 36, 18, 18, 6)
