"""`target` scores by central differences: two ordinary forward passes, on any architecture and attention kernel.

For each direction the model runs on a pair of streams, x+ and x-, that stand for h +- step * h'. Where they are equal
in the mean, everything but a linear map may treat them as ordinary inputs, fused kernels included. The tracked
modules are treated in one of two ways:

- folded (full rank in the model's own precision): x+ meets W + step V, x- meets W - step V. 4N FLOP a token.
- exact (low precision, or low rank): the streams are turned into s = x+ + x- and d = x+ - x-, products are taken of
  these, W s and W d + step V s, and turned back. Rounding a product to bfloat16 then touches h and h' alike by one part
  in 256; a difference of two rounded products would be nothing but rounding. 4N at low rank, 6N at full rank.

The streams themselves stay float32. The LM head and the loss are differentiated exactly (`lm_head`). The error is
O(step^2) from the truncation and 2^-24 / step from the streams; the step is set so that the final hidden state
moves by `RELATIVE_STEP` of its size, which keeps both near 1e-5 (bench/LOG.md).

Further directions share W s: K directions cost (1 + K) 2N instead of K 4N, and 2K streams.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.directions import Direction, linear_module
from ifguide.influence.fused import kernels, stacked
from ifguide.influence.lm_head import LMHead
from ifguide.influence.paired_attention import PAIRED, pairs_of_streams
from ifguide.influence.patching import attention, replaced_forwards
from ifguide.influence.products import Product

RELATIVE_STEP = 2.0**-9
PROBE_TOKENS = 64


class DifferenceEngine:
    """`score` gives (K, B, T) derivatives of each token's NLL along K directions.

    product_dtype: of the matrix products (None: the model's own). steps: one per direction, or None to calibrate
    them on a fixed probe; they are powers of two, so that they scale exactly. fused: compile the element-wise work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        directions: Sequence[Mapping[str, Direction]],
        *,
        product_dtype: torch.dtype | None = None,
        steps: Sequence[float] | None = None,
        fused: bool = False,
    ) -> None:
        self.kernels = kernels(fused=fused)
        self.model, self.dtype = model, product_dtype or model.dtype
        self.head = LMHead(model, product_dtype=product_dtype, fused=fused)
        self.low_precision = self.dtype != model.dtype
        self.K = len(directions)
        # Attention in low precision needs its own treatment of the pair, as the linear maps do.
        self.attention = PAIRED if self.low_precision and model._supports_attention_backend else None
        self.steps = list(steps) if steps is not None else self._calibrate(directions)
        self.forwards = self._forwards(directions, self.steps)

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        # The last token predicts nothing, but sizes that are powers of two multiply faster than ones below them.
        hidden_BTD, tangents_KBTD = self._hidden(tokens_BT, self.forwards)
        hidden_BTD, tangents_KBTD = hidden_BTD[:, :-1], tangents_KBTD[:, :, :-1]
        scores_KN = self.head.tangents(
            hidden_BTD.flatten(0, 1), tangents_KBTD.flatten(1, 2), tokens_BT[:, 1:].flatten()
        )
        for k, step in enumerate(self.steps):
            scores_KN[k] /= 2 * step
        return F.pad(scores_KN.view(self.K, len(tokens_BT), -1), (1, 0))

    def _hidden(self, tokens_BT: Tensor, forwards: Mapping[str, Callable[[Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
        """Final hidden states (B, T, D), and x+ - x- (K, B, T, D)."""
        by_module = {self.model.get_submodule(name): forward for name, forward in forwards.items()}
        with (
            pairs_of_streams(self.K, self.dtype, self.kernels),
            attention(self.model, self.attention),
            replaced_forwards(by_module),
        ):
            streams = self.model.base_model(tokens_BT.repeat(2 * self.K, 1), use_cache=False).last_hidden_state
        pairs = streams.view(self.K, 2, *tokens_BT.shape, -1)
        return 0.5 * (pairs[0, 0] + pairs[0, 1]), pairs[:, 0] - pairs[:, 1]

    @torch.no_grad()
    def _calibrate(self, directions: Sequence[Mapping[str, Direction]]) -> list[float]:
        """Steps that move the final hidden state of a fixed probe by RELATIVE_STEP, as powers of two.

        Tokens of the probe are spread over the vocabulary by a multiplicative sequence: no random state, no data.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        probe = (torch.arange(1, PROBE_TOKENS + 1, device=self.model.device) * 2_654_435_761) % vocabulary
        weights = [linear_module(self.model, name).weight for name in directions[0]]
        weight_norm = math.sqrt(sum(float(weight.float().square().sum()) for weight in weights))
        steps = []
        for one in directions:
            norm = math.sqrt(sum(_squared_norm(direction) for direction in one.values()))
            if norm == 0:
                raise ValueError("a direction is zero in every module; build the query again")
            steps.append(_power_of_two(RELATIVE_STEP * weight_norm / norm))
        for _ in range(2):  # once from the norms, once more from near the right size
            hidden, differences = self._hidden(probe[None], self._forwards(directions, steps))
            size = hidden.square().mean().sqrt()
            for k in range(self.K):
                moved = float(0.5 * differences[k].square().mean().sqrt() / size)
                if not math.isfinite(moved) or moved == 0:
                    raise ValueError("the direction does not move the probe's hidden state: is it zero or not finite?")
                steps[k] = _power_of_two(steps[k] * RELATIVE_STEP / moved)
        return steps

    def _forwards(
        self, directions: Sequence[Mapping[str, Direction]], steps: Sequence[float]
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        forwards = {}
        for name in directions[0]:
            own = [
                one[name].to(self.model.device, torch.promote_types(self.model.dtype, torch.float32))
                for one in directions
            ]
            folded = not self.low_precision and all(direction.weight is not None for direction in own)
            forwards[name] = (self._folded if folded else self._exact)(name, own, steps)
        return forwards

    def _folded(self, name: str, directions: Sequence[Direction], steps: Sequence[float]) -> Callable[[Tensor], Tensor]:
        module = linear_module(self.model, name)
        weights, biases = [], []
        for direction, step in zip(directions, steps, strict=True):
            for signed in (step, -step):
                assert direction.weight is not None
                weights.append(torch.add(module.weight, direction.weight, alpha=signed))
                biases.append(None if direction.bias is None else torch.add(module.bias, direction.bias, alpha=signed))

        def forward(x: Tensor) -> Tensor:
            streams = x.reshape(len(weights), -1, x.shape[-1])
            outputs = [F.linear(*each) for each in zip(streams, weights, biases, strict=True)]
            return torch.cat(outputs).view(*x.shape[:-1], -1)

        return forward

    def _exact(self, name: str, directions: Sequence[Direction], steps: Sequence[float]) -> Callable[[Tensor], Tensor]:
        module, K, dtype = linear_module(self.model, name), self.K, self.dtype
        # s is twice the input: the halves are exact in any binary precision.
        weight = Product((0.5 * module.weight.detach()).to(dtype))
        bias = module.bias
        changes = [_scaled_change(direction, step, dtype) for direction, step in zip(directions, steps, strict=True)]
        bias_changes = [bias for _, bias in changes if bias is not None]
        change_bias = torch.stack(bias_changes) if bias_changes else None
        mix, unmix = self.kernels.mix, self.kernels.unmix

        def forward(x: Tensor) -> Tensor:
            mixed = mix(x.reshape(K, 2, -1, x.shape[-1]), dtype, 1.0)
            count = mixed.shape[1]
            primal, *tangents = weight(mixed.view(-1, x.shape[-1])).view(1 + K, count, -1)
            for k, (factors, _) in enumerate(changes):
                inner = mixed[0]
                for factor in factors[:-1]:
                    inner = factor(inner)
                tangents[k] = factors[-1].added_to(tangents[k], inner)
            output = unmix(primal, stacked(tangents), bias, change_bias)
            return output.to(x.dtype).view(*x.shape[:-1], -1)

        return forward


def _scaled_change(direction: Direction, step: float, dtype: torch.dtype) -> tuple[list[Product], Tensor | None]:
    """step * V as factors to apply one after the other to s (twice the input), and step * v_b."""
    if direction.weight is not None:
        factors = [0.5 * step * direction.weight]
    else:
        assert direction.left is not None
        assert direction.right is not None
        root = math.sqrt(step)
        factors = [0.5 * root * direction.right, root * direction.left]
    products = [Product(factor.to(dtype)) for factor in factors]
    return products, None if direction.bias is None else step * direction.bias


def _squared_norm(direction: Direction) -> float:
    if direction.weight is not None:
        return float(direction.weight.float().square().sum())
    assert direction.left is not None
    assert direction.right is not None
    return float(((direction.left.mT @ direction.left) * (direction.right @ direction.right.mT)).sum())


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))
