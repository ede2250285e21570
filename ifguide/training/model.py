"""The model that is trained: its architecture, its initial weights, and the Hugging Face folder that it ends as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide.artifacts import fsync_tree, remove_tree
from ifguide.config import ModelSource
from ifguide.models import load_architecture, load_model
from ifguide.shapes import initial_model, with_positions
from ifguide.training.adapters import adapt, load_trained
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.objective import Objective
from ifguide.training.settings import TrainingSettings


def architecture(target: ModelSource, tokenizer: PreTrainedTokenizerFast, block_size: int) -> dict[str, Any]:
    """The HF config fields of the model to train; vocabulary and special tokens follow the tokenizer if unset."""
    fields = with_positions(load_architecture(target), block_size)
    fields.setdefault("vocab_size", len(tokenizer))
    return {**fields, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def build_model(settings: TrainingSettings, tokenizer: PreTrainedTokenizerFast) -> LanguageModelLoss:
    """The target with its initial weights, its adapters if it trains those, and the objective; float32, on the CPU."""
    train = settings.train
    target = initial_model(settings.target, train.init_from)
    if not train.init_from:
        fields = architecture(target, tokenizer, settings.block_size)
        target = ModelSource(architecture=fields, trust_remote_code=target.trust_remote_code)
    model = load_model(target, seed=settings.seed)
    if train.lora is not None:
        adapt(model, train.lora)
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = Objective(
        kind=train.objective.kind, penalty=train.penalty, floor_probability=train.objective.floor_probability
    )
    return LanguageModelLoss(model, objective)


def trained_model(
    settings: TrainingSettings, trained: PreTrainedModel, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model of the trained one's architecture with the weights of a checkpoint, adapters merged, in float32.

    Raises:
        ValueError: `weights` lacks some that the model needs, or has others.
    """
    if settings.train.lora is not None:
        model = load_model(initial_model(settings.target, settings.train.init_from))
        adapted = adapt(model, settings.train.lora)
        load_trained(model, weights)
        return adapted.merge_and_unload()
    made: Any = type(trained)(trained.config).float()
    missing, unexpected = made.load_state_dict(weights, strict=False)
    tied = set(getattr(made, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise ValueError(f"the weights lack {sorted(set(missing) - tied)}, and have {unexpected} too much")
    made.tie_weights()
    return made


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a local Hugging Face folder of a model and its tokenizer."""
    remove_tree(folder)
    generation: Any = model.generation_config
    generation.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fsync_tree(folder)
