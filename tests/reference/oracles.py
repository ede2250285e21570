"""Slow float64 oracles of the influence core: one backward pass per token, explicit Kronecker matrices.

They share no code with `ifguide.influence`: gradients come from torch autograd on `log_softmax`, one scalar at
a time. Conventions as in the library: label-aligned NLL, the bias is the last input column.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def token_nll(model: nn.Module, tokens_T: Tensor, j: int) -> Tensor:
    """NLL_j = -log p(x_j | x_<j) of one unpadded sequence, from its prefix alone."""
    logits_TV = model(tokens_T[None, :j], use_cache=False).logits[0]
    return -logits_TV[-1].log_softmax(dim=-1)[tokens_T[j]]


def module_gradients(model: nn.Module, names: Sequence[str], loss: Tensor) -> dict[str, Tensor]:
    """d loss / d [weight | bias] per module, (d_out, d_in [+ 1])."""
    gradients = {}
    for name in names:
        module = model.get_submodule(name)
        parts = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        gradients[name] = torch.cat([part if part.dim() == 2 else part[:, None] for part in parts], dim=1)
    return gradients


def target_scores(model: nn.Module, directions: Mapping[str, Tensor], tokens_T: Tensor) -> Tensor:
    """<V, grad NLL_j> for every j of one unpadded sequence, by one full backward pass per token."""
    scores = [torch.zeros((), dtype=torch.float64)]
    for j in range(1, len(tokens_T)):
        gradients = module_gradients(model, list(directions), token_nll(model, tokens_T, j))
        scores.append(
            sum((directions[name].double() * gradients[name].double()).sum() for name in directions)  # type: ignore[arg-type]
        )
    return torch.stack(scores)


def position_scores(model: nn.Module, directions: Mapping[str, Tensor], tokens_T: Tensor) -> Tensor:
    """s_t = sum over modules of g_t^T V [a_t; 1], g_t of the whole sequence's NLL; what happens at t is entry t + 1."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
        for name in directions
    ]
    log_p_TV = model(tokens_T[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1)
    for handle in handles:
        handle.remove()
    loss = -log_p_TV[torch.arange(len(tokens_T) - 1), tokens_T[1:]].sum()
    scores_T = torch.zeros(len(tokens_T), dtype=torch.float64)
    for name, V in directions.items():
        inputs_BTI, outputs_BTO = seen[name]
        (gradient_BTO,) = torch.autograd.grad(loss, outputs_BTO, retain_graph=True)
        for t in range(len(tokens_T) - 1):
            a = inputs_BTI[0, t].detach().double()
            a = torch.cat([a, a.new_ones(V.shape[1] - len(a))])
            scores_T[t + 1] += gradient_BTO[0, t].double() @ (V.double() @ a)
    return scores_T


def sequence_gradients(
    model: nn.Module, names: Sequence[str], blocks_NT: Tensor, lengths_N: Tensor
) -> list[dict[str, Tensor]]:
    """The gradient of each sequence's summed NLL, its true labels, one sequence at a time."""
    gradients = []
    for tokens_T, length in zip(blocks_NT, lengths_N.tolist(), strict=True):
        loss = torch.stack([token_nll(model, tokens_T[:length], j) for j in range(1, length)]).sum()
        gradients.append(module_gradients(model, names, loss))
    return gradients


def covariances(model: nn.Module, name: str, blocks_NT: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sum of a a^T and of g g^T over the real tokens of all sequences, and their number, for one module."""
    module = model.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["output"] = inputs[0], output

    activation_sum: Tensor | float = 0.0
    gradient_sum: Tensor | float = 0.0
    count = 0
    handle = module.register_forward_hook(keep)
    for tokens_T, length in zip(blocks_NT, lengths_N.tolist(), strict=True):
        logits_TV = model(tokens_T[None, :length], use_cache=False).logits[0]
        log_p_TV = logits_TV.log_softmax(dim=-1)
        loss = -log_p_TV[torch.arange(length - 1), tokens_T[1:length]].sum()
        (gradient,) = torch.autograd.grad(loss, seen["output"])
        for t in range(length):
            a = seen["input"][0, t].detach()
            if module.bias is not None:
                a = torch.cat([a, torch.ones(1, dtype=a.dtype)])
            activation_sum = activation_sum + torch.outer(a, a)
            gradient_sum = gradient_sum + torch.outer(gradient[0, t], gradient[0, t])
            count += 1
    handle.remove()
    assert isinstance(activation_sum, Tensor)
    assert isinstance(gradient_sum, Tensor)
    return activation_sum, gradient_sum, count


def kronecker_solve(gradient: Tensor, Q_A: Tensor, Q_S: Tensor, lambda_mean: Tensor, damping: float) -> Tensor:
    """V = H^-1 G with the dense H = (Q_S kron Q_A) diag(Lambda) (Q_S kron Q_A)^T + damping I, float64.

    G is flattened by rows, so that vec(S G A) = (S kron A^T) vec(G).
    """
    basis = torch.kron(Q_S.double(), Q_A.double())
    hessian = basis @ torch.diag(lambda_mean.double().flatten()) @ basis.T
    hessian = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.solve(hessian, gradient.double().flatten()).reshape(gradient.shape)


def gauss_newton(model: nn.Module, names: Sequence[str], blocks_NT: Tensor, lengths_N: Tensor) -> Tensor:
    """The dense H (P, P) = 1/N sum over sequences of sum over predicted tokens of J^T (diag p - p p^T) J, one row of J
    at a time. Modules lie one after the other, each [weight | bias] by rows."""
    total: Tensor | float = 0.0
    for tokens_T, length in zip(blocks_NT, lengths_N.tolist(), strict=True):
        for j in range(1, length):
            logits_V = model(tokens_T[None, :j], use_cache=False).logits[0, -1]
            rows = [flat(module_gradients(model, names, logit)) for logit in logits_V]
            jacobian_VP = torch.stack(rows)
            p_V = logits_V.softmax(dim=-1).detach()
            total = total + jacobian_VP.T @ (torch.diag(p_V) - torch.outer(p_V, p_V)) @ jacobian_VP
    assert isinstance(total, Tensor)
    return total / len(blocks_NT)


def flat(vector: Mapping[str, Tensor]) -> Tensor:
    """(P,): the modules' tensors by rows, one after the other."""
    return torch.cat([tensor.flatten() for tensor in vector.values()])
