"""Adversarial suffixes by greedy coordinate gradient (GCG; Zou et al., arXiv 2307.15043, Algorithm 1).

For a prompt x and a target completion y, n suffix tokens are sought that lower the mean NLL of y after x and suffix:

    repeat `steps` times
        for each suffix place i:  X_i = the `top_k` tokens v of least  d loss / d onehot_i[v]
        `candidates` times: the suffix with one token at a uniform place replaced by a uniform one of its X_i
        the suffix becomes the candidate of least loss

A step is taken even if it raises the loss, as in the algorithm; the best suffix met is what comes back. As in the
authors' code, candidates whose text does not tokenise to themselves are left out where a check is given.

Cost: a forward and backward pass and `candidates` forward passes a step; (suffix, vocabulary) values of gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.evaluation.generation import evaluating
from ifguide.models import next_token_nll


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How hard an attack tries; `batch_size` candidates share a forward pass."""

    steps: int
    candidates: int
    top_k: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The best suffix met; losses in nats per target token, of the first suffix and of the best; `exact`: greedy
    decoding after it gives the target token by token. `steps` were taken: it ends when the target is decoded."""

    suffix: tuple[int, ...]
    first_loss: float
    loss: float
    exact: bool
    steps: int


def attack(
    model: PreTrainedModel,
    context: Sequence[int],
    target: Sequence[int],
    first_suffix: Sequence[int],
    budget: Budget,
    *,
    seed: int,
    allowed_V: Tensor | None = None,
    keeps_its_tokens: Callable[[Sequence[int]], bool] | None = None,
) -> Attack:
    """Seek a suffix after `context` that draws `target`; all are token ids.

    allowed_V: bool, the tokens that a suffix may hold; None: all. keeps_its_tokens: whether a suffix survives being
    text; where none of a step's candidates does, all are kept. ValueError for an empty context, target or suffix.
    """
    if not (len(context) and len(target) and len(first_suffix)):
        raise ValueError("an attack needs at least one token each of context, suffix and target")
    rng = np.random.default_rng(seed)
    best = current = list(first_suffix)
    best_loss = first_loss = float(_losses(model, context, [current], target, 1)[0])
    exact, steps = _decodes_to(model, [*context, *current], target), 0
    while steps < budget.steps and not exact:
        ids = [*context, *current, *target]
        gradient_SV = one_hot_gradient(model, ids, (len(context), len(context) + len(current)), len(target))
        if allowed_V is not None:
            gradient_SV = gradient_SV.masked_fill(~allowed_V.to(gradient_SV.device), float("inf"))
        top_SK = (-gradient_SV).topk(min(budget.top_k, gradient_SV.shape[1]), dim=1).indices.cpu().numpy()
        candidates = replacements(current, top_SK, budget.candidates, rng)
        if keeps_its_tokens is not None:
            candidates = [suffix for suffix in candidates if keeps_its_tokens(suffix)] or candidates
        losses_B = _losses(model, context, candidates, target, budget.batch_size)
        current = candidates[int(losses_B.argmin())]
        steps += 1
        if float(losses_B.min()) < best_loss:
            best, best_loss = current, float(losses_B.min())
            exact = _decodes_to(model, [*context, *best], target)
    return Attack(suffix=tuple(best), first_loss=first_loss, loss=best_loss, exact=exact, steps=steps)


def replacements(suffix: Sequence[int], top_SK: np.ndarray, count: int, rng: np.random.Generator) -> list[list[int]]:
    """`count` copies of the suffix, each with one token replaced: place and token are uniform."""
    places, choices = rng.integers(0, len(suffix), count), rng.integers(0, top_SK.shape[1], count)
    copies = []
    for place, choice in zip(places.tolist(), choices.tolist(), strict=True):
        copy = list(suffix)
        copy[place] = int(top_SK[place, choice])
        copies.append(copy)
    return copies


def one_hot_gradient(model: PreTrainedModel, ids: Sequence[int], places: tuple[int, int], target_tokens: int) -> Tensor:
    """(S, V): the derivative of the loss of the last `target_tokens` ids by the one-hot vectors at places [a, b).

    The embedding is linear in the one-hot, so it is g_i . embed(v), with g_i the gradient by the embedding at place i.
    """
    embedding = model.get_input_embeddings()
    tokens_BT = torch.tensor([list(ids)], device=model.device)
    embedded_BTD = embedding(tokens_BT).detach().requires_grad_(True)
    logits_BTV = model(inputs_embeds=embedded_BTD, use_cache=False).logits
    loss = _target_mean(logits_BTV, tokens_BT, target_tokens).sum()
    (gradient_BTD,) = torch.autograd.grad(loss, embedded_BTD)
    with torch.no_grad():
        every_VD = embedding(torch.arange(logits_BTV.shape[2], device=model.device))
    return gradient_BTD[0, places[0] : places[1]] @ every_VD.T


def target_losses(model: PreTrainedModel, sequences: Sequence[Sequence[int]], target_tokens: int) -> Tensor:
    """(B,): the mean NLL of the last `target_tokens` ids of each sequence, all of one length."""
    tokens_BT = torch.tensor([list(ids) for ids in sequences], device=model.device)
    with evaluating(model):
        return _target_mean(model(tokens_BT, use_cache=False).logits, tokens_BT, target_tokens)


def _target_mean(logits_BTV: Tensor, tokens_BT: Tensor, target_tokens: int) -> Tensor:
    lengths_B = torch.full((len(tokens_BT),), tokens_BT.shape[1], device=tokens_BT.device)
    return next_token_nll(logits_BTV, tokens_BT, lengths_B)[:, -target_tokens:].mean(1)


def _losses(
    model: PreTrainedModel,
    context: Sequence[int],
    suffixes: Sequence[Sequence[int]],
    target: Sequence[int],
    batch_size: int,
) -> Tensor:
    sequences = [[*context, *suffix, *target] for suffix in suffixes]
    parts = [
        target_losses(model, sequences[begin : begin + batch_size], len(target))
        for begin in range(0, len(sequences), batch_size)
    ]
    return torch.cat(parts)


def _decodes_to(model: PreTrainedModel, ids: Sequence[int], target: Sequence[int]) -> bool:
    return greedy_continuation(model, ids, len(target)) == list(target)


def greedy_continuation(model: PreTrainedModel, ids: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest tokens after `ids`, one by one."""
    chosen: list[int] = []
    step_BT, cache = torch.tensor([list(ids)], device=model.device), None
    with evaluating(model):
        for _ in range(count):
            output = model(input_ids=step_BT, past_key_values=cache, use_cache=True)
            cache, step_BT = output.past_key_values, output.logits[:, -1:].argmax(-1)
            chosen.append(int(step_BT))
    return chosen
