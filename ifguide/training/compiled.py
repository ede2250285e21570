"""The compiled parts of a step: the model's layers, and the loss of a chunk of logits as one kernel.

Compiled is what lies between products: norms, activations, rotary embeddings; of the head all of softmax, loss, mask
and gradient. Fixed sizes are compiled, layers of a kind share one graph. It takes a C++ compiler on a CPU and Triton on
a GPU. Compiled or not changes last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.config import ConfigError
from ifguide.influence.fused import RECOMPILATIONS, can_fuse, compiled_layers
from ifguide.lm_head import LMHead
from ifguide.training.choices import Compiled
from ifguide.training.objective import Objective

# FLOP of a training from which on compiling earns its time.
EARNED_FLOP = {"cpu": 1e14, "cuda": 1e17}


def compiles(wanted: bool | None, *, parameters: int, tokens: int, device: torch.device, dtype: str) -> Compiled:
    """Whether to compile: as `wanted`; for None where a training of so many tokens is long enough, on a CPU in bfloat16
    alone. In float32 a CPU's time goes to the products.

    Raises:
        ConfigError: it is wanted, and this machine has no compiler.
    """
    able, flop, earned = can_fuse(device), 6.0 * parameters * tokens, EARNED_FLOP[device.type]
    if wanted and not able:
        raise ConfigError(
            "pretrain.acceleration.compiled_layers, compiled_loss: there is no compiler for this"
            f" {device.type} here (g++ or clang++, or Triton); unset them, or train where they were on from the start"
        )
    if wanted is not None:
        return Compiled(wanted, "as the config says")
    if device.type == "cpu" and dtype != "bfloat16":
        return Compiled(False, f"on a CPU the time of {dtype} goes to the products")
    if not able:
        return Compiled(False, "there is no compiler here")
    sign = ">=" if flop >= earned else "<"
    return Compiled(flop >= earned, f"{flop:.1e} FLOP {sign} {earned:.0e}, which earn the compilation's time")


def compile_layers(model: PreTrainedModel) -> None:
    """Have every repeated layer of the model run compiled, forward and back; changes `model`."""
    for layer, forward in compiled_layers(model, of_streams=False).items():
        layer.forward = forward


@functools.cache
def compiled_chunk() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`chunk` as one kernel."""
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": RECOMPILATIONS}
    return torch.compile(chunk, **options)


def chunk(
    linear_NV: Tensor,
    label_N: Tensor,
    counted_N: Tensor,
    masked_N: Tensor,
    objective: Objective,
    head: LMHead,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll_N, value_N, error_N): each token's NLL, its part of the loss, 0 where it is not counted, and the gradient of
    the loss by W h + b at its label. `linear_NV`, W h + b, is overwritten with that gradient everywhere else.

    In float32 at least, whatever the products' precision. `label_N`: W h + b at the labels, in it: looked up and put
    back outside, for a comparison with every column is not vectorised. `factor`: the head's scale over the step's count
    of tokens.
    """
    logits_NV, slope_NV = head.activate(linear_NV)
    at_label_N, slope_N = head.activate(label_N.clone())
    highest_N1 = logits_NV.amax(dim=-1, keepdim=True)
    log_sum_N1 = (logits_NV - highest_N1).exp().sum(dim=-1, keepdim=True).log() + highest_N1
    nll_N = log_sum_N1.squeeze(1) - at_label_N
    value_N, by_nll_N = objective.of_tokens(nll_N, masked_N)
    by_nll_N = by_nll_N.masked_fill(~counted_N, 0) * factor
    # Of another difference than above: an exponential of both uses would be written down, and memory is slower.
    error_NV = (logits_NV - log_sum_N1).exp() * by_nll_N[:, None]
    error_N = torch.expm1(-nll_N) * by_nll_N
    if slope_NV is not None and slope_N is not None:
        error_NV, error_N = error_NV * slope_NV, error_N * slope_N
    linear_NV.copy_(error_NV)
    return nll_N, value_N.masked_fill(~counted_N, 0), error_N
