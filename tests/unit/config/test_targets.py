"""What a target cannot be made of is refused by its key when the config is read."""

from __future__ import annotations

from typing import Any

import pytest

from ifguide.config import ConfigError, config_from_mapping
from ifguide.config.typed_yaml import read_yaml


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"proxy": "p", "pretrain": {"init_from": "a/b", "train_tokenizer": 512}},
            r"pretrain\.train_tokenizer: .* that model's own tokens; .* by pretrain\.tokenizer=a/b$",
        ),
        (
            {"pretrain": {"init_from": "a/b"}, "pack_corpus": {"train_tokenizer": 512}},
            r"pack_corpus\.train_tokenizer: .* that model's own tokens; set pretrain\.tokenizer=a/b, or tokenizer=a/b",
        ),
        ({"pretrain": {"betas": [1, 0.95]}}, r"pretrain\.betas\[0\]: 1\.0 must be below 1"),
        ({"pretrain": {"betas": [0.9, 1.0]}}, r"pretrain\.betas\[1\]: 1\.0 must be below 1"),
        (
            {"target": {"source": "a/b", "trust_remote_code": True}},
            r"target\.trust_remote_code: targets of remote code are not supported; set it to false$",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        config_from_mapping(tree)


def test_published_weights_go_with_a_corpus_of_trained_tokens_where_they_read_their_own() -> None:
    pretrain = {"init_from": "a/b", "tokenizer": "a/b"}
    config_from_mapping({"proxy": "p", "pretrain": pretrain, "pack_corpus": {"train_tokenizer": 512}})


def test_numbers_with_an_exponent_are_numbers_in_a_models_own_options_too() -> None:
    text = "target: {architecture: {model_type: llama, rope_theta: 5e5, layer_norm_eps: 1e-5, name: 5ever}}"
    fields = config_from_mapping(read_yaml(text)).target.architecture
    assert fields == {"model_type": "llama", "rope_theta": 5e5, "layer_norm_eps": 1e-5, "name": "5ever"}
