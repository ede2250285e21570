"""Eq. 9 and its gradient against a token-by-token loop in float64 with its own autograd."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.objective import signed_loss


def literal_loss(
    logits: torch.Tensor, tokens: list[list[int]], mask: list[list[bool]], lengths: list[int], penalty: float, n: int
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        for j in range(1, length):
            row = logits[b, j - 1]
            nll = torch.log(torch.exp(row).sum()) - row[tokens[b][j]]
            total = total - penalty * nll if mask[b][j] else total + nll
    return total / n


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 5), st.booleans())
def test_loss_and_gradient_equal_the_float64_loop(seed: int, penalty: float, wide: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64) * 3
    tokens = torch.randint(9, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.4
    lengths = torch.randint(1, 7, (3,), generator=generator)

    exact = logits.float().double().requires_grad_()
    expected = literal_loss(exact, tokens.tolist(), mask.tolist(), lengths.tolist(), penalty, 14)
    if expected.requires_grad:
        (expected_gradient,) = torch.autograd.grad(expected, exact)
    else:  # no token is predicted
        expected_gradient = torch.zeros_like(exact)

    used = (exact.detach() if wide else logits.float()).requires_grad_()
    result = signed_loss(used, tokens, mask, lengths, penalty=penalty, token_count=14)
    (gradient,) = torch.autograd.grad(result.loss, used)
    # float32 rounds at 6e-8 of the largest term; the sum has at most 15 terms of size up to 20, times 5.
    tolerance = 1e-12 if wide else 2e-5
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)
