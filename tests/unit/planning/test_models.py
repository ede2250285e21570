"""The shapes of a config's models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ifguide.config import Config, ConfigError, ModelSource, PackCorpus, Pretrain
from ifguide.planning.models import proxy_shape, target_shape
from tests.tiny import ARCHITECTURES


def test_the_baseline_is_the_proxy_and_its_vocabulary_that_of_the_corpus() -> None:
    architecture = {key: value for key, value in ARCHITECTURES["gpt_neox"].items() if key != "vocab_size"}
    config = Config(target=ModelSource(architecture=architecture), pack_corpus=PackCorpus(train_tokenizer=512))
    assert proxy_shape(config) == target_shape(config)
    assert target_shape(config).vocabulary == 512
    assert target_shape(replace(config, pretrain=Pretrain(train_tokenizer=600))).vocabulary == 600
    named = replace(config, target=ModelSource(source="EleutherAI/pythia-160m"))
    assert target_shape(named).vocabulary == 512
    assert target_shape(replace(named, pretrain=Pretrain(tokenizer="./of/its/own"))).vocabulary == 50304
    with pytest.raises(ConfigError, match=r"target\.architecture\.vocab_size"):
        target_shape(Config(target=ModelSource(architecture=architecture), tokenizer="./not/there"))
    with pytest.raises(ConfigError, match="target"):
        target_shape(Config(pretrain=Pretrain()))
