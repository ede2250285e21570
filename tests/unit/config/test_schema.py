"""The JSON Schema of the config, and the keys on a terminal: what loads is valid, what is refused is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ifguide.cli import main
from ifguide.config import Config, ConfigError, config_from_mapping, to_mapping
from ifguide.config.reference import SECTIONS, find_key, terminal_lines
from ifguide.config.schema import json_schema
from ifguide.config.sections import ScoreCorpus

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_defaults_are_valid(validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(to_mapping(Config()))


@pytest.mark.parametrize(
    "tree",
    [
        {"seed": -1},
        {"seed": 1.5},
        {"score": {"preset": "exact"}},
        {"score_corpus": {"preset": "slow"}},
        {"pack_corpus": {"inputs": [{"text_column": "t"}]}},
        {"pack_corpus": {"inputs": [3]}},
        {"pretrain": {"betas": [0.9]}},
        {"build_mask": {"quantile": 0}},
        {"evaluate": {"models": {"a": 1}}},
    ],
)
def test_what_loading_refuses_is_not_valid(tree: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    assert not validator.is_valid(tree)
    with pytest.raises(ConfigError):
        config_from_mapping(tree)


def test_a_section_has_a_schema_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "score_corpus", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(ScoreCorpus)
    assert main(["config", "score_corpus.preset", "--schema"]) == 1
    assert "score_corpus.preset is no section" in capsys.readouterr().err


def test_every_section_and_key_is_shown_with_what_it_is() -> None:
    overview = "\n".join(terminal_lines())
    assert all(f"\n{name} " in overview for name in SECTIONS)
    assert "seed: integer; default 0; ≥ 0\n    of samples, orders and initial weights." in overview
    for name in SECTIONS:
        text = "\n".join(terminal_lines(name))
        for key, value in to_mapping(Config())[name].items():
            assert f"{name}.{key}" in text, f"{key}: {value}"
    assert next(iter(terminal_lines("score_corpus.max_actors"))) == "score_corpus.max_actors *: integer; default 1; ≥ 1"
    assert "pack_corpus.inputs.text_column: text; default text" in list(terminal_lines("pack_corpus.inputs"))
    assert next(iter(terminal_lines("pack_corpus.inputs.path"))) == "pack_corpus.inputs.path: text; default required"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("score.preset", "score.preset: unknown key; did you mean score_corpus.preset?"),
        ("score", "score: unknown key; did you mean score_corpus?"),
        ("pretrain.epoch", "pretrain.epoch: unknown key; did you mean pretrain.epochs?"),
        ("pack_corpus.inputs.pth", "pack_corpus.inputs.pth: unknown key; did you mean pack_corpus.inputs.path?"),
        ("seed.a", "seed.a: unknown key; valid here: "),
    ],
)
def test_a_key_that_there_is_not_is_answered_with_the_nearest(key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_key(key)
    assert str(error.value).startswith(message)
