"""Activations of pairs of streams against forward-mode differentiation of transformers' own."""

import pytest
import torch
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


@pytest.mark.parametrize(("family", "name"), [("llama", "act_fn"), ("gemma2", "act_fn"), ("gpt2", "act")])
def test_the_gated_activation_of_each_layer_is_found(family: str, name: str) -> None:
    model = tiny_model(family)
    found = paired_activations(model, 1)
    assert [path.rpartition(".")[2] for path, module in model.named_modules() if module in found] == [name] * 2


def test_an_activation_that_is_not_gated_stays_as_it_is() -> None:
    assert paired_activations(tiny_model("gpt_neox"), 1) == {}
