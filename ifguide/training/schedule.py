"""The pure parts of `pretrain`: which blocks a step sees, its learning rate, the DeepSpeed config, when to stop.

Data are sampled by index: the order is a function of (seed, epoch), so every block is seen once an epoch, the
position is one integer (the step), and the order does not depend on the number of workers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ifguide.config import Pretrain

PADDING = -1  # fills up the last batch; a padding block carries no loss


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The blocks of every step: the epochs' permutations of `num_blocks`, end to end, cut into batches."""

    num_blocks: int
    batch_blocks: int
    epochs: float
    seed: int

    @property
    def total_blocks(self) -> int:
        """Blocks seen over the whole training."""
        return max(1, round(self.epochs * self.num_blocks))

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may be short."""
        return math.ceil(self.total_blocks / self.batch_blocks)

    def batch(self, step: int) -> np.ndarray:
        """Block indices of a step, (batch_blocks,) int64, filled up with PADDING."""
        start = step * self.batch_blocks
        places = np.arange(start, min(start + self.batch_blocks, self.total_blocks))
        epochs, within = np.divmod(places, self.num_blocks)
        indices = np.full(self.batch_blocks, PADDING, dtype=np.int64)
        for epoch in np.unique(epochs):
            order = epoch_order(self.num_blocks, self.seed, int(epoch))
            here = np.flatnonzero(epochs == epoch)
            indices[here] = order[within[here]]
        return indices


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin another; drawing 10M blocks takes 0.3 s
def epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the blocks in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def require_training_blocks(num_blocks: int, heldout: int) -> None:
    """Raises ValueError when nothing would be left to train on."""
    if heldout >= num_blocks:
        raise ValueError(
            f"pretrain.heldout_blocks: {heldout} of the corpus' {num_blocks} blocks leave none to train on"
        )


def split_heldout(num_blocks: int, heldout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(blocks to train on, held-out blocks), ascending int64, drawn by seed; with none held out, all in order.

    Raises ValueError when nothing would be left to train on.
    """
    require_training_blocks(num_blocks, heldout)
    drawn = np.random.default_rng([seed, num_blocks, heldout]).permutation(num_blocks)
    return np.sort(drawn[heldout:]), np.sort(drawn[:heldout])


def rank_micro_batches(batch: np.ndarray, *, rank: int, world_size: int, micro_batch_blocks: int) -> np.ndarray:
    """A rank's part of a batch, (accumulation steps, micro_batch_blocks); filled up with PADDING where it must be."""
    missing = -len(batch) % (world_size * micro_batch_blocks)
    padded = np.pad(batch, (0, missing), constant_values=PADDING)
    return padded.reshape(-1, world_size, micro_batch_blocks)[:, rank]


def accumulation_steps(config: Pretrain, world_size: int) -> int:
    """Micro-batches of each rank in one step."""
    return math.ceil(config.batch_blocks / (world_size * config.micro_batch_blocks))


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's random numbers (dropout) in a step: a resumed training draws the same."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


@dataclass
class BenignRise:
    """How far the benign loss, smoothed over about ten steps, is above its lowest: what diverges shows it first."""

    smoothed: float | None = None
    lowest: float | None = None

    def update(self, benign_loss: float) -> None:
        """Take one step's loss."""
        self.smoothed = benign_loss if self.smoothed is None else 0.9 * self.smoothed + 0.1 * benign_loss
        self.lowest = self.smoothed if self.lowest is None else min(self.lowest, self.smoothed)

    @property
    def value(self) -> float:
        """The rise in nats; 0 at a new lowest, and before the first step."""
        return 0.0 if self.smoothed is None or self.lowest is None else self.smoothed - self.lowest


def learning_rate(step: int, steps: int, config: Pretrain) -> float:
    """Linear warm-up over `warmup_fraction` of the steps, then cosine to the final ratio."""
    warmup = max(1, round(config.warmup_fraction * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def deepspeed_config(
    config: Pretrain, *, world_size: int | None = None, load_universal: bool = False
) -> dict[str, Any]:
    """The engine's config. The optimizer is ours to build: a config AdamW compiles a kernel on first use."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:  # never on NVMe: its checkpoints would hold no float32 weights to export
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        nvme = {"device": "nvme", "nvme_path": config.offload_nvme}
        zero["offload_param"] = {"device": "cpu"} if config.offload_nvme is None else nvme
    made = {
        "train_micro_batch_size_per_gpu": config.micro_batch_blocks,
        "gradient_accumulation_steps": accumulation_steps(config, world_size or config.workers),
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return {**made, "checkpoint": {"load_universal": True}} if load_universal else made


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and norms."""
    decayed: list[Any] = []
    plain: list[Any] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty vector in its place
            (decayed if len(shape) >= 2 else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
