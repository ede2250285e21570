"""The element-wise work around the difference engine's matrix products, and its compilation.

A product in low precision leaves so little time that what lies between the products counts: turning streams into sums
and differences and back, norms, activations, rotary embeddings. Run one operation at a time, these read and write
each value several times. So each layer of the model is compiled (`torch.compile`, which needs a C++ compiler on a CPU
and Triton on a GPU) with the functions below in its graph; products and attention stay calls. Fixed sizes are
compiled: with symbolic ones every view of pairs is a division to reason about. The softmax of attention and the sum of
the LM head are kernels of their own.

Compiled or not changes the last bits of a score: a run decides once (`influence.decision`).
"""

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

RECOMPILATIONS = 64  # of one function: families have layers of several kinds


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """`mix` and the functions of the same names below, compiled or not.

    by_layer: `mix` goes into `compiled_layers`. flash: causal attention of q, k, v with a soft cap by one kernel
    (`flash_pair`); where there is one, on a GPU, linear maps make their changes by one product too.
    """

    mix: Callable[[Tensor, torch.dtype, float], Tensor]
    softmax_and_change: Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
    expected_change: Callable[[Tensor, Tensor], Tensor]
    by_layer: bool
    flash: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None = None


def can_fuse(device: torch.device) -> bool:
    """Whether kernels can be compiled for `device` on this machine."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    return any(shutil.which(compiler) for compiler in ("g++", "clang++"))


@functools.cache
def kernels(*, fused: bool, device_type: str) -> Kernels:
    """The kernels; `fused` ones are compiled when they first meet a dtype or a count of behaviours."""
    if not fused:
        return Kernels(mix=mix, softmax_and_change=softmax_and_change, expected_change=expected_change, by_layer=False)
    # One kernel for all sizes; a variant for each layout and for sizes of one, whose number is bounded. Past the limit
    # `fullgraph` raises; running on uncompiled would change bits in the middle of a run.
    # (The type overloads of torch.compile leave `recompile_limit` out.)
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": RECOMPILATIONS}
    softmax: Any = torch.compile(softmax_and_change, **options)
    expected: Any = torch.compile(expected_change, **options)
    flash = None
    if device_type == "cuda":
        from ifguide.influence.flash_pair import flash_pair

        flash = flash_pair
    return Kernels(
        mix=mix if flash is None else mix_by_sign,
        softmax_and_change=softmax,
        expected_change=expected,
        by_layer=True,
        flash=flash,
    )


def compiled_layers(model: PreTrainedModel, *, of_streams: bool) -> dict[nn.Module, Callable[..., Any]]:
    """The repeated layers of a model and their compiled forwards, for fixed sizes; layers of a kind share one graph.

    of_streams: pairs of streams flow through them."""
    compilation: dict[str, Any] = {"dynamic": False, "recompile_limit": RECOMPILATIONS}
    if of_streams and model.device.type == "cpu":
        # Streams of which sums and differences are taken are computed for both at once, and not written down between.
        compilation["options"] = {"realize_opcount_threshold": 200, "realize_reads_threshold": 16}
    names = set(model._no_split_modules or ())
    layers = [
        module
        for module in model.base_model.modules()
        if not names.isdisjoint(kind.__name__ for kind in type(module).__mro__)
    ]
    kinds: set[Any] = {type(layer) for layer in layers}
    compiled = {kind: torch.compile(kind.forward, **compilation) for kind in kinds}
    return {layer: MethodType(compiled[type(layer)], layer) for layer in layers}


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """K tensors -> (K, ...); a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def pairs(x: Tensor, count: int) -> Tensor:
    """Streams (2K B, ...) by their outer dimensions, direction, sign and row -> (K, 2, B, ...), K the `count`."""
    return x.reshape(count, 2, x.shape[0] // (2 * count), *x.shape[1:])


def mix(streams: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """(K, 2, ...) pairs x+, x- -> scale * (1 + K, ...) in `dtype`: x+ + x- of the first pair, then x+ - x- of each."""
    total, change = (streams[0, 0] + streams[0, 1])[None], streams[:, 0] - streams[:, 1]
    if scale != 1:
        total, change = total * scale, change * scale
    return torch.cat([total.to(dtype), change.to(dtype)])


def mix_by_sign(streams: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """As `mix`, for Triton. It turns `cat` into a choice between its parts at each element, every part computed: an
    activation or a rotary embedding before it would be computed twice as often."""
    first = streams[0, 0] + _signs(streams, streams.dim() - 1) * streams[0, 1]
    if len(streams) > 1:
        first = torch.cat([first, streams[1:, 0] - streams[1:, 1]])
    return (scale * first).to(dtype)


def change_and_total(streams: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Streams (K, 2, ..., D) -> (..., 2 D): x+ - x- of pair k, and next to it x+ + x- of the first pair."""
    if k == 0:
        plus, minus = streams[0, 0].unsqueeze(-2), streams[0, 1].unsqueeze(-2)
        return (plus - _signs(streams, 2) * minus).to(dtype).flatten(-2)
    return torch.cat([streams[k, 0] - streams[k, 1], streams[0, 0] + streams[0, 1]], dim=-1).to(dtype)


def unmix(primal: Tensor, change: Tensor, bias: Tensor | None, change_bias: Tensor | None) -> Tensor:
    """y (..., D) and its half differences (K, ..., D) -> (K, 2, ..., D) streams, at least float32.

    `bias` (D,) and `change_bias` (K, D), or None, are added to them first.
    """
    dtype = torch.promote_types(primal.dtype, torch.float32)
    primal, change = primal.to(dtype), change.to(dtype)
    if bias is not None:
        primal = primal + bias
    if change_bias is not None:
        change = change + change_bias.view(len(change), *[1] * (primal.dim() - 1), -1)
    return with_signs(primal, change)


def with_signs(mean: Tensor, change: Tensor) -> Tensor:
    """Means (..., D) or (K, ..., D) and half differences (K, ..., D) -> streams (K, 2, ..., D), mean +- change."""
    # By sign and not by `stack`, whose parts a compiler writes down before it goes on.
    mean = mean.expand_as(change)
    return mean[:, None] + _signs(change, change.dim()) * change[:, None]


def softmax_and_change(S: Tensor, change: Tensor, mask: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """S (N, R, T) and S' (K, N, R, T) -> P = softmax(S) and P' = P * (S' - rowsum(P * S')), in S's dtype.

    Computed in at least float32. `mask`, broadcastable to S: 0, and -inf where P is to be zero; it is added, which
    compiles to half the time of a boolean one. `softcap` c: S and S' are those of c tanh(S / c).
    """
    dtype = torch.promote_types(S.dtype, torch.float32)
    logits, slopes = S.to(dtype), change.to(dtype)
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits, slopes = softcap * tanh, slopes * (1 - tanh.square())
    weights, scale = _exponentials(logits + mask)
    mean = (weights * slopes).sum(dim=-1, keepdim=True) * scale
    P = weights * scale
    return P.to(S.dtype), (P * (slopes - mean)).to(S.dtype)


def expected_change(logits: Tensor, change: Tensor) -> Tensor:
    """Logits (N, V) and their changes (N, V) -> (N,) sum over v of softmax(logits)_v change_v, at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights, scale = _exponentials(logits.to(dtype))
    return (weights * change.to(dtype)).sum(dim=-1) * scale.squeeze(-1)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - their row's highest), and one over its row sum (..., 1)."""
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return weights, weights.sum(dim=-1, keepdim=True).reciprocal()


def _signs(like: Tensor, dims: int) -> Tensor:
    """1 and -1, (2, 1, ...) of `dims` dimensions."""
    return (1 - 2 * torch.arange(2, device=like.device, dtype=like.dtype)).view(2, *[1] * (dims - 1))
