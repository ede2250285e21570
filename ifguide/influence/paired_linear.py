"""A linear map of pairs of streams x+-, h +- step * h', in the three ways the difference engine has.

- `folded` (full rank in the model's own precision): x+ meets W + step V, x- meets W - step V.
- `added` and `joint` (low precision, or low rank): with s = x+ + x- and d = x+ - x-, y = W s and y' = W d + step V s.
  Rounding a product to bfloat16 then touches h and h' alike by one part in 256; a difference of two rounded products
  would be nothing but rounding. `joint`, for compiled layers on a GPU, makes y' by one product of [W V].

A map takes streams (2K B, ..., d_in), the outer dimensions (direction, sign, row), and returns (2K B, ..., d_out).
Cost per token: K 4 d_in d_out FLOP folded, else (1 + K) 2 d_in d_out and those of V, as much again at full rank.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifguide.influence.directions import Direction
from ifguide.influence.fused import Kernels, change_and_total, pairs, stacked, unmix
from ifguide.influence.products import JointProduct, Product

PairedLinear = Callable[[Tensor], Tensor]


def paired_linear(
    module: nn.Linear, directions: Sequence[Direction], steps: Sequence[float], dtype: torch.dtype, kernels: Kernels
) -> PairedLinear:
    """The map of `module` with K directions, its products in `dtype`."""
    if dtype == module.weight.dtype and all(direction.weight is not None for direction in directions):
        return _folded(module, directions, steps)
    if kernels.flash is not None:
        return _joint(module, directions, steps, dtype)
    return _added(module, directions, steps, dtype, kernels)


def _folded(module: nn.Linear, directions: Sequence[Direction], steps: Sequence[float]) -> PairedLinear:
    weights, biases = [], []
    for direction, step in zip(directions, steps, strict=True):
        for signed in (step, -step):
            assert direction.weight is not None
            weights.append(torch.add(module.weight, direction.weight, alpha=signed))
            biases.append(None if direction.bias is None else torch.add(module.bias, direction.bias, alpha=signed))

    def forward(x: Tensor) -> Tensor:
        streams = x.reshape(len(weights), -1, x.shape[-1])
        outputs = [F.linear(s, weight, bias) for s, weight, bias in zip(streams, weights, biases, strict=True)]
        return torch.cat(outputs).view(*x.shape[:-1], -1)

    return forward


def _added(
    module: nn.Linear, directions: Sequence[Direction], steps: Sequence[float], dtype: torch.dtype, kernels: Kernels
) -> PairedLinear:
    weight = Product(_halved(module, dtype))
    changes = [
        [Product(factor) for factor in _scaled(direction, step, dtype)]
        for direction, step in zip(directions, steps, strict=True)
    ]
    bias, change_bias, K = module.bias, _change_bias(directions, steps), len(directions)

    def forward(x: Tensor) -> Tensor:
        mixed = kernels.mix(pairs(x, K), dtype, 1.0)
        primal, *tangents = weight(mixed.view(-1, x.shape[-1])).view(1 + K, -1, module.out_features)
        total = mixed[0].view(-1, x.shape[-1])
        for k, factors in enumerate(changes):
            inner = total
            for factor in factors[:-1]:
                inner = factor(inner)
            tangents[k] = factors[-1].added_to(tangents[k], inner)
        shape = *mixed.shape[1:-1], module.out_features
        output = unmix(primal.view(shape), stacked(tangents).view(K, *shape), bias, change_bias)
        return output.to(x.dtype).view(*x.shape[:-1], -1)

    return forward


def _joint(
    module: nn.Linear, directions: Sequence[Direction], steps: Sequence[float], dtype: torch.dtype
) -> PairedLinear:
    weight = _halved(module, dtype)
    factors = [_scaled(direction, step, dtype) for direction, step in zip(directions, steps, strict=True)]
    joints = [JointProduct(weight, of_direction[-1]) for of_direction in factors]
    bias, change_bias, K = module.bias, _change_bias(directions, steps), len(directions)

    def forward(x: Tensor) -> Tensor:
        width, streams = x.shape[-1], pairs(x, K)
        operands = [change_and_total(streams, k, dtype) for k in range(K)]
        total = operands[0][..., width:]
        for k, of_direction in enumerate(factors):
            if len(of_direction) > 1:  # low rank
                operands[k] = torch.cat([operands[k][..., :width], F.linear(total, of_direction[0])], dim=-1)
        tangents = [joint.both(operand) for joint, operand in zip(joints, operands, strict=True)]
        output = unmix(joints[0].left(total), stacked(tangents), bias, change_bias)
        return output.to(x.dtype).view(*x.shape[:-1], -1)

    return forward


def _halved(module: nn.Linear, dtype: torch.dtype) -> Tensor:
    """W / 2, for s is twice the input; halves are exact in any binary precision."""
    return (0.5 * module.weight.detach()).to(dtype)


def _scaled(direction: Direction, step: float, dtype: torch.dtype) -> list[Tensor]:
    """step * V / 2 as matrices to apply one after the other to s."""
    if direction.weight is not None:
        factors = [0.5 * step * direction.weight]
    else:
        assert direction.left is not None
        assert direction.right is not None
        root = math.sqrt(step)
        factors = [0.5 * root * direction.right, root * direction.left]
    return [factor.to(dtype) for factor in factors]


def _change_bias(directions: Sequence[Direction], steps: Sequence[float]) -> Tensor | None:
    """step * v_b of each direction (K, d_out), or None without a bias."""
    biases = [step * V.bias for V, step in zip(directions, steps, strict=True) if V.bias is not None]
    return torch.stack(biases) if biases else None
