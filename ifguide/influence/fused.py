"""The element-wise work around the difference engine's matrix products, each kernel one function.

A product in low precision leaves so little time that what lies between the products counts: turning streams into sums
and differences and back, and the softmax with its derivative. Run one operation at a time, these read and write each
value several times; compiled (`torch.compile`, which needs a C++ compiler on a CPU and Triton on a GPU) they read
and write it once. `kernels(fused=False)` are the same functions, not compiled.

On a CPU each function is compiled alone. On a GPU each layer of the model is, with these functions in its graph, so
that norms, activations and rotary embeddings are fused with them too; attention is a kernel of its own (`flash_pair`).

Compiled or not changes the last bits of a score: a run decides once (`stages/scoring_method.py`).
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


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions below, compiled or as they are.

    With an `attend` they are for `compiled_layers`: it attends causally, given q, k, v and a soft cap (`flash_pair`).
    """

    mix: Callable[[Tensor, torch.dtype, float], Tensor]
    unmix: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    softmax_and_change: Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
    expected_change: Callable[[Tensor, Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None = None

    @property
    def by_layer(self) -> bool:
        """Whether the model's layers are compiled with these in their graphs."""
        return self.attend is not None


def can_fuse(device: torch.device) -> bool:
    """Whether kernels can be compiled for `device` on this machine."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    return any(shutil.which(compiler) for compiler in ("g++", "clang++"))


@functools.cache
def kernels(*, fused: bool, device_type: str) -> Kernels:
    """The kernels; `fused` ones are compiled when they first meet a dtype or a count of behaviours."""

    def compiled(function: Callable) -> Callable:
        # One kernel for all sizes; a variant for each layout and for sizes of one, whose number is bounded. Past the
        # limit `fullgraph` raises; running on uncompiled would change bits in the middle of a run.
        # (The type overloads of torch.compile leave `recompile_limit` out.)
        options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": 64}
        return torch.compile(function, **options) if fused else function

    if fused and device_type == "cuda":
        from ifguide.influence.flash_pair import flash_pair

        return layer_kernels(flash_pair, compiled(expected_change))
    return Kernels(
        mix=compiled(mix),
        unmix=compiled(unmix),
        softmax_and_change=compiled(softmax_and_change),
        expected_change=compiled(expected_change),
    )


def layer_kernels(
    attend: Callable[[Tensor, Tensor, Tensor, float | None], Tensor],
    expected_change: Callable[[Tensor, Tensor], Tensor],
) -> Kernels:
    """Kernels for the graphs of `compiled_layers`."""
    return Kernels(
        mix=mix_by_sign,
        unmix=unmix_by_sign,
        softmax_and_change=softmax_and_change,
        expected_change=expected_change,
        attend=attend,
    )


def compiled_layers(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """The repeated layers of a model and their compiled forwards, for fixed sizes; layers of a kind share one graph."""
    options: dict[str, Any] = {"dynamic": False, "recompile_limit": 64}
    names = set(model._no_split_modules or ())
    kinds = {type(module) for module in model.base_model.modules() if type(module).__name__ in names}
    compiled: dict[type, Any] = {kind: torch.compile(kind.forward, **options) for kind in kinds}
    return {
        module: MethodType(compiled[type(module)], module)
        for module in model.base_model.modules()
        if type(module) in compiled
    }


def stacked(each: Sequence[Tensor]) -> Tensor:
    """K tensors -> (K, ...); a single one is not copied."""
    return each[0][None] if len(each) == 1 else torch.stack(list(each))


def mix(streams: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """(K, 2, ...) pairs x+, x- -> scale * (1 + K, ...) in `dtype`: x+ + x- of the first pair, then x+ - x- of each."""
    total, change = (streams[0, 0] + streams[0, 1])[None], streams[:, 0] - streams[:, 1]
    if scale != 1:
        total, change = total * scale, change * scale
    return torch.cat([total.to(dtype), change.to(dtype)])


def unmix(primal: Tensor, change: Tensor, bias: Tensor | None, change_bias: Tensor | None) -> Tensor:
    """y (N, D) and its half differences (K, N, D) -> (K, 2, N, D) streams, at least float32.

    `bias` (D,) and `change_bias` (K, D), or None, are added to them first.
    """
    dtype = torch.promote_types(primal.dtype, torch.float32)
    primal, change = primal.to(dtype), change.to(dtype)
    if bias is not None:
        primal = primal + bias
    if change_bias is not None:
        change = change + change_bias[:, None]
    return torch.stack([primal + change, primal - change], dim=1)


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


# For graphs that Triton compiles: the same values without `cat` and `stack`, which it turns into a choice between
# their parts at each element, every part computed. Element-wise functions of both streams stay one kernel so.


def mix_by_sign(streams: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """As `mix`."""
    first = streams[0, 0] + _signs(streams, streams.dim() - 1) * streams[0, 1]
    if len(streams) > 1:
        first = torch.cat([first, streams[1:, 0] - streams[1:, 1]])
    return (scale * first).to(dtype)


def unmix_by_sign(primal: Tensor, change: Tensor, bias: Tensor | None, change_bias: Tensor | None) -> Tensor:
    """As `unmix`."""
    dtype = torch.promote_types(primal.dtype, torch.float32)
    primal, change = primal.to(dtype), change.to(dtype)
    if bias is not None:
        primal = primal + bias
    if change_bias is not None:
        change = change + change_bias[:, None]
    return primal + _signs(primal, 3) * change[:, None]


def change_and_total(streams: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Streams (K, 2, N, D) -> (N, 2 D): x+ - x- of pair k, and next to it x+ + x- of the first pair."""
    if k == 0:
        plus, minus = streams[0, :, :, None]
        return (plus - _signs(streams, 2) * minus).to(dtype).flatten(1)
    return torch.cat([streams[k, 0] - streams[k, 1], streams[0, 0] + streams[0, 1]], dim=-1).to(dtype)


def _signs(like: Tensor, dims: int) -> Tensor:
    """1 and -1, (2, 1, ...) of `dims` dimensions."""
    return (1 - 2 * torch.arange(2, device=like.device, dtype=like.dtype)).view(2, *[1] * (dims - 1))
