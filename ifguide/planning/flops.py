"""FLOP of every pass of the pipeline, per token: what the floor of a stage is counted from.

With N the weights of the tracked linear maps, H those of the LM head, L layers of attention width A and blocks of T
tokens, a forward pass takes per token, at 2 FLOP a multiply and add,

    2 N + 2 H + 2 L A T        (the last is causal attention: half of the full square that plain kernels compute)

A backward pass takes that twice, or once for the linear maps where no weight gradient is wanted. Element-wise
operations, norms and embeddings are left out: they cost bandwidth, and show in the efficiency that was measured.
"""

from __future__ import annotations

from ifguide.influence.scorer import Attribution, Method
from ifguide.planning.shapes import ModelShape

EIGEN_FLOP = 9.0  # n^3 of these for a symmetric eigendecomposition with vectors: tridiagonal reduction, QR, vectors


def forward(shape: ModelShape, block_size: int) -> float:
    """One forward pass with logits, FLOP per token."""
    return 2.0 * shape.tracked + 2.0 * shape.head + attention(shape, block_size)


def attention(shape: ModelShape, block_size: int) -> float:
    """Causal attention's two products, FLOP per token."""
    return 2.0 * shape.layers * shape.attention_width * block_size


def training(shape: ModelShape, block_size: int, *, recomputed: bool = False) -> float:
    """Forward and backward with weight gradients; `recomputed` adds the forward of activation checkpointing."""
    return (4.0 if recomputed else 3.0) * forward(shape, block_size)


def traced(shape: ModelShape, block_size: int) -> float:
    """Forward, and the backward that gives output gradients but no weight gradients, FLOP per token."""
    return 4.0 * shape.tracked + 4.0 * shape.head + 3.0 * attention(shape, block_size)


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


def scoring(
    shape: ModelShape, block_size: int, *, attribution: Attribution, method: Method, behaviours: int = 1
) -> float:
    """Token scores along `behaviours` directions by the engine of `method`, FLOP per token."""
    K, attended = behaviours, attention(shape, block_size)
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
