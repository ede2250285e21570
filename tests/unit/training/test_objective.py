"""The kinds of objective on single tokens, against autograd and by hand."""

import math

import pytest
import torch

from ifguide.config.pretrain import ObjectiveKind
from ifguide.training.objective import Objective

KINDS: tuple[ObjectiveKind, ...] = ("penalty", "ignore", "unlikelihood", "clipped")


@pytest.mark.parametrize("kind", KINDS)
def test_a_benign_token_has_its_nll_and_slope_one_whatever_the_kind(kind: ObjectiveKind) -> None:
    nll = torch.tensor([0.0, 1e-9, 0.5, 80.0])
    value, slope = Objective(kind=kind, penalty=3.0).of_tokens(nll, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(value, nll)
    assert torch.equal(slope, torch.ones(4))


def test_masked_tokens_by_hand() -> None:
    nll, masked = torch.tensor([math.log(4)], dtype=torch.float64), torch.tensor([True])  # p = 1/4

    def at(kind: ObjectiveKind, floor: float = 1e-3) -> tuple[float, float]:
        value, slope = Objective(kind=kind, penalty=0.5, floor_probability=floor).of_tokens(nll, masked)
        return value.item(), slope.item()

    assert at("penalty") == pytest.approx((-0.5 * math.log(4), -0.5))
    assert at("ignore") == (0.0, 0.0)
    assert at("unlikelihood") == pytest.approx((0.5 * math.log(4 / 3), -0.5 / 3))
    assert at("clipped", floor=0.2) == pytest.approx((-0.5 * math.log(4), -0.5))
    assert at("clipped", floor=0.5) == pytest.approx((-0.5 * math.log(2), 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_is_the_derivative_of_the_value(kind: ObjectiveKind) -> None:
    nll = torch.linspace(0.01, 12, 50, dtype=torch.float64, requires_grad=True)
    masked = torch.arange(50) % 2 == 0
    value, slope = Objective(kind=kind, penalty=1.3).of_tokens(nll, masked)
    (expected,) = torch.autograd.grad(value.sum(), nll)
    torch.testing.assert_close(slope.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ignore", "unlikelihood", "clipped"])
def test_the_bounded_kinds_are_bounded_below_and_finite_for_every_probability(kind: ObjectiveKind) -> None:
    nll = torch.tensor([0.0, 1e-9, 1e-6, 1.0, 100.0, 1e6])
    value, slope = Objective(kind=kind, floor_probability=0.01).of_tokens(nll, torch.ones(6, dtype=torch.bool))
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()
    assert value.min() >= math.log(0.01) - 1e-5


def test_values_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="penalty must be 0 or more"):
        Objective(penalty=-1.0)
    with pytest.raises(ValueError, match="choose one of penalty"):
        Objective(kind="ascent")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor_probability"):
        Objective(kind="clipped", floor_probability=0.0)
