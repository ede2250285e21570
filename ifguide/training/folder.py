"""Where a training works: in its artifact's folder or, if that is remote, in one of each machine's own.

An engine writes many files, appends to some and maps others: it needs a disk. With a remote artifact each machine has
a folder of its own for that, made anew by every attempt; what must outlive the machine (checkpoints, metrics, the
exported model) is uploaded, and a checkpoint is fetched whole by each machine that goes on from it.

On every machine one rank, the one that leads, moves the files, so each machine's network carries each of them once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifguide.artifacts import move_folder, remove_tree
from ifguide.storage import download_folder, is_remote, location, upload, upload_folder, work_folder
from ifguide.training.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    describe_files,
    part_folder,
    publish_checkpoint,
    remove_others,
)

METRICS, TENSORBOARD, WANDB = "metrics.jsonl", "tensorboard", "wandb.json"
UPLOAD_SECONDS = 15.0  # between uploads of the metrics


class TrainingFolder:
    """`folder` is the artifact's, `local` where this machine works: the same, unless the artifact is remote.

    `leads`: this rank moves its machine's files. `barrier` waits for all ranks.
    """

    def __init__(self, folder: str | Path, *, rank: int, local_rank: int, barrier: Callable[[], None]):
        self.folder = location(folder)
        self.rank, self.barrier = rank, barrier
        self.remote = is_remote(self.folder)
        self.leads = (local_rank if self.remote else rank) == 0
        self.local = self.folder
        self.uploaded = float("-inf")
        if self.remote:
            self.local = work_folder("training", self.folder)
            if self.leads:
                remove_tree(self.local)  # of an attempt that was killed; what it published is remote
                self.local.mkdir()
                for name in (METRICS, WANDB):
                    if (self.folder / name).exists():
                        (self.local / name).write_bytes((self.folder / name).read_bytes())
            barrier()

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint on this machine's disk; downloaded by the rank that calls it, which then should lead."""
        if not self.remote:
            return checkpoint
        folder = self.local / CHECKPOINTS / checkpoint.folder.name
        if not folder.exists():
            part = folder.with_suffix(".fetched")
            remove_tree(part)
            download_folder(checkpoint.folder, part)
            part.rename(folder)
        return replace(checkpoint, folder=folder)

    def fetch_for_all(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """`fetch` for every rank of a training, which all call it."""
        if checkpoint is None or not self.remote:
            return checkpoint
        if self.leads:
            self.fetch(checkpoint)
        self.barrier()
        return self.fetch(checkpoint)

    def checkpoint_part(self, step: int) -> Path:
        """An empty folder for all ranks to write a step's checkpoint into."""
        part = part_folder(self.local, step)
        if self.leads:
            remove_tree(part)
            part.mkdir(parents=True)
            if self.remote and self.rank == 0:
                remove_tree(self._published(part))  # files of an attempt that never described them
        self.barrier()
        return part

    def publish_checkpoint(self, part: Path, description: Mapping[str, Any]) -> None:
        """Publish what all ranks have written into `part`; every rank calls it."""
        self.barrier()
        if self.remote:
            if self.leads:
                upload_folder(part, self._published(part))
                remove_tree(part)
            self.barrier()
            if self.rank == 0:
                describe_files(self._published(part), description)
        elif self.rank == 0:
            publish_checkpoint(part, description)
        self.barrier()

    def remove_checkpoints(self, *, keep_last: int, keep_best: int) -> None:
        """Remove all published checkpoints but the last and the best ones; every rank calls it."""
        if self.rank == 0:
            remove_others(self.folder, keep_last=keep_last, keep_best=keep_best)
        self.barrier()

    def share_metrics(self, *, now: bool) -> None:
        """Upload the metrics so far, TensorBoard's files only if `now`; by rank 0, seldom unless `now`."""
        if not self.remote or not (now or time.monotonic() - self.uploaded > UPLOAD_SECONDS):
            return
        self.uploaded = time.monotonic()
        for name in (METRICS, WANDB):
            if (self.local / name).exists():
                upload(self.local / name, self.folder / name)
        if now:
            upload_folder(self.local / TENSORBOARD, self.folder / TENSORBOARD)

    def publish_folder(self, part: Path, name: str) -> None:
        """Make a whole local folder the artifact's folder of that name, in place of what was there."""
        move_folder(part, self.folder / name)

    def close(self) -> None:
        """Remove this machine's own folder; every rank calls it."""
        self.barrier()
        if self.remote and self.leads:
            remove_tree(self.local)

    def _published(self, part: Path) -> Path:
        return self.folder / CHECKPOINTS / part.with_suffix("").name
