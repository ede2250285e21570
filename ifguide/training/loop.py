"""One rank's training loop, the same for every engine: data order, objective, evaluation, checkpoints, resuming.

A step is a function of the weights, the optimizer's state, the step's number and the config: its blocks, learning rate
and random numbers all come from the number. So a training that goes on from a checkpoint repeats what an
uninterrupted one does, to the last bit on as many ranks (on a CPU), and up to the order of sums on another number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ifguide.artifacts import fsync_tree, remove_tree, write_json
from ifguide.config import Config, ConfigError, ModelSource, config_from_mapping, redact, to_mapping
from ifguide.models import load_architecture, load_model
from ifguide.shapes import initial_model, with_positions
from ifguide.storage import location
from ifguide.telemetry import MetricsLog, log, read_metrics
from ifguide.tokenizer import load_tokenizer
from ifguide.training.blocks import BLOCKS, TrainingBlocks, flatten_blocks
from ifguide.training.checkpoints import (
    STATE,
    Checkpoint,
    best_checkpoints,
    describe_checkpoint,
    last_checkpoint,
    published_checkpoints,
)
from ifguide.training.engines import DeepSpeedEngine, Engine, TorchEngine
from ifguide.training.folder import METRICS, TrainingFolder
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.meter import meter_of
from ifguide.training.objective import Objective
from ifguide.training.schedule import (
    PADDING,
    BenignRise,
    Schedule,
    learning_rate,
    rank_micro_batches,
    split_heldout,
    step_seed,
)

VERB = "pretrain"
SUMMARY, EXPORT = "summary.json", "hf"


def architecture(config: Config, target: ModelSource, tokenizer: Any) -> dict[str, Any]:
    """The HF config fields of the model to train; vocabulary and special tokens follow the tokenizer if unset."""
    fields = with_positions(load_architecture(target), config.pack_corpus.block_size)
    fields.setdefault("vocab_size", len(tokenizer))
    return {**fields, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


class TrainingLoop:
    """The state of one rank: engine, blocks, position.

    `settings`: `config` (a mapping), `corpus`, `mask` (None: none), `folder` of the model, `name`.
    """

    def __init__(self, settings: dict[str, Any], *, rank: int, world_size: int, local_rank: int | None = None):
        self.config = config_from_mapping(settings["config"])
        self.rank, self.world_size, self.name = rank, world_size, settings["name"]
        self.train = self.config.pretrain
        torch.set_num_threads(max(1, int(self.train.resources.cpus)))
        self.place = TrainingFolder(
            settings["folder"],
            rank=rank,
            local_rank=rank if local_rank is None else local_rank,
            barrier=self._barrier,
        )
        self.folder = self.place.folder
        if self.place.leads:
            mask = location(settings["mask"]) if settings["mask"] else None
            flatten_blocks(location(settings["corpus"]), mask, self.place.local / BLOCKS)
        self._barrier()
        self.blocks = TrainingBlocks(self.place.local / BLOCKS)
        self.trained, self.heldout = split_heldout(
            len(self.blocks.lengths), self.train.heldout_blocks, self.config.seed
        )
        self.schedule = Schedule(
            num_blocks=len(self.trained),
            batch_blocks=self.train.batch_blocks,
            epochs=self.train.epochs,
            seed=self.config.seed,
        )
        self.tokenizer = load_tokenizer(self.config.tokenizer_source)
        checkpoint = self.place.fetch_for_all(self._agreed_checkpoint())
        self.engine = self._engine(checkpoint)
        self.step = checkpoint.step if checkpoint else 0
        self.rise = BenignRise(**(checkpoint.training if checkpoint else {}))
        self.stopped = self._diverged()  # a checkpoint may be the last one of a training that stopped early

    def _agreed_checkpoint(self) -> Checkpoint | None:
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

    def _diverged(self) -> bool:
        return self.train.max_benign_rise is not None and self.rise.value > self.train.max_benign_rise

    def _engine(self, checkpoint: Checkpoint | None) -> Engine:
        torch.manual_seed(self.config.seed)
        if checkpoint is not None and checkpoint.engine != self.train.engine:
            raise ConfigError(f"pretrain.engine: {checkpoint.folder} is of engine {checkpoint.engine}")
        if self.train.engine == "torch":
            return TorchEngine(self.train, self._build_model, checkpoint)
        return DeepSpeedEngine(
            self.train, self._build_model, checkpoint, leads=self.place.leads, world_size=self.world_size
        )

    def _build_model(self) -> LanguageModelLoss:
        target = initial_model(self.config.target, self.train.init_from)
        if not self.train.init_from:
            target = ModelSource(
                architecture=architecture(self.config, target, self.tokenizer),
                trust_remote_code=target.trust_remote_code,
            )
        model = load_model(target, seed=self.config.seed)
        if self.train.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        objective = Objective(
            kind=self.train.objective.kind,
            penalty=self.train.penalty,
            floor_probability=self.train.objective.floor_probability,
        )
        return LanguageModelLoss(model, objective)

    def run(self) -> None:
        """Train to the last step, export, and publish the summary."""
        metrics = self._metrics() if self.rank == 0 else None
        model_fields = self.engine.module.model.config.to_dict()
        meter = meter_of(
            self.config,
            model_fields,
            step=self.step,
            steps=self.schedule.steps,
            device=self.engine.device,
            workers=self.world_size,
        )
        while self.step < self.schedule.steps and not self.stopped:
            values = self._train_step()
            last = self.step == self.schedule.steps or self.stopped
            due = last or self.step % self.train.checkpoint_steps == 0
            if due:
                values["loss_heldout"] = self._heldout_loss()
            if metrics and (due or self.step % self.train.log_steps == 0):
                metrics.write(self.step, values | meter.values(self.step))
                self.place.share_metrics(now=due)
            if due:
                self._save(values["loss_heldout"])
        self._finish()
        if metrics:
            metrics.close()
            self.place.share_metrics(now=True)
        self.place.close()

    def _metrics(self) -> MetricsLog:
        name = f"{self.folder.parent.parent.name}/{self.folder.name}"
        wandb = {**to_mapping(self.train.wandb), "name": name} if self.train.wandb else None
        return MetricsLog(self.place.local / METRICS, wandb=wandb, config=redact(to_mapping(self.config)))

    def _train_step(self) -> dict[str, Any]:
        batch = self.schedule.batch(self.step)
        batch = np.where(batch == PADDING, PADDING, self.trained[batch])
        rate = learning_rate(self.step, self.schedule.steps, self.train)
        torch.manual_seed(step_seed(self.config.seed, self.step, self.rank))
        self.engine.begin_step(rate)
        sums = torch.zeros(5, dtype=torch.float64, device=self.engine.device)
        for inputs in self._micro_batches(batch):
            result = self.engine.loss(inputs)
            sums += result.sums()
            self.engine.backward(result.loss)
        norm = self.engine.end_step()
        self.step += 1
        loss, benign_sum, masked_sum, benign_count, masked_count = self._over_ranks(sums)
        benign = benign_sum / max(benign_count, 1)
        if not math.isfinite(loss + (norm or 0.0)):  # before such weights replace a checkpoint
            raise FloatingPointError(
                f"the loss is {loss} (benign {benign}), its gradient's norm {norm} at step {self.step}; lower"
                " pretrain.learning_rate or pretrain.penalty, or take a bounded pretrain.objective.kind"
            )
        self.rise.update(benign)
        self.stopped = self._diverged()
        return {
            "loss": loss,
            "loss_benign": benign,
            "loss_masked": masked_sum / masked_count if masked_count else None,
            "benign_rise": self.rise.value,
            "learning_rate": rate,
            "gradient_norm": norm,
        }

    def _micro_batches(self, batch: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """This rank's micro-batches on the device: (tokens, lengths, mask, the whole batch's token count)."""
        token_count = max(1, self.blocks.predicted_tokens(batch))
        for indices in rank_micro_batches(
            batch, rank=self.rank, world_size=self.world_size, micro_batch_blocks=self.train.micro_batch_blocks
        ):
            arrays = self.blocks.take(indices)
            tensors = [None if array is None else torch.from_numpy(array).to(self.engine.device) for array in arrays]
            yield (*tensors, token_count)

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        """Mean NLL in nats of the held-out blocks' tokens, masked or not; None if there are no such blocks."""
        if not len(self.heldout):
            return None
        sums = torch.zeros(5, dtype=torch.float64, device=self.engine.device)
        self.engine.module.eval()
        for tokens, lengths, _, token_count in self._micro_batches(self.heldout):
            sums += self.engine.loss((tokens, lengths, None, token_count)).sums()
        self.engine.module.train()
        _, total, _, count, _ = self._over_ranks(sums)
        return total / count

    def _over_ranks(self, sums: torch.Tensor) -> list[float]:
        if self.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums.tolist()

    def _barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def _save(self, heldout: float | None) -> None:
        """Publish the engine's state of this step, then remove what need not be kept."""
        part = self.place.checkpoint_part(self.step)
        self.engine.save(part / STATE)
        made = Checkpoint(
            folder=part,
            step=self.step,
            engine=self.train.engine,
            world_size=self.world_size,
            heldout=heldout,
            training=asdict(self.rise),
        )
        self.place.publish_checkpoint(part, describe_checkpoint(made))
        self.place.remove_checkpoints(keep_last=self.train.keep_last, keep_best=self.train.keep_best)

    def _finish(self) -> None:
        """Export the checkpoint that the config names and write the summary; on rank 0."""
        if self.rank == 0:
            checkpoints = published_checkpoints(self.folder)
            best = best_checkpoints(checkpoints)
            chosen = best[0] if self.train.export == "best" else checkpoints[-1]
            self._export(self.place.fetch(chosen))
            rows = read_metrics(self.place.local / METRICS)
            seen = min(self.step * self.train.batch_blocks, self.schedule.total_blocks)
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
            summary = {"steps": self.step, "blocks_seen": seen, "parameters": parameters, "exported_step": chosen.step}
            summary |= {name: rows[-1][name] for name in ("loss_benign", "loss_masked")}
            if best:
                summary |= {"loss_heldout": chosen.heldout, "best_step": best[0].step}
            if self.step < self.schedule.steps:
                summary["stopped_early"] = rows[-1]["benign_rise"]
                log(VERB, f"{self.name}: stopped at step {self.step}, the benign loss has risen")
            write_json(self.folder / SUMMARY, summary)
        self._barrier()

    def _export(self, checkpoint: Checkpoint) -> None:
        """Write the HF checkpoint in float32, from the engine's own full-precision weights."""
        trained = self.engine.module.model
        model: Any = type(trained)(trained.config).float()
        missing, unexpected = model.load_state_dict(self.engine.weights(checkpoint), strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ValueError(f"{checkpoint.folder} lacks {sorted(set(missing) - tied)}, and has {unexpected} too much")
        model.tie_weights()
        part = self.place.local / f"{EXPORT}.part"
        remove_tree(part)
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        fsync_tree(part)
        self.place.publish_folder(part, EXPORT)
