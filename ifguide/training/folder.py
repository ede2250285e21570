"""Where a training works: in its artifact's folder or, if that is remote, in one of each machine's own.

An engine writes many files, appends to some and maps others: it needs a disk. With a remote artifact each machine has
a folder of its own for that, made anew by every attempt; what must outlive the machine (checkpoints, metrics, the
exported model) is uploaded, and a checkpoint is fetched whole by each machine that goes on from it.

On every machine one rank, the one that leads, moves the files, so each machine's network carries each of them once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifguide.artifacts import move_folder, remove_tree, write_json
from ifguide.storage import (
    download_folder,
    file_sizes,
    is_remote,
    location,
    read_texts,
    upload,
    upload_folder,
    work_folder,
)
from ifguide.telemetry import METRICS, TENSORBOARD
from ifguide.training.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    Files,
    describe_files,
    digest_files,
    part_folder,
    publish_checkpoint,
    remove_others,
)

WANDB = "wandb.json"
DIGESTS = "digests-"  # files of each rank, gathered before a checkpoint is published
WRITER_FAILED = ("inline_container", "PytorchStreamWriter")  # of what torch.save raises on a full disk
STOP = "stop"  # in the model's folder, empty until the driver asks its ranks to save and end: on NFS a machine that
# opens a file sees what was written to it, but may see a new file only a minute late
LOOK_SECONDS, LOOK_SECONDS_REMOTE = 0.2, 2.0  # between looks for it
UPLOAD_SECONDS = 15.0  # between uploads of the metrics


class TrainingFolder:
    """`folder` is the artifact's, `local` where this machine works: the same, unless the artifact is remote.

    `leads`: this rank moves its machine's files. `barrier` waits for all ranks.
    """

    def __init__(self, folder: str | Path, *, rank: int, local_rank: int, world_size: int, barrier: Callable[[], None]):
        self.folder = location(folder)
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self.remote = is_remote(self.folder)
        self.leads = (local_rank if self.remote else rank) == 0
        self.local = self.folder
        self.uploaded = self.looked = float("-inf")
        self.stopping = False
        if self.remote:
            self.local = work_folder("training", self.folder)
            if self.leads:
                remove_tree(self.local)  # of an attempt that was killed; what it published is remote
                self.local.mkdir()
                for name in (METRICS, WANDB):
                    if (self.folder / name).exists():
                        (self.local / name).write_bytes((self.folder / name).read_bytes())
            barrier()

    def asked_to_stop(self) -> bool:
        """Whether the driver has asked the training to save and end; looked up seldom."""
        now = time.monotonic()
        if now - self.looked > (LOOK_SECONDS_REMOTE if self.remote else LOOK_SECONDS):
            self.looked = now
            with contextlib.suppress(FileNotFoundError):  # nobody will ask
                self.stopping = bool((self.folder / STOP).read_bytes())
        return self.stopping

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint on this machine's disk; downloaded by the rank that calls it, which then should lead."""
        if not self.remote:
            return checkpoint
        folder = self.local / CHECKPOINTS / checkpoint.folder.name
        if not folder.exists():
            part = folder.with_suffix(".fetched")
            remove_tree(part)
            download_folder(checkpoint.folder, part)
            if digest_files(part, checkpoint.files) != checkpoint.files:
                raise OSError(f"{checkpoint.folder} came damaged, or has changed since it was written")
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

    @contextlib.contextmanager
    def writing_checkpoint(self, step: int) -> Iterator[Path]:
        """An empty folder for all ranks to write a step's checkpoint into, and publish it; every rank calls it.

        Raises:
            OSError: there was no room for it. What was written of it is removed, then and on any other error.
        """
        part = part_folder(self.local, step)
        if self.leads:
            remove_tree(part)
            part.mkdir(parents=True)
            if self.remote and self.rank == 0:
                remove_tree(self._published(part))  # files of an attempt that never described them
        self.barrier()
        try:
            yield part
        except BaseException as error:
            full = _no_room(error, part)
            with contextlib.suppress(OSError):  # another rank may be at it, too
                remove_tree(part)
            if full is None:
                raise
            raise full from error

    def publish_checkpoint(self, part: Path, description: Mapping[str, Any]) -> None:
        """Publish what all ranks have written into `part`; every rank calls it."""
        self.barrier()
        self._digest(part)
        self.barrier()
        if self.remote:
            if self.leads:
                upload_folder(part, self._published(part))
                remove_tree(part)
            self.barrier()
            if self.rank == 0:
                published = self._published(part)
                describe_files(published, description, _gather_digests(published))
        elif self.rank == 0:
            publish_checkpoint(part, description, _gather_digests(part))
        self.barrier()

    def _digest(self, part: Path) -> None:
        """Leave the digests of this rank's share of the files in `part`: of all, where each machine has its own."""
        names = [name for name in file_sizes(part) if not name.startswith(DIGESTS)]
        self.barrier()  # else a rank would list what another is leaving, and look for it when it has its last name
        if self.remote:
            names = names if self.leads else []
        else:
            names = names[self.rank :: self.world_size]
        if names:
            write_json(part / f"{DIGESTS}{self.rank}.json", digest_files(part, names))

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


def _gather_digests(folder: Path) -> Files:
    """The digests that all ranks have left in a folder, which are removed."""
    paths = [folder / name for name in file_sizes(folder) if name.startswith(DIGESTS)]
    files: Files = {}
    for path, text in zip(paths, read_texts(paths), strict=True):
        files |= json.loads(text)
        path.unlink()
    return dict(sorted(files.items()))


def _no_room(error: BaseException, part: Path) -> OSError | None:
    """What to raise in place of an error in writing a checkpoint, if the disk was full: path and room."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and not (isinstance(error, RuntimeError) and any(name in str(error) for name in WRITER_FAILED)):
        return None
    with contextlib.suppress(OSError):
        written, free = sum(file_sizes(part).values()), shutil.disk_usage(part).free
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC
        return OSError(
            number,
            f"no room for a checkpoint: {written / 1e6:,.1f} MB of it were written, {free / 1e6:,.1f} MB are free; make"
            " room and run it again",
            str(part),
        )
    return None
