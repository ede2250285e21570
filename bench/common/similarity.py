"""Scores of examples by attribution and by similarity to reference examples, for `bench/date_lm.py`.

An example is a `TokenisedQuery`: its loss is the summed NLL of its response, from `completion_start` on. Gradients are
of the linear modules named, exact and not projected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.common.scores import score_blocks
from ifguide.influence.method import Method
from ifguide.influence.query import TokenisedQuery, mean_completion_gradient
from ifguide.models import next_token_nll
from ifguide.telemetry import Progress

BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ReferenceGradients:
    """Per module: the mean gradient of the references, and the mean of their gradients each divided by its norm over
    all modules. <the latter, g> / |g| is the mean over references of the cosine with g."""

    mean: dict[str, Tensor]
    mean_unit: dict[str, Tensor]


def reference_gradients(
    model: PreTrainedModel, names: Sequence[str], reference: Sequence[TokenisedQuery]
) -> ReferenceGradients:
    """Of the gradient of the response's summed NLL; one backward pass each."""
    mean: dict[str, Tensor] = {}
    unit: dict[str, Tensor] = {}
    progress = Progress("references", len(reference), "examples")
    for query in reference:
        gradient = mean_completion_gradient(model, names, [query], [1 / len(reference)], batch_tokens=BATCH_TOKENS)
        norm = sum(float(tensor.double().square().sum()) for tensor in gradient.values()) ** 0.5 * len(reference)
        for name, tensor in gradient.items():
            mean[name] = mean[name] + tensor if name in mean else tensor
            unit[name] = unit[name] + tensor / norm if name in unit else tensor / norm
        progress.advance(1)
    return ReferenceGradients(mean=mean, mean_unit=unit)


def token_scores(
    model: PreTrainedModel,
    directions: Mapping[str, Mapping[str, Tensor]],
    queries: Sequence[TokenisedQuery],
    *,
    method: Method,
) -> dict[str, list[np.ndarray]]:
    """Direction -> per example <V, grad NLL_j> of each token j of its response."""
    blocks = [(np.array(query.token_ids), None, None) for query in queries]
    all_scores = score_blocks(model, list(directions.values()), blocks, "target", 0, method=method)
    return {
        name: [scores[query.completion_start :] for scores, query in zip(each, queries, strict=True)]
        for name, each in zip(directions, all_scores, strict=True)
    }


def gradient_norms(model: PreTrainedModel, names: Sequence[str], queries: Sequence[TokenisedQuery]) -> np.ndarray:
    """(n,) float64: each example's norm of the gradient of its response's summed NLL, over the modules `names`.

    No weight gradient is made: a linear map with inputs a_t and output gradients g_t has G = sum_t g_t a_t^T, so
    |G|^2 = sum_tu (a_t . a_u) (g_t . g_u), where a bias adds 1 to a_t . a_u.
    """
    squares = np.zeros(len(queries))
    progress = Progress("norms", sum(len(query.token_ids) for query in queries), "tokens")
    model.requires_grad_(False)
    for batch in length_batches(queries):
        tokens_BT, lengths_B, response_BT = padded([queries[i] for i in batch])
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True))]
        handles += [model.get_submodule(name).register_forward_hook(_keep(seen, name)) for name in names]
        nll_BT = next_token_nll(model(tokens_BT, use_cache=False).logits, tokens_BT, lengths_B)
        outputs = [seen[name][1] for name in names]
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad((nll_BT * response_BT).sum(), outputs)
        for name, g_BTO in zip(names, gradients, strict=True):
            a_BTI = seen[name][0]
            products_BTT = a_BTI @ a_BTI.mT
            if model.get_submodule(name).bias is not None:
                products_BTT = products_BTT + 1
            squares[batch] += (products_BTT * (g_BTO @ g_BTO.mT)).sum((1, 2)).double().numpy()
        progress.advance(float(lengths_B.sum()))
    return np.sqrt(squares)


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0].detach(), output)

    return hook


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """Last hidden states of n examples, (n, d): of the last token, and the mean over the response's tokens."""

    last: Tensor
    mean: Tensor


@torch.no_grad()
def hidden_states(model: PreTrainedModel, queries: Sequence[TokenisedQuery]) -> HiddenStates:
    """What the LM head reads, after the last norm."""
    last: list[Tensor] = [torch.zeros(0)] * len(queries)
    mean = list(last)
    for batch in length_batches(queries):
        tokens_BT, lengths_B, response_BT = padded([queries[i] for i in batch])
        states_BTD = model.base_model(tokens_BT, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            last[i] = states_BTD[row, lengths_B[row] - 1]
            mean[i] = states_BTD[row, response_BT[row] > 0].mean(0)
    return HiddenStates(last=torch.stack(last), mean=torch.stack(mean))


def mean_cosine(rows_ND: Tensor, references_RD: Tensor) -> np.ndarray:
    """(N,) the mean over references of the cosine with each."""
    return (F.normalize(rows_ND, dim=1) @ F.normalize(references_RD, dim=1).mean(0)).numpy()


def length_batches(queries: Sequence[TokenisedQuery], batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Examples of like length together, at most `batch_tokens` padded tokens (or one example)."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(queries)), key=lambda i: len(queries[i].token_ids)):
        if batches[-1] and len(queries[i].token_ids) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(queries: Sequence[TokenisedQuery]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, T) padded on the right, lengths (B,), and 1.0 at the responses' tokens (B, T)."""
    lengths_B = torch.tensor([len(query.token_ids) for query in queries])
    tokens_BT = torch.zeros(len(queries), int(lengths_B.max()), dtype=torch.long)
    response_BT = torch.zeros(tokens_BT.shape)
    for row, query in enumerate(queries):
        tokens_BT[row, : len(query.token_ids)] = torch.tensor(query.token_ids)
        response_BT[row, query.completion_start : len(query.token_ids)] = 1
    return tokens_BT, lengths_B, response_BT
