"""One influence score per token of a corpus block, by contracting a direction V with token gradients.

Method (IF-Guide, arXiv 2506.01790). With a_t the input and g_t the loss gradient at the output of a tracked
linear module at position t (a bias is one more, constant, input column), two attributions:

- `target`, Eq. 8:  s_j = <V, grad NLL_j>. This is the directional derivative of token j's own loss along V, so
  one forward-mode pass gives every j: each module's output tangent is W a'_t + V a_t, and with logits z and
  their tangent z' at j - 1, s_j = sum_v softmax(z)_v z'_v - z'_{x_j}. No backward pass, no stored graph.
- `position`, what the paper's code computes:  s_t = sum over modules of g_t^T V a_t, with g_t the gradient of
  the whole block's summed NLL. Each output gets eps_t V a_t added, with eps = 0, shared by all modules: the
  gradient of the loss by eps_t is s_t. No weight gradient is formed.

Summed over a block the two are equal; token by token they are not: `position` at t mixes in the losses of all
later tokens.

Alignment: returned scores are label-aligned. score[b, j] speaks of predicting token j, so `position` is
shifted by one (what happens at t predicts token t + 1). Index 0 and padding are exactly 0.
Sign: positive means that training on the token makes the positive completions of V more likely.

Cost: about 6N FLOP per token for N tracked parameters, either way. `target` keeps (B, T, V) logits and their
tangent; `position` the activations of one forward pass. It holds no per-token gradient and approximates nothing.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ifguide.models import next_token_nll, predicted_positions

Attribution = Literal["target", "position"]
Perturbation = Callable[[Tensor, Tensor], Tensor]


class TokenScorer:
    """Scores packed blocks with one model and one direction V.

    The scorer takes the model over: it turns off `requires_grad` of its parameters and sets the attention to
    `sdpa`, unless that is `eager` already. Fused attention kernels have no forward-mode derivative, so `target`
    runs attention by its plain (math) kernel.

    directions: tracked module -> (d_out, d_in), or (d_out, d_in + 1) with a bias; any floating dtype.

    Raises ValueError when a direction names no `nn.Linear` of the model or has another shape, when there is
    none, or when the model is in training mode (dropout would make the scores random).
    """

    def __init__(self, model: PreTrainedModel, directions: Mapping[str, Tensor], *, attribution: Attribution) -> None:
        if attribution not in ("target", "position"):
            raise ValueError(f"attribution is {attribution!r}; it must be 'target' or 'position'")
        if not directions:
            raise ValueError("no directions to score with; build the query first")
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before scoring")
        if model.config._attn_implementation not in ("sdpa", "eager"):
            model.set_attn_implementation("sdpa")
        self.model = model.requires_grad_(False)
        self.attribution = attribution
        self._modules = [_tracked(model, name, direction) for name, direction in directions.items()]

    def score(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores (B, T), label-aligned, on the model's device; float32, or float64 if the model is.

        tokens_BT: int64, padded on the right with any valid id; lengths_B: real tokens of each row.
        """
        tokens_BT, lengths_B = tokens_BT.to(self.model.device), lengths_B.to(self.model.device)
        score = self._score_target if self.attribution == "target" else self._score_position
        scores_BT = score(tokens_BT, lengths_B)
        scores_BT = scores_BT.masked_fill(~predicted_positions(tokens_BT, lengths_B), 0.0)
        return scores_BT if scores_BT.dtype == torch.float64 else scores_BT.float()

    def _score_target(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        def perturb(output: Tensor, change: Tensor) -> Tensor:
            primal, tangent = forward_ad.unpack_dual(output)
            return forward_ad.make_dual(primal, change if tangent is None else tangent + change)

        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            logits_BTV, tangent_BTV = forward_ad.unpack_dual(self._logits(tokens_BT, perturb))
            if logits_BTV.dtype != torch.float64:
                logits_BTV, tangent_BTV = logits_BTV.float(), tangent_BTV.float()
            expected = (logits_BTV[:, :-1].softmax(dim=-1) * tangent_BTV[:, :-1]).sum(dim=-1)
            observed = tangent_BTV[:, :-1].gather(2, tokens_BT[:, 1:, None]).squeeze(2)
            return F.pad(expected - observed, (1, 0))

    def _score_position(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        epsilon_BT = torch.zeros(tokens_BT.shape, dtype=self.model.dtype, device=tokens_BT.device, requires_grad=True)
        with torch.enable_grad():
            logits_BTV = self._logits(tokens_BT, lambda output, change: output + epsilon_BT[..., None] * change)
            loss = next_token_nll(logits_BTV, tokens_BT, lengths_B).sum()
            (scores_BT,) = torch.autograd.grad(loss, epsilon_BT)
        return F.pad(scores_BT[:, :-1], (1, 0))

    def _logits(self, tokens_BT: Tensor, perturb: Perturbation) -> Tensor:
        """Runs the model with every tracked output o_t replaced by `perturb(o_t, V a_t)`."""
        with ExitStack() as hooks:
            for module, weight, bias in self._modules:

                def hook(
                    module: nn.Module,
                    inputs: tuple[Any, ...],
                    output: Tensor,
                    weight: Tensor = weight,
                    bias: Tensor | None = bias,
                ) -> Tensor:
                    assert output.shape[:2] == tokens_BT.shape, "a tracked module must see (B, T, d) inputs"
                    # V a_t is a constant of the perturbation: neither tangent nor gradient flows through it.
                    with torch.no_grad():
                        change = F.linear(_primal(inputs[0]), weight, bias)
                    return perturb(output, change)

                hooks.enter_context(module.register_forward_hook(hook))
            return self.model(tokens_BT, use_cache=False).logits


def _primal(tensor: Tensor) -> Tensor:
    """The value without its tangent (outside of a dual level: the tensor itself)."""
    return forward_ad.unpack_dual(tensor).primal


def _tracked(model: nn.Module, name: str, direction: Tensor) -> tuple[nn.Linear, Tensor, Tensor | None]:
    """The module, and V split like its parameters: weight (d_out, d_in) and bias (d_out,) or None."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"direction of {name}: the model has no such module; use the query's proxy") from error
    if type(module) is not nn.Linear:
        raise ValueError(f"direction of {name}: a {type(module).__name__}, not an nn.Linear")
    expected = (module.out_features, module.in_features + (module.bias is not None))
    if tuple(direction.shape) != expected:
        raise ValueError(f"direction of {name} has shape {tuple(direction.shape)}, its module needs {expected}")
    direction = direction.to(module.weight.device, module.weight.dtype)
    weight = direction[:, : module.in_features].contiguous()
    return module, weight, (None if module.bias is None else direction[:, -1].contiguous())
