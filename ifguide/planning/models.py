"""The shapes of a config's proxy and target."""

from __future__ import annotations

from ifguide.architecture import with_positions
from ifguide.config import Config, ConfigError
from ifguide.shapes import ModelShape, initial_model, model_shape, shape_of_fields
from ifguide.tokenizer import load_tokenizer


def proxy_shape(config: Config) -> ModelShape:
    """The model that is scored with; the target's shape where the baseline of the run is the proxy.

    Raises:
        ConfigError, FileNotFoundError, ValueError: the shape cannot be known; says what to set.
    """
    return target_shape(config) if config.proxy_is_baseline else model_shape(config.proxy, "proxy")


def target_shape(config: Config) -> ModelShape:
    """The model to be trained; its vocabulary is the tokenizer's where the architecture leaves it open, or where the
    model is named and the tokenizer is trained.

    Raises:
        ConfigError, FileNotFoundError, ValueError: the shape cannot be known; says what to set.
    """
    source, traced = initial_model(config.target, config.pretrain.init_from), config.proxy_is_baseline
    if source.architecture is not None:
        fields = with_positions(source.architecture, config.pack_corpus.block_size)
        if "vocab_size" not in fields:
            fields["vocab_size"] = _vocabulary(config)
        return shape_of_fields("target", "target.architecture", fields, traced=traced)
    return model_shape(source, "target", traced=traced, vocabulary=config.target_tokenizer_size)


def _vocabulary(config: Config) -> int:
    if config.target_tokenizer_size is not None:
        return config.target_tokenizer_size
    try:
        return len(load_tokenizer(config.pretrain.tokenizer or config.named_tokenizer))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "target.architecture.vocab_size: is left to the tokenizer, which cannot be read yet"
            f" ({config.named_tokenizer}); plan with --set target.architecture.vocab_size=N"
        ) from error
