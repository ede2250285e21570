"""What YAML makes of a config without a word, and numbers that nothing can be done with: refused, by key or by line."""

from __future__ import annotations

import dataclasses
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ifguide.config import Config, ConfigError, config_from_mapping, load_config


def numeric_keys(cls: type, where: tuple[str, ...] = ()) -> Iterator[tuple[str, type]]:
    """Every dotted key of a config that is a number or holds numbers, with their type."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if dataclasses.is_dataclass(option):
                yield from numeric_keys(option, (*where, field.name))
            elif option in (int, float):
                yield ".".join((*where, field.name)), option


KEYS = sorted(set(numeric_keys(Config)), key=str)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    tree = value
    for key in reversed(dotted.split(".")):
        tree = {key: tree}
    return tree


def test_there_are_numbers_of_every_section() -> None:
    assert len(KEYS) > 60
    assert {key.partition(".")[0] for key, _ in KEYS} >= {"seed", "pack_corpus", "pretrain", "evaluate", "analyse"}


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), ".inf", "1e999", 10**30, -(10**30), 10**400]
)
@pytest.mark.parametrize(("key", "kind"), KEYS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_number_that_is_none_or_too_large_is_refused_by_key(key: str, kind: type, value: Any) -> None:
    if kind is float and isinstance(value, int) and abs(value) < 1e300:
        value = 10**400  # a float may be as large as that, within its key's bounds
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        config_from_mapping(nested(key, value))


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"proxy": {"architecture": {"rope_theta": float("nan")}}}, "proxy.architecture.rope_theta"),
        ({"proxy": {"architecture": {"rope": [{"a": float("inf")}]}}}, r"proxy.architecture.rope\[0\].a"),
        ({"pretrain": {"betas": [0.9, float("nan")]}}, r"pretrain.betas\[1\]"),
        ({"run_dir": "a\0b"}, "run_dir"),
        ({"run_dir": "a\ud800b"}, "run_dir"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_key(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        config_from_mapping(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0100", r"0100 is an octal number.*line 1"),
        ("pack_corpus: {block_size: 010}", "010 is an octal number"),
        ("pretrain:\n  learning_rate: 1:30.5\n", r"1:30\.5 is a number to the base 60.*line 2"),
        ("seed: 1:30", "1:30 is a number to the base 60"),
        ("seed: 0o17", "seed: expected int, got '0o17'"),
        ("seed: yes", "seed: expected int, got True"),
        ("run_dir: no", "run_dir: expected str, got False"),
        ("run_dir: 2020-01-01", "run_dir: expected str, got datetime"),
        ("seed: 2020-13-45", "not valid YAML: month must be in"),
        ("evaluate: {models: {no: a/b}}", "evaluate.models: YAML reads a key as False; write it in quotes"),
        ("evaluate: {models: {1.10: a/b}}", "evaluate.models: YAML reads a key as 1.1; write it in quotes"),
        ("proxy: {architecture: {since: 2020-01-01}}", r"proxy.architecture.since: YAML reads it as datetime"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("seed: " + "[" * 5000 + "]" * 5000, "not valid YAML"),
        ("proxy: &a {architecture: *a}", "aliases stand for more than .* or for themselves"),
        ("--- {seed: 1}\n--- {seed: 2}\n", "not valid YAML: expected a single document"),
        ("seed: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
    ],
)
def test_what_yaml_reads_otherwise_than_people_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("merge", [False, True])
def test_a_few_lines_that_mean_billions_are_refused_at_once(tmp_path: Path, merge: bool) -> None:
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x]"]
    for i in range(1, 40):
        alias = f"*a{i - 1}"
        lines.append(f"a{i}: &a{i} {{<<: [{alias}, {alias}]}}" if merge else f"a{i}: &a{i} [{alias}, {alias}]")
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(ConfigError, match="aliases stand for more than"):
        load_config(tmp_path / "c.yaml")
    assert time.monotonic() - started < 5


def test_plain_numbers_aliases_and_underscores_stay_what_they_are(tmp_path: Path) -> None:
    text = "seed: 0\npretrain: {resources: &r {cpus: 2, gpus: 0}, learning_rate: 0.5}\nanalyse: {resources: *r}\n"
    (tmp_path / "c.yaml").write_text(text + "pack_corpus: {block_size: 1_024}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.seed, config.pack_corpus.block_size, config.pretrain.learning_rate) == (0, 1024, 0.5)
    assert config.analyse.resources.cpus == config.pretrain.resources.cpus == 2


def test_a_config_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("run_dir: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.yaml: not UTF-8"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("seed: 1\npack_corpus: {block_size: 64}\npack_corpus: {interleave: false}\n", "pack_corpus", 3),
        ("pack_corpus:\n  block_size: 64\n  block_size: 128\n", "block_size", 3),
        ("pack_corpus: {inputs: [{path: a, path: b}]}\n", "path", 1),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, text, key, line):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=rf"(?s)config\.yaml: not valid YAML: the key '{key}' stands twice.*line {line}"
    ):
        load_config(path)


def test_a_key_that_stands_twice_in_an_override_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="the key 'path' stands twice"):
        load_config(path, ["pack_corpus.inputs=[{path: a, path: b}]"])
