"""The README and the pages of docs/: links resolve, commands parse, keys and examples load, the log is in order."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import typing
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifguide.cli import _parser
from ifguide.config import Config, config_from_mapping, load_config
from ifguide.stages.evaluate import check_evaluation
from ifguide.toxicity.classifiers import CLASSIFIERS, PREFIXES

ROOT = Path(__file__).parents[2]
README, LOG = ROOT / "README.md", ROOT / "bench" / "LOG.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, LOG, ROOT / "cluster" / "README.md"]
COMMANDS = {"ifguide", "make", "python", "ray", "cluster/local.sh", "source", "eval", "pip", "lm_eval"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
PLACEHOLDER = re.compile(r"\b(VERB|NAME)\b|\.\.\.")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def fences(path: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(path.read_text(encoding="utf-8")) if name == language]


def anchors(path: Path) -> set[str]:
    """What a page's headings are called, as GitHub names them."""
    names: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names[name] = names.get(name, -1) + 1
        found.add(name if not names[name] else f"{name}-{names[name]}")
    return found


def code_spans(path: Path) -> Iterator[str]:
    for line in prose(path).splitlines():
        yield from CODE.findall(line)


def commands(path: Path) -> Iterator[list[str]]:
    """Every command that a page shows, in its shell blocks and in its text, as words."""
    for block in fences(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)
    for code in code_spans(path):
        words = code.split()
        if words[0] in {"ifguide", "make", "python"} and len(words) > 1 and not PLACEHOLDER.search(code):
            yield shlex.split(code)


class Parsed(Exception):
    """Ends a bench's `main` where it has read its arguments."""


def parse_bench(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of `bench/NAME.py` by its own parser."""
    module = importlib.import_module("bench." + Path(words[0]).stem)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(parser, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(Parsed):
        module.main()
    monkeypatch.undo()


def subcommands() -> Iterator[str]:
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices


def parse_ifguide(words: list[str]) -> None:
    """The arguments of `ifguide` by its own parser; its config is there and takes its overrides."""
    if len(words) == 1:  # a text that speaks of a command
        assert words[0] in subcommands(), words[0]
        return
    options = _parser().parse_args(words)
    config = getattr(options, "config", None)
    if config is not None and config.parts[0] == "configs":
        load_config(ROOT / config, options.overrides)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(words[0]).name if words[0].startswith((".venv/", "$PWD/")) else words[0]
    assert program in COMMANDS, f"{program}: no command that this test knows"
    if program == "ifguide":
        parse_ifguide(words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^(\w+) [:?]?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            name, assigned, _ = word.partition("=")
            assert name in (variables if assigned else targets), word
    elif program == "python" and words[1] == "-m":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file() or words[2] == "pytest", words[2]
    elif program == "python":
        script = words[1]
        assert (ROOT / script).is_file(), script
        if script.startswith("jobs/"):
            parse_ifguide([Path(script).stem, *words[2:]])
        else:
            parse_bench(words[1:], monkeypatch)
    elif program == "ray" and "--" in words:
        check_command(words[words.index("--") + 1 :], monkeypatch)
    elif program == "cluster/local.sh":
        assert re.search(rf"^\s*{words[1]}\)", (ROOT / program).read_text(), re.MULTILINE), words[1]


@pytest.mark.parametrize("path", LINKED, ids=page_id)
def test_links_and_pictures_resolve(path: Path) -> None:
    text = prose(path)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_command_exists_with_its_flags(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(path):
        try:
            check_command(words, monkeypatch)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: its own parser refuses it")


def test_every_command_of_the_program_is_described() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    for name in subcommands():
        assert re.search(rf"`{name}\b|ifguide {name}\b", pages), f"no page speaks of `ifguide {name}`"
    for bench in (ROOT / "bench").glob("[!_]*.py"):
        assert f"bench/{bench.name}" in pages, f"no page speaks of bench/{bench.name}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_examples_of_configs_load(path: Path) -> None:
    for block in fences(path, "yaml"):
        config_from_mapping(yaml.safe_load(block))


def test_the_readme_offers_every_classifier_that_can_evaluate_as_it_is_written() -> None:
    line = re.search(r"^ +classifier: (\S+) +# or (.+)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    offered = set()
    for classifier in yaml.safe_load(f"[{line[1]}, {line[2]}]"):
        evaluate = config_from_mapping({"evaluate": {"prompts": "p.jsonl", "classifier": classifier}}).evaluate
        check_evaluation(evaluate)
        offered.add(evaluate.classifier.name.partition(":")[0])
    assert offered == {name.partition(":")[0] for name in (*CLASSIFIERS, *PREFIXES)} - {"labels"}


def follow(cls: Any, keys: list[str]) -> None:
    """Raises KeyError unless `keys` lead through the dataclasses of a config, mappings' names left out."""
    if not keys or not dataclasses.is_dataclass(cls):
        return
    hint = typing.get_type_hints(cls)[keys[0]]
    inner = next((a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), None)
    follow(inner, keys[1:] if typing.get_origin(hint) is not dict else keys[2:])


@pytest.mark.parametrize("path", [*PAGES, LOG], ids=page_id)
def test_keys_named_in_the_text_exist(path: Path) -> None:
    sections = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config, f.name, None))}
    for code in code_spans(path):
        key = re.match(r"((?:\w+\.)+\w+)(?:[:=].*)?$", code)
        if key and key[1].split(".")[0] in sections:
            try:
                follow(Config, key[1].split("."))
            except KeyError:
                pytest.fail(f"`{code}`: no such key")


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_files_named_in_the_text_exist(path: Path) -> None:
    for code in code_spans(path):
        if re.fullmatch(r"(?:ifguide|configs|bench|tests|jobs|cluster|docs)/[\w./-]*", code):
            assert (ROOT / code).exists(), f"`{code}` is not there"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    for path in PAGES[1:]:
        assert f"(docs/{path.name})" in text, f"no link to {path.name}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_blocks_say_what_they_are_and_pictures_are_small(path: Path) -> None:
    opened = path.read_text(encoding="utf-8").split("\n```")[1::2]
    assert all(re.match(r"(sh|yaml|json|python|text)\n", block) for block in opened)
    for picture in path.parent.glob("*.png"):
        assert picture.stat().st_size < 200_000 or picture.parent != ROOT / "docs", picture


def test_the_log_is_newest_first_and_its_entries_are_whole() -> None:
    entries = LOG.read_text(encoding="utf-8").split("\n## ")[1:]
    dates = []
    for entry in entries:
        title, _, body = entry.partition("\n")
        for field in ("Date", "Commit", "Machine", "Command", "Result", "Decision"):
            assert f"**{field}** " in body, f"{title}: no {field}"
        dated = re.search(r"\*\*Date\*\* (?:not recorded|.*?(\d{4}-\d\d-\d\d))", body)
        assert dated, f"{title}: a date is YYYY-MM-DD, or not recorded"
        if dated[1]:
            dates.append(date.fromisoformat(dated[1]))
    assert dates == sorted(dates, reverse=True)
    titles = [entry.partition("\n")[0] for entry in entries]
    assert len(set(titles)) == len(titles)
