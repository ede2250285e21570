"""One rank's training loop, the same for every engine: data order, objective, evaluation, checkpoints, resuming.

A step is a function of the weights, the optimizer's state, the step's number and the settings: its blocks, learning
rate and random numbers all come from the number. So a training that goes on from a checkpoint repeats what an
uninterrupted one does, to the last bit on as many ranks (on a CPU), and up to the order of sums on another number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from ifguide.artifacts import write_sealed
from ifguide.config import ConfigError, to_mapping
from ifguide.storage import location
from ifguide.telemetry import METRICS, MetricsLog, log
from ifguide.tokenizer import load_tokenizer
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
from ifguide.training.engines import DeepSpeedEngine, Engine, TorchEngine
from ifguide.training.folder import TrainingFolder
from ifguide.training.losses import LossSums, LossTotals, MicroBatch
from ifguide.training.meter import Meter, meter_of
from ifguide.training.model import build_model, trained_model, write_model
from ifguide.training.schedule import (
    PADDING,
    BenignRise,
    Schedule,
    learning_rate,
    rank_micro_batches,
    split_heldout,
    step_seed,
)
from ifguide.training.settings import TrainingSettings

VERB = "pretrain"
SUMMARY, EXPORT = "summary.json", "hf"


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
        self.step = checkpoint.step if checkpoint else 0
        state = dict(checkpoint.training) if checkpoint else {}
        self.losses: dict[str, float | None] = {name: state.pop(name, None) for name in ("loss_benign", "loss_masked")}
        self.rise = BenignRise(**state)
        self.stopped = self._diverged()  # a checkpoint may be the last one of a training that stopped early

    def _blocks(self) -> TrainingBlocks:
        folder, mask = self.place.local / BLOCKS, self.settings.mask
        if self.place.leads:
            flatten_blocks(location(self.settings.corpus), location(mask) if mask else None, folder)
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
        build = partial(build_model, self.settings, self.tokenizer)
        if self.train.engine == "torch":
            return TorchEngine(self.train, build, checkpoint)
        return DeepSpeedEngine(self.train, build, checkpoint, leads=self.place.leads, world_size=self.world_size)

    def run(self) -> None:
        """Train to the last step, export, and publish the summary.

        Raises:
            TrainingStopped: it was asked to end, and has saved the step it was at.
        """
        metrics = self._metrics() if self.rank == 0 else None
        meter = self._meter()
        while self.step < self.schedule.steps and not self.stopped:
            values = self._train_step()
            last = self.step == self.schedule.steps or self.stopped
            due = last or self.step % self.train.checkpoint_steps == 0
            if due:
                values["loss_heldout"] = self._heldout_loss()
            if metrics and (due or self.step % self.train.log_steps == 0):
                metrics.write(self.step, values | meter.values(self.step))
                self.place.share_metrics(now=due)
            if due or self.asked:
                self._save(values.get("loss_heldout"))
            if self.asked:
                self._close(metrics)
                raise TrainingStopped(self.step)
        self._finish()
        self._close(metrics)

    def _close(self, metrics: MetricsLog | None) -> None:
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
        batch = self.schedule.batch(self.step)
        batch = np.where(batch == PADDING, PADDING, self.trained[batch])
        rate = learning_rate(self.step, self.schedule.steps, self.train)
        torch.manual_seed(step_seed(self.settings.seed, self.step, self.rank))
        self.engine.begin_step(rate)
        sums = LossSums(self.engine.device)
        for micro_batch in self._micro_batches(batch):
            loss = self.engine.loss(micro_batch)
            sums.add(loss)
            self.engine.backward(loss.loss)
        norm = self.engine.end_step()
        self.step += 1
        totals = sums.totals(self.world_size, stopping=self.stopping())
        self.asked = totals.stopping > 0
        self._require_finite(totals, norm)
        self.rise.update(totals.benign)
        self.stopped = self._diverged()
        self.losses = {"loss_benign": totals.benign, "loss_masked": totals.masked}
        return {
            "loss": totals.loss,
            **self.losses,
            "benign_rise": self.rise.value,
            "learning_rate": rate,
            "gradient_norm": norm,
        }

    def _require_finite(self, totals: LossTotals, norm: float | None) -> None:
        if not math.isfinite(totals.loss + (norm or 0.0)):  # before such weights replace a checkpoint
            raise FloatingPointError(
                f"the loss is {totals.loss} (benign {totals.benign}), its gradient's norm {norm} at step {self.step};"
                " lower pretrain.learning_rate or pretrain.penalty, or take a bounded pretrain.objective.kind"
            )

    def _diverged(self) -> bool:
        return self.train.max_benign_rise is not None and self.rise.value > self.train.max_benign_rise

    def _micro_batches(self, batch: np.ndarray, *, masked: bool = True) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step's blocks, on the device; without the mask unless `masked`."""
        token_count = max(1, self.blocks.predicted_tokens(batch))
        for indices in rank_micro_batches(
            batch, rank=self.rank, world_size=self.world_size, micro_batch_blocks=self.train.micro_batch_blocks
        ):
            blocks = self.blocks.take(indices)
            mask_BT = None if blocks.mask_BT is None or not masked else self._on_device(blocks.mask_BT)
            yield MicroBatch(self._on_device(blocks.tokens_BT), self._on_device(blocks.lengths_B), mask_BT, token_count)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.engine.device)

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        """Mean NLL in nats of the held-out blocks' tokens, masked or not; None if there are no such blocks."""
        if not len(self.heldout):
            return None
        sums = LossSums(self.engine.device)
        self.engine.module.eval()
        for micro_batch in self._micro_batches(self.heldout, masked=False):
            sums.add(self.engine.loss(micro_batch))
        self.engine.module.train()
        return sums.totals(self.world_size).benign

    def _barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def _save(self, heldout: float | None) -> None:
        """Publish the engine's state of this step, then remove what need not be kept."""
        with self.place.writing_checkpoint(self.step) as part:
            self.engine.save(part / STATE)
            made = Checkpoint(
                folder=part,
                step=self.step,
                engine=self.train.engine,
                world_size=self.world_size,
                heldout=heldout,
                training={**asdict(self.rise), **self.losses},
            )
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
