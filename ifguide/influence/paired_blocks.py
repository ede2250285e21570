"""Where pairs of streams begin: at the first transformer block that a direction touches.

Below it V changes nothing, x+ and x- are the same, and one stream is enough. Its products run as those of the pairs do:
in low precision by `one_stream`, else as the model has them. From that block on, each block's forward is wrapped: the
states that come in first are repeated for the pairs, and so are, at every block, the masks and positions that the model
made for its rows. Which of a block's arguments have rows is known by name.

Cost: 2N FLOP a token for N parameters below, in place of the 4N to 6N of a pair.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.influence.products import Product
from ifguide.models import transformer_blocks

Forward = Callable[..., Any]
STATES = "hidden_states"
ROWS = {STATES, "attention_mask", "position_ids", "position_embeddings"}  # arguments whose first dimension is rows
ROWS_OF = {"BloomBlock": {"alibi"}}  # or rows times heads; elsewhere it may be heads alone


def block_number(blocks_name: str, module_name: str) -> int | None:
    """The place of the block that holds a module; None of a module outside the blocks."""
    inside = module_name.removeprefix(f"{blocks_name}.")
    return None if inside == module_name else int(inside.partition(".")[0])


def first_block(model: PreTrainedModel, module_names: Iterable[str]) -> int:
    """The place of the first block that holds one of the modules; 0 where one lies outside the blocks."""
    blocks_name, _ = transformer_blocks(model)
    numbers = [block_number(blocks_name, name) for name in module_names]
    return min((0 if number is None else number for number in numbers), default=0)


def one_stream(blocks: Iterable[nn.Module], dtype: torch.dtype) -> dict[nn.Module, Forward]:
    """The plain linear maps of some blocks, and what computes them with products in `dtype`; sums stay as they are."""
    return {
        module: _in_precision(module, dtype)
        for block in blocks
        for module in block.modules()
        if type(module) is nn.Linear
    }


def _in_precision(module: nn.Linear, dtype: torch.dtype) -> Forward:
    weight, bias, d_out = Product(module.weight.detach().to(dtype)), module.bias, module.out_features

    def forward(x: Tensor) -> Tensor:
        output = weight(x.reshape(-1, x.shape[-1]).to(dtype)).to(x.dtype).view(*x.shape[:-1], d_out)
        return output if bias is None else output + bias

    return forward


def paired_blocks(
    blocks: Sequence[nn.Module],
    forwards: Mapping[nn.Module, Forward],
    copies: int,
    of_pairs: Callable[[], AbstractContextManager[None]],
) -> dict[nn.Module, Forward]:
    """The blocks from the first one on that pairs run through, and their forwards: those of `forwards`, or their own.

    copies: streams of a row. of_pairs: the context in which streams are pairs. The forwards raise ValueError where the
    model hands a block a tensor that is not known to have rows.
    """
    return {
        block: _paired(block, forwards.get(block, block.forward), copies, of_pairs, begins=block is blocks[0])
        for block in blocks
    }


def _paired(
    block: nn.Module, inner: Forward, copies: int, of_pairs: Callable[[], AbstractContextManager[None]], *, begins: bool
) -> Forward:
    kind = type(block)
    rows = ROWS | ROWS_OF.get(kind.__name__, set())
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]

    def repeated(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(repeated(name, part) for part in value)
        if not isinstance(value, Tensor) or (name == STATES and not begins):
            return value
        if name not in rows:
            raise ValueError(
                f"{kind.__name__}: not known whether its argument {name} has a row for each text, so pairs of streams"
                " cannot begin here; score with engine forward"
            )
        if len(value) == 1 and name != STATES:  # the same for all rows
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))

    def forward(*arguments: Any, **named: Any) -> Any:
        given = [repeated(name, value) for name, value in zip(names, arguments, strict=False)]
        with of_pairs():
            return inner(*given, **{name: repeated(name, value) for name, value in named.items()})

    return forward
