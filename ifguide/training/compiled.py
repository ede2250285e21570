"""The compiled parts of a step: the model's layers, and the loss of a chunk of logits as one kernel.

Compiled is what lies between products: norms, activations, rotary embeddings; of the head all of softmax, loss, mask
and gradient. Fixed sizes are compiled, layers of a kind share one graph. It takes a C++ compiler on a CPU and Triton on
a GPU. Compiled or not changes last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.config import ConfigError
from ifguide.influence.fused import can_fuse
from ifguide.lm_head import LMHead
from ifguide.training.objective import Objective

RECOMPILATIONS = 64  # of one layer's code: families have layers of several kinds
# FLOP of a training from which on compiling earns its time.
EARNED_FLOP = {"cpu": 1e15, "cuda": 1e17}


def compiles(wanted: bool | None, *, parameters: int, tokens: int, device: torch.device) -> bool:
    """Whether to compile: as `wanted`, or where a training of so many tokens is long enough (None).

    Raises:
        ConfigError: it is wanted, and this machine has no compiler.
    """
    if wanted is None:
        return 6.0 * parameters * tokens >= EARNED_FLOP[device.type] and can_fuse(device)
    if wanted and not can_fuse(device):
        raise ConfigError(
            "pretrain.acceleration.compiled_layers, compiled_loss: there is no compiler for this"
            f" {device.type} here (g++ or clang++, or Triton); unset them"
        )
    return wanted


def compile_layers(model: PreTrainedModel) -> None:
    """Have every repeated layer of the model run compiled, forward and back; changes `model`."""
    names = set(model._no_split_modules or ())
    compiled: dict[type, Any] = {}
    for module in model.base_model.modules():
        kind = type(module)
        if names.isdisjoint(each.__name__ for each in kind.__mro__):
            continue
        if kind not in compiled:
            options: dict[str, Any] = {"dynamic": False, "recompile_limit": RECOMPILATIONS}
            compiled[kind] = torch.compile(kind.forward, **options)
        module.forward = MethodType(compiled[kind], module)


@functools.cache
def compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    """`chunk` as one kernel."""
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": RECOMPILATIONS}
    return torch.compile(chunk, **options)


def chunk(
    linear_NV: Tensor,
    labels_N: Tensor,
    counted_N: Tensor,
    masked_N: Tensor,
    objective: Objective,
    head: LMHead,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """(nll_N, value_N): each token's NLL and its part of the loss, 0 where it is not counted; `linear_NV`, W h + b, is
    overwritten with the gradient of the loss by it.

    In float32 at least, whatever the products' precision. `factor`: the head's scale over the step's count of tokens.
    """
    dtype = torch.promote_types(linear_NV.dtype, torch.float32)
    logits_NV, slope_NV = _activated(linear_NV.to(dtype), head)
    shifted_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)
    total_N1 = shifted_NV.exp().sum(dim=-1, keepdim=True)
    nll_N = (total_N1.log() - shifted_NV.gather(1, labels_N[:, None])).squeeze(1)
    value_N, by_nll_N = objective.of_tokens(nll_N, masked_N)
    weight_N = by_nll_N.masked_fill(~counted_N, 0) * factor
    here_NV = torch.arange(linear_NV.shape[1], device=linear_NV.device) == labels_N[:, None]
    error_NV = (shifted_NV.exp() / total_N1 - here_NV.to(dtype)) * weight_N[:, None]
    linear_NV.copy_(error_NV if slope_NV is None else error_NV * slope_NV)
    return nll_N, value_N.masked_fill(~counted_N, 0)


def _activated(logits_NV: Tensor, head: LMHead) -> tuple[Tensor, Tensor | None]:
    """As `LMHead.activate`, which works in place."""
    if head.scale != 1.0:
        logits_NV = logits_NV * head.scale
    if head.softcap is None:
        return logits_NV, None
    tanh_NV = (logits_NV / head.softcap).tanh()
    return head.softcap * tanh_NV, 1 - tanh_NV.square()
