"""A training's engine checkpoints: published whole by one rename, found again, kept or removed.

    checkpoints/step-00000500/checkpoint.json    step, engine, world size, size and SHA-256 of all files, held-out loss
                              state/...          the engine's own files

Everything is written under a `.part` name and fsynced before the rename, checkpoint.json last. What lacks it, or does
not hold exactly the files that it names, of their sizes, was torn and is passed over for the one before it. Before one
is loaded its digests are checked too (`first_whole`): DeepSpeed reads its files with pickle, so what a training did not
write must not come to that. An object store has no rename: each machine uploads what its ranks wrote, then
checkpoint.json names all that has arrived.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from logging import WARNING
from pathlib import Path
from typing import Any

from ifguide.artifacts import FileEntry, file_entry, fsync, fsync_tree, remove_tree, unsealed, write_sealed
from ifguide.storage import file_sizes, subfolders
from ifguide.telemetry import log

Files = dict[str, FileEntry]  # by name in the checkpoint
CHECKPOINTS, DESCRIPTION, STATE = "checkpoints", "checkpoint.json", "state"
UNIVERSAL = ".universal"
DIGESTED_AT_ONCE = 8  # files: a digest takes a core about a second for each gigabyte


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published checkpoint; `training` is the loop's own state, `heldout` its held-out loss in nats, if taken,
    `files` what it consists of."""

    folder: Path
    step: int
    engine: str
    world_size: int
    heldout: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The folder of the engine's files."""
        return self.folder / STATE


def part_folder(folder: Path, step: int) -> Path:
    """Where the ranks write the files of a step's checkpoint, under `STATE`."""
    return folder / CHECKPOINTS / f"step-{step:08d}.part"


def publish_checkpoint(part: Path, description: Mapping[str, Any], files: Files) -> Path:
    """Make the files in `part`, all of which are written, the checkpoint that `description` speaks of."""
    describe_files(part, description, files)
    fsync_tree(part)
    final = part.with_suffix("")
    remove_tree(final)  # there is one only if it was torn
    part.rename(final)
    fsync(final.parent)
    return final


def describe_files(folder: Path, description: Mapping[str, Any], files: Files) -> None:
    """Write the `checkpoint.json` of the files that are in a folder; in an object store this publishes them."""
    write_sealed(folder / DESCRIPTION, {**description, "files": files})


def digest_files(folder: Path, names: Iterable[str]) -> Files:
    """Size and SHA-256 of files of a folder, some at once."""
    names = list(names)
    with ThreadPoolExecutor(DIGESTED_AT_ONCE) as threads:
        return dict(zip(names, threads.map(lambda name: file_entry(folder / name), names), strict=True))


def published_checkpoints(folder: Path) -> list[Checkpoint]:
    """The whole checkpoints of a model folder, by step; their files' digests are not looked at."""
    checkpoints = []
    for path in subfolders(folder / CHECKPOINTS):
        if path.suffix:
            continue  # unfinished, or converted
        checkpoint = _read(path)
        if checkpoint is None:
            log("pretrain", f"{path} is torn and passed over: a file is missing, cut short, or not the training's own")
        else:
            checkpoints.append(checkpoint)
    return checkpoints


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a model folder; its files' digests are not looked at."""
    checkpoints = published_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def first_whole(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The first whose files are those that were written; every other loses its description, and is passed over."""
    for checkpoint in checkpoints:
        digests = digest_files(checkpoint.folder, checkpoint.files)
        changed = [name for name, entry in checkpoint.files.items() if digests[name] != entry]
        if not changed:
            return checkpoint
        path = checkpoint.folder / changed[0]
        log("pretrain", f"{path} has changed since it was written: its checkpoint is passed over", level=WARNING)
        (checkpoint.folder / DESCRIPTION).unlink()
    return None


def best_checkpoints(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those with a held-out loss, lowest first; the earlier of equals."""
    measured = [checkpoint for checkpoint in checkpoints if checkpoint.heldout is not None]
    return sorted(measured, key=lambda checkpoint: (checkpoint.heldout, checkpoint.step))


def remove_others(folder: Path, *, keep_last: int, keep_best: int) -> None:
    """Remove all but the last and the best checkpoints, and every leftover."""
    whole = published_checkpoints(folder)
    kept = {checkpoint.folder for checkpoint in [*whole[-keep_last:], *best_checkpoints(whole)[:keep_best]]}
    for path in subfolders(folder / CHECKPOINTS):
        if path not in kept:
            remove_tree(path)


def _read(folder: Path) -> Checkpoint | None:
    try:
        path = folder / DESCRIPTION
        checkpoint = Checkpoint(folder=folder, **unsealed(json.loads(path.read_text(encoding="utf-8")), path))
        expected = {name: entry["bytes"] for name, entry in checkpoint.files.items()}
    except (
        FileNotFoundError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):  # no JSON, or not what was written
        return None
    hidden = {name for name in file_sizes(folder) if name.rpartition("/")[2].startswith(".")}  # a file system's own
    sizes = {name: size for name, size in file_sizes(folder).items() if name not in {DESCRIPTION, *hidden}}
    return checkpoint if sizes == expected else None


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `publish_checkpoint` takes."""
    return {key: value for key, value in asdict(checkpoint).items() if key not in ("folder", "files")}
