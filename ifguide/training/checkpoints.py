"""A training's engine checkpoints: published whole by one rename, found again, kept or removed.

    checkpoints/step-00000500/checkpoint.json    step, engine, world size, sizes of all files, held-out loss
                              state/...          the engine's own files

Everything is written under a `.part` name and fsynced before the rename, checkpoint.json last. What lacks it, or has a
file of another size than it says, was torn and is passed over for the one before it. An object store has no rename:
each machine uploads what its ranks wrote, then checkpoint.json names all that has arrived.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ifguide.artifacts import fsync, fsync_tree, remove_tree, write_json
from ifguide.storage import file_sizes, sizes, subfolders
from ifguide.telemetry import log

CHECKPOINTS, DESCRIPTION, STATE = "checkpoints", "checkpoint.json", "state"
UNIVERSAL = ".universal"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published checkpoint; `training` is the loop's own state, `heldout` its held-out loss in nats, if taken."""

    folder: Path
    step: int
    engine: str
    world_size: int
    heldout: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The folder of the engine's files."""
        return self.folder / STATE


def part_folder(folder: Path, step: int) -> Path:
    """Where the ranks write the files of a step's checkpoint, under `STATE`."""
    return folder / CHECKPOINTS / f"step-{step:08d}.part"


def publish_checkpoint(part: Path, description: Mapping[str, Any]) -> Path:
    """Make the files in `part`, all of which are written, the checkpoint that `description` speaks of."""
    describe_files(part, description)
    fsync_tree(part)
    final = part.with_suffix("")
    remove_tree(final)  # there is one only if it was torn
    part.rename(final)
    fsync(final.parent)
    return final


def describe_files(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the `checkpoint.json` of the files that are in a folder; in an object store this publishes them."""
    write_json(folder / DESCRIPTION, {**description, "files": file_sizes(folder)})


def published_checkpoints(folder: Path) -> list[Checkpoint]:
    """The whole checkpoints of a model folder, by step."""
    found = []
    for path in subfolders(folder / CHECKPOINTS):
        if path.suffix:
            continue  # unfinished, or converted
        checkpoint = _read(path)
        if checkpoint is None:
            log("pretrain", f"{path} is torn and passed over: a file is missing or cut short")
        else:
            found.append(checkpoint)
    return found


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a model folder."""
    found = published_checkpoints(folder)
    return found[-1] if found else None


def best_checkpoints(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those with a held-out loss, lowest first; the earlier of equals."""
    known = [checkpoint for checkpoint in checkpoints if checkpoint.heldout is not None]
    return sorted(known, key=lambda checkpoint: (checkpoint.heldout, checkpoint.step))


def remove_others(folder: Path, *, keep_last: int, keep_best: int) -> None:
    """Remove all but the last and the best checkpoints, and every leftover."""
    found = published_checkpoints(folder)
    kept = {checkpoint.folder for checkpoint in [*found[-keep_last:], *best_checkpoints(found)[:keep_best]]}
    for path in subfolders(folder / CHECKPOINTS):
        if path not in kept:
            remove_tree(path)


def _read(folder: Path) -> Checkpoint | None:
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    files = content.pop("files")
    if sizes(folder, files) != files:
        return None
    return Checkpoint(folder=folder, **content)


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `publish_checkpoint` takes."""
    return {key: value for key, value in asdict(checkpoint).items() if key != "folder"}
