"""The chunked loss: alignment, counts, chunks, and models whose heads it must understand or refuse."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ifguide.config import ModelSource
from ifguide.models import load_model
from ifguide.training import lm_loss
from ifguide.training.lm_loss import LanguageModelLoss, Loss, chunked_loss
from ifguide.training.objective import Objective
from tests.tiny import ARCHITECTURES, VOCABULARY, as_tensors, random_blocks, tiny_model

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
FALCON_H1 = {
    **SMALL, "model_type": "falcon_h1", "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_d_state": 16,
}  # fmt: skip
SCALED: dict[str, dict[str, Any]] = {
    "granite": {**SMALL, "model_type": "granite", "logits_scaling": 0.25},
    "hyperclovax": {**SMALL, "model_type": "hyperclovax", "logits_scaling": 4.0},
    "falcon_h1": {**FALCON_H1, "lm_head_multiplier": 4.0},
    "recurrent_gemma": {**SMALL, "model_type": "recurrent_gemma", "lru_width": 64, "logits_soft_cap": 0.5},
}


def batch(num_blocks: int = 3, block_size: int = 7, width: int = 5, vocab: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_blocks, block_size, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    return hidden, weight, torch.randint(vocab, (num_blocks, block_size), generator=generator)


def whole(num_blocks: int = 3) -> torch.Tensor:
    return torch.full((num_blocks,), 7)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 100])
def test_without_a_mask_it_is_cross_entropy_of_the_same_chunks_bit_for_bit(chunk_tokens: int) -> None:
    hidden, weight, tokens = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    options: dict[str, Any] = {"token_count": 18, "chunk_tokens": chunk_tokens}
    results = [
        chunked_loss(hidden, weight, None, tokens, mask, whole(), objective=objective, **options)
        for mask, objective in (
            (None, Objective()),
            (nothing, Objective()),
            (nothing, Objective(kind="unlikelihood")),
            (~nothing, Objective(penalty=0.0)),
        )
    ]
    gradients = [torch.autograd.grad(result.loss, (hidden, weight)) for result in results]
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    pieces = zip(hidden.flatten(0, 1).split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    total = torch.zeros(())
    for states, here in pieces:
        total = total + F.cross_entropy(states @ weight.T, here, reduction="none").sum()
    for result in results[:3]:
        assert torch.equal(result.loss, total / 18)
    for found in gradients[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(found, gradients[0], strict=True))
    for found, expected in zip(gradients[0], torch.autograd.grad(total / 18, (hidden, weight)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert all((gradient == 0).all() for gradient in gradients[3])


def test_index_zero_and_padding_carry_no_loss_no_gradient_and_no_count() -> None:
    hidden, weight, tokens = batch()
    everything = torch.ones_like(tokens, dtype=torch.bool)
    hidden.requires_grad_()
    lengths = torch.tensor([7, 4, 1])
    result = chunked_loss(
        hidden, weight, None, tokens, everything, lengths, objective=Objective(penalty=2.0), token_count=9
    )
    assert (result.benign_count.item(), result.masked_count.item(), result.benign_sum.item()) == (0, 9, 0)
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    # The state at j - 1 predicts token j: index 0..5 of block 0, 0..2 of block 1, none of block 2.
    touched = gradient.abs().sum(dim=-1) > 0
    assert touched.tolist() == [[True] * 6 + [False], [True] * 3 + [False] * 4, [False] * 7]


def test_two_accumulation_parts_with_one_denominator_add_to_the_whole() -> None:
    hidden, weight, tokens = batch(num_blocks=4)
    lengths, mask = torch.tensor([7, 7, 7, 5]), torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    weight.requires_grad_()

    def gradient(part: slice) -> torch.Tensor:
        inputs = (hidden[part], weight, None, tokens[part], mask[part], lengths[part])
        loss = chunked_loss(*inputs, objective=Objective(penalty=0.7), token_count=22).loss
        return torch.autograd.grad(loss, weight)[0]

    torch.testing.assert_close(gradient(slice(0, 1)) + gradient(slice(1, 4)), gradient(slice(0, 4)))


def test_loss_is_of_the_reported_sums_and_the_sums_carry_no_gradient() -> None:
    hidden, weight, tokens = batch()
    result = chunked_loss(
        hidden.requires_grad_(), weight, None, tokens, tokens % 3 == 0, whole(), objective=Objective(penalty=1.5),
        token_count=18,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, (result.benign_sum - 1.5 * result.masked_sum) / 18, rtol=1e-5, atol=1e-6)
    assert result.loss.requires_grad
    assert not result.benign_sum.requires_grad


def test_half_precision_products_are_summed_in_float32() -> None:
    hidden, weight, tokens = batch(width=32, vocab=5000)
    half = [hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    result = chunked_loss(*half, None, tokens, None, whole(), objective=Objective(), token_count=18)
    logits = (half[0] @ half[1].T).float()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(result.loss, half)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16]


def test_where_no_gradient_is_wanted_none_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, tokens = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    inputs = (hidden, weight, None, tokens, None, whole())
    wanted = chunked_loss(*inputs, objective=Objective(), token_count=18).loss
    monkeypatch.setattr(lm_loss, "_add_product", lambda *_: pytest.fail("a held-out loss needs no gradient"))
    with torch.no_grad():
        assert torch.equal(chunked_loss(*inputs, objective=Objective(), token_count=18).loss, wanted)


def test_a_mask_of_another_shape_and_a_second_backward_are_refused() -> None:
    hidden, weight, tokens = batch()
    with pytest.raises(ValueError, match="another corpus"):
        chunked_loss(
            hidden, weight, None, tokens, torch.ones(3, 8).bool(), whole(), objective=Objective(), token_count=18
        )
    loss = chunked_loss(
        hidden.requires_grad_(), weight, None, tokens, None, whole(), objective=Objective(), token_count=18
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken back twice"):
        loss.backward()


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_gives_the_loss_and_gradient_of_its_own_logits(family: str) -> None:
    blocks, lengths = as_tensors(*random_blocks(3, 12))
    mask = blocks % 5 == 0
    count = int((lengths - 1).sum())
    model = tiny_model(family, dtype=torch.float64).eval()
    wrapped = LanguageModelLoss(model, Objective(penalty=0.8), chunk_tokens=7)
    wrapped.check()
    found = Loss(*wrapped(blocks, lengths, mask, count))
    found.loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    logits = model(input_ids=blocks, use_cache=False).logits.double()
    positions = torch.arange(11)
    weights = torch.where(mask[:, 1:], -0.8, torch.ones((), dtype=torch.float64)) * (positions < (lengths - 1)[:, None])
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(), reduction="none").view(3, 11)
    expected = (weights * nll).sum() / count
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-10, atol=1e-10)
    for (name, _), gradient in zip(
        parameters.items(), torch.autograd.grad(expected, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_a_head_that_is_not_understood_is_refused_by_name() -> None:
    model = tiny_model("llama")
    plain = model.forward
    model.forward = lambda *a, **k: (lambda out: (setattr(out, "logits", out.logits * 3), out)[1])(plain(*a, **k))
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not"):
        LanguageModelLoss(model, Objective()).check()
    assert model.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_not_understood_is_refused_though_its_loss_is_near(dtype: torch.dtype) -> None:
    """At random initialisation the loss is near ln V, whatever the logits' scale."""
    model = nn.Module.to(load_model(ModelSource(architecture={**SMALL, "model_type": "llama"})), dtype)
    plain = model.forward
    model.forward = lambda *a, **k: (lambda out: (setattr(out, "logits", out.logits / 4), out)[1])(plain(*a, **k))
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not"):
        LanguageModelLoss(model, Objective()).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(SCALED))
def test_scales_and_soft_caps_are_read_by_every_name(family: str, dtype: torch.dtype) -> None:
    model = nn.Module.to(load_model(ModelSource(architecture=SCALED[family])), dtype)
    wrapped = LanguageModelLoss(model, Objective())
    wrapped.check()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        found = Loss(*wrapped(tokens, torch.tensor([12]), None, 11)).loss
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    expected = F.cross_entropy(logits, tokens[0, 1:])
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=0)
    assert not wrapped.head.is_linear


def test_autocast_rounds_the_products_of_the_head_as_it_rounds_all_others() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(11)
    tokens, lengths = torch.randint(11, (2, 5)), torch.tensor([5, 5])
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_loss(
            hidden, weight, bias, tokens, None, lengths, objective=Objective(), token_count=8, chunk_tokens=3
        )
        logits = F.linear(hidden, weight, bias)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
    assert float(found.benign_sum) == pytest.approx(float(expected), rel=1e-6)
