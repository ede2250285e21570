"""`pretrain`: train the target with the signed per-token loss (Eq. 9), or without a mask as baseline.

Both models of a run see the same blocks in the same order from the same initial weights; only the loss differs.
DeepSpeed under Ray Train, or plain torch in this process: `ifguide.training.loop` is the loop of both,
`ifguide.training.engines` what differs. A rerun goes on from the last checkpoint, on any number of workers. Ray Train
starts lost workers again, and with `min_workers` goes on with those it has. A step is saved before a machine leaves.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem

from ifguide import interrupts
from ifguide.architecture import check_vocabulary, require_positions
from ifguide.artifacts import Manifest, file_entry, read_sealed, remove_tree, require, require_same
from ifguide.config import Cluster, redact, to_mapping, to_yaml
from ifguide.corpus.tables import require_same_documents
from ifguide.distributed.metrics import ray_metrics
from ifguide.distributed.network import name_interface
from ifguide.distributed.session import connect, is_fixed, require_resources
from ifguide.distributed.shards import StageError
from ifguide.folders import BASELINE, EXPORT, PENALISED
from ifguide.models import source_fingerprint
from ifguide.planning.pretrain_plan import describe, plan_pretrain, require_fit
from ifguide.run import Run
from ifguide.shapes import initial_model, shape_of_fields
from ifguide.spans.filling import mask_other_tokens
from ifguide.storage import is_remote, location
from ifguide.telemetry import METRICS, configure_logging, log
from ifguide.tokenizer import check_own_tokens, load_tokenizer
from ifguide.training.adapters import adapted_modules
from ifguide.training.blocks import BLOCKS
from ifguide.training.checkpoints import first_whole, last_checkpoint, published_checkpoints
from ifguide.training.folder import STOP
from ifguide.training.loop import SUMMARY, VERB, TrainingLoop, TrainingStopped
from ifguide.training.meter import ShownMetrics
from ifguide.training.model import architecture
from ifguide.training.model_card import write_model_card
from ifguide.training.schedule import require_training_blocks
from ifguide.training.settings import TrainingSettings

SAME_AGAIN = (ValueError, FloatingPointError)  # what a training started again would end with, too
RAY_TRAIN = "ray_train"  # Ray Train's own folder of a model in training
END_SECONDS = 3.0  # of the time that a signal leaves: for Ray to end in, when the ranks have saved
STARTS = 10  # attempts to start the workers where no machine can join: Ray Train gives each a minute
FAILURE = "failure.txt"  # its message, for the driver and for the workers that are started again


def pretrain(run: Run, *, dry_run: bool = False, name: str | None = None) -> Manifest | None:
    """Make `model/penalised`, or `model/baseline` when `pretrain.use_mask` is false.

    name: what the log calls the model; None: as its folder.

    Where the target has another tokenizer than the corpus, it is trained on `target/corpus`, which `pack_corpus` has
    packed, and the run's mask in its tokens, `target/mask`, is made first.

    Raises:
        FileNotFoundError: corpus or mask is missing. MismatchError: the mask is of another corpus. ConfigError: no
            target is named, or the machine is too small. ValueError: corpus, tokenizer and target do not go together.
        StageError: the training failed.
    """
    initial_model(run.config.target, run.config.pretrain.init_from)
    if dry_run:
        plan = plan_pretrain(run.config)
        for line in describe(plan):
            log(VERB, line)
        require_fit(plan)
        return None
    corpus, mask = training_data(run)
    settings = _settings(run, name)
    _require_trainable(settings, corpus)
    inputs = {"corpus": corpus.fingerprint, **({"mask": mask.fingerprint} if mask else {})}
    train = settings.train
    if train.init_from is not None:
        inputs["init_from"] = source_fingerprint(train.init_from, settings.target.revision)
    choice = {"pretrain.checkpoint_steps": train.checkpoint_steps} if train.export == "best" else {}
    artifact = run.open(location(settings.folder), VERB, inputs=inputs, extra=choice)
    if artifact.manifest:
        log(VERB, f"{settings.name} is complete")
        return artifact.manifest
    summary = _train(settings, run.config.cluster)
    write_model_card(
        artifact.folder / EXPORT,
        settings,
        sources=[source.path for source in run.config.pack_corpus.inputs],
        corpus=corpus,
        mask=mask,
        scores=run.scores,
        training=summary,
    )
    for leftover in (RAY_TRAIN, BLOCKS):
        remove_tree(artifact.folder / leftover)
    files = [path for path in (artifact.folder / EXPORT).iterdir() if path.is_file()]
    rows = {"steps": summary["steps"], "blocks_seen": summary["blocks_seen"]}
    metrics = artifact.folder / METRICS  # the report reads it, and no fingerprint holds it: it tells times
    logged = {"metrics": file_entry(metrics)} if metrics.exists() else {}
    manifest = artifact.finish(files, rows=rows, summary={**summary, **logged})
    log(
        VERB, f"{settings.name}: {summary['steps']} steps, last loss {summary['loss_benign']:.4f}, in {artifact.folder}"
    )
    return manifest


def training_data(run: Run) -> tuple[Manifest, Manifest | None]:
    """The corpus that is trained on and, if wanted, its mask: the run's own, or those in the target's tokens.

    Raises:
        FileNotFoundError: a corpus or the run's own mask is missing. MismatchError: the mask is of another corpus, or
            the inputs have changed since they were packed. ValueError: a document has, or the mask has no spans.
    """
    target, config = run.target, run.config
    corpus = require(target.corpus, "pack_corpus")
    if target is not run:
        require_same_documents(run.corpus, require(run.corpus, "pack_corpus"), target.corpus, corpus)
    if not config.pretrain.use_mask:
        return corpus, None
    if target is not run:
        return corpus, mask_other_tokens(
            source=run.corpus,
            source_mask=run.mask,
            corpus=target.corpus,
            mask=target.mask,
            cluster=config.cluster,
            resources=config.build_mask.resources,
            config=to_yaml(config),
        )
    mask = require(run.mask, "build_mask")
    require_same(
        f"the corpus of {run.mask}",
        mask.inputs["corpus"],
        f"{run.corpus}",
        corpus.fingerprint,
        "build the mask of this corpus, or train on the mask's own",
    )
    return corpus, mask


def _settings(run: Run, name: str | None) -> TrainingSettings:
    data, config = run.target, run.config
    model = PENALISED if config.pretrain.use_mask else BASELINE
    return TrainingSettings(
        name=name or model,
        folder=str(run.model(model)),
        corpus=str(data.corpus),
        mask=str(data.mask) if config.pretrain.use_mask else None,
        tokenizer=data.tokenizer_source,
        block_size=config.pack_corpus.block_size,
        target=config.target,
        train=config.pretrain,
        seed=config.seed,
        trained_tokenizer=config.target_tokenizer_size is not None,
        working_directory=os.getcwd(),
        logged=redact(to_mapping(config)),
    )


def _require_trainable(settings: TrainingSettings, corpus: Manifest) -> None:
    """Refuse a corpus, a tokenizer and a target that do not go together, before any worker starts."""
    train, block_size = settings.train, settings.block_size
    require_training_blocks(corpus.rows["blocks"], train.heldout_blocks)
    target, tokenizer = initial_model(settings.target, train.init_from), load_tokenizer(settings.tokenizer)
    fields = architecture(target, tokenizer, block_size, trained_tokenizer=settings.trained_tokenizer)
    name = target.source or "target.architecture"
    check_vocabulary(fields["vocab_size"], tokenizer, model_name=name, tokenizer_name=settings.tokenizer)
    require_positions(name, fields, block_size)
    if train.init_from is not None:
        check_own_tokens(target, tokenizer, tokenizer_name=settings.tokenizer)
    if train.lora is not None:
        adapted_modules(shape_of_fields(name, "its config", fields, traced=False).skeleton, train.lora)


def _train(settings: TrainingSettings, cluster: Cluster) -> dict[str, Any]:
    folder, name = location(settings.folder), settings.name
    checkpoints = reversed(published_checkpoints(folder))
    checkpoint = next(checkpoints, None) if is_remote(folder) else first_whole(checkpoints)
    if checkpoint:
        log(VERB, f"{name}: resuming from step {checkpoint.step}, saved by {checkpoint.world_size} workers")
    if settings.train.engine != "torch":
        connect(cluster)
    with (
        interrupts.deferring(),
        ray_metrics(VERB, folder) as gauges,
        ShownMetrics(VERB, name, folder / METRICS, gauges),
    ):
        if settings.train.engine == "torch":
            threads = torch.get_num_threads()
            try:
                TrainingLoop(settings, rank=0, world_size=1, stopping=interrupts.requested).run()
            except TrainingStopped:
                raise interrupts.interruption(_kept(folder)) from None
            except FloatingPointError as error:
                raise StageError(str(error)) from error
            finally:
                torch.set_num_threads(threads)
        else:
            _train_on_ray(settings, cluster)
    summary = read_sealed(folder / SUMMARY)
    if "stopped_early" in summary:
        log(
            VERB,
            f"{name}: stopped at step {summary['steps']}: the benign loss rose by {summary['stopped_early']:.2f} nats"
            f" over its lowest; lower pretrain.penalty, or take a bounded pretrain.objective.kind",
            level=logging.WARNING,
        )
    return summary


def _kept(folder: Path) -> str:
    """What a training that is interrupted goes on from."""
    checkpoint = last_checkpoint(folder)
    return f"the checkpoint of step {checkpoint.step} is saved" if checkpoint else "no checkpoint was saved yet"


def _train_on_ray(settings: TrainingSettings, cluster: Cluster) -> None:
    """Train to the end, in as many runs of Ray Train as machines are taken away, and up to `max_failures` more."""
    from ray.train import TrainingFailedError

    train, folder = settings.train, location(settings.folder)
    failure, failures = folder / FAILURE, 0
    require_resources(cluster, VERB, train.resources, train.fewest_workers)
    try:
        while True:
            failure.unlink(missing_ok=True)
            (folder / STOP).write_text("")
            error: TrainingFailedError | None = None
            try:
                _fit(_trainer(settings, fixed=is_fixed(cluster)), folder)
            except TrainingFailedError as failed:  # it may be of what Ray met while it ended the others
                error = failed
            failures += error is not None
            again = error is None or (_lost_by_ray(error) and not 0 <= train.max_failures < failures)
            if failure.exists() or not again:
                raise StageError(_reason(failure, error)) from error
            if (folder / SUMMARY).exists():
                return
            lost = f"a worker was lost ({error})" if error else "a machine is being taken away"
            log(VERB, f"{settings.name}: {lost}: {_kept(folder)}; going on on others")
    finally:
        for word in (failure, folder / STOP):
            word.unlink(missing_ok=True)


def _lost_by_ray(error: Exception) -> bool:
    """Whether a worker was gone while Ray Train started the workers or ended them, which it does not try again."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)


