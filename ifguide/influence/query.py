"""The query direction: which way the weights move when a behaviour becomes more likely.

Method (IF-Guide, arXiv 2506.01790, Sec. 4.1). With G the differential gradient

    G = mean over positive queries of grad NLL(completion | prompt) - the same mean over negative ones

the direction is V = (EK-FAC + damping)^-1 G, per tracked module

    V = Q_S [ (Q_S^T G Q_A) / (Lambda + d) ] Q_A^T,       d = damping, or damping_scale * mean(Lambda).

NLL is a SUM over completion tokens, the mean is over queries, and prompt tokens carry no loss. <V, grad NLL_j>
is then positive for a token j whose training makes the positive completions more likely.

Shapes: a module with weight (d_out, d_in) has G and V of (d_out, d_in), or (d_out, d_in + 1) if it has a bias:
the bias is the last input column, as kronfluence lays it out.

Cost: one forward and backward pass over the queries, whatever their weights, with logits of completions alone and in
chunks; memory does not grow with their number. Preconditioning is four matrix products per module in float64. It does
not fit factors and does not approximate G by low rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.models import max_positions


@dataclass(frozen=True, kw_only=True)
class TokenisedQuery:
    """`token_ids` of prompt and completion; those from `completion_start` (>= 1) on carry the loss."""

    token_ids: tuple[int, ...]
    completion_start: int

    def __post_init__(self) -> None:
        if not 1 <= self.completion_start < len(self.token_ids):
            raise ValueError(
                f"completion_start is {self.completion_start} of {len(self.token_ids)} tokens; a completion needs "
                "one token of context before it and at least one token"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleFactors:
    """EK-FAC of one module: `Q_A` (d_in [+ 1], d_in [+ 1]) and `Q_S` (d_out, d_out) with eigenvectors in
    columns; `lambda_mean` (d_out, d_in [+ 1]), the mean over sequences of (Q_S^T G Q_A)^2."""

    Q_A: Tensor
    Q_S: Tensor
    lambda_mean: Tensor

    def in_float64(self, device: torch.device) -> ModuleFactors:
        """The same factors, as they are computed with."""
        tensors = (tensor.to(device, torch.float64) for tensor in (self.Q_A, self.Q_S, self.lambda_mean))
        return ModuleFactors(**dict(zip(("Q_A", "Q_S", "lambda_mean"), tensors, strict=True)))

    def damping(self, damping: float | None, damping_scale: float) -> Tensor | float:
        """`damping`, or `damping_scale` * mean(Lambda) if None."""
        return damping_scale * self.lambda_mean.mean() if damping is None else damping

    def solve(self, gradient: Tensor, damping: Tensor | float) -> Tensor:
        """(EK-FAC + damping)^-1 gradient, of one dtype with the factors."""
        rotated = self.Q_S.T @ gradient @ self.Q_A
        return self.Q_S @ (rotated / (self.lambda_mean + damping)) @ self.Q_A.T


def tokenise_query(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, *, max_tokens: int, beginning: int | None = None
) -> TokenisedQuery:
    """Tokenises prompt + completion jointly; a token whose characters end inside the completion belongs to it.

    So a token that straddles the boundary carries loss. Too long: the prompt loses tokens on its left, down to
    one, then the completion on its right. Without a prompt token before the completion, an EOS (what precedes a
    document in the corpus) is put there. `beginning`: a BOS that stands before all, whatever the prompt loses, and in
    place of that EOS.

    Raises ValueError when the completion is empty or `max_tokens` < 2.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; a query needs at least 2 tokens")
    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids: list[int] = encoded["input_ids"]
    ends = [end for _, end in encoded["offset_mapping"]]
    start = next((index for index, end in enumerate(ends) if end > len(prompt)), len(ends))
    if start == len(ends):
        raise ValueError(f"empty completion {completion!r} after the prompt {prompt!r}; every query needs one")
    context, answer = token_ids[:start], token_ids[start:]
    first = [] if beginning is None else [beginning]
    context = context or ([] if first else [tokenizer.eos_token_id])
    answer = answer[: max_tokens - min(len(first) + bool(context), max_tokens - 1)]
    room = max_tokens - len(answer) - len(first)
    context = [*first, *(context[-room:] if room else [])]
    return TokenisedQuery(token_ids=(*context, *answer), completion_start=len(context))


