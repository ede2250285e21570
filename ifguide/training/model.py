"""The model that is trained: its architecture, its initial weights, and the Hugging Face folder that it ends as."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ifguide.architecture import load_architecture, with_positions
from ifguide.artifacts import fsync_tree, remove_tree
from ifguide.config import ConfigError, ModelSource, Pretrain
from ifguide.influence.fused import can_fuse
from ifguide.models import load_model
from ifguide.shapes import initial_model
from ifguide.telemetry import log
from ifguide.training.adapters import adapt, load_trained
from ifguide.training.choices import CHOICES, Choices, Compiled
from ifguide.training.compiled import compile_layers, compiles
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.objective import Objective
from ifguide.training.settings import TrainingSettings

FLEX = "flex_attention"


def architecture(
    target: ModelSource, tokenizer: PreTrainedTokenizerFast, block_size: int, *, trained_tokenizer: bool = False
) -> dict[str, Any]:
    """The HF config fields of the model to train; special tokens are the tokenizer's, and so is the vocabulary where
    `target.architecture` leaves it open, or where the target is named and the tokenizer was trained for it."""
    fields = with_positions(load_architecture(target), block_size)
    if "vocab_size" not in fields or (trained_tokenizer and target.architecture is None):
        fields["vocab_size"] = len(tokenizer)
    return fields | {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def build_model(
    settings: TrainingSettings, tokenizer: PreTrainedTokenizerFast, *, tokens: int, chosen: Choices | None = None
) -> LanguageModelLoss:
    """The target with its initial weights, its adapters if it trains those, and the objective; float32, on the CPU. To
    be trained on so many `tokens`: compiled, if that is worth it, or as `chosen` before.

    Raises:
        ConfigError: it is to be compiled, or to go on with flex attention, and cannot be.
    """
    train = settings.train
    target = initial_model(settings.target, train.init_from)
    if not train.init_from:
        fields = architecture(target, tokenizer, settings.block_size, trained_tokenizer=settings.trained_tokenizer)
        target = ModelSource(architecture=fields)
    model = load_model(target, seed=settings.seed, attn_implementation=_attention(train, chosen))
    if train.lora is not None:
        adapt(model, train.lora)
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = Objective(
        kind=train.objective.kind, penalty=train.penalty, floor_probability=train.objective.floor_probability
    )
    choices = _choices(train, model, tokens, chosen)
    if choices.layers.on:
        compile_layers(model)
    log("pretrain", choices.text())
    module = LanguageModelLoss(model, objective, compiled=choices.loss.on)
    module.choices = choices
    return module


def _choices(train: Pretrain, model: PreTrainedModel, tokens: int, chosen: Choices | None) -> Choices:
    """As the config and `chosen` say, or as pays."""
    device = torch.device("cuda" if train.resources.gpus else "cpu")
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())

    def compiled(wanted: bool | None, before: Compiled | None) -> Compiled:
        wanted = wanted if before is None else before.on
        now = compiles(wanted, parameters=parameters, tokens=tokens, device=device, dtype=train.dtype)
        return now if before is None else before

    layers = compiled(train.acceleration.compiled_layers, chosen.layers if chosen else None)
    loss = compiled(train.acceleration.compiled_loss, chosen.loss if chosen else None)
    if train.acceleration.deepspeed_compile:
        layers = Compiled(False, "DeepSpeed compiles the model")
    elif train.parts_parameters:
        layers = Compiled(False, "ZeRO-3 gathers weights module by module, which a graph hides")
    return Choices(layers=layers, loss=loss, attention=str(model.config._attn_implementation))


def _attention(train: Pretrain, chosen: Choices | None) -> str | None:
    """On a GPU with a compiler documents are kept apart by flex attention, which skips what is masked; elsewhere by a
    mask; or as `chosen` before. None: as `load_model` chooses.

    Raises:
        ConfigError: flex attention was chosen before, and cannot be had.
    """
    able = train.resources.gpus > 0 and can_fuse(torch.device("cuda"))
    wanted = train.document_attention and able if chosen is None else chosen.attention == FLEX
    if wanted and not able:
        raise ConfigError(
            "pretrain.document_attention: this training has begun with flex attention, which takes a GPU and Triton; go"
            f" on where they are, or delete its {CHOICES} to choose anew"
        )
    return FLEX if wanted else None


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
    made.generation_config = copy.deepcopy(trained.generation_config)
    return made


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a local Hugging Face folder of a model and its tokenizer. Text ends with the tokenizer's EOS, and with all
    that the model's generation config ends it with beside that."""
    remove_tree(folder)
    generation: Any = model.generation_config
    stops = generation.eos_token_id
    if not isinstance(stops, list) or tokenizer.eos_token_id not in stops:
        stops = tokenizer.eos_token_id
    generation.eos_token_id = stops
    try:
        generation.save_pretrained(folder)
    except ValueError:  # transformers writes flags that do not go together as they were published, and no others
        beginning, padding = generation.bos_token_id, generation.pad_token_id
        plain = GenerationConfig(bos_token_id=beginning, eos_token_id=stops, pad_token_id=padding)
        model.generation_config = plain
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fsync_tree(folder)
