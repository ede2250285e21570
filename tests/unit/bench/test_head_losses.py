"""The losses of the head that are set beside one another: ours, and other libraries' where they are installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import head_losses


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the places of the two libraries, by torch's own loss; cut-cross-entropy's runs out of memory once it
    is called without a gradient."""
    cut = ModuleType("cut_cross_entropy")

    def linear_cross_entropy(e: Any, c: Any, targets: Any, *, reduction: str) -> torch.Tensor:
        return F.cross_entropy(F.linear(e, c), targets, reduction=reduction)

    class Liger:
        def __call__(self, weight: Any, hidden: Any, target: Any) -> torch.Tensor:
            raise RuntimeError("0 active drivers")

    cut.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
    liger = ModuleType("liger_kernel.transformers.fused_linear_cross_entropy")
    liger.LigerFusedLinearCrossEntropyLoss = Liger  # type: ignore[attr-defined]
    for module in (cut, ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers"), liger):
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, loader=None)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["bench/head_losses.py", "--small"])
    head_losses.main()
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_what_is_not_installed_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head_losses, "find_spec", lambda name: None)
    lines, figures = printed(monkeypatch, capsys)
    assert lines == ["liger: liger_kernel is not installed", "cut: cut_cross_entropy is not installed"]
    assert (figures["lacking"], set(figures["seconds"]), figures["failed"]) == (["liger", "cut"], {"ours", "torch"}, {})


def test_what_is_installed_runs_and_a_failure_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins(monkeypatch)
    lines, figures = printed(monkeypatch, capsys)
    assert (lines, figures["lacking"]) == ([], [])
    assert set(figures["seconds"]) == set(figures["ratios"]) == {"ours", "torch", "cut"}
    assert figures["failed"] == {"liger": "RuntimeError: 0 active drivers"}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sides_have_one_loss_and_the_mask_is_in_those_that_carry_it(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 4, generator=generator), torch.randn(9, 4, generator=generator)
    tokens, mask = torch.randint(9, (12,), generator=generator), torch.rand(12, generator=generator) < share
    sides = head_losses.losses(tokens, mask, compiled=False)
    found = {name: float(sides[name](hidden, weight)) for name in ("ours", "cut", "torch")}
    assert found["ours"] == pytest.approx(found["cut"], rel=1e-5)
    assert (found["ours"] == pytest.approx(found["torch"], rel=1e-5)) is (share == 0.0)
