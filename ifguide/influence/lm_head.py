"""From the final hidden states to the loss and its tangent or gradient, without whole logits.

With z = f(W h) the logits of a position and x its label, NLL = logsumexp(z) - z_x, and

- the tangent of the NLL along h' is  s = sum_v softmax(z)_v z'_v - z'_x,  z' = f'(W h) * W h';
- the gradient of the NLL by h is  W^T [f'(W h) * (softmax(z) - onehot(x))].

f is the identity, a scale (Cohere, Granite) or a soft cap c tanh(z / c) (Gemma). Positions are taken in chunks of
`CHUNK_VALUES` logits: no (tokens, vocabulary) tensor is ever whole.

Cost: 2 d V FLOP a token for the logits, as much again for each tangent or for the gradient. Softmax and sums are
float32 (float64 for a float64 model) whatever precision the products run in.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.influence.fused import kernels
from ifguide.influence.products import Product

# Logits at a time. 4M are 16 MB in float32: small enough for a CPU's cache, large enough for a matrix product.
CHUNK_VALUES = {"cpu": 4 << 20, "cuda": 128 << 20}


class LMHead:
    """The output embedding of `model`, its products run in `product_dtype` (None: the model's own); `fused` compiles
    the sum over the vocabulary in `tangents`.

    Raises ValueError when the model's logits are not f(W h) with an f that is known (`check`).
    """

    def __init__(
        self, model: PreTrainedModel, *, product_dtype: torch.dtype | None = None, fused: bool = False
    ) -> None:
        self.kernels = kernels(fused=fused, device_type=model.device.type)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{type(model).__name__}: its LM head is a {type(head).__name__}, not an nn.Linear")
        config = model.config.get_text_config()
        self.dtype = product_dtype or head.weight.dtype
        self._head = head
        self.bias = None if head.bias is None else head.bias.detach()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    @cached_property
    def weight(self) -> Tensor:
        """W (V, D) as it is multiplied from the left, for gradients."""
        return self._head.weight.detach().to(self.dtype)

    @cached_property
    def project(self) -> Product:
        """W as it is multiplied from the right, for logits."""
        return Product(self._head.weight.detach().to(self.dtype))

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError when `model`'s own logits differ from these: a head that is not understood."""
        tokens_BT = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        expected = model(tokens_BT, use_cache=False).logits[0].float()
        hidden = model.base_model(tokens_BT, use_cache=False).last_hidden_state[0]
        found = self._logits(hidden)[0].float()
        tolerance = 1e-4 if self.dtype in (torch.float32, torch.float64) else 5e-2
        if (found - expected).abs().max() > tolerance * expected.abs().max().clamp(min=1.0):
            raise ValueError(
                f"{type(model).__name__}: its logits are not its output embedding times the hidden state, up to a"
                " scale or soft cap; choose a proxy of a common family (GPT-NeoX, Llama, Qwen, Gemma, ...)"
            )

    def tangents(self, hidden_ND: Tensor, tangents_KND: Tensor, labels_N: Tensor) -> Tensor:
        """(K, N): the derivative of each position's NLL along each of K tangents of its hidden state."""
        scores_KN = tangents_KND.new_empty(tangents_KND.shape[:2])
        for rows in self._chunks(len(hidden_ND)):
            logits_NV, slope_NV = self._logits(hidden_ND[rows])
            labels = labels_N[rows, None]
            for k, tangent_ND in enumerate(tangents_KND[:, rows]):
                change_NV = self.project(tangent_ND.to(self.dtype))
                if slope_NV is not None or self.scale != 1.0:
                    change_NV = change_NV * (self.scale if slope_NV is None else slope_NV)
                observed_N = change_NV.gather(1, labels).squeeze(1)
                scores_KN[k, rows] = self.kernels.expected_change(logits_NV, change_NV) - observed_N
        return scores_KN

    def gradient(self, hidden_ND: Tensor, labels_N: Tensor, weight_N: Tensor) -> Tensor:
        """(N, D): the gradient of sum_n weight_n NLL_n by the hidden states."""
        gradient_ND = torch.empty_like(hidden_ND)
        for rows in self._chunks(len(hidden_ND)):
            logits_NV, slope_NV = self._logits(hidden_ND[rows])
            error_NV = logits_NV.to(torch.promote_types(self.dtype, torch.float32)).softmax(dim=-1)
            error_NV.scatter_add_(1, labels_N[rows, None], -torch.ones_like(error_NV[:, :1]))
            error_NV *= weight_N[rows, None] * (self.scale if slope_NV is None else slope_NV)
            gradient_ND[rows] = (error_NV.to(self.dtype) @ self.weight).to(gradient_ND.dtype)
        return gradient_ND

    def _chunks(self, count: int) -> Iterator[slice]:
        values = CHUNK_VALUES.get(self._head.weight.device.type, CHUNK_VALUES["cpu"])
        size = max(1, values // self._head.out_features)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _logits(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, at least float32 if f is not the identity, and f' where f is not linear."""
        logits_NV = self.project(hidden_ND.to(self.dtype))
        if self.bias is None and self.scale == 1.0 and self.softcap is None:
            return logits_NV, None
        logits_NV = logits_NV.to(torch.promote_types(self.dtype, torch.float32))
        if self.bias is not None:
            logits_NV += self.bias
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.softcap is None:
            return logits_NV, None
        tanh_NV = torch.tanh(logits_NV / self.softcap)
        return self.softcap * tanh_NV, self.scale * (1 - tanh_NV.square())
