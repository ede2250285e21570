"""Frozen dataclasses from YAML: strict keys, types and bounds, with errors that name the dotted key.

Generic: it knows nothing of the project's sections, which `ifguide.config` defines with `option`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, Literal

import yaml

MAX_INT = 2**63 - 1
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class ConfigError(ValueError):
    """A config file or override that cannot be used; the message starts with the dotted key."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    increasing: bool = False,
    affects_result: bool = True,
    off: Any = dataclasses.MISSING,
) -> Any:
    """A config field with inclusive bounds (`at_least`, `at_most`) or an exclusive one (`above`), of a number or of
    each number of a tuple; `increasing` wants a tuple's numbers in strictly ascending order.

    off: at this value results are as they were before the option came, so it does not count among what made them: what
    was made earlier still fits."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "increasing": increasing}
    return field(default=default, metadata={**bounds, "affects_result": affects_result, "off": off})


def result_part(value: Any) -> Any:
    """The options of a dataclass (or list or dict of them) that change results, as nested dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in dataclasses.fields(value) if f.metadata.get("affects_result", True)]
        on = [f.name for f in kept if f.metadata.get("off", dataclasses.MISSING) != getattr(value, f.name)]
        return {name: result_part(getattr(value, name)) for name in on}
    if isinstance(value, tuple | list):
        return [result_part(item) for item in value]
    if isinstance(value, dict):
        return {key: result_part(item) for key, item in value.items()}
    return value


