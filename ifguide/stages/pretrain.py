"""`pretrain`: train the target with the signed per-token loss (Eq. 9), or without a mask as baseline.

Both models of a run see the same blocks in the same order from the same initial weights; only the loss differs.
DeepSpeed under Ray Train, on any number of workers, or plain torch in this process: `stages.training_loop` is the loop
of both, `stages.engines` what differs. A rerun goes on from the last checkpoint, on another number of workers too;
Ray Train starts lost workers again, and with `min_workers` goes on with those it has.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem

from ifguide.artifacts import Manifest, remove_tree, require, require_same
from ifguide.config import to_mapping
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import StageError
from ifguide.models import check_vocabulary
from ifguide.planning.pretrain_plan import describe, plan_pretrain, require_fit
from ifguide.run import BASELINE, PENALISED, Run
from ifguide.shapes import initial_model, require_positions
from ifguide.stages.target_corpus import training_run
from ifguide.storage import is_remote, location
from ifguide.telemetry import configure_logging, cut_torn_line, log
from ifguide.tokenizer import load_tokenizer
from ifguide.training.blocks import BLOCKS
from ifguide.training.checkpoints import last_checkpoint
from ifguide.training.folder import METRICS
from ifguide.training.loop import EXPORT, SUMMARY, VERB, TrainingLoop, architecture
from ifguide.training.meter import training_line
from ifguide.training.model_card import write_model_card
from ifguide.training.schedule import require_training_blocks

SAME_AGAIN = (ValueError, FloatingPointError)  # what a training started again would end with, too
FAILURE = "failure.txt"  # its message, for the driver and for the workers that are started again


def pretrain(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `model/penalised`, or `model/baseline` when `pretrain.use_mask` is false.

    Raises:
        MismatchError: the mask is of another corpus. ConfigError: no target is named, or the machine is too small.
        ValueError: corpus, tokenizer and target do not go together. StageError: the training failed.
    """
    config = run.config.pretrain
    name = PENALISED if config.use_mask else BASELINE
    target = initial_model(run.config.target, config.init_from)
    if dry_run:
        plan = plan_pretrain(run.config)
        for line in describe(plan):
            log(VERB, line)
        require_fit(plan)
        return None
    data = training_run(run)  # the run itself, unless the target has a tokenizer of its own
    corpus, mask = require(data.corpus, "pack_corpus"), None
    inputs = {"corpus": corpus.fingerprint}
    if config.use_mask:
        mask = require(data.mask, "build_mask")
        require_same(
            f"the corpus of {data.mask}",
            mask.inputs["corpus"],
            f"{data.corpus}",
            corpus.fingerprint,
            "build the mask of this corpus, or train on the mask's own",
        )
        inputs["mask"] = mask.fingerprint
    require_training_blocks(corpus.rows["blocks"], config.heldout_blocks)
    tokenizer = load_tokenizer(data.config.tokenizer_source)
    fields, model_name = architecture(run.config, target, tokenizer), target.source or "target.architecture"
    check_vocabulary(
        fields["vocab_size"], tokenizer, model_name=model_name, tokenizer_name=data.config.tokenizer_source
    )
    require_positions(model_name, fields, run.config.pack_corpus.block_size)
    artifact = run.open(run.model(name), VERB, keys=("pretrain", "target", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"{name} is complete")
        return artifact.manifest
    summary = _train(run, data, artifact.folder, name)
    write_model_card(
        artifact.folder / EXPORT,
        data.config,
        corpus=corpus,
        mask=mask,
        scores=run.scores,
        objective={"kind": config.objective.kind, "lambda": config.penalty},
        training=summary,
    )
    for leftover in ("ray_train", BLOCKS):
        remove_tree(artifact.folder / leftover)
    files = [path for path in (artifact.folder / EXPORT).iterdir() if path.is_file()]
    rows = {"steps": summary["steps"], "blocks_seen": summary["blocks_seen"]}
    manifest = artifact.finish(files, rows=rows, summary=summary)
    log(VERB, f"{name}: {summary['steps']} steps, last loss {summary['loss_benign']:.4f}, in {artifact.folder}")
    return manifest


def _train(run: Run, data: Run, folder: Path, name: str) -> dict[str, Any]:
    config = run.config.pretrain
    settings = {
        "config": to_mapping(data.config),
        "corpus": str(data.corpus),
        "mask": str(data.mask) if config.use_mask else None,
        "folder": str(folder),
        "name": name,
        "working_directory": os.getcwd(),
    }
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        log(VERB, f"{name}: resuming from step {checkpoint.step}, saved by {checkpoint.world_size} workers")
    with _ShownMetrics(folder / METRICS, name):
        if config.engine == "torch":
            threads = torch.get_num_threads()
            try:
                TrainingLoop(settings, rank=0, world_size=1).run()
            except FloatingPointError as error:
                raise StageError(str(error)) from error
            finally:
                torch.set_num_threads(threads)
        else:
            connect(run.config.cluster)
            _train_on_ray(run, settings)
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    if "stopped_early" in summary:
        log(
            VERB,
            f"{name}: stopped at step {summary['steps']}: the benign loss rose by {summary['stopped_early']:.2f} nats"
            f" over its lowest; lower pretrain.penalty, or take a bounded pretrain.objective.kind",
            level=logging.WARNING,
        )
    return summary


def _train_on_ray(run: Run, settings: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    config, failure = run.config.pretrain, location(settings["folder"]) / FAILURE
    use_gpu = config.resources.gpus > 0
    workers: Any = config.workers if config.min_workers is None else (config.min_workers, config.workers)
    require_resources(run.config.cluster, VERB, config.resources, config.min_workers or config.workers)
    failure.unlink(missing_ok=True)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": config.resources.cpus,
                **({"GPU": config.resources.gpus} if use_gpu else {}),
                **({"memory": config.resources.memory} if config.resources.memory else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"{settings['name']}-{time.time_ns()}",
            **_ray_storage(location(settings["folder"]) / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
        if failure.exists():
            raise StageError(failure.read_text())
    except ray.train.TrainingFailedError as error:
        raise StageError(_reason(error)) from error
    finally:
        failure.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """What the first worker to fail said; one whose process died has said nothing, and others only that it is gone."""
    failures = sorted(getattr(error, "worker_failures", {}).items())
    for _, cause in failures:
        if isinstance(cause, SAME_AGAIN):
            return str(cause)
    return "; ".join(f"worker {rank}: {type(cause).__name__}: {cause}" for rank, cause in failures[:1]) or str(error)


def _ray_storage(folder: Path) -> dict[str, Any]:
    """Ray Train's own folder, for it, through this program's file systems."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    remote: Any = folder
    return {"storage_path": remote.path, "storage_filesystem": PyFileSystem(FSSpecHandler(remote.fs))}


def train_loop(settings: dict[str, Any]) -> None:
    """One Ray Train worker: one rank of the DeepSpeed job. What it would end with again it raises once, which ends all
    ranks, and writes down: when they are started again, they do nothing."""
    import ray.train

    configure_logging()
    os.chdir(settings["working_directory"])  # Ray Train moved to its own; relative paths in the config are the driver's
    context, failure = ray.train.get_context(), location(settings["folder"]) / FAILURE
    if failure.exists():
        return
    try:
        run_rank(
            settings,
            rank=context.get_world_rank(),
            local_rank=context.get_local_rank(),
            world_size=context.get_world_size(),
        )
    except SAME_AGAIN as error:
        # else it may be storage that failed, or another worker, which takes the process group with it
        if torch.distributed.is_initialized() and not isinstance(error.__cause__, OSError):
            failure.write_text(str(error))
        raise


def run_rank(settings: dict[str, Any], *, rank: int, local_rank: int, world_size: int) -> None:
    """One rank of the DeepSpeed job, in whatever process group torch has."""
    if not settings["config"]["pretrain"]["resources"]["gpus"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a 80 s compilation; gloo serves
    TrainingLoop(settings, rank=rank, world_size=world_size, local_rank=local_rank).run()


class _ShownMetrics:
    """Shows what rank 0 appends to its metrics file as progress lines of the driver, while training runs.

    Workers' own output stays in Ray's logs: theirs would come with a prefix, late, and among that of others.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.seconds = 10.0 if is_remote(path) else 1.0
        if not is_remote(path):  # a remote one is uploaded whole
            cut_torn_line(path)
        self.offset = path.stat().st_size if path.exists() else 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self._show_new()

    def _follow(self) -> None:
        while not self.stop.wait(self.seconds):
            self._show_new()

    def _show_new(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self.offset += len(complete)
        for line in complete.splitlines():
            log(VERB, training_line(self.name, json.loads(line)))
