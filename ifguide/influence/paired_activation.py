"""Activations of pairs of streams x+-, h +- d, differentiated exactly: f(h) +- f'(h) d, in compiled layers on a CPU.

SiLU and the GELU by tanh are f(x) = x s(x) with a gate s(x) = sigmoid(g(x)), hence f' = s + f (1 - s) g': one
exponential for both streams. As two plain activations they took a sixth of a pass of SmolLM2 (bench/LOG.md).

Other activations stay what they are, for the difference engine takes any function of the streams.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ifguide.influence.fused import pairs, with_signs

Gate = Callable[[Tensor], tuple[Tensor, Tensor | float]]


def paired_activations(model: PreTrainedModel, count: int) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """For `count` pairs of streams (2K B, ...): the gated activations of `model`, and what computes them of pairs."""
    gates = {module: GATES[type(module)] for module in model.base_model.modules() if type(module) in GATES}
    return {module: _paired(gate, count) for module, gate in gates.items()}


def _paired(gate: Gate, count: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        streams = pairs(x, count)
        h, d = 0.5 * (streams[:, 0] + streams[:, 1]), 0.5 * (streams[:, 0] - streams[:, 1])
        g, g_slope = gate(h)
        # What is read twice after an `exp`, torch's compiler writes down; after an `exp2` it does not.
        s = torch.reciprocal(1 + torch.exp2(-math.log2(math.e) * g))
        f = h * s
        return with_signs(f, (s + f * (1 - s) * g_slope) * d).reshape(x.shape)

    return forward


def _silu(x: Tensor) -> tuple[Tensor, float]:
    return x, 1.0


def _gelu_by_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    scale, cubic = math.sqrt(8 / math.pi), 0.044715
    return scale * x * (1 + cubic * x * x), scale * (1 + 3 * cubic * x * x)


_NAMED: dict[Gate, tuple[str, ...]] = {
    _silu: ("silu", "swish"),
    _gelu_by_tanh: ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
}
GATES: dict[type[nn.Module], Gate] = {type(ACT2FN[name]): gate for gate, names in _NAMED.items() for name in names}
