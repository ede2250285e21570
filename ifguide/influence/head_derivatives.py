"""From the final hidden states to the loss and its tangent or gradient, without whole logits.

With z = f(W h) the logits of a position and x its label, NLL = logsumexp(z) - z_x, and

- the tangent of the NLL along h' is  s = sum_v softmax(z)_v z'_v - z'_x,  z' = f'(W h) * W h';
- the gradient of the NLL by h is  W^T [f'(W h) * (softmax(z) - onehot(x))];
- its Gauss-Newton product with h' is  W^T [f'(W h) * p * (z' - sum_v p_v z'_v)],  p = softmax(z).

f is that of `ifguide.lm_head`. Positions are taken in chunks of `CHUNK_VALUES` logits.

Cost: 2 d V FLOP a token for the logits, as much again for each tangent or for the gradient. Softmax and sums are
float32 (float64 for a float64 model) whatever precision the products run in.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.fused import kernels
from ifguide.influence.products import Product
from ifguide.lm_head import LMHead, chunks, not_understood, output_embedding

# Logits at a time. 4M are 16 MB in float32: small enough for a CPU's cache, large enough for a matrix product.
CHUNK_VALUES = {"cpu": 4 << 20, "cuda": 128 << 20}


class HeadDerivatives:
    """Of the LM head of `model`, its products run in `product_dtype` (None: the model's own); `fused` compiles the sum
    over the vocabulary in `tangents`.

    Raises ValueError when the model's logits are not f(W h) with an f that is known (`check`).
    """

    def __init__(
        self, model: PreTrainedModel, *, product_dtype: torch.dtype | None = None, fused: bool = False
    ) -> None:
        self.kernels = kernels(fused=fused, device_type=model.device.type)
        self.head, self._linear = LMHead.of(model), output_embedding(model)
        self.dtype = product_dtype or self._linear.weight.dtype
        self.bias = None if self._linear.bias is None else self._linear.bias.detach()

    @cached_property
    def weight(self) -> Tensor:
        """W (V, D) as it is multiplied from the left, for gradients."""
        return self._linear.weight.detach().to(self.dtype)

    @cached_property
    def project(self) -> Product:
        """W as it is multiplied from the right, for logits."""
        return Product(self._linear.weight.detach().to(self.dtype))

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError when `model`'s own logits differ from these: a head that is not understood."""
        tokens_BT = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        expected = model(tokens_BT, use_cache=False).logits[0].float()
        hidden = model.base_model(tokens_BT, use_cache=False).last_hidden_state[0]
        logits = self._logits(hidden)[0].float()
        tolerance = 1e-4 if self.dtype in (torch.float32, torch.float64) else 5e-2
        if (logits - expected).abs().max() > tolerance * expected.abs().max().clamp(min=1.0):
            raise not_understood(model, "proxy")

    def tangents(self, hidden_ND: Tensor, tangents_KND: Tensor, labels_N: Tensor) -> Tensor:
        """(K, N): the derivative of each position's NLL along each of K tangents of its hidden state."""
        scores_KN = tangents_KND.new_empty(tangents_KND.shape[:2])
        for rows in self._chunks(len(hidden_ND)):
            logits_NV, slope_NV = self._logits(hidden_ND[rows])
            labels = labels_N[rows, None]
            for k, tangent_ND in enumerate(tangents_KND[:, rows]):
                change_NV = self._change(tangent_ND, slope_NV)
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
            error_NV *= weight_N[rows, None] * self.head.scale
            if slope_NV is not None:
                error_NV *= slope_NV
            gradient_ND[rows] = (error_NV.to(self.dtype) @ self.weight).to(gradient_ND.dtype)
        return gradient_ND

    def curvature(self, hidden_ND: Tensor, tangent_ND: Tensor, weight_N: Tensor) -> Tensor:
        """(N, D): of each position weight_n J^T (diag p - p p^T) J h', where J is the derivative of its logits by its
        hidden state and h' the tangent of that. It does not depend on the label."""
        product_ND = torch.empty_like(hidden_ND)
        for rows in self._chunks(len(hidden_ND)):
            logits_NV, slope_NV = self._logits(hidden_ND[rows])
            p_NV = logits_NV.to(torch.promote_types(self.dtype, torch.float32)).softmax(dim=-1)
            change_NV = self._change(tangent_ND[rows], slope_NV)
            change_NV = p_NV * (change_NV - (p_NV * change_NV).sum(dim=-1, keepdim=True))
            change_NV *= weight_N[rows, None] * self.head.scale
            if slope_NV is not None:
                change_NV *= slope_NV
            product_ND[rows] = (change_NV.to(self.dtype) @ self.weight).to(product_ND.dtype)
        return product_ND

    def _change(self, tangent_ND: Tensor, slope_NV: Tensor | None) -> Tensor:
        """z' (N, V): how logits move with a tangent of the hidden states."""
        change_NV = self.project(tangent_ND.to(self.dtype))
        if self.head.scale != 1.0:
            change_NV = change_NV * self.head.scale
        return change_NV if slope_NV is None else change_NV * slope_NV

    def _chunks(self, count: int) -> Iterator[slice]:
        values = CHUNK_VALUES.get(self._linear.weight.device.type, CHUNK_VALUES["cpu"])
        return chunks(count, max(1, values // self._linear.out_features))

    def _logits(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, at least float32 if f is not the identity, and f' / scale where f is not linear."""
        linear_NV = self.project(hidden_ND.to(self.dtype))
        if self.bias is None and self.head.is_linear:
            return linear_NV, None
        if self.bias is not None:
            linear_NV = linear_NV.to(torch.promote_types(self.dtype, torch.float32)) + self.bias
        return self.head.activate(linear_NV)
