"""The residual stream of a causal LM: what enters its first block, and what leaves each block.

Depth 0 is the embedding, depth l the stream after l blocks; L blocks give L + 1 depths. Blocks are found by structure,
as tracked modules are (`models.transformer_blocks`), so no family needs a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.evaluation.generation import evaluating
from ifguide.models import transformer_blocks


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the blocks, and gives the last hidden states."""
    return model.get_submodule(transformer_blocks(model)[0].rpartition(".")[0])


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the LM head: the last norm beside the list of blocks.

    Raises ValueError naming the model where there is none (OPT-350m norms inside its blocks alone).
    """
    blocks_name, _ = transformer_blocks(model)
    norms = [module for module in decoder_of(model).children() if "norm" in type(module).__name__.lower()]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm beside {blocks_name}, so a logit lens has nothing to read its hidden"
            " states with; leave this model out of the analysis"
        )
    return norms[-1]


@contextmanager
def recorded_residuals(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it, a forward pass of the model fills the list with the stream (B, T, D) at each depth, in order."""
    _, blocks = transformer_blocks(model)
    depths: list[Tensor] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        depths[:] = [arguments[0] if arguments else named["hidden_states"]]

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        depths.append(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield depths
    finally:
        for handle in handles:
            handle.remove()


def mean_residuals(model: PreTrainedModel, texts: Sequence[Sequence[int]], *, batch_size: int, skip: int = 0) -> Tensor:
    """(L + 1, N, D) float32: the mean over each text's tokens of the stream at each depth; texts are token ids.

    `skip`: tokens at the beginning of each that are read and not in the mean, as a BOS, whose stream dwarfs all others.

    Padding is on the right, which a causal model never looks back on. ValueError for a text without tokens, and for no
    text at all.
    """
    if not texts:
        raise ValueError("no texts; an analysis needs at least one")
    empty = [i for i, ids in enumerate(texts) if len(ids) <= skip]
    if empty:
        raise ValueError(f"text {empty[0]} has no tokens; every text of an analysis needs one")
    residuals: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with evaluating(model), recorded_residuals(model) as depths:
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            tokens_BT, lengths_B = padded([texts[i] for i in rows], model.device)
            model.base_model(tokens_BT, use_cache=False)
            places_T = torch.arange(tokens_BT.shape[1], device=model.device)
            real_BT = (places_T >= skip) & (places_T < lengths_B[:, None])
            for place, i in enumerate(rows):
                residuals[i] = torch.stack([depth[place, real_BT[place]].float().mean(0) for depth in depths]).cpu()
    return torch.stack(residuals, dim=1)


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the right with id 0, and lengths (B,)."""
    lengths = [len(ids) for ids in texts]
    tokens_BT = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    for row, ids in enumerate(texts):
        tokens_BT[row, : len(ids)] = torch.tensor(list(ids))
    return tokens_BT.to(device), torch.tensor(lengths, device=device)
