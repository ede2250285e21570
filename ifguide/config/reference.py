"""The config reference, made from the dataclasses: `python -m ifguide.config.reference > docs/config.md`, and on a
terminal `ifguide config`.

A key's meaning is its line under `Attributes:` in the docstring of its class. A key without one is an error here, so
that the reference is whole.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from ifguide.config.packaged import packaged_configs
from ifguide.config.sections import VERBS, Config
from ifguide.config.typed_yaml import ConfigError, unknown_key, unknown_section

HEAD = """# Config reference

Made by `python -m ifguide.config.reference > docs/config.md`. Do not edit it by hand.

A config is one YAML file with a section for each verb. `--set section.key=value` overrides a key; the value is in YAML
syntax. `extends: other.yaml` takes every key from another file that this one does not set. Unknown keys, wrong types
and values out of bounds are errors that name the key. `ifguide run --config F --dry-run` checks a file.

`ifguide config` prints these keys on a terminal, `ifguide config score_corpus.preset` one of them, and `ifguide config
--schema` a JSON Schema, from which editors complete and check a YAML file. `--config` also takes the name of a packaged
config (`demo`, `tiny`, ...), and so does `extends`.

Keys marked `*` do not change results. A finished artifact stays valid when they change.
"""
SECTIONS = ("cluster", *VERBS, "compare", "analyse")
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
ATTRIBUTE = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


@dataclasses.dataclass
class Leaf:
    """What a key without keys of its own holds."""


def reference() -> str:
    """The whole reference in Markdown: top-level keys, the sections in the order of the verbs, and shared types.

    Raises:
        ValueError: a key that its class' docstring does not describe, or a description of no key.
    """
    sections = _sections()
    shared = sorted(set(_nested(Config)) - set(sections.values()), key=lambda cls: cls.__name__)
    parts = [HEAD, _section("Top level", Config, skipped=SECTIONS)]
    parts += [_section(f"`{name}`", cls, prefix=f"{name}.") for name, cls in sections.items()]
    parts.append("## Shared types\n\nWhat stands inside the sections above.\n")
    parts += [_section(cls.__name__, cls, level=3) for cls in shared]
    return "\n".join(parts)


def described(cls: type, skipped: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
    """What a section is, and the meaning of each of its keys but those `skipped`."""
    text, _, attributes = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    meanings = {name: " ".join(words.split()) for name, words in ATTRIBUTE.findall(attributes)}
    keys = [f.name for f in dataclasses.fields(cls) if f.name not in skipped]
    for name in keys:
        if name not in meanings:
            raise ValueError(f"{cls.__name__}.{name}: no line under `Attributes:` in the docstring says what it is")
    for name in meanings:
        if name not in keys:
            raise ValueError(f"{cls.__name__}: the docstring describes {name}, which is no key")
    return text.strip(), meanings


def _section(title: str, cls: type, *, prefix: str = "", skipped: tuple[str, ...] = (), level: int = 2) -> str:
    text, meanings = described(cls, skipped)
    hints = typing.get_type_hints(cls)
    rows = ["| key | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |"]
    for f in dataclasses.fields(cls):
        if f.name not in skipped:
            key = f"`{prefix}{f.name}`" + ("" if f.metadata.get("affects_result", True) else " *")
            cells = (key, _type(hints[f.name]), _default(f), _bounds(f), meanings[f.name].replace("|", "\\|"))
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"{'#' * level} {title}", "", text, "", *rows, ""])


def terminal_lines(dotted: str | None = None) -> Iterator[str]:
    """The sections of a config; or a section's keys; or a key, and those within it.

    Raises:
        ConfigError: there is no such key; names the nearest.
    """
    if dotted is None:
        yield from _key_lines(Config, "", skipped=SECTIONS)
        for name, cls in _sections().items():
            text, _ = described(cls)
            yield f"{name:16} {text.split(chr(10))[0]}"
        yield f"\nPackaged configs: {', '.join(packaged_configs())}."
        yield "`ifguide config SECTION` lists a section's keys. Keys marked * do not change results."
        return
    cls, field = find_key(dotted)
    if field is None:
        text, _ = described(cls)
        yield f"{text}\n"
        yield from _key_lines(cls, f"{dotted}.")
        return
    prefix = dotted.removesuffix(field.name)
    yield from _key_lines(cls, prefix, skipped=tuple(f.name for f in dataclasses.fields(cls) if f is not field))
    for inner in _dataclasses_in(typing.get_type_hints(cls)[field.name]):
        text, _ = described(inner)
        yield f"\n{inner.__name__}: {text}\n"
        yield from _key_lines(inner, f"{dotted}.")


def find_key(dotted: str) -> tuple[type, dataclasses.Field | None]:
    """The class of a section, or the class and the field of a key within one.

    Raises:
        ConfigError: there is no such key; names the nearest.
    """
    cls: type = Config
    field: dataclasses.Field | None = None
    names = dotted.split(".")
    for place, name in enumerate(names):
        if field is not None:
            cls = next(_dataclasses_in(typing.get_type_hints(cls)[field.name]), Leaf)
        fields, so_far = {f.name: f for f in dataclasses.fields(cls)}, ".".join(names[: place + 1])
        if name not in fields:
            within = dict.fromkeys(names[place + 1 : place + 2])
            cut = unknown_section(so_far, name, within, typing.get_type_hints(cls))
            raise ConfigError(cut or unknown_key(so_far, name, fields, getattr(cls, "RENAMED", {})))
        field = fields[name]
    return (_sections()[dotted], None) if dotted in SECTIONS else (cls, field)


def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {name: next(_dataclasses_in(hints[name])) for name in SECTIONS}


def _key_lines(cls: type, prefix: str, skipped: tuple[str, ...] = ()) -> Iterator[str]:
    _, meanings = described(cls, SECTIONS if cls is Config else ())
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name not in skipped:
            mark = "" if f.metadata.get("affects_result", True) else " *"
            facts = (_type(hints[f.name]), f"default {_default(f)}", _bounds(f))
            line = f"{prefix}{f.name}{mark}: {'; '.join(fact for fact in facts if fact)}"
            yield LINK.sub(r"\1", line).replace("`", "")
            yield textwrap.fill(meanings[f.name], 100, initial_indent="    ", subsequent_indent="    ")


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


def _nested(cls: type) -> Iterator[type]:
    """Every dataclass within `cls`, as often as it stands there."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        for inner in _dataclasses_in(hints[f.name]):
            yield inner
            yield from _nested(inner)


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is types.NoneType else _type(a) for a in arguments)
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        kinds = "texts" if arguments[0] is str else f"{_type(arguments[0])}{'' if arguments[-1] is Ellipsis else 's'}"
        return f"list of {kinds}" if arguments[-1] is Ellipsis else f"two {kinds}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of name to {_type(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        return f"[{name}](#{name.lower()})"
    return {str: "text", float: "number", int: "integer", bool: "true or false"}[hint]


def _default(f: dataclasses.Field) -> str:
    if f.default is dataclasses.MISSING:
        return "required" if f.default_factory is dataclasses.MISSING else "none"
    if dataclasses.is_dataclass(f.default):
        return f"`{{gpus: {f.default.gpus:g}}}`" if hasattr(f.default, "gpus") else "its defaults"
    if f.default is None or f.default == ():
        return "null" if f.default is None else "none"
    if isinstance(f.default, str):
        return f"`{f.default}`"
    return f"`{f.default:g}`" if isinstance(f.default, float) else f"`{json.dumps(f.default)}`"


def _bounds(f: dataclasses.Field) -> str:
    signs = {"above": "> {:g}", "at_least": "≥ {:g}", "at_most": "≤ {:g}"}
    bounds = [text.format(f.metadata[key]) for key, text in signs.items() if f.metadata.get(key) is not None]
    return ", ".join([*bounds, *(["ascending"] if f.metadata.get("increasing") else [])])


if __name__ == "__main__":
    sys.stdout.write(reference())
