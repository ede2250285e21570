"""Adapters: at first the model is as it was, then they alone move, and merged they are the model that was trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from ifguide.config import ConfigError, ModelSource, Pretrain, config_from_mapping
from ifguide.config.pretrain import Lora
from ifguide.models import load_model
from ifguide.planning.training_memory import training_memory
from ifguide.shapes import shape_of_fields
from ifguide.training.adapters import adapt, adapter_parameters, load_trained, trained_state
from ifguide.training.engines import build_optimizer
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.objective import Objective
from tests.tiny import ARCHITECTURES, as_tensors, random_blocks

FAMILIES = ("gpt_neox", "llama", "smollm", "gpt2")  # gpt2's maps are Conv1D, smollm's embeddings are tied
LORA = Lora(rank=3, alpha=12.0)
OBJECTIVE = Objective(kind="penalty", penalty=0.5)
TRAIN = Pretrain(init_from="somewhere", lora=LORA, learning_rate=0.05)


def published(family: str) -> PreTrainedModel:
    return load_model(ModelSource(architecture=ARCHITECTURES[family]))


def losses(module: LanguageModelLoss) -> torch.Tensor:
    tokens, lengths = as_tensors(*random_blocks(4, 12))
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    return module(tokens, lengths, masked, 40)[0]


def trained(family: str) -> tuple[PreTrainedModel, object]:
    """A model after three steps of its adapters, and peft's view of it."""
    torch.manual_seed(1)
    model = published(family)
    tuner = adapt(model, LORA)
    module = LanguageModelLoss(model, OBJECTIVE)
    optimizer = build_optimizer(module, TRAIN)
    for _ in range(3):
        optimizer.zero_grad()
        losses(module).backward()
        optimizer.step()
    return model, tuner


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_is_that_of_the_model_without_adapters(family: str) -> None:
    plain, adapted = published(family), published(family)
    adapt(adapted, LORA)
    assert torch.equal(losses(LanguageModelLoss(adapted, OBJECTIVE)), losses(LanguageModelLoss(plain, OBJECTIVE)))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_move(family: str) -> None:
    model, _ = trained(family)
    at_first = published(family).state_dict()
    moved = {name for name, value in model.named_parameters() if value.requires_grad}
    assert moved
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)
    assert all(value.abs().sum() > 0 for name, value in model.state_dict().items() if ".lora_B." in name)
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if name not in moved}
    assert kept.keys() == at_first.keys()
    assert all(torch.equal(kept[name], at_first[name]) for name in kept)
    assert trained_state(model).keys() == moved
    assert sum(value.numel() for value in trained_state(model).values()) == adapter_parameters(published(family), LORA)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_are_the_trained_model(family: str) -> None:
    model, _ = trained(family)
    tokens, _ = as_tensors(*random_blocks(2, 12))
    expected = model.eval()(input_ids=tokens).logits
    again = published(family)
    tuner = adapt(again, LORA)
    load_trained(again, copy.deepcopy(trained_state(model)))
    merged = tuner.merge_and_unload()
    assert merged.state_dict().keys() == published(family).state_dict().keys()
    assert torch.allclose(merged.eval()(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(published(family)(input_ids=tokens).logits, expected, atol=1e-2)


def test_a_state_without_an_adapter_or_with_something_else_is_refused() -> None:
    model, _ = trained("llama")
    state = trained_state(model)
    name = next(iter(state))
    with pytest.raises(ValueError, match="weights lack"):
        load_trained(model, {other: value for other, value in state.items() if other != name})
    with pytest.raises(ValueError, match="too much"):
        load_trained(model, {**state, "head": state[name]})


def test_targets_are_maps_of_the_blocks() -> None:
    model = published("llama")
    adapt(model, replace(LORA, targets=("q_proj", "v_proj")))
    adapted = {name.split(".")[-4] for name in trained_state(model)}
    assert adapted == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"pretrain\.lora\.targets: .* no lm_head, quarry; choose among down_proj, "):
        adapt(published("llama"), replace(LORA, targets=("quarry", "q_proj", "lm_head")))


def test_adapters_need_weights_to_begin_with() -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.lora: .* name a model by pretrain\.init_from"):
        config_from_mapping({"pretrain": {"lora": {"rank": 4}}})


def test_a_plan_counts_states_of_the_adapters_alone() -> None:
    shape = shape_of_fields("target", "test", {**ARCHITECTURES["llama"], "hidden_size": 64}, traced=False)
    whole, lora = training_memory(replace(TRAIN, lora=None), shape, 16), training_memory(TRAIN, shape, 16)
    share = adapter_parameters(shape.skeleton, LORA) / shape.parameters
    assert 0 < share < 0.5
    assert lora.weights == whole.weights
    assert (lora.gradients, lora.optimizer) == pytest.approx((share * whole.gradients, share * whole.optimizer))
    assert lora.head < whole.head
