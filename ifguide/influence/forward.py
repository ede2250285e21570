"""`target` scores by forward-mode differentiation: exact, in the model's own precision.

Every hidden state is a dual number (h, h'). A tracked module maps (a, a') to (W a, W a' + V a): torch carries h'
through the rest of the model. No backward pass, no stored graph. Fused attention kernels have no forward-mode
derivative, so attention runs by its plain (math) kernel, which holds (heads, T, T) weights per block.

Cost: 6N FLOP a token for N tracked parameters and one direction (4N at low rank), plus every element-wise operation
about three times over. Each further direction is another pass: this is the engine that the fast one is checked with.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ifguide.documents import last_hidden_state
from ifguide.influence.directions import Direction, linear_module
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.patching import attention, replaced_forwards


class ForwardEngine:
    """`score` gives (K, B, T) derivatives of each token's NLL along K directions."""

    fixed_sizes = False

    def __init__(self, model: PreTrainedModel, directions: Sequence[Mapping[str, Direction]]) -> None:
        self.model = model
        self.head = HeadDerivatives(model)
        self.directions = [
            {name: direction.to(model.device, model.dtype) for name, direction in one.items()} for one in directions
        ]

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
        return torch.stack([self._score_one(directions, tokens_BT, document_BT) for directions in self.directions])

    def primal(self, streams: Tensor, layer: int) -> Tensor:
        return forward_ad.unpack_dual(streams).primal

    def tangents(self, streams: Tensor, layer: int) -> Tensor:
        if len(self.directions) > 1:
            raise ValueError("engine forward reads one direction at a time; use difference for several")
        return forward_ad.unpack_dual(streams).tangent[None]

    def _score_one(self, directions: Mapping[str, Direction], tokens_BT: Tensor, document_BT: Tensor | None) -> Tensor:
        hidden_BTD, tangent_BTD = hidden_tangents(self.model, directions, tokens_BT, document_BT)
        scores = self.head.tangents(
            hidden_BTD[:, :-1].flatten(0, 1), tangent_BTD[None, :, :-1].flatten(1, 2), tokens_BT[:, 1:].flatten()
        )
        return F.pad(scores.view(len(tokens_BT), -1), (1, 0))


@torch.no_grad()
def hidden_tangents(
    model: PreTrainedModel,
    directions: Mapping[str, Direction],
    tokens_BT: Tensor,
    document_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The final hidden states (B, T, D), and their derivatives along one direction of the model's device and dtype."""
    forwards = {model.get_submodule(name): _dual_forward(model, name, one) for name, one in directions.items()}
    implementation = None if model.config._attn_implementation == "eager" else "sdpa"
    with (
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
        attention(model, implementation),
        replaced_forwards(forwards),
    ):
        hidden = last_hidden_state(model, tokens_BT, document_BT)
        hidden_BTD, tangent_BTD = forward_ad.unpack_dual(hidden)
    return hidden_BTD, tangent_BTD


def _dual_forward(model: PreTrainedModel, name: str, direction: Direction) -> Callable[[Tensor], Tensor]:
    module = linear_module(model, name)
    weight, bias = module.weight, module.bias

    def forward(dual: Tensor) -> Tensor:
        a, a_tangent = forward_ad.unpack_dual(dual)
        if direction.weight is not None:
            change = F.linear(a, direction.weight, direction.bias)
        else:
            assert direction.left is not None
            assert direction.right is not None
            change = F.linear(F.linear(a, direction.right), direction.left, direction.bias)
        # Before the first tracked module nothing depends on V: no tangent, no product.
        if a_tangent is not None:
            change = change + F.linear(a_tangent, weight)
        return forward_ad.make_dual(F.linear(a, weight, bias), change)

    return forward
