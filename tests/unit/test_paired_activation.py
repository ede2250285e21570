"""Activations of pairs of streams against forward-mode differentiation of transformers' own."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from ifguide.influence.paired_activation import GATES, _paired, paired_activations
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", ["silu", "swish", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_pairs_hold_the_activation_and_its_derivative(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    activation = ACT2FN[name]
    h, d = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    h[0, 0, :4] = torch.tensor([0.0, 40.0, -40.0, -800.0])  # where the exponential is 0, or not finite
    streams = torch.stack([h + 1e-3 * d, h - 1e-3 * d], dim=1).flatten(0, 1)
    found = _paired(GATES[type(activation)], 2)(streams).view(2, 2, 5, 7)
    value, derivative = torch.func.jvp(activation, (h,), (d,))
    torch.testing.assert_close(0.5 * (found[:, 0] + found[:, 1]), value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(500 * (found[:, 0] - found[:, 1]), derivative, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("gemma2", 2), ("gpt2", 2), ("gpt_neox", 0)])
def test_gated_activations_of_a_model_are_found(family: str, count: int) -> None:
    found = paired_activations(tiny_model(family), 1)
    assert len(found) == count
    assert all(isinstance(module, nn.Module) for module in found)