def _trainer(settings: TrainingSettings, *, fixed: bool = False) -> Any:
    """One run of Ray Train. `fixed`: no machine will join, so it does not wait for some without end."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    train = settings.train
    use_gpu = train.resources.gpus > 0
    workers = train.workers if train.min_workers is None else (train.min_workers, train.workers)
    # their types are those of another class
    scaling: Any = ray.train.ScalingConfig
    failures: Any = ray.train.FailureConfig
    return TorchTrainer(
        train_loop,
        train_loop_config={"settings": settings},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=scaling(
            num_workers=workers,
            # a group that is made larger while it trains would be ended without a checkpoint
            elastic_resize_monitor_interval_s=float("inf"),
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": train.resources.cpus,
                **({"GPU": train.resources.gpus} if use_gpu else {}),
                **({"memory": train.resources.memory} if train.resources.memory else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"{settings.name}-{time.time_ns()}",
            **_ray_storage(location(settings.folder) / RAY_TRAIN),
            failure_config=failures(max_failures=train.max_failures, controller_failure_limit=STARTS if fixed else -1),
        ),
    )


def _fit(trainer: Any, folder: Path) -> None:
    """`trainer.fit()`, in a thread of its own: in this one Ray Train would take Ctrl-C for itself.

    Raises:
        Interrupted: a signal has come. The ranks had time to save the step they were at.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive() and not interrupts.requested():
        thread.join(0.2)
    if interrupts.requested():
        stop, deadline = folder / STOP, time.monotonic() + interrupts.grace_seconds() - END_SECONDS
        stop.write_text("stop")
        while thread.is_alive() and stop.exists() and time.monotonic() < deadline:
            thread.join(1.0 if is_remote(folder) else 0.1)
        raise interrupts.interruption(_kept(folder))
    if errors:
        raise errors[0]


