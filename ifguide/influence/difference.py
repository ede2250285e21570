"""`target` scores by central differences: two ordinary forward passes, on any architecture and attention kernel.

For each direction the model runs on a pair of streams, x+ and x-, that stand for h +- step * h'. Where they are equal
in the mean, everything but a linear map may treat them as ordinary inputs, fused kernels included; the tracked modules
take the pair apart (`paired_linear`), and so do attention in low precision (`paired_attention`) and, where layers are
compiled for a CPU, gated activations (`paired_activation`). 4N FLOP a token at full rank in the model's own precision
and at low rank, else 6N.

Below the first block that V touches there is one stream (`paired_blocks`). The streams themselves stay float32. The LM
head and the loss are differentiated exactly (`head_derivatives`). The error is O(step^2) from the truncation and
2^-24 / step from the streams; the step is set so that the final hidden state moves by `RELATIVE_STEP` of its size,
which keeps both near 1e-5 (bench/LOG.md).

Further directions share W s: K directions cost (1 + K) 2N instead of K 4N, and 2K streams.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.documents import last_hidden_state
from ifguide.influence.directions import Direction, linear_module
from ifguide.influence.fused import compiled_layers, kernels, pairs
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.paired_activation import paired_activations
from ifguide.influence.paired_attention import ONE_STREAM, PAIRED, pairs_of_streams
from ifguide.influence.paired_blocks import first_block, one_stream, paired_blocks
from ifguide.influence.paired_linear import paired_linear
from ifguide.influence.patching import attention, replaced_forwards
from ifguide.models import max_positions, transformer_blocks

RELATIVE_STEP = 2.0**-9
PROBE_TOKENS = 64


class DifferenceEngine:
    """`score` gives (K, B, T) derivatives of each token's NLL along K directions.

    product_dtype: of the matrix products (None: the model's own). steps: one per direction, or None to calibrate
    them on a fixed probe; they are powers of two, so that they scale exactly. fused: compile the model's layers with
    the element-wise work in them, for each number of blocks anew (`fixed_sizes`).
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
        self.kernels = kernels(fused=fused, device_type=model.device.type)
        self.model, self.dtype = model, product_dtype or model.dtype
        self.head = HeadDerivatives(model, product_dtype=product_dtype, fused=fused)
        self.low_precision = self.dtype != model.dtype
        self.K = len(directions)
        # Attention in low precision needs its own treatment of the pair, as the linear maps do.
        self.attention = PAIRED if self.low_precision and model._supports_attention_backend else None
        self.blocks, self.first = transformer_blocks(model)[1], first_block(model, directions[0])
        below = self.blocks[: self.first]
        self.below = one_stream(below, self.dtype) if self.low_precision else {}
        self.steps = list(steps) if steps is not None else self._calibrate(directions)
        forwards = self._forwards(directions, self.steps)
        self.fixed_sizes = self.kernels.by_layer
        if self.fixed_sizes:
            forwards |= compiled_layers(model, of_streams=True)
            if model.device.type == "cpu":
                alone = {module for block in below for module in block.modules()}
                paired = paired_activations(model, self.K)
                forwards |= {module: own for module, own in paired.items() if module not in alone}
        self.forwards = self._begun(forwards)

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None = None) -> Tensor:
        hidden_BTD, tangents_KBTD = self._hidden(tokens_BT, self.forwards, document_BT)
        # The last token predicts nothing, but sizes that are powers of two multiply faster than ones below them.
        hidden_BTD, tangents_KBTD = hidden_BTD[:, :-1], tangents_KBTD[:, :, :-1]
        scores_KN = self.head.tangents(
            hidden_BTD.flatten(0, 1), tangents_KBTD.flatten(1, 2), tokens_BT[:, 1:].flatten()
        )
        for k, step in enumerate(self.steps):
            scores_KN[k] /= 2 * step
        return F.pad(scores_KN.view(self.K, len(tokens_BT), -1), (1, 0))

    def primal(self, streams: Tensor, layer: int) -> Tensor:
        return self._mean(streams) if layer > self.first else streams

    def _mean(self, streams: Tensor) -> Tensor:
        plus, minus = pairs(streams, self.K)[0]
        return 0.5 * (plus + minus)

    def tangents(self, streams: Tensor, layer: int) -> Tensor:
        if layer <= self.first:
            return streams.new_zeros(self.K, *streams.shape)
        plus, minus = pairs(streams, self.K).unbind(1)
        return (plus - minus) / (2 * plus.new_tensor(self.steps).view(-1, *[1] * (plus.dim() - 1)))

    def _hidden(
        self, tokens_BT: Tensor, forwards: Mapping[nn.Module, Callable[..., Any]], document_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states (B, T, D), and x+ - x- (K, B, T, D)."""
        copies = 1 if self.first else 2 * self.K, 1
        documents = None if document_BT is None else document_BT.repeat(copies)
        with (
            pairs_of_streams(ONE_STREAM if self.first else self.K, self.dtype, self.kernels),
            attention(self.model, self.attention),
            replaced_forwards(forwards),
        ):
            streams = last_hidden_state(self.model, tokens_BT.repeat(copies), documents)
        of_signs = pairs(streams, self.K)
        return self._mean(streams), of_signs[:, 0] - of_signs[:, 1]

    def _begun(self, forwards: dict[nn.Module, Callable[..., Any]]) -> dict[nn.Module, Callable[..., Any]]:
        """Those forwards, with what runs on one stream and begins the pairs where V does not touch the first block."""
        if not self.first:
            return forwards
        of_pairs = functools.partial(pairs_of_streams, self.K, self.dtype, self.kernels)
        return self.below | forwards | paired_blocks(list(self.blocks)[self.first :], forwards, 2 * self.K, of_pairs)

    @torch.no_grad()
    def _calibrate(self, directions: Sequence[Mapping[str, Direction]]) -> list[float]:
        """Steps that move the final hidden state of a fixed probe by RELATIVE_STEP, as powers of two.

        Tokens of the probe are spread over the vocabulary by a multiplicative sequence: no random state, no data.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        length = min(PROBE_TOKENS, max_positions(self.model))
        probe = (torch.arange(1, length + 1, device=self.model.device) * 2_654_435_761) % vocabulary
        weights = [linear_module(self.model, name).weight for name in directions[0]]
        weight_norm = math.sqrt(sum(float(weight.float().square().sum()) for weight in weights))
        steps = []
        for one in directions:
            norm = math.sqrt(sum(_squared_norm(direction) for direction in one.values()))
            if norm == 0:
                raise ValueError("a direction is zero in every module; build the query again")
            steps.append(_power_of_two(RELATIVE_STEP * weight_norm / norm))
        for _ in range(2):  # once from the norms, once more from near the right size
            hidden, differences = self._hidden(probe[None], self._begun(self._forwards(directions, steps)))
            size = hidden.square().mean().sqrt()
            for k in range(self.K):
                moved = float(0.5 * differences[k].square().mean().sqrt() / size)
                if not math.isfinite(moved) or moved == 0:
                    raise ValueError("the direction does not move the probe's hidden state: is it zero or not finite?")
                steps[k] = _power_of_two(steps[k] * RELATIVE_STEP / moved)
        return steps

    def _forwards(
        self, directions: Sequence[Mapping[str, Direction]], steps: Sequence[float]
    ) -> dict[nn.Module, Callable[..., Any]]:
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        modules = {name: linear_module(self.model, name) for name in directions[0]}
        return {
            module: paired_linear(
                module,
                [one[name].to(self.model.device, dtype) for one in directions],
                steps,
                self.dtype,
                self.kernels,
            )
            for name, module in modules.items()
        }


def _squared_norm(direction: Direction) -> float:
    if direction.weight is not None:
        return float(direction.weight.float().square().sum())
    assert direction.left is not None
    assert direction.right is not None
    return float(((direction.left.mT @ direction.left) * (direction.right @ direction.right.mT)).sum())


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))
