"""The config's dataclasses as JSON Schema, by which editors complete and check a YAML file.

It says what one key allows. What keys demand of each other, only loading the config tells.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from ifguide.config.reference import SECTIONS, described
from ifguide.config.sections import Config

BOUNDS = {"at_least": "minimum", "at_most": "maximum", "above": "exclusiveMinimum"}
SCALARS = {str: "string", float: "number", int: "integer", bool: "boolean"}


def json_schema(cls: type = Config) -> dict[str, Any]:
    """The schema of the whole config, or of one section of it."""
    definitions: dict[str, Any] = {}
    schema = _object(cls, definitions)
    if cls is Config:
        schema["properties"]["extends"] = {
            "type": "string",
            "description": "a config whose keys hold where none is set",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__, **schema} | {
        "$defs": dict(sorted(definitions.items()))
    }


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    sections = SECTIONS if cls is Config else ()
    text, meanings = described(cls, sections)
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        bounds = {name: field.metadata[key] for key, name in BOUNDS.items() if field.metadata.get(key) is not None}
        properties[field.name] = _value(hints[field.name], bounds, definitions)
        if field.name not in sections:  # whose own description says what they are
            properties[field.name]["description"] = meanings[field.name]
        if field.default is None or isinstance(field.default, str | int | float):
            properties[field.name]["default"] = field.default
    required = [
        field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING
    ]
    schema = {"type": "object", "description": text, "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _value(hint: Any, bounds: dict[str, float], definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = [{"type": "null"} if a is types.NoneType else _value(a, bounds, definitions) for a in arguments]
        return {"anyOf": kinds}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        items = _value(arguments[0], bounds, definitions)
        fixed = {} if arguments[-1] is Ellipsis else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": items, **fixed}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(arguments[1], bounds, definitions)}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _reference(hint, definitions)
    return {} if hint is Any else {"type": SCALARS[hint], **bounds}


def _reference(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """A bare string stands for the first key where that is one."""
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}  # for what holds itself
        definitions[cls.__name__] = _object(cls, definitions)
    reference = {"$ref": f"#/$defs/{cls.__name__}"}
    first = typing.get_type_hints(cls)[dataclasses.fields(cls)[0].name]
    if str in (first, *typing.get_args(first)):
        return {"anyOf": [{"type": "string"}, reference]}
    return reference
