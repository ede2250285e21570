"""`position` scores, s_t = sum over modules of g_t^T V a_t, by one backward pass for activations only.

g_t is the gradient of the whole block's summed NLL at a module's output. Each tracked module is one autograd function:
backward passes W^T g on and contracts g with V a on the way, so no weight gradient is formed. At full rank the
input a stays referenced until then (autograd holds it anyhow for the other operations, or not at all); at rank r only
R a (r values a token) does, and s_t = (U^T g_t) . (R a_t).

Cost: 2N FLOP a token forward, 2N backward, and 2N for V (almost nothing at low rank) per direction: further directions
share both passes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.documents import last_hidden_state
from ifguide.influence.directions import Direction, linear_module
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.patching import attention, replaced_forwards
from ifguide.models import predicted_positions


class BackwardEngine:
    """`score` gives (K, B, T) label-aligned `position` scores; products run in `product_dtype` (None: the model's)."""

    fixed_sizes = False

    def __init__(
        self,
        model: PreTrainedModel,
        directions: Sequence[Mapping[str, Direction]],
        *,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.dtype = model, product_dtype or model.dtype
        self.head = HeadDerivatives(model, product_dtype=product_dtype)
        self.weights = {name: linear_module(model, name).weight.detach().to(self.dtype) for name in directions[0]}
        self.directions = [
            {name: direction.to(model.device, self.dtype) for name, direction in one.items()} for one in directions
        ]

    def score(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
        sink_KN = torch.zeros(len(self.directions), tokens_BT.numel(), dtype=self.model.dtype, device=tokens_BT.device)
        # Starts the graph: what comes before the first tracked module needs no gradient.
        anchor = torch.zeros((), dtype=self.model.dtype, device=tokens_BT.device, requires_grad=True)
        forwards = {self.model.get_submodule(name): self._forward(name, anchor, sink_KN) for name in self.weights}
        implementation = None if self.model.config._attn_implementation == "eager" else "sdpa"
        with torch.enable_grad(), attention(self.model, implementation), replaced_forwards(forwards):
            hidden_BTD = last_hidden_state(self.model, tokens_BT, document_BT)
        with torch.no_grad():
            has_loss_BT = predicted_positions(tokens_BT, lengths_B, document_BT)[:, 1:]
            gradient = self.head.gradient(
                hidden_BTD.detach()[:, :-1].flatten(0, 1),
                tokens_BT[:, 1:].flatten(),
                has_loss_BT.flatten().to(hidden_BTD.dtype),
            )
            gradient_BTD = F.pad(gradient.view(*has_loss_BT.shape, hidden_BTD.shape[-1]), (0, 0, 0, 1))
        torch.autograd.grad(hidden_BTD, anchor, gradient_BTD)
        scores_KBT = sink_KN.view(-1, *tokens_BT.shape)
        return F.pad(scores_KBT[..., :-1], (1, 0))

    def primal(self, streams: Tensor, layer: int) -> Tensor:
        return streams

    def tangents(self, streams: Tensor, layer: int) -> Tensor:
        raise ValueError("attribution position has no tangents of hidden states; use target")

    def _forward(self, name: str, anchor: Tensor, sink_KN: Tensor) -> Callable[[Tensor], Tensor]:
        bias = linear_module(self.model, name).bias
        directions = [one[name] for one in self.directions]

        def forward(a: Tensor) -> Tensor:
            return _ScoredLinear.apply(a, anchor, self.weights[name], bias, directions, sink_KN)

        return forward


class _ScoredLinear(torch.autograd.Function):
    """W a + b; its backward adds g^T V a of every position to `sink_KN`."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        directions: Sequence[Direction],
        sink_KN: Tensor,
    ) -> Tensor:
        low = a.reshape(-1, a.shape[-1]).to(weight.dtype)
        whole = any(direction.right is None for direction in directions)
        projected = [F.linear(low, direction.right) for direction in directions if direction.right is not None]
        ctx.save_for_backward(*projected, *([low] if whole else []))
        ctx.weight, ctx.directions, ctx.sink_KN = weight, directions, sink_KN
        output = F.linear(low, weight).to(a.dtype)
        if bias is not None:
            output += bias
        return output.view(*a.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        g = gradient.reshape(-1, gradient.shape[-1]).to(ctx.weight.dtype)
        saved = iter(ctx.saved_tensors)
        projected = [next(saved) for direction in ctx.directions if direction.right is not None]
        whole = next(saved, None)
        remaining = iter(projected)
        for k, direction in enumerate(ctx.directions):
            if direction.right is not None:
                score = (F.linear(g, direction.left.mT) * next(remaining)).sum(-1, dtype=ctx.sink_KN.dtype)
            else:
                assert whole is not None
                score = (F.linear(g, direction.weight.mT) * whole).sum(-1, dtype=ctx.sink_KN.dtype)
            if direction.bias is not None:
                score = score + F.linear(g, direction.bias[None]).squeeze(1)
            ctx.sink_KN[k] += score
        passed_on = None
        if ctx.needs_input_grad[0]:
            passed_on = (g @ ctx.weight).to(gradient.dtype).view(*gradient.shape[:-1], -1)
        return passed_on, gradient.new_zeros(()), None, None, None, None
