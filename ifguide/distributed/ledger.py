"""The ledger of a stage in work: what each shard came to, and how often it was tried, as small files.

`ledger/<key>.json` is published when a shard is done, with the digests of its files. `ledger/<key>.attempts` counts
the attempts at a shard that is not: it is written before the work starts, so that an attempt that kills its process
counts. A shard that was given up keeps it, with its reason. The folder goes when the stage is complete.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts import FileEntry, unsealed, write_json, write_sealed
from ifguide.config import redact
from ifguide.storage import read_texts
from ifguide.telemetry import log

LEDGER = "ledger"
ACTORS = "actors"  # of the ledger: attempts to start an actor
DIED = "its process died"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A shard that is done: its small result, the attempts that it took, and the seconds of the last one.

    `files` are those that it published, by their path in the stage's folder; of others by their whole path."""

    key: str
    result: dict[str, Any]
    attempts: int
    seconds: float
    files: dict[str, FileEntry]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A shard that was given up."""

    key: str
    reason: str


class Attempts:
    """The attempts at one shard, on storage."""

    def __init__(self, ledger: Path, key: str):
        self.path, self.key = ledger / f"{key}.attempts", key
        content = read_attempts(self.path)
        self.made: int = content["attempts"]
        self.reason: str = content["reason"]

    def begin(self) -> None:
        """Count an attempt that starts now; unless it says otherwise, its process died."""
        self.made, self.reason = self.made + 1, DIED
        self._write()

    def failed(self, reason: str) -> None:
        """Keep why the attempt failed; while it runs, why it will have failed if its process dies."""
        self.reason = reason
        self._write()

    def give_up(self, reason: str) -> Failure:
        """Keep why the shard was given up, for `ifguide status`."""
        self.reason = reason
        self._write(given_up=True)
        return Failure(key=self.key, reason=reason)

    def forget(self) -> None:
        """The shard is done."""
        self.path.unlink(missing_ok=True)

    def _write(self, *, given_up: bool = False) -> None:
        write_json(self.path, {"attempts": self.made, "reason": redact(self.reason), "given_up": given_up})


def write_entry(ledger: Path, entry: Entry) -> None:
    """A shard is done."""
    write_sealed(_place(ledger, entry.key), dataclasses.asdict(entry))


def read_entry(ledger: Path, key: str) -> Entry | None:
    """The entry of a shard that is done; none of one that is not, or whose entry is damaged."""
    path = _place(ledger, key)
    try:
        return _entry(path.read_text(encoding="utf-8", errors="replace"), path)
    except FileNotFoundError:
        return None


def finished_entries(ledger: Path) -> dict[str, Entry]:
    """The entries of the shards that are done, by key; one that is damaged is said and left out."""
    paths = list(ledger.glob("*.json"))
    entries = (_entry(text, path) for text, path in zip(read_texts(paths), paths, strict=True))
    return {entry.key: entry for entry in entries if entry}


def _entry(text: str, path: Path) -> Entry | None:
    try:
        return Entry(**unsealed(json.loads(text), path))
    except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON, or not what was written
        log("ledger", f"{path} is damaged; its shard is done again", level=logging.WARNING)
        return None


def forget(ledger: Path, key: str) -> None:
    """A shard is not done after all."""
    _place(ledger, key).unlink(missing_ok=True)


def unfinished_attempts(ledger: Path) -> list[Path]:
    """The counters of shards that are in work, were interrupted, or were given up."""
    return sorted(ledger.glob("*.attempts"))


def read_attempts(path: Path) -> dict[str, Any]:
    """`attempts`, `reason` and `given_up` of a counter; of one that is not there, none."""
    none = {"attempts": 0, "reason": DIED, "given_up": False}
    try:
        content = json.loads(path.read_bytes())
        return {"attempts": int(content["attempts"]), "reason": content["reason"], "given_up": content["given_up"]}
    except FileNotFoundError:
        return none
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        log("ledger", f"{path} is damaged; the attempts are counted from 0 again", level=logging.WARNING)
        return none


def _place(ledger: Path, key: str) -> Path:
    return ledger / f"{key}.json"
