"""The table of origins and outputs, `sources.yaml`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import yaml

TABLE = Path(__file__).with_name("sources.yaml")


class Contents(NamedTuple):
    """The size of a file and the SHA-256 (hex) of its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where originals lie: single `files` under `url`, or the `members` (patterns) of one .tar.gz at `url`."""

    name: str
    what: str
    licence: str
    url: str
    checked: str
    files: Mapping[str, Contents] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    sha256: str = ""  # of an archive's members: see the head of sources.yaml

    def holds(self, path: str) -> bool:
        """Whether a path in an archive is one of its members."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.members)

    def address(self, path: str) -> str:
        """Where to download an original, or the archive that holds it."""
        return self.url if self.members else self.url + path


@dataclass(frozen=True, kw_only=True)
class Output:
    """A file of the folder: what it is converted from, by what, and what it must be.

    `of`: an output before this one that it is made of, in place of originals; `origin` is that one's then."""

    name: str
    converter: str
    origin: Origin
    files: tuple[str, ...]  # originals, in the converter's order; empty: all of the archive
    result: Contents
    of: str | None = None


def read_table(path: Path = TABLE) -> list[Output]:
    """Every output, with its origin.

    Raises:
        ValueError: an output names an origin, a file or an output that the table does not have.
    """
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    origins = {name: _origin(name, **entry) for name, entry in table["origins"].items()}
    outputs: dict[str, Output] = {}
    for name, entry in table["outputs"].items():
        if "of" not in entry:
            outputs[name] = _output(path, origins, name, **entry)
        elif entry["of"] in outputs:
            contents = Contents(*entry["result"])
            outputs[name] = replace(
                outputs[entry["of"]], name=name, converter=entry["converter"], result=contents, of=entry["of"]
            )
        else:
            raise ValueError(f"{path}: outputs.{name}.of: there is no output {entry['of']!r} before it")
    return list(outputs.values())


def _origin(
    name: str, *, files: Mapping[str, list] | None = None, members: tuple[str, ...] = (), **entry: str
) -> Origin:
    contents = {path: Contents(*fields) for path, fields in (files or {}).items()}
    return Origin(name=name, files=contents, members=tuple(members), **entry)


def _output(
    path: Path,
    origins: Mapping[str, Origin],
    name: str,
    *,
    converter: str,
    origin: str,
    files: list[str] | None = None,
    result: list | None = None,
) -> Output:
    if origin not in origins:
        raise ValueError(f"{path}: outputs.{name}.origin: there is no origin {origin!r}")
    source = origins[origin]
    unknown = sorted(set(files or ()) - set(source.files))
    if unknown:
        raise ValueError(f"{path}: outputs.{name}.files: origin {origin!r} has no {', '.join(unknown)}")
    paths = tuple(files or source.files)
    expected = source.files[paths[0]] if result is None else Contents(*result)
    return Output(name=name, converter=converter, origin=source, files=paths, result=expected)
