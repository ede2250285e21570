"""Eq. 9 on cases small enough to compute by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from ifguide.models import next_token_nll, predicted_positions
from ifguide.objective import signed_loss, token_weights


def batch(num_blocks: int = 3, block_size: int = 7, vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_blocks, block_size, vocab, generator=generator)
    return logits, torch.randint(vocab, (num_blocks, block_size), generator=generator)


def test_two_tokens_by_hand() -> None:
    # Vocabulary of 2. Logits at 0 predict token 1 with p = 3/4, at 1 predict token 2 with p = 1/4.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)], [50.0, -50.0]]])
    tokens = torch.tensor([[0, 1, 0]])
    mask = torch.tensor([[False, False, True]])
    result = signed_loss(logits, tokens, mask, torch.tensor([3]), penalty=0.5, token_count=2)
    assert result.loss.item() == pytest.approx((math.log(4 / 3) - 0.5 * math.log(4)) / 2, rel=1e-6)
    assert result.benign_sum.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert result.masked_sum.item() == pytest.approx(math.log(4), rel=1e-6)
    assert (result.benign_count.item(), result.masked_count.item()) == (1, 1)


@pytest.mark.parametrize("mask", [None, torch.zeros(3, 7, dtype=torch.bool)])
def test_without_a_mask_it_is_cross_entropy(mask: torch.Tensor | None) -> None:
    logits, tokens = batch()
    count = tokens[:, 1:].numel()
    loss = signed_loss(logits, tokens, mask, torch.full((3,), 7), penalty=1.0, token_count=count).loss
    # Bit for bit against the same terms summed in the same order. reduction="mean" adds the same terms in
    # another order, and float addition is not associative: only close.
    shifted, labels = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    terms = F.cross_entropy(shifted, labels, reduction="none").view(3, 6)
    assert torch.equal(loss, F.pad(terms, (1, 0)).sum() / count)
    torch.testing.assert_close(loss, F.cross_entropy(shifted, labels), rtol=1e-6, atol=0)


def test_index_zero_and_padding_carry_no_loss_no_gradient_and_no_count() -> None:
    logits, tokens = batch()
    lengths = torch.tensor([7, 4, 1])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    assert predicted_positions(tokens, lengths).sum(dim=1).tolist() == [6, 3, 0]
    nll = next_token_nll(logits, tokens, lengths)
    assert torch.equal(nll != 0, predicted_positions(tokens, lengths))
    logits.requires_grad_()
    result = signed_loss(logits, tokens, everything, lengths, penalty=2.0, token_count=9)
    assert (result.benign_count.item(), result.masked_count.item(), result.benign_sum.item()) == (0, 9, 0)
    result.loss.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(dim=-1) > 0
    # The logits at j - 1 predict token j: index 0..5 of block 0, 0..2 of block 1, none of block 2.
    assert touched.tolist() == [[True] * 6 + [False], [True] * 3 + [False] * 4, [False] * 7]


def test_two_accumulation_halves_with_one_denominator_add_to_the_whole() -> None:
    logits, tokens = batch(num_blocks=4)
    lengths, mask = torch.tensor([7, 7, 7, 5]), torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    logits.requires_grad_()
    count = int(predicted_positions(tokens, lengths).sum())
    whole = signed_loss(logits, tokens, mask, lengths, penalty=0.7, token_count=count)
    (expected,) = torch.autograd.grad(whole.loss, logits)
    halves = [
        signed_loss(logits[part], tokens[part], mask[part], lengths[part], penalty=0.7, token_count=count)
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert sum(int(half.benign_count + half.masked_count) for half in halves) == count
    torch.testing.assert_close(halves[0].loss + halves[1].loss, whole.loss, rtol=1e-6, atol=1e-7)
    (found,) = torch.autograd.grad(halves[0].loss + halves[1].loss, logits)
    assert torch.equal(found, expected)


def test_loss_is_of_the_reported_sums_and_the_sums_carry_no_gradient() -> None:
    logits, tokens = batch()
    mask = tokens % 3 == 0
    result = signed_loss(logits.requires_grad_(), tokens, mask, torch.full((3,), 7), penalty=1.5, token_count=18)
    torch.testing.assert_close(result.loss, (result.benign_sum - 1.5 * result.masked_sum) / 18, rtol=1e-5, atol=1e-6)
    assert result.loss.requires_grad
    assert not result.benign_sum.requires_grad
    assert not result.masked_sum.requires_grad


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, tokens = batch(vocab=5000)
    lengths = torch.full((3,), 7)
    half = logits.bfloat16()
    assert torch.equal(next_token_nll(half, tokens % 11, lengths), next_token_nll(half.float(), tokens % 11, lengths))
    assert next_token_nll(half, tokens % 11, lengths).dtype == torch.float32


def test_weights_are_one_or_minus_penalty() -> None:
    weights = token_weights(torch.tensor([[False, True]]), 0.25)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1.0, -0.25]]


def test_negative_penalty_and_a_mask_of_another_shape_are_refused() -> None:
    logits, tokens = batch()
    with pytest.raises(ValueError, match="penalty must be 0 or more"):
        signed_loss(logits, tokens, None, torch.full((3,), 7), penalty=-1.0, token_count=18)
    with pytest.raises(ValueError, match="another corpus"):
        signed_loss(logits, tokens, torch.ones(3, 8).bool(), torch.full((3,), 7), penalty=1.0, token_count=18)
