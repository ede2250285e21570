"""What a proxy makes of token blocks and queries: hidden states and losses, in this process, without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.query import TokenisedQuery, tokenise_queries
from ifguide.influence.query_file import QueryRow
from ifguide.models import next_token_nll

Blocks = Sequence[Sequence[int]]
Pairs = Sequence[tuple[str, str]]
STATE_TOKENS, LOSS_TOKENS = 4096, 1024  # at a time: of states of all layers; of logits over a vocabulary


@dataclass(frozen=True, kw_only=True)
class QuerySets:
    """What finders learn a behaviour from: queries (prompt, completion) that show it, and others.

    max_tokens: of a query. beginning: a BOS that is read before each."""

    positive: Pairs
    negative: Pairs
    max_tokens: int = 512
    beginning: int | None = None

    @classmethod
    def of(cls, rows: Iterable[QueryRow], *, max_tokens: int, beginning: int | None = None) -> QuerySets:
        """Those of a query's rows."""
        sides: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
        for row in rows:
            sides[row.positive].append((row.prompt, row.completion))
        return cls(positive=sides[True], negative=sides[False], max_tokens=max_tokens, beginning=beginning)

    def sides(self) -> tuple[tuple[str, Pairs], tuple[str, Pairs]]:
        return ("positive", self.positive), ("negative", self.negative)

    def tokenised(self, tokenizer: Any, pairs: Pairs, model: PreTrainedModel | None = None) -> list[TokenisedQuery]:
        """Some of the queries as `build_query` reads them, with `model` as the proxy."""
        return tokenise_queries(tokenizer, pairs, model, max_tokens=self.max_tokens, beginning=self.beginning)


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, blocks: Blocks, *, beginning: int | None = None, precision: str = "float32"
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """For each block, by its number and in order of length, the states (T, D) of each layer: the embedding, then what
    each block of the model gives, the last one normed as the LM head reads it. Entry t has read the tokens up to t.

    `beginning`: a BOS that is read before each block and has no entry. `precision`: of matrix products; in bfloat16
    norms, softmax and the stream between the layers stay float32."""
    for numbers, tokens_BT, lengths_B in _batches(model, blocks, beginning, STATE_TOKENS):
        with in_precision(model, precision):
            states = model.base_model(tokens_BT, use_cache=False, output_hidden_states=True).hidden_states
        first = int(beginning is not None)
        for row, number in enumerate(numbers):
            yield number, tuple(layer[row, first : int(lengths_B[row])] for layer in states)


def in_precision(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Within it the model's matrix products are of that precision; its norms, softmax and stream stay as they are."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, blocks: Blocks, *, beginning: int | None = None, precision: str = "float32"
) -> list[Tensor]:
    """Of each block the NLL (T,) of its tokens, float32 on the CPU; entry 0 is 0 without a `beginning`. `precision`: of
    matrix products, the LM head's too."""
    losses: list[Tensor] = [torch.empty(0)] * len(blocks)
    for numbers, tokens_BT, lengths_B in _batches(model, blocks, beginning, LOSS_TOKENS):
        with in_precision(model, precision):
            logits_BTV = model(tokens_BT, use_cache=False).logits
        nll_BT = next_token_nll(logits_BTV, tokens_BT, lengths_B).cpu()
        for row, number in enumerate(numbers):
            losses[number] = nll_BT[row, int(beginning is not None) : int(lengths_B[row])]
    return losses


def _batches(
    model: PreTrainedModel, blocks: Blocks, beginning: int | None, batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Numbers, ids (B, T) padded on the right and lengths (B,) of blocks of like length: `batch_tokens`, or one."""
    first = [] if beginning is None else [beginning]
    batch: list[int] = []
    for number in sorted(range(len(blocks)), key=lambda i: len(blocks[i])):  # stable: blocks of one length in order
        longest = len(blocks[number]) + len(first)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield _batch(model, [[*first, *blocks[i]] for i in batch], batch)
            batch = []
        if len(blocks[number]):
            batch.append(number)
    if batch:
        yield _batch(model, [[*first, *blocks[i]] for i in batch], batch)


def _batch(model: PreTrainedModel, rows: Blocks, numbers: list[int]) -> tuple[list[int], Tensor, Tensor]:
    lengths_B = torch.tensor([len(row) for row in rows])
    longest = int(lengths_B.max())
    tokens_BT = torch.stack([F.pad(torch.tensor(row, dtype=torch.long), (0, longest - len(row))) for row in rows])
    return numbers, tokens_BT.to(model.device), lengths_B
