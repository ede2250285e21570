"""Manifests of finished artifacts: what was made, from what, and the digest of every file.

The manifest holds the options, the fingerprints of the inputs, and each file's SHA-256; an artifact's fingerprint is
the digest of its files' digests, so equal contents have equal fingerprints. It bears its own digest, so that a damaged
one is refused as a damaged file is.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts.files import FileEntry, json_digest, write_json
from ifguide.storage import sizes

MANIFEST = "manifest.json"
CONFIG = "config.yaml"  # beside it: what the artifact was made with
PLAN = "plan.json"
SEAL = "sha256"  # of the other keys of a JSON file
REMAKE = "delete its folder and run the stage again"


class MismatchError(ValueError):
    """Artifacts that do not belong together, or a run directory that holds another config."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished artifact is and what it was made from."""

    verb: str
    fingerprint: str
    options: dict[str, Any]
    inputs: dict[str, str]  # artifact or model name -> fingerprint
    rows: dict[str, int]
    summary: dict[str, Any]
    files: dict[str, FileEntry]  # by path relative to the folder
    created: str  # UTC, ISO 8601
    seconds: float
    environment: dict[str, str]

    def names(self, pattern: str = "shard-*.parquet") -> list[str]:
        """The files whose names match, in the order of their numbers."""
        return sorted(fnmatch.filter(self.files, pattern), key=lambda name: (len(name), name))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished artifact.

    Raises:
        FileNotFoundError: the artifact is missing or unfinished.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "is unfinished" if (folder / PLAN).exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}: run the stage that makes it first (`ifguide show` lists them)")
    content = read_json(path)
    expected = {field.name for field in dataclasses.fields(Manifest)}
    if content.keys() - {SEAL} != expected:
        raise ValueError(f"{path} has keys {sorted(content)}, expected {sorted(expected)}; another version made it")
    manifest = Manifest(**unsealed(content, path))
    kinds = {"verb": str, "fingerprint": str, "created": str, "seconds": int | float}
    for field in sorted(expected):
        if not isinstance(getattr(manifest, field), kinds.get(field, dict)):
            raise ValueError(f"{path}: {field} is not what a stage writes there; {REMAKE}")
    if not all(isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"} for entry in manifest.files.values()):
        raise ValueError(f"{path}: files have no digest or no size; {REMAKE}")
    return manifest


def read_plan(folder: Path) -> dict[str, Any]:
    """What an unfinished artifact is made from: `options` and `inputs`, and `SCRATCH` of a finished one.

    Raises:
        FileNotFoundError: there is no plan. ValueError: it is damaged; names it.
    """
    plan = read_json(folder / PLAN)
    if not all(isinstance(plan.get(part), dict) for part in ("options", "inputs")):
        raise ValueError(f"{folder / PLAN} has no options or no inputs; {REMAKE}")
    return plan


def require(folder: Path, verb: str) -> Manifest:
    """The manifest of a finished artifact whose files are all there with their sizes.

    Raises:
        FileNotFoundError: missing or unfinished, naming the verb to run.
        ValueError: a file is missing or has another size.
    """
    if not (folder / MANIFEST).exists():
        state = "is unfinished" if (folder / PLAN).exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}; run `ifguide {verb}` first")
    manifest = read_manifest(folder)
    present = sizes(folder, manifest.files)
    for name, entry in manifest.files.items():
        if present.get(name) != entry["bytes"]:
            raise ValueError(
                f"{folder / name} has {present.get(name)} bytes where its manifest says {entry['bytes']}; delete"
                f" {folder} and run `ifguide {verb}` again"
            )
    return manifest


def require_same(left: str, left_fingerprint: str, right: str, right_fingerprint: str, advice: str) -> None:
    """Refuse two things that do not belong together, naming both fingerprints."""
    if left_fingerprint != right_fingerprint:
        raise MismatchError(f"{left} ({left_fingerprint[:16]}) is not {right} ({right_fingerprint[:16]}): {advice}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish the manifest: from now on the artifact is complete."""
    write_sealed(folder / MANIFEST, dataclasses.asdict(manifest))


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Publish a JSON object with its own digest."""
    write_json(path, {**content, SEAL: json_digest(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` published.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it has changed since it was written.
    """
    return unsealed(read_json(path), path)


def unsealed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A JSON object as it was before `write_sealed`; one that never had a digest is taken as it is.

    Raises:
        ValueError: it has changed since it was written.
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    if content.get(SEAL, json_digest(rest)) != json_digest(rest):
        raise ValueError(f"{path} has changed since it was written; {REMAKE}")
    return rest


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no JSON object; names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); {REMAKE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a JSON {type(content).__name__} where an object is expected; {REMAKE}")
    return content