def tokenise_queries(
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterable[tuple[str, str]],
    model: PreTrainedModel | None,
    *,
    max_tokens: int,
    beginning: int | None = None,
) -> list[TokenisedQuery]:
    """`tokenise_query` of (prompt, completion) pairs, cut to the positions of `model` as well if it is given."""
    longest = max_tokens if model is None else min(max_tokens, max_positions(model))
    return [tokenise_query(tokenizer, *pair, max_tokens=longest, beginning=beginning) for pair in pairs]


def differential_weights(positive: Sequence[bool], weights: Sequence[float] | None = None) -> list[float]:
    """The weight of each query in the differential gradient, by whether it is of the positive set: 1 / n of the n
    positive ones, -1 / m of the m negative ones. Without negative ones it is the mean of the positive ones. `weights`:
    the means of the sets are weighted ones.

    Raises ValueError when none is positive.
    """
    own = [1.0] * len(positive) if weights is None else weights
    totals = {kind: sum(w for w, of in zip(own, positive, strict=True) if of == kind) for kind in (True, False)}
    if not totals[True]:
        raise ValueError("no positive query: a direction needs completions that show the behaviour")
    return [(w if kind else -w) / totals[kind] for w, kind in zip(own, positive, strict=True)]


def mean_completion_gradient(
    model: PreTrainedModel,
    names: Sequence[str],
    queries: Sequence[TokenisedQuery],
    weights: Sequence[float],
    *,
    batch_tokens: int,
) -> dict[str, Tensor]:
    """Sum over queries of weight * gradient of the completion's summed NLL, per module of `names`.

    With weight 1 / n for positive queries and -1 / m for negative ones this is the differential gradient in one
    pass; partial sums over disjoint queries add. Queries of like length share a batch of at most `batch_tokens`
    padded tokens (or one query); padding is on the right, which a causal model never looks back on, so it needs
    no attention mask. Returns tensors (d_out, d_in [+ 1]) in the model's dtype on its device.

    Raises ValueError when queries and weights differ in number, when the model is in training mode (dropout would make
    the gradients random), or when its LM head is not understood.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before building a direction")
    if len(queries) != len(weights):
        raise ValueError(f"{len(queries)} queries but {len(weights)} weights; give one weight per query")
    modules = {name: _linear(model, name) for name in names}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    head = HeadDerivatives(model)
    head.check(model)
    with only_trainable(model, parameters):
        for indices in length_batches(queries, batch_tokens):
            gradients = _completion_gradients(
                model, head, parameters, [queries[i] for i in indices], [weights[i] for i in indices]
            )
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
    return by_module(modules, totals)


def build_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    positive: Sequence[tuple[str, str]],
    negative: Sequence[tuple[str, str]],
    factors: Mapping[str, ModuleFactors],
    *,
    damping: float | None = None,
    damping_scale: float = 0.1,
    max_tokens: int = 512,
    batch_tokens: int = 4096,
    beginning: int | None = None,
) -> dict[str, Tensor]:
    """V per module of `factors`, float32 of (d_out, d_in [+ 1]), from (prompt, completion) pairs of both sets.

    `positive` completions show the behaviour, `negative` ones do not; without any of the latter V is that of the
    positive mean alone. The other options are those of `tokenise_queries`, `mean_completion_gradient` and
    `precondition`, which this calls, and so are the errors.

    Raises:
        TypeError: a query is no pair of strings; names it.
    """
    for name, pairs in (("positive", positive), ("negative", negative)):
        for index, pair in enumerate(pairs):
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise TypeError(f"{name}[{index}]: {pair!r} is no pair of strings, (prompt, completion)")
    queries = tokenise_queries(tokenizer, (*positive, *negative), model, max_tokens=max_tokens, beginning=beginning)
    weights = differential_weights([True] * len(positive) + [False] * len(negative))
    gradient = mean_completion_gradient(model, list(factors), queries, weights, batch_tokens=batch_tokens)
    return precondition(gradient, factors, damping=damping, damping_scale=damping_scale)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert type(module) is nn.Linear, f"{name} is {type(module).__name__}, not nn.Linear"
    return module


def add_gradient(total: dict[str, Tensor], gradient: Mapping[str, Tensor], weight: float) -> None:
    """total += weight * gradient, per module; an empty total is 0."""
    for name, tensor in gradient.items():
        total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor * weight


def by_module(modules: Mapping[str, nn.Linear], of_parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """(d_out, d_in [+ 1]) per module, of tensors like its parameters: those of the modules, one after the other."""
    remaining = iter(of_parameters)
    return {
        name: next(remaining) if module.bias is None else torch.cat([next(remaining), next(remaining)[:, None]], dim=1)
        for name, module in modules.items()
    }


@contextmanager
def only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for `parameters` alone; every other parameter's weight gradient would be computed for nothing."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def length_batches(queries: Sequence[TokenisedQuery], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of queries of like length: of at most `batch_tokens` padded tokens together, or of one."""
    batch: list[int] = []
    for index in sorted(range(len(queries)), key=lambda i: (len(queries[i].token_ids), i)):
        if batch and len(queries[index].token_ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the right, and lengths (B,)."""
    lengths_B = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.zeros(len(rows), int(lengths_B.max()), dtype=torch.long)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)] = torch.tensor(row)
    return tokens_BT, lengths_B


def _completion_gradients(
    model: PreTrainedModel,
    head: HeadDerivatives,
    parameters: Sequence[Tensor],
    queries: Sequence[TokenisedQuery],
    weights: Sequence[float],
) -> tuple[Tensor, ...]:
    """Gradients by the parameters of the weighted sum of the completions' NLL; prompts have no logits."""
    tokens_BT, _ = padded([query.token_ids for query in queries])
    weight_BT = torch.zeros(tokens_BT.shape, dtype=torch.float64)
    for row, (query, weight) in enumerate(zip(queries, weights, strict=True)):
        weight_BT[row, query.completion_start : len(query.token_ids)] = weight
    rows, before = torch.nonzero(weight_BT[:, 1:], as_tuple=True)
    labels_N, weight_N = tokens_BT[rows, before + 1], weight_BT[rows, before + 1]
    hidden_BTD = model.base_model(tokens_BT.to(model.device), use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD[rows.to(model.device), before.to(model.device)]
    weight_N = weight_N.to(model.device, torch.promote_types(hidden_ND.dtype, torch.float32))
    with torch.no_grad():
        gradient_ND = head.gradient(hidden_ND, labels_N.to(model.device), weight_N)
    return torch.autograd.grad(hidden_ND, parameters, gradient_ND)


def load_factors(folder: Path, names: Sequence[str] | None = None) -> dict[str, ModuleFactors]:
    """The factors in `folder` (kronfluence's file format) of the modules `names`, or of all of them.

    Raises FileNotFoundError for a missing file, ValueError for a module that the files do not hold.
    """
    tables = {
        kind: _read_tensors(folder / f"{kind}.safetensors", names)
        for kind in ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
    }
    return {
        name: ModuleFactors(
            Q_A=tables["activation_eigenvectors"][name],
            Q_S=tables["gradient_eigenvectors"][name],
            lambda_mean=lambda_sum / tables["num_lambda_processed"][name],
        )
        for name, lambda_sum in tables["lambda_matrix"].items()
    }


def _read_tensors(path: Path, names: Sequence[str] | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such factor file; fit the factors first")
    with safe_open(path, framework="pt", device="cpu") as file:
        present = set(file.keys())
        missing = sorted(set(names or ()) - present)
        if missing:
            raise ValueError(f"{path}: no factors for {missing[:3]}; were they fitted on another model?")
        return {name: file.get_tensor(name) for name in (sorted(present) if names is None else names)}


def precondition(
    gradient: Mapping[str, Tensor],
    factors: Mapping[str, ModuleFactors],
    *,
    damping: float | None = None,
    damping_scale: float = 0.1,
) -> dict[str, Tensor]:
    """V = (EK-FAC + d)^-1 G per module, with d = `damping`, or `damping_scale` * mean(Lambda) if None.

    Computed in float64 on the gradient's device, returned in float32, same shapes as `gradient`.

    Raises ValueError when gradient and factors speak of different modules or shapes, or when Lambda + d has
    a zero (no damping, and a direction the sample never moved in).
    """
    if gradient.keys() != factors.keys():
        different = sorted(gradient.keys() ^ factors.keys())
        raise ValueError(f"gradient and factors differ in modules {different[:3]}; both must be of one proxy")
    directions = {}
    for name, module_gradient in gradient.items():
        module = factors[name].in_float64(module_gradient.device)
        if module.lambda_mean.shape != module_gradient.shape:
            raise ValueError(
                f"{name}: the factors are of shape {tuple(module.lambda_mean.shape)}, the gradient of "
                f"{tuple(module_gradient.shape)}; both must be of one proxy"
            )
        damped = module.damping(damping, damping_scale)
        if not bool((module.lambda_mean + damped > 0).all()):
            raise ValueError(f"{name}: Lambda + damping has zeros; raise damping, or fit factors on more blocks")
        directions[name] = module.solve(module_gradient.double(), damped).float()
    return directions