def _reason(failure: Path, error: Exception | None) -> str:
    """What a rank has written down; else what the first worker to fail said. One whose process died has said nothing,
    and others only that it is gone."""
    if failure.exists():
        return failure.read_text()
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


def train_loop(given: dict[str, TrainingSettings]) -> None:
    """One Ray Train worker: one rank of the DeepSpeed job, by the `settings` it is given. What it would end with again
    it raises once, which ends all ranks, and writes down: when they are started again, they do nothing."""
    import ray.train

    configure_logging()
    settings = given["settings"]
    os.chdir(settings.working_directory)  # Ray Train moved to its own; relative paths in the config are the driver's
    name_interface(ray.util.get_node_ip_address())
    context, failure = ray.train.get_context(), location(settings.folder) / FAILURE
    if failure.exists():
        return
    try:
        run_rank(
            settings,
            rank=context.get_world_rank(),
            local_rank=context.get_local_rank(),
            world_size=context.get_world_size(),
            noticed=_machine_is_taken_away,
        )
    except TrainingStopped:
        if context.get_world_rank() == 0:  # the driver need not wait for Ray Train, which takes seconds to end
            (location(settings.folder) / STOP).unlink(missing_ok=True)
    except SAME_AGAIN as error:
        # else it may be storage that failed, or another worker, which takes the process group with it
        if torch.distributed.is_initialized() and not isinstance(error.__cause__, OSError):
            failure.write_text(redact(str(error)))
        raise


def _machine_is_taken_away() -> bool:
    """Whether Ray has said so to the ranks: after a SIGTERM to a node's `ray start --block`, as in a pod that ends, or
    by `ray drain-node`.

    The public `ray.train.get_preemption_info` says the same, but has all ranks wait for each other every time.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def run_rank(
    settings: TrainingSettings,
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    noticed: Callable[[], bool] = lambda: False,
) -> None:
    """One rank of the DeepSpeed job, in whatever process group torch has; saves and ends once it has `noticed`."""
    if not settings.train.resources.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a 80 s compilation; gloo serves
    loop = TrainingLoop(settings, rank=rank, world_size=world_size, local_rank=local_rank)
    asked = loop.stopping
    loop.stopping = lambda: noticed() or asked()
    loop.run()
