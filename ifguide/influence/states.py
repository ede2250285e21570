"""Hidden states of some layers, taken on the way while a model computes something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

Primal = Callable[[Tensor, int], Tensor]  # what flows through the model, and the layer -> (B, T, D) hidden states
States = dict[int, Tensor]


@contextmanager
def taken_states(
    model: PreTrainedModel, blocks: nn.ModuleList, layers: Sequence[int], primal: Primal
) -> Iterator[States]:
    """Inside, a pass of the model's body leaves the states (B, T, D) of each of `layers` in what this gives.

    Layer n is what the n-th of the model's `blocks` gives; the last one is normed, as the LM head reads it."""
    states: States = {}

    def taker(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            states[layer] = primal(output if isinstance(output, Tensor) else output[0], layer).detach()

        return take

    with ExitStack() as stack:
        for layer in layers:
            module = model.base_model if layer == len(blocks) else blocks[layer - 1]
            stack.callback(module.register_forward_hook(taker(layer)).remove)
        yield states
