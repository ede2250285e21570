"""The size of a model without its weights: what FLOP, memory and storage are counted from.

The model is built on torch's meta device, so the counts are those of the model that will run, whatever its family, and
the tracked modules are the ones that influence is traced through. A hub id of `shapes.yaml` needs no network.

FLOP are counted per token, at 2 a multiply and add. With N the weights of the tracked linear maps, H those of the LM
head, L layers of attention width A and blocks of T tokens, a forward pass takes

    2 N + 2 H + 2 L A T        (the last is causal attention: half of the full square that plain kernels compute)

and a backward pass with weight gradients twice that; where only adapters are trained, little more than once.
Element-wise operations, norms and embeddings are left out: they cost bandwidth, and show in the efficiency that was
measured.

Cost: about a second per model and no memory. It does not read weights.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ifguide.architecture import load_architecture
from ifguide.config import ConfigError, ModelSource
from ifguide.models import linearise, tracked_modules, transformer_blocks


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """`linears`: (d_out, d_in with 1 for a bias) of every tracked module, and `tracked` their weights; of a model that
    is only trained there are none, and `tracked` are the blocks' weights that a token meets. `attention_width`: heads *
    head width. `known_from` says where the shape comes from; `skeleton` is the model on the meta device."""

    name: str
    known_from: str
    parameters: int
    linears: tuple[tuple[int, int], ...]
    tracked: int
    head: int
    layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    module_names: tuple[str, ...] = field(repr=False)
    skeleton: PreTrainedModel = field(repr=False, compare=False)

    def attention_flop(self, block_size: int) -> float:
        """Causal attention's two products, FLOP per token."""
        return 2.0 * self.layers * self.attention_width * block_size

    def forward_flop(self, block_size: int) -> float:
        """One forward pass with logits, FLOP per token."""
        return 2.0 * self.tracked + 2.0 * self.head + self.attention_flop(block_size)

    def training_flop(self, block_size: int, *, recomputed: bool = False, adapters: int | None = None) -> float:
        """Forward and backward with weight gradients, FLOP per token; `recomputed` adds the forward of activation
        checkpointing. With so many weights in `adapters` only those have gradients, and every other map's backward
        pass is one product instead of two."""
        forward = self.forward_flop(block_size)
        if adapters is None:
            return (4.0 if recomputed else 3.0) * forward
        forward += 2.0 * adapters
        backward = forward + self.attention_flop(block_size) + 2.0 * adapters
        return (2.0 if recomputed else 1.0) * forward + backward


def published_shapes() -> dict[str, dict[str, Any]]:
    """Hub id -> `parameters` and `fields` of the models whose shape is packaged."""
    text = resources.files("ifguide").joinpath("shapes.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def initial_model(target: ModelSource, init_from: str | None) -> ModelSource:
    """The weights to start from (`init_from`), or the target whose architecture is initialised at random.

    Raises:
        ConfigError: neither is named.
    """
    if init_from:
        return replace(target, source=init_from, architecture=None)
    if target.source is None and target.architecture is None:
        raise ConfigError("target: set target.architecture or target.source, or pretrain.init_from")
    return target


def model_shape(model: ModelSource, key: str, *, traced: bool = True, vocabulary: int | None = None) -> ModelShape:
    """The shape of a configured model. `key` (proxy, target) names it in errors; `traced` as in `shape_of_fields`; a
    `vocabulary` takes the place of a named model's own.

    Raises:
        ValueError: a hub id that is neither packaged nor to be had; FileNotFoundError: no such local model.
    """
    if model.architecture is not None:
        return shape_of_fields(key, f"{key}.architecture", model.architecture, traced=traced)
    assert model.source is not None
    published = published_shapes()
    other = {} if vocabulary is None else {"vocab_size": vocabulary}
    if model.source in published:
        fields = published[model.source]["fields"] | other
        return shape_of_fields(model.source, "published shape", fields, traced=traced)
    try:
        fields = load_architecture(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{key}: {error}. To plan before it exists, name a model of its shape: --set {key}=EleutherAI/pythia-160m"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{key}: the config of {model.source} cannot be fetched. Name a local folder that holds its config.json,"
            f" give its shape as {key}.architecture, or a model of known shape: {', '.join(published)}"
        ) from error
    return shape_of_fields(model.source, "its config", fields | other, traced=traced)


def shape_of_fields(name: str, known_from: str, fields: dict[str, Any], *, traced: bool = True) -> ModelShape:
    """The shape of a Hugging Face config's fields. Raises ValueError where they do not say it or, if `traced`, where
    influence cannot be traced."""
    if "model_type" not in fields:
        raise ValueError(f"{name}: the architecture needs model_type (llama, gpt_neox, ...); it has {sorted(fields)}")
    skeleton = _skeleton(json.dumps(fields, sort_keys=True, default=str))
    names = tracked_modules(skeleton, min_coverage=0.0).names if traced else ()
    linears, tracked = [], 0 if traced else _weights_per_token(skeleton)
    for module_name in names:
        module = skeleton.get_submodule(module_name)
        assert isinstance(module, nn.Linear)
        linears.append((module.out_features, module.in_features + (module.bias is not None)))
        tracked += module.weight.numel()
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"{name}: {config.model_type} has no num_attention_heads to count attention by")
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = skeleton.get_output_embeddings()
    assert head is not None
    return ModelShape(
        name=name,
        known_from=known_from,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        linears=tuple(linears),
        tracked=tracked,
        head=head.weight.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        attention_width=width,
        module_names=names,
        skeleton=skeleton,
    )


def _weights_per_token(skeleton: PreTrainedModel) -> int:
    """Weights of the blocks' matrices that a token meets: all but those of the experts that it is not sent to."""
    config = skeleton.config.get_text_config()
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next(filter(None, counts), 1)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    total = 0.0
    for name, parameter in transformer_blocks(skeleton)[1].named_parameters():
        if parameter.ndim >= 2:
            total += parameter.numel() * (chosen / experts if "experts" in name.split(".") else 1)
    return round(total)


@functools.lru_cache(maxsize=4)
def _skeleton(fields: str) -> PreTrainedModel:
    config = AutoConfig.for_model(**json.loads(fields))
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:  # it is of the vocabulary that was published
        text.pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return linearise(model)
