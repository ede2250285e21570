"""Counts of FLOP and parameters against direct ones."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifguide.architecture import require_positions, with_positions
from ifguide.config import ModelSource
from ifguide.config.pretrain import Lora
from ifguide.models import load_model
from ifguide.shapes import (
    initial_model,
    model_shape,
    published_shapes,
    shape_of_fields,
)
from ifguide.training.adapters import adapt, adapter_parameters
from tests.tiny import ARCHITECTURES, random_blocks, tiny_model

TOKENS = 12


@pytest.mark.parametrize("name", ["EleutherAI/pythia-160m", "meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M"])
def test_a_packaged_shape_has_the_published_number_of_parameters(name: str) -> None:
    shape = model_shape(ModelSource(source=name), "proxy")
    assert shape.parameters == published_shapes()[name]["parameters"]
    assert shape.known_from == "published shape"


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3", "gpt2"])
def test_the_forward_pass_is_counted_as_torch_counts_it(family: str) -> None:
    shape = shape_of_fields("tiny", "test", ARCHITECTURES[family])
    model = tiny_model(family)
    tokens = torch.from_numpy(random_blocks(3, TOKENS, ragged=False)[0]).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attended = sum(count for op, count in counts.items() if "attention" in str(op) or "bmm" in str(op))
    products = sum(count for op, count in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    assert products == 3 * TOKENS * 2 * (shape.tracked + shape.head)
    if attended:  # the CPU's flash kernel is not counted by torch
        assert attended == pytest.approx(3 * TOKENS * 2 * shape.attention_flop(TOKENS), rel=0.1)  # the full square
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_token_meets_the_experts_that_it_is_sent_to() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    fields = ARCHITECTURES["llama"] | {"model_type": "mixtral"} | experts
    shape = shape_of_fields("tiny", "test", fields, traced=False)
    model = load_model(ModelSource(architecture=fields))
    model.set_experts_implementation("eager")  # torch does not count its grouped product
    tokens = torch.from_numpy(random_blocks(3, TOKENS, ragged=False)[0]).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    assert products == 3 * TOKENS * 2 * (shape.tracked + shape.head)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_the_weights_that_a_token_meets_are_those_that_can_be_tracked(family: str) -> None:
    tracked, trained = (
        shape_of_fields("tiny", "test", ARCHITECTURES[family], traced=traced) for traced in (True, False)
    )
    assert trained.tracked == tracked.tracked


def test_training_is_counted_as_torch_counts_it() -> None:
    shape = shape_of_fields("tiny", "test", ARCHITECTURES["gpt_neox"])
    model = tiny_model("gpt_neox").requires_grad_(True)
    tokens = torch.from_numpy(random_blocks(2, TOKENS, ragged=False)[0]).long()
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    wanted = 2 * TOKENS * (shape.training_flop(TOKENS) - 3 * shape.attention_flop(TOKENS))
    assert products == pytest.approx(wanted)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_training_of_adapters_is_counted_as_torch_counts_it(family: str) -> None:
    """But for the lowest maps, whose inputs have no gradient."""
    lora, fields = Lora(rank=4), {**ARCHITECTURES[family], "num_hidden_layers": 24}
    model = load_model(ModelSource(architecture=fields))
    shape = shape_of_fields("tiny", "test", fields)
    adapters = adapter_parameters(shape.skeleton, lora)
    adapt(model, lora)
    tokens = torch.from_numpy(random_blocks(2, TOKENS, ragged=False)[0]).long()
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    wanted = 2 * TOKENS * (shape.training_flop(TOKENS, adapters=adapters) - 3 * shape.attention_flop(TOKENS))
    assert products == pytest.approx(wanted, rel=0.03)
    again = shape.training_flop(TOKENS, adapters=adapters, recomputed=True)
    assert again - shape.training_flop(TOKENS, adapters=adapters) == shape.forward_flop(TOKENS) + 2 * adapters


def test_a_model_that_cannot_be_fetched_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/no-such-model.*proxy\.architecture"):
        model_shape(ModelSource(source="nobody/no-such-model"), "proxy")


def test_a_proxy_that_is_still_to_be_made_is_refused_with_what_to_do() -> None:
    with pytest.raises(FileNotFoundError, match="--set proxy="):
        model_shape(ModelSource(source="runs/not/there/hf"), "proxy")


def test_the_model_to_start_from_has_the_targets_revision_and_trust() -> None:
    target = ModelSource(architecture=ARCHITECTURES["llama"], revision="step3", trust_remote_code=True)
    found = initial_model(target, "a/b")
    assert found == ModelSource(source="a/b", revision="step3", trust_remote_code=True)
    assert initial_model(target, None) == target


def test_positions_are_the_models_own_or_a_blocks_tokens() -> None:
    assert with_positions({"model_type": "llama"}, 64)["max_position_embeddings"] == 64
    for known in ({"max_position_embeddings": 32}, {"n_positions": 32}, {"text_config": {"n_positions": 32}}):
        assert with_positions(known, 64) == known
        require_positions("target", known, 32)
        with pytest.raises(ValueError, match=r"^pack_corpus\.block_size: 33 tokens are more than the 32 positions"):
            require_positions("target", known, 33)
    require_positions("target", {"model_type": "bloom"}, 10**6)
