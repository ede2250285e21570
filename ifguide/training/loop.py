"""One rank's training loop, the same for every engine: data order, objective, evaluation, checkpoints, resuming.

A step is a function of the weights, the optimizer's state, the step's number and the settings: its blocks, learning
rate and random numbers all come from the number. So a training that goes on from a checkpoint repeats what an
uninterrupted one does, to the last bit on as many ranks (on a CPU), and up to the order of sums on another number.

Nothing of a step is read on the host before a logging step, a checkpoint, a look at the benign loss or the end: a GPU
then has its next kernels before it is done with these. So that a loss is no number is seen there. That the benign loss
has risen too far is seen every LOOK_STEPS, whatever is logged or saved: where a training stops decides its model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ifguide.artifacts import write_sealed
from ifguide.config import ConfigError, to_mapping
from ifguide.folders import EXPORT
from ifguide.host_memory import keep_freed_memory, release_freed_memory
from ifguide.storage import location
from ifguide.telemetry import METRICS, MetricsLog, log
from ifguide.tokenizer import load_tokenizer
from ifguide.training.batches import Batches
from ifguide.training.blocks import BLOCKS, TrainingBlocks, flatten_blocks
from ifguide.training.checkpoints import (
    CHECKPOINTS,
    STATE,
    Checkpoint,
    best_checkpoints,
    describe_checkpoint,
    first_whole,
    last_checkpoint,
    published_checkpoints,
)
from ifguide.training.choices import read_choices
from ifguide.training.engines import DeepSpeedEngine, Engine, TorchEngine
from ifguide.training.folder import TrainingFolder
from ifguide.training.losses import LossHistory, LossSums, StepLosses
from ifguide.training.meter import Meter, meter_of
from ifguide.training.model import build_model, trained_model, write_model
from ifguide.training.schedule import BenignRise, Schedule, learning_rate, split_heldout, step_seed
from ifguide.training.settings import TrainingSettings
from ifguide.training.writing import CheckpointWriter

VERB = "pretrain"
SUMMARY = "summary.json"
LOOK_STEPS = 10  # from one look at the rise of the benign loss to the next
PATIENCE = timedelta(days=2)  # of ranks that wait for one at work on files: a whole corpus, or a checkpoint


class TrainingStopped(Exception):
    """A training was asked to end, and has saved `step`."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class TrainingLoop:
    """The state of one rank: engine, blocks, position.

    stopping: asked after every step; True makes the training save and end. None: whether the driver has left word in
    the folder, which rank 0 looks for.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        *,
        rank: int,
        world_size: int,
        local_rank: int | None = None,
        stopping: Callable[[], bool] | None = None,
    ):
        self.settings, self.train, self.name = settings, settings.train, settings.name
        self.rank, self.world_size = rank, world_size
        self.patient = self._group(timeout=PATIENCE) if world_size > 1 else None
        torch.set_num_threads(max(1, int(self.train.resources.cpus)))
        self.place = TrainingFolder(
            settings.folder,
            rank=rank,
            local_rank=rank if local_rank is None else local_rank,
            world_size=world_size,
            barrier=self._barrier,
        )
        self.folder = self.place.folder
        self.stopping = stopping or (self.place.asked_to_stop if rank == 0 else lambda: False)
        self.asked = False  # to save and end
        self.blocks = self._blocks()
        self.trained, self.heldout = split_heldout(len(self.blocks.lengths), self.train.heldout_blocks, settings.seed)
        self.schedule = Schedule(
            num_blocks=len(self.trained),
            batch_blocks=self.train.batch_blocks,
            epochs=self.train.epochs,
            seed=settings.seed,
        )
        self.tokenizer = load_tokenizer(settings.tokenizer)
        checkpoint = self.place.fetch_for_all(self._agreed_checkpoint())
        self.engine = self._engine(checkpoint)
        if rank == 0 and self.engine.module.choices is not None:
            self.engine.module.choices.write(self.folder)
        self.batches = Batches(
            self.blocks,
            self.schedule,
            self.trained,
            rank=rank,
            world_size=world_size,
            micro_batch_blocks=self.train.micro_batch_blocks,
            device=self.engine.device,
            ahead=self.train.acceleration.prefetched_batches,
        )
        self.hosts = self._host_group()
        self.writer = CheckpointWriter()
        self.history = LossHistory()
        self.step = self.begun = checkpoint.step if checkpoint else 0
        self.keeps_memory = False
        state = dict(checkpoint.training) if checkpoint else {}
        self.losses: dict[str, float | None] = {name: state.pop(name, None) for name in ("loss_benign", "loss_masked")}
        self.rise = BenignRise(**state)
        self.stopped = self._diverged()  # a checkpoint may be the last one of a training that stopped early

    def _host_group(self) -> Any:
        """The process group in which hosts agree without their devices; None: the one that there is."""
        if self.world_size == 1 or torch.distributed.get_backend() == "gloo":
            return None
        return self._group()

    def _group(self, **options: Any) -> Any:
        return torch.distributed.new_group(backend="gloo", **options)

    def _blocks(self) -> TrainingBlocks:
        folder, mask = self.place.local / BLOCKS, self.settings.mask
        if self.place.leads:
            flatten_blocks(
                location(self.settings.corpus),
                location(mask) if mask else None,
                folder,
                documents=self.train.document_attention,
            )
        self._barrier()
        return TrainingBlocks(folder)

    def _agreed_checkpoint(self) -> Checkpoint | None:
        if self.rank == 0:
            first_whole(reversed(published_checkpoints(self.folder)))  # those that have changed are passed over by all
        self._barrier()
        checkpoint = last_checkpoint(self.folder)
        steps: list[Any] = [checkpoint.step if checkpoint else None] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(steps, steps[0])
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the workers see different last checkpoints in {self.folder}, of steps {steps}: run_dir must lie on"
                " storage that all nodes mount, or be remote"
            )
        return checkpoint

    def _engine(self, checkpoint: Checkpoint | None) -> Engine:
        torch.manual_seed(self.settings.seed)
        if checkpoint is not None and checkpoint.engine != self.train.engine:
            raise ConfigError(f"pretrain.engine: {checkpoint.folder} is of engine {checkpoint.engine}")
        tokens = self.schedule.total_blocks * self.settings.block_size
        chosen = read_choices(self.folder) if checkpoint is not None else None
        build = partial(build_model, self.settings, self.tokenizer, tokens=tokens, chosen=chosen)
        if self.train.engine == "torch":
            return TorchEngine(self.train, build, checkpoint)
        leads, barrier = self.place.leads, self._barrier
        return DeepSpeedEngine(self.train, build, checkpoint, leads=leads, world_size=self.world_size, barrier=barrier)

    def run(self) -> None:
        """Train to the last step, export, and publish the summary.

        Raises:
            TrainingStopped: it was asked to end, and has saved the step it was at.
        """
        metrics = self._metrics() if self.rank == 0 else None
        try:
            self._run(metrics)
        finally:
            self.batches.close()
            self.writer.close()
            if self.keeps_memory:
                release_freed_memory()

    def _run(self, metrics: MetricsLog | None) -> None:
        meter = self._meter()
        while self.step < self.schedule.steps and not self.stopped:
            values = self._train_step()
            due = self.stopped or self._saves()
            if due:
                values["loss_heldout"] = self._heldout_loss()
            if metrics and values and (due or self._logs()):
                metrics.write(self.step, values | meter.values(self.step))
                self.place.share_metrics(now=due)
            if due or self.asked:
                self._save(values.get("loss_heldout"))
            if self.asked:
                self._close(metrics)
                raise TrainingStopped(self.step)
        self.writer.wait()
        self._finish()
        self._close(metrics)

    def _logs(self) -> bool:
        return self.step % self.train.log_steps == 0

    def _looks(self) -> bool:
        return self.train.max_benign_rise is not None and self.step % LOOK_STEPS == 0

    def _saves(self) -> bool:
        return self.step == self.schedule.steps or self.step % self.train.checkpoint_steps == 0

    def _close(self, metrics: MetricsLog | None) -> None:
        self.writer.wait()
        if metrics:
            metrics.close()
            self.place.share_metrics(now=True)
        self.place.close()

    def _metrics(self) -> MetricsLog:
        name = f"{self.folder.parent.parent.name}/{self.folder.name}"
        wandb = {**to_mapping(self.train.wandb), "name": name} if self.train.wandb else None
        return MetricsLog(self.place.local / METRICS, wandb=wandb, config=self.settings.logged)

    def _meter(self) -> Meter:
        return meter_of(
            self.engine.module.model.config.to_dict(),
            self.train,
            block_size=self.settings.block_size,
            step=self.step,
            steps=self.schedule.steps,
            device=self.engine.device,
            workers=self.world_size,
        )

    def _train_step(self) -> dict[str, Any]:
        """Take a step. Its figures, where they are read: at a logging step, a checkpoint, a look and the end."""
        if self.step == self.begun + 1 and self.train.acceleration.kept_memory and self.engine.device.type == "cpu":
            self.keeps_memory = keep_freed_memory()
        rate = learning_rate(self.step, self.schedule.steps, self.train)
        torch.manual_seed(step_seed(self.settings.seed, self.step, self.rank))
        self.engine.begin_step(rate)
        sums = LossSums(self.engine.device)
        for micro_batch in self.batches.of_step(self.step):
            loss = self.engine.loss(micro_batch)
            sums.add(loss)
            self.engine.backward(loss.loss)
        norm = self.engine.end_step()
        self.step += 1
        self.history.add(self.step, sums, norm)
        self.asked = self._any_asked()
        if not (self.asked or self._logs() or self._looks() or self._saves()):
            return {}
        self.writer.check()
        return self._read_losses(rate)

    def _any_asked(self) -> bool:
        """Whether a rank was asked to end: all know after the same step. No device waits for it."""
        asked = self.stopping()
        if self.world_size == 1:
            return asked
        word = torch.tensor([int(asked)])
        torch.distributed.all_reduce(word, group=self.hosts)
        return bool(word)

    def _read_losses(self, rate: float) -> dict[str, Any]:
        read = self.history.read(self.world_size)
        for losses in read:
            self._require_finite(losses)
            self.rise.update(losses.totals.benign)
        _, totals, norm = read[-1]
        self.stopped = self._diverged()
        self.losses = {"loss_benign": totals.benign, "loss_masked": totals.masked}
        return {
            "loss": totals.loss,
            **self.losses,
            "benign_rise": self.rise.value,
            "learning_rate": rate,
            "gradient_norm": norm,
        }

    def _require_finite(self, losses: StepLosses) -> None:
        totals, norm = losses.totals, losses.gradient_norm
        if not math.isfinite(totals.loss + (norm or 0.0)):  # before such weights replace a checkpoint
            raise FloatingPointError(
                f"the loss is {totals.loss} (benign {totals.benign}), its gradient's norm {norm} at step {losses.step};"
                " lower pretrain.learning_rate or pretrain.penalty, or take a bounded pretrain.objective.kind"
            )

    def _diverged(self) -> bool:
        """Only where an uninterrupted training looks, whatever steps were saved when it was asked to end."""
        most = self.train.max_benign_rise
        return most is not None and self._looks() and self.rise.value > most

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        """Mean NLL in nats of the held-out blocks' tokens, masked or not; None if there are no such blocks."""
        if not len(self.heldout):
            return None
        sums = LossSums(self.engine.device)
        self.engine.module.eval()
        for micro_batch in self.batches.of_blocks(self.heldout):
            sums.add(self.engine.loss(micro_batch))
        self.engine.module.train()
        return sums.totals(self.world_size).benign

    def _barrier(self) -> None:
        """Wait for all ranks. One of them may be at work on files, for as long as it takes; one that has died ends all
        by Ray Train."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.patient)

    def _save(self, heldout: float | None) -> None:
        """Publish the engine's state of this step, then remove what need not be kept; from a copy, by a thread, where
        the engine can and the config says so."""
        self.writer.wait()
        made = Checkpoint(
            folder=self.folder,
            step=self.step,
            engine=self.train.engine,
            world_size=self.world_size,
            heldout=heldout,
            training={**asdict(self.rise), **self.losses},
        )
        wanted = self.train.acceleration.background_checkpoints
        in_background = self.engine.device.type != "cpu" if wanted is None else wanted
        write = self.engine.copied() if in_background else None
        if write is None:
            self._publish(made, self.engine.save)
        else:
            self.writer.start(partial(self._publish, made, write))

    def _publish(self, made: Checkpoint, write: Callable[[Path], None]) -> None:
        with self.place.writing_checkpoint(made.step) as part:
            write(part / STATE)
            self.place.publish_checkpoint(part, describe_checkpoint(made))
        self.place.remove_checkpoints(keep_last=self.train.keep_last, keep_best=self.train.keep_best)

    def _finish(self) -> None:
        """Export the checkpoint that the config names and write the summary; on rank 0."""
        if self.rank == 0:
            checkpoints = published_checkpoints(self.folder)
            best = best_checkpoints(checkpoints)
            chosen = first_whole(best if self.train.export == "best" else reversed(checkpoints))
            if chosen is None:
                raise OSError(f"{self.folder / CHECKPOINTS}: no checkpoint is as it was written; run the stage again")
            self._export(self.place.fetch(chosen))
            seen = min(self.step * self.train.batch_blocks, self.schedule.total_blocks)
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
            summary = {"steps": self.step, "blocks_seen": seen, "parameters": parameters, "exported_step": chosen.step}
            summary |= self.losses
            if best:
                summary |= {"loss_heldout": chosen.heldout, "best_step": best[0].step}
            if self.step < self.schedule.steps:
                summary["stopped_early"] = self.rise.value
                log(VERB, f"{self.name}: stopped at step {self.step}, the benign loss has risen")
            write_sealed(self.folder / SUMMARY, summary)
        self._barrier()

    def _export(self, checkpoint: Checkpoint) -> None:
        """Write the HF folder in float32, from the engine's own full-precision weights."""
        part = self.place.local / f"{EXPORT}.part"
        try:
            model = trained_model(self.settings, self.engine.module.model, self.engine.weights(checkpoint))
        except ValueError as error:
            raise ValueError(f"{checkpoint.folder}: {error}") from error
        write_model(model, self.tokenizer, part)
        self.place.publish_folder(part, EXPORT)
