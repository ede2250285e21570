"""FLOP of every pass that traces influence, per token: what the floor of a stage is counted from.

They are counted as those of a forward pass and of training are (`ifguide.shapes`). A backward pass takes a forward
pass twice, or once for the linear maps where no weight gradient is wanted.
"""

from __future__ import annotations

from dataclasses import replace

from ifguide.influence.directions import linear_module
from ifguide.influence.method import Attribution, Method
from ifguide.influence.paired_blocks import block_number
from ifguide.influence.smoothing import smoothing_layers
from ifguide.models import transformer_blocks
from ifguide.shapes import ModelShape
from ifguide.student.suffix import first_of_suffix

EIGEN_FLOP = 9.0  # n^3 of these for a symmetric eigendecomposition with vectors: tridiagonal reduction, QR, vectors


def traced(shape: ModelShape, block_size: int) -> float:
    """Forward, and the backward that gives output gradients but no weight gradients, FLOP per token."""
    return 4.0 * shape.tracked + 4.0 * shape.head + 3.0 * shape.attention_flop(block_size)


def covariance(shape: ModelShape, block_size: int) -> float:
    """Sums of a a^T and g g^T, FLOP per token."""
    return traced(shape, block_size) + sum(2.0 * (out**2 + inner**2) for out, inner in shape.linears)


def lambda_(shape: ModelShape, block_size: int) -> float:
    """The gradient of each sequence, rotated into the eigenbases, FLOP per token."""
    rotation = sum(2.0 * out * inner * (out + inner) for out, inner in shape.linears)
    return traced(shape, block_size) + 2.0 * shape.tracked + rotation / block_size


def eigendecomposition(shape: ModelShape) -> float:
    """All eigendecompositions of A and S, FLOP in float64."""
    return EIGEN_FLOP * sum(float(out) ** 3 + float(inner) ** 3 for out, inner in shape.linears)


def query_gradient(shape: ModelShape, block_size: int) -> float:
    """The mean gradient of the tracked weights, FLOP per token."""
    return traced(shape, block_size) + 2.0 * shape.tracked


def preconditioning(shape: ModelShape) -> float:
    """V from the mean gradient: into the eigenbases and back, FLOP."""
    return sum(4.0 * out * inner * (out + inner) for out, inner in shape.linears)


def gauss_newton(shape: ModelShape, block_size: int) -> float:
    """A product of the Gauss-Newton matrix with a direction: hidden states with their tangents, the head's curvature, a
    forward pass and its backward pass with weight gradients, FLOP per token."""
    return 12.0 * shape.tracked + 6.0 * shape.head + 6.0 * shape.attention_flop(block_size)


def scoring(
    shape: ModelShape, block_size: int, *, attribution: Attribution, method: Method, behaviours: int = 1
) -> float:
    """Token scores along `behaviours` directions by the engine of `method`, FLOP per token."""
    K, attended = behaviours, shape.attention_flop(block_size)
    if method.rank is None:
        by_direction = 2.0 * shape.tracked
    else:
        by_direction = sum(2.0 * min(method.rank, out, inner) * (out + inner) for out, inner in shape.linears)
    if attribution == "position":
        return traced(shape, block_size) + K * by_direction
    if method.engine == "forward":
        return K * (4.0 * shape.tracked + by_direction + 4.0 * shape.head + 3.0 * attended)
    folded = method.precision == "float32" and method.rank is None
    products = 4.0 * K * shape.tracked if folded else 2.0 * (1 + K) * shape.tracked + K * by_direction
    return products + 2.0 * (1 + K) * shape.head + 2.0 * K * attended


def head_student(shape: ModelShape, block_size: int) -> float:
    """Scores by a `head` student, FLOP per token: a forward pass, the tangent from four layers' hidden states, and its
    logits. An upper bound: one that regresses the score alone needs no logits."""
    return shape.forward_flop(block_size) + 2.0 * shape.head + 8.0 * float(shape.hidden) ** 2


def head_sums(shape: ModelShape) -> float:
    """What a `head` student is fitted on, FLOP in float64 per token: one half of the symmetric product of the features
    of the layers that are read, and their product with the final hidden tangent."""
    width = float(len(smoothing_layers(shape.layers)) * shape.hidden)
    return width * (width + 2.0 * shape.hidden)


def suffix_student(shape: ModelShape, block_size: int, *, method: Method) -> float:
    """Scores by a `suffix` student, FLOP per token: one stream through the blocks below, and exact scores of those
    above."""
    blocks_name, blocks = transformer_blocks(shape.skeleton)
    first = first_of_suffix(len(blocks))
    above = [
        (name, linear)
        for name, linear in zip(shape.module_names, shape.linears, strict=True)
        if (block_number(blocks_name, name) or 0) >= first
    ]
    weights = sum(linear_module(shape.skeleton, name).weight.numel() for name, _ in above)
    upper = replace(
        shape,
        linears=tuple(linear for _, linear in above),
        module_names=tuple(name for name, _ in above),
        tracked=weights,
        layers=shape.layers - first,
    )
    below = 2.0 * (shape.tracked - weights) + replace(shape, layers=first).attention_flop(block_size)
    return below + scoring(upper, block_size, attribution="target", method=method)


def encoder_student(shape: ModelShape, block_size: int) -> float:
    """Scores by an `encoder` student of that shape, FLOP per token: a forward pass without an LM head."""
    return shape.forward_flop(block_size) - 2.0 * shape.head
