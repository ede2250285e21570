"""Excess loss: how much better a model tuned on the positive queries predicts a token than one tuned on the negative.

Method (after Rho-1, arXiv 2404.07965, Eq. 3, with a harmful and a harmless reference in place of a reference and the
model itself). A copy of the proxy is trained on the completions of each query set, and

    score_t = NLL of token t under the negative copy - NLL of token t under the positive copy,

so a positive score is of a token that belongs to the positive side, as a likelihood ratio has it.

Both copies see as many queries, in an order drawn by the seed, without dropout: the same bytes on the same machine.
Cost: epochs * queries forward and backward passes for each copy; to score, two forward passes. Memory: two models, and
while one is trained its gradients and AdamW's state.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.config.compare import ExcessLoss
from ifguide.influence.query import TokenisedQuery
from ifguide.methods.reading import Blocks, QuerySets, in_precision, token_losses
from ifguide.models import next_token_nll

DEFAULTS = ExcessLoss()


@dataclass(frozen=True, eq=False)
class ExcessLossFinder:
    """Token scores by two copies of one model, tuned on a query set each."""

    in_stream: ClassVar[bool] = False  # it reads blocks
    positive: PreTrainedModel
    negative: PreTrainedModel
    summary: dict[str, Any]
    beginning: int | None = None
    precision: str = "float32"

    def score(self, blocks: Blocks) -> list[NDArray[np.float32]]:
        """For each block of token ids its excess loss (T,) in nats, label-aligned; entry 0 is 0."""
        losses = (
            token_losses(model, blocks, beginning=self.beginning, precision=self.precision)
            for model in (self.negative, self.positive)
        )
        scores = [(negative - positive).float().numpy() for negative, positive in zip(*losses, strict=True)]
        for block in scores:
            block[:1] = 0
        return scores

    def save(self, path: Path) -> None:
        """Write what `load_excess_loss` reads."""
        tensors = {
            f"{side}.{name}": parameter.detach().cpu().contiguous()
            for side, model in (("positive", self.positive), ("negative", self.negative))
            for name, parameter in model.named_parameters()
        }
        save_file(tensors, path)


def load_excess_loss(
    path: Path, model: PreTrainedModel, *, beginning: int | None, precision: str = "float32"
) -> ExcessLossFinder:
    """What `ExcessLossFinder.save` wrote, for copies of the same model."""
    saved = load_file(path)
    copies = []
    for side in ("positive", "negative"):
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                parameter.copy_(saved[f"{side}.{name}"])
        copies.append(tuned)
    return ExcessLossFinder(copies[0], copies[1], summary={}, beginning=beginning, precision=precision)


def tune_excess_loss(
    model: PreTrainedModel, tokenizer: Any, sets: QuerySets, *, options: ExcessLoss = DEFAULTS, seed: int = 0
) -> ExcessLossFinder:
    """Copies of `model`, which is not changed, tuned on as many queries of each set.

    Raises ValueError where a set is empty."""
    count = min(len(sets.positive), len(sets.negative), options.max_queries or len(sets.positive))
    if not count:
        raise ValueError("excess loss needs queries of both sets; build the query with build_query.differential")
    copies, losses = [], {}
    for side, pairs in sets.sides():
        rng = np.random.default_rng(seed)
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count].tolist()]
        queries = sets.tokenised(tokenizer, chosen, model)
        tuned = copy.deepcopy(model)
        losses[side] = [round(value, 4) for value in tune(tuned, queries, options, rng)]
        copies.append(tuned)
    summary = {"queries": count, "loss": losses}
    return ExcessLossFinder(
        copies[0], copies[1], summary=summary, beginning=sets.beginning, precision=options.precision
    )


def tune(
    model: PreTrainedModel, queries: Sequence[TokenisedQuery], options: ExcessLoss, rng: np.random.Generator
) -> list[float]:
    """Train `model` in place on completions, by AdamW without weight decay; returns each epoch's mean loss of a token.

    A step's loss is the mean over the completion tokens of its queries. The model ends in eval mode, as it trains."""
    model.eval().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    means = []
    for _ in range(options.epochs):
        order, total, tokens = rng.permutation(len(queries)).tolist(), 0.0, 0
        for start in range(0, len(order), options.batch_size):
            with in_precision(model, options.precision):
                nll_N = _completion_losses(model, [queries[i] for i in order[start : start + options.batch_size]])
            nll_N.mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            total, tokens = total + float(nll_N.detach().sum()), tokens + len(nll_N)
        means.append(total / tokens)
    model.requires_grad_(False)
    return means


def _completion_losses(model: PreTrainedModel, queries: Sequence[TokenisedQuery]) -> Tensor:
    """The NLL of all completion tokens of some queries, (N,)."""
    lengths_B = torch.tensor([len(query.token_ids) for query in queries])
    tokens_BT = torch.zeros(len(queries), int(lengths_B.max()), dtype=torch.long)
    answer_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    for row, query in enumerate(queries):
        tokens_BT[row, : len(query.token_ids)] = torch.tensor(query.token_ids)
        answer_BT[row, query.completion_start : len(query.token_ids)] = True
    tokens_BT = tokens_BT.to(model.device)
    nll_BT = next_token_nll(model(tokens_BT, use_cache=False).logits, tokens_BT, lengths_B)
    return nll_BT[answer_BT.to(nll_BT.device)]
