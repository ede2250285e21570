"""The signed loss of logits is the training loop's own, value and gradient."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from ifguide.config.pretrain import ObjectiveKind
from ifguide.training.lm_loss import LanguageModelLoss, chunked_loss
from ifguide.training.objective import Objective
from ifguide.training.signed_loss import objective, signed_loss
from tests.tiny import VOCABULARY, as_tensors, random_blocks, tiny_model

FLOOR = 0.1


def as_labels(tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    return tokens_BT.masked_fill(torch.arange(tokens_BT.shape[1]) >= lengths_B[:, None], -100)


@pytest.mark.parametrize("kind", get_args(ObjectiveKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_chunked_loss(kind: ObjectiveKind, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 7, 5, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=dtype, requires_grad=True)
    tokens = torch.randint(11, (3, 7), generator=generator)
    mask, lengths = torch.rand(3, 7, generator=generator) < 0.5, torch.tensor([7, 4, 1])
    objective = Objective(kind=kind, penalty=0.7, floor_probability=FLOOR)
    own = chunked_loss(hidden, weight, None, tokens, mask, lengths, objective=objective, token_count=9)
    assert own.masked_count > 0
    assert own.benign_count > 0
    options = {"kind": kind, "penalty": 0.7, "floor_probability": FLOOR}
    found = signed_loss(hidden @ weight.T, as_labels(tokens, lengths), mask, **options)  # type: ignore[arg-type]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(found, own.loss, **tolerance)
    expected = torch.autograd.grad(own.loss, (hidden, weight))
    for gradient, wanted in zip(torch.autograd.grad(found, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, **tolerance)


def test_a_model_in_anybodys_loop_moves_as_in_ours() -> None:
    tokens, lengths = as_tensors(*random_blocks(3, 9))
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    count = int((lengths - 1).sum())
    ours, theirs = (tiny_model("llama").requires_grad_(True) for _ in range(2))
    objective = Objective(kind="clipped", penalty=0.5)
    LanguageModelLoss(ours, objective)(tokens, lengths, mask, count)[0].backward()
    signed_loss(theirs(input_ids=tokens).logits, as_labels(tokens, lengths), mask).backward()
    for own, found in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, own.grad, rtol=1e-4, atol=1e-6)


def test_a_count_for_each_device_is_one_of_all() -> None:
    """As transformers' Trainer gives them, who then multiplies the loss by the number of devices."""
    logits = torch.randn(2, 6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(2))
    one, four = (objective(logits, labels, count) for count in (torch.tensor(9), torch.tensor(9).expand(4, 1)))
    assert four.shape == ()
    torch.testing.assert_close(4 * four, one)


def test_without_a_mask_it_is_cross_entropy_and_parts_with_one_count_add_up() -> None:
    logits = torch.randn(4, 6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    labels[3, 4:] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(signed_loss(logits, labels, None), expected)
    mask = labels % 3 == 0
    parts = [signed_loss(logits[part], labels[part], mask[part], token_count=18) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0] + parts[1], signed_loss(logits, labels, mask))


def test_a_masked_token_that_cannot_be_less_likely_has_no_gradient_and_no_nan() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = -torch.inf
    logits.requires_grad_()
    loss = signed_loss(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, False]]))
    assert torch.isfinite(loss)
    loss.backward()
    assert (logits.grad[0, 0] == 0).all()
    assert torch.isfinite(logits.grad[0, 1]).all()


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels \(2, 3\) and mask \(2, 2\) must agree"):
        signed_loss(logits, labels, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="penalty must be 0 or more"):
        signed_loss(logits, labels, None, penalty=-1.0)
