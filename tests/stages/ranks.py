"""Ranks of a training as processes of their own, without Ray, that can be made to kill themselves at a given point.

They are forked from a server that has imported everything already, so that a rank starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ifguide.training.settings import TrainingSettings

# The optimizer's import alone takes longer than a whole training here.
PRELOADED = [
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "ifguide.stages.pretrain",
    "tensorboard.summary.writer.record_writer",
    "transformers.integrations.deepspeed",
    "transformers.models.gpt_neox.modeling_gpt_neox",
]
PLACES = ("step", "backward", "save", "publish")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """kill -9 of `rank` (None: of all, as when a node goes) in the step that follows `step`, or saves it.

    place: before the step's first micro-batch (`step`), between two of them (`backward`), after this rank's files of
    the checkpoint are written (`save`), after the checkpoint is published and before others are removed (`publish`).
    """

    step: int
    place: str
    rank: int | None


def run_ranks(
    settings: TrainingSettings,
    world_size: int,
    kill: Kill | None = None,
    *,
    machines: Sequence[dict[str, str]] | None = None,
) -> None:
    """Train with `world_size` ranks to the end, or until `kill`; fails if it ends in any other way.

    machines: of every rank the environment, as if each ran on a machine of its own; None: all run on one.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # the server inherits it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = Path(tempfile.mkdtemp(prefix="ifguide-ranks-"))
    processes = [
        context.Process(target=_rank, args=(settings, rank, world_size, folder, kill, machines), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        _join(processes, timeout=1200, patience=0.0 if kill is not None and kill.rank is None else 5.0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    output = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(folder.glob("*.log")))
    shutil.rmtree(folder)
    if kill is None:
        assert codes == [0] * world_size, output
    else:
        assert -signal.SIGKILL in codes, f"{kill} did not come about: {codes}\n{output}"
        assert 0 not in codes, f"a rank outlived {kill}: {codes}\n{output}"


def _join(processes: list[Any], *, timeout: float, patience: float) -> None:
    """Wait until all have ended; from the first death on only for `patience` seconds."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.005)
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + patience)


def _rank(
    settings: TrainingSettings,
    rank: int,
    world_size: int,
    folder: Path,
    kill: Kill | None,
    machines: Sequence[dict[str, str]] | None,
) -> None:
    local_rank = rank if machines is None else 0
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        **(machines[rank] if machines else {}),
    }
    import torch

    from ifguide.stages import pretrain

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=600),
    )
    if kill is not None and kill.rank in (None, rank):
        _doom(kill)
    pretrain.run_rank(settings, rank=rank, local_rank=local_rank, world_size=world_size)
    torch.distributed.destroy_process_group()


def _doom(kill: Kill) -> None:
    """Have this process' training loop kill the process where `kill` says."""
    from ifguide.stages import pretrain
    from ifguide.training import folder as training_folder
    from ifguide.training import loop as training_loop

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class DoomedLoop(training_loop.TrainingLoop):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            backward, save = self.engine.backward, self.engine.save

            def backward_and_die(loss: Any) -> None:
                backward(loss)
                if kill.place == "backward" and self.step == kill.step:
                    die()

            def save_and_die(folder: Path) -> None:
                save(folder)
                if kill.place == "save" and self.step > kill.step:
                    die()

            self.engine.backward, self.engine.save = backward_and_die, save_and_die  # type: ignore[method-assign]

        def _train_step(self) -> dict[str, Any]:
            if kill.place == "step" and self.step == kill.step:
                die()
            return super()._train_step()

    publish = training_folder.publish_checkpoint

    def publish_and_die(part: Path, description: Any, files: Any) -> Path:
        final = publish(part, description, files)
        if kill.place == "publish" and description["step"] > kill.step:
            die()
        return final

    training_folder.publish_checkpoint = publish_and_die
    pretrain.TrainingLoop = DoomedLoop  # type: ignore[misc]
