"""What a model's config says of it, and whether that suits a tokenizer and a block. It reads no weights.

Apart from `ifguide.models`, so that the preflight can ask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from ifguide.config import ModelSource
from ifguide.tokenizer import locate


def load_architecture(model: ModelSource) -> dict[str, Any]:
    """The config fields of `model` without its weights: what `ModelSource.architecture` takes."""
    if model.architecture is not None:
        return dict(model.architecture)
    assert model.source is not None
    location, options = locate(model.source, model.revision, model.trust_remote_code)
    with named_errors(model.source):
        fields: dict[str, Any] = AutoConfig.from_pretrained(location, **options).to_dict()
    return fields


@contextlib.contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Have errors of files that are not what they should be name the model. Of damaged ones nearly any error comes."""
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{source}: the model cannot be loaded ({error}); restore its files") from error


def check_vocabulary(
    vocab_size: int, tokenizer: PreTrainedTokenizerFast, *, model_name: str, tokenizer_name: str
) -> None:
    """Raises ValueError when the tokenizer can make ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer_name} has {len(tokenizer)} tokens but model {model_name} only {vocab_size}; "
            "use the model's own tokenizer, or set vocab_size of its architecture to at least that"
        )


def with_positions(fields: Mapping[str, Any], block_size: int) -> dict[str, Any]:
    """A Hugging Face config's fields with a position for every token of a block, if they leave that open."""
    has_positions = _positions(fields) is not None
    return dict(fields) if has_positions else {**fields, "max_position_embeddings": block_size}


def require_positions(name: str, fields: Mapping[str, Any], block_size: int, *, beginning: int = 0) -> None:
    """Raises ValueError when a model of these config fields has fewer positions than a block has tokens, with
    `beginning` ones (a BOS) before it."""
    positions = _positions(fields)
    if positions is not None and positions < block_size + beginning:
        raise ValueError(
            f"pack_corpus.block_size: {block_size} tokens{' and a BOS' * beginning} are more than the {positions}"
            f" positions of {name}; pack {positions - beginning} at most, or take a model with more"
            " (max_position_embeddings)"
        )


def _positions(fields: Mapping[str, Any]) -> int | None:
    text = fields.get("text_config") or fields
    return text.get("max_position_embeddings", text.get("n_positions"))