def substitute(tree: Any, run_dir: str) -> Any:
    """Every string with `{run_dir}` replaced: a config's own data can lie in its run directory."""
    if isinstance(tree, dict):
        return {key: substitute(value, run_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [substitute(value, run_dir) for value in tree]
    return tree.replace("{run_dir}", run_dir) if isinstance(tree, str) else tree


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's, which of two equal keys drops the first in silence, and reads 0100 as 64 and 1:30 as 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for place, key in enumerate(written):
            if key in written[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An int or a float as it is written."""
        text = str(node.value)
        if SURPRISING.fullmatch(text):
            what = "is a number to the base 60" if ":" in text else "is an octal number"
            raise yaml.constructor.ConstructorError(
                None, None, f"{text} {what} in YAML; write it in decimals, or in quotes if it is text", node.start_mark
            )
        if node.tag.endswith("int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)


SURPRISING = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?)")
MAX_NODES = 100_000  # of a YAML text with what stands for its aliases: a few lines of them can mean billions
for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.construct_number)


def read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not valid, a mapping has a key twice, a number is not written as people read it, or its
            aliases stand for too much; says where.
    """
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_small(node)
        return loader.construct_document(node)
    except (ValueError, RecursionError) as error:  # a date that there is not, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _require_small(node: yaml.Node) -> None:
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_NODES + 1  # what holds itself is endless
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            flat = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] = 1 + sum(map(size, flat))
        if sizes[id(node)] > MAX_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {MAX_NODES:,} values, or for themselves", node.start_mark
            )
        return sizes[id(node)]

    size(node)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in nested dicts; the value is in YAML syntax."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected a.b=value")
    node = tree
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is not a section")
        node = child
    try:
        node[last] = read_yaml(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error


def build(cls: type, tree: Any, where: str, default: Any = None) -> Any:
    """An instance of dataclass `cls` from a mapping; `where` is the dotted path of the mapping.

    Keys that are not set are those of `default`, an instance of `cls` if there is one. `RENAMED` of a class says where
    a key of former versions is now, so that the error can: in its section, or after a slash in the whole config."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'config'}: expected a section with keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, raw in tree.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in fields:
            renamed = getattr(cls, "RENAMED", {})
            raise ConfigError(
                unknown_section(dotted, str(key), raw, hints) or unknown_key(dotted, str(key), fields, renamed)
            )
        values[key] = _convert(hints[key], raw, dotted, fields[key].default)
        _check_bounds(fields[key], values[key], dotted)
    if isinstance(default, cls):
        return dataclasses.replace(default, **values)  # type: ignore[type-var]
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}.{missing[0]}: required, and not set")
    return cls(**values)


def unknown_section(dotted: str, key: str, raw: Any, hints: Mapping[str, Any]) -> str | None:
    """What is said of a section whose name is cut short, if one that begins so has the first of its keys."""
    inner = str(next(iter(raw), "")) if isinstance(raw, Mapping) else ""
    for name, hint in hints.items():
        if (
            name.startswith(key)
            and dataclasses.is_dataclass(hint)
            and inner in [f.name for f in dataclasses.fields(hint)]
        ):
            return f"{dotted}.{inner}: unknown key; did you mean {dotted.removesuffix(key)}{name}.{inner}?"
    return None


def unknown_key(dotted: str, key: str, valid: Iterable[str], renamed: Mapping[str, str]) -> str:
    """What is said of a key that there is not, in place of one of `valid`."""
    if key in renamed:
        now = renamed[key]
        return f"{dotted}: is now called {now[1:] if now.startswith('/') else dotted.removesuffix(key) + now}"
    begun = [name for name in valid if name.startswith(key)] if key else []
    nearest = begun or difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    if nearest:
        parent = dotted.rpartition(".")[0]
        return f"{dotted}: unknown key; did you mean {f'{parent}.' if parent else ''}{nearest[0]}?"
    return f"{dotted}: unknown key; valid here: {', '.join(sorted(valid))}"


def _convert(hint: Any, raw: Any, dotted: str, default: Any = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if raw is None:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        return _convert(str if str in kinds and isinstance(raw, str) else kinds[0], raw, dotted)
    if dataclasses.is_dataclass(hint):
        # a bare string stands for the first field: `inputs: [a.jsonl]`, `proxy: EleutherAI/pythia-160m`
        if isinstance(raw, str):
            raw = {dataclasses.fields(hint)[0].name: raw}
        return build(hint, raw, dotted, default)  # type: ignore[arg-type]
    if origin is Literal:
        if raw not in arguments:
            raise ConfigError(f"{dotted}: {raw!r} is not one of {', '.join(map(str, arguments))}")
        return raw
    if origin is tuple:
        return _convert_tuple(arguments, raw, dotted)
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{dotted}: expected a mapping, got {raw!r}")
        return {_key(k, dotted): _convert(arguments[1], v, f"{dotted}.{k}") for k, v in raw.items()}
    if hint is Any:
        return _plain(raw, dotted)
    return _convert_scalar(hint, raw, dotted)


def _convert_tuple(arguments: tuple[Any, ...], raw: Any, dotted: str) -> tuple[Any, ...]:
    if not isinstance(raw, list | tuple):
        hint = f"; of one: [{raw}]" if isinstance(raw, str) else ""
        raise ConfigError(f"{dotted}: expected a list, got {raw!r}{hint}")
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{dotted}[{i}]") for i, item in enumerate(raw))
    if len(raw) != len(arguments):
        raise ConfigError(f"{dotted}: expected {len(arguments)} values, got {len(raw)}")
    return tuple(_convert(a, item, f"{dotted}[{i}]") for i, (a, item) in enumerate(zip(arguments, raw, strict=True)))


def _key(key: Any, dotted: str) -> str:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ConfigError(f"{dotted}: YAML reads a key as {key!r}; write it in quotes")
    return str(_checked(key, dotted))


def _plain(raw: Any, dotted: str) -> Any:
    """What a model's or a storage's own options may be: what JSON can hold."""
    if isinstance(raw, Mapping):
        return {_key(key, dotted): _plain(value, f"{dotted}.{key}") for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_plain(item, f"{dotted}[{i}]") for i, item in enumerate(raw)]
    if isinstance(raw, str) and EXPONENT.fullmatch(raw):
        return _checked(float(raw), dotted)  # YAML 1.1 reads 5e5 as a string
    if raw is None or isinstance(raw, bool | int | float | str):
        return _checked(raw, dotted)
    raise ConfigError(f"{dotted}: YAML reads it as {raw!r}; write it in quotes")


def _convert_scalar(hint: Any, raw: Any, dotted: str) -> Any:
    if hint is float and isinstance(raw, int | float | str) and not isinstance(raw, bool):
        try:
            return _checked(float(raw), dotted)  # YAML 1.1 reads 6e-4 as a string
        except OverflowError:
            return _checked(math.inf, dotted)
        except ConfigError:
            raise
        except ValueError:
            pass
    elif isinstance(raw, hint) and not (hint is int and isinstance(raw, bool)):
        return _checked(raw, dotted)
    raise ConfigError(f"{dotted}: expected {hint.__name__}, got {raw!r}")


def _checked(raw: Any, dotted: str) -> Any:
    """A number or a text as it is, unless nothing can be done with it."""
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ConfigError(f"{dotted}: expected a finite number, got {raw!r}")
    if isinstance(raw, int) and abs(raw) > MAX_INT:
        raise ConfigError(f"{dotted}: {str(raw)[:20]}... is beyond {MAX_INT}, the largest number that can be used")
    if isinstance(raw, str) and ("\0" in raw or any("\ud800" <= character <= "\udfff" for character in raw)):
        raise ConfigError(f"{dotted}: {raw!r} holds a character that no file can name or hold")
    return raw


def _check_bounds(definition: dataclasses.Field, value: Any, dotted: str) -> None:
    bounds = definition.metadata
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_bounds(definition, item, f"{dotted}[{i}]")
        if bounds.get("increasing") and list(value) != sorted(set(value)):
            raise ConfigError(f"{dotted}: {list(value)} is not in ascending order")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if bounds.get("at_least") is not None and not value >= bounds["at_least"]:
        raise ConfigError(f"{dotted}: {value} is below {bounds['at_least']}")
    if bounds.get("at_most") is not None and not value <= bounds["at_most"]:
        raise ConfigError(f"{dotted}: {value} is above {bounds['at_most']}")
    if bounds.get("above") is not None and not value > bounds["above"]:
        raise ConfigError(f"{dotted}: {value} must be above {bounds['above']}")
