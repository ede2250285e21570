"""The chunked objective and its gradients against a token-by-token loop in float64 with its own autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.config.pretrain import ObjectiveKind
from ifguide.lm_head import LMHead
from ifguide.training import compiled, lm_loss
from ifguide.training.lm_loss import chunked_loss
from ifguide.training.objective import Objective

FLOOR = 0.05


def literal_token(nll: torch.Tensor, kind: ObjectiveKind, penalty: float) -> torch.Tensor:
    if kind == "penalty":
        return -penalty * nll
    if kind == "ignore":
        return 0 * nll
    if kind == "unlikelihood":
        return -penalty * torch.log(1 - torch.exp(-nll))
    return -penalty * torch.minimum(nll, torch.tensor(-math.log(FLOOR), dtype=torch.float64))


def literal_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: list[list[int]],
    mask: list[list[bool]],
    lengths: list[int],
    objective: Objective,
    head: LMHead,
    n: int,
) -> torch.Tensor:
    """Every token by itself: logits, scale, soft cap, log of a sum of exponentials."""
    total = 0 * hidden.sum() + 0 * weight.sum() + (0 if bias is None else 0 * bias.sum())
    for b, length in enumerate(lengths):
        for j in range(1, length):
            row = weight @ hidden[b, j - 1] + (0 if bias is None else bias)
            row = row * head.scale
            if head.softcap is not None:
                row = head.softcap * torch.tanh(row / head.softcap)
            nll = torch.logsumexp(row, dim=0) - row[tokens[b][j]]
            total = total + (literal_token(nll, objective.kind, objective.penalty) if mask[b][j] else nll)
    return total / n


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["penalty", "ignore", "unlikelihood", "clipped"]),
    penalty=st.floats(0, 5),
    chunk=st.integers(1, 20),
    with_bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 2.0]),
    softcap=st.sampled_from([None, 3.0]),
    first_masked=st.booleans(),
    wide=st.booleans(),
    one_kernel=st.booleans(),
)
def test_loss_and_gradients_equal_the_float64_loop(
    seed, kind, penalty, chunk, with_bias, scale, softcap, first_masked, wide, one_kernel
):
    generator = torch.Generator().manual_seed(seed)
    objective = Objective(kind=kind, penalty=penalty, floor_probability=FLOOR)
    head = LMHead(scale=scale, softcap=softcap)
    hidden = torch.randn(3, 6, 4, generator=generator)
    weight = torch.randn(9, 4, generator=generator)
    bias = torch.randn(9, generator=generator) if with_bias else None
    tokens = torch.randint(9, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.4
    mask[0, 1] = first_masked  # a kernel that takes the first token's weight for all would be right for one of these
    lengths = torch.tensor([6, *torch.randint(1, 7, (2,), generator=generator).tolist()])

    leaves = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = literal_loss(*leaves, tokens.tolist(), mask.tolist(), lengths.tolist(), objective, head, 14)
    expected = torch.autograd.grad(wanted, [x for x in leaves if x is not None])

    used = [None if x is None else (x.double() if wide else x.clone()).requires_grad_() for x in (hidden, weight, bias)]
    options = {"objective": objective, "token_count": 14, "head": head, "chunk_tokens": chunk, "compiled": one_kernel}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_loss, "compiled_chunk", lambda: compiled.chunk)  # what is compiled; that takes seconds
        result = chunked_loss(*used, tokens, mask, lengths, **options)
    found = torch.autograd.grad(result.loss, [x for x in used if x is not None])
    tolerance = 1e-10 if wide else 1e-5
    torch.testing.assert_close(result.loss.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    for one, other in zip(found, expected, strict=True):
        # relative to the largest entry: single entries of a signed sum cancel
        assert (one.double() - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("first_masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_weights_get_the_float64_gradient(tied: bool, first_masked: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    output = embedding if tied else torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(9, (2, 8), generator=generator)
    mask = torch.rand(2, 8, generator=generator) < 0.3
    mask[0, 1] = first_masked
    lengths, objective, head = torch.tensor([8, 5]), Objective(penalty=0.7), LMHead()
    hidden = torch.cumsum(embedding[tokens], dim=1).tanh()
    arguments = (tokens.tolist(), mask.tolist(), lengths.tolist(), objective, head, 11)
    wanted = literal_loss(hidden, output, None, *arguments)
    leaves = [embedding] if tied else [embedding, output]
    expected = torch.autograd.grad(wanted, leaves, retain_graph=True)
    loss = chunked_loss(
        hidden, output, None, tokens, mask, lengths, objective=objective, token_count=11, chunk_tokens=3
    )
    for one, other in zip(torch.autograd.grad(loss.loss, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["penalty", "ignore", "unlikelihood", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_is_the_function_that_it_was_compiled_from(kind: ObjectiveKind, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    linear = (4 * torch.randn(7, 300, generator=generator)).to(dtype)
    labels = torch.randint(300, (7,), generator=generator)
    counted, masked = labels % 5 != 0, labels % 2 == 0
    objective = Objective(kind=kind, penalty=0.7, floor_probability=FLOOR)
    at_label = linear.gather(1, labels[:, None]).squeeze(1)
    rest = (at_label, counted, masked, objective, LMHead(softcap=3.0), torch.tensor(0.1))
    plain, fused = linear.clone(), linear.clone()
    expected, found = compiled.chunk(plain, *rest), compiled.compiled_chunk()(fused, *rest)
    for one, other in zip((*found, fused), (*expected, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)
    assert plain[~counted].abs().max() == 0
