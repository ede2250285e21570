"""What `pretrain` is going to take: parameters, memory of a GPU by part, steps and hours; refused where it cannot fit.

Needs neither Ray, a GPU nor the network (for a model of `shapes.yaml`). The memory is `training_memory`'s, the hours
those of `ifguide plan`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ifguide.architecture import require_positions
from ifguide.config import Config, ConfigError, Pretrain
from ifguide.config.pretrain import check_pretrain
from ifguide.folders import BASELINE, CORPUS, PENALISED, TARGET
from ifguide.hardware import Hardware, hardware
from ifguide.planning.command import planned_hardware, planned_tokens
from ifguide.planning.estimate import pretrain_estimate
from ifguide.planning.job import Job, StageEstimate
from ifguide.planning.models import target_shape
from ifguide.planning.table import duration, size
from ifguide.planning.training_memory import USABLE, TrainingMemory, training_memory
from ifguide.shapes import ModelShape
from ifguide.training.adapters import adapter_parameters
from ifguide.training.schedule import Schedule

MOST_WORKERS = 4096
LEAST_STEPS = 100  # of a training that is worth its warm-up


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """`other` is the memory with activation checkpointing if the config has none, and without if it has it."""

    config: Config
    target: ModelShape
    machine: Hardware
    memory: TrainingMemory
    other: TrainingMemory
    tokens: float
    steps: int
    estimate: StageEstimate
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the worker's GPU holds it; of a CPU nothing is known."""
        return _fits(self.config.pretrain, self.memory, self.machine)


def plan_pretrain(config: Config) -> PretrainPlan:
    """The plan of one model of a config, that with the mask or the baseline.

    Raises:
        ConfigError, ValueError, FileNotFoundError: the target's shape cannot be known; says what to set.
    """
    train, block_size = config.pretrain, config.pack_corpus.block_size
    machine = planned_hardware(config) if train.resources.gpus else hardware("cpu")
    tokens, notes = planned_tokens(config, (f"{TARGET}/{CORPUS}", CORPUS) if train.has_own_tokenizer else (CORPUS,))
    target = target_shape(config)
    require_positions(target.name, target.skeleton.config.to_dict(), block_size)
    job = Job(config=config, proxy=target, target=target, tokens=tokens, machine=machine, core=hardware("cpu"))
    schedule = Schedule(
        num_blocks=max(1, math.ceil(tokens / block_size) - train.heldout_blocks),
        batch_blocks=train.batch_blocks,
        epochs=train.epochs,
        seed=config.seed,
    )
    other = replace(train, activation_checkpointing=not train.activation_checkpointing)
    return PretrainPlan(
        config=config,
        target=target,
        machine=machine,
        memory=training_memory(train, target, block_size),
        other=training_memory(other, target, block_size),
        tokens=tokens,
        steps=schedule.steps,
        estimate=pretrain_estimate(job, models=1),
        notes=tuple(notes),
    )


def require_fit(plan: PretrainPlan) -> None:
    """Refuse what the GPU cannot hold.

    Raises:
        ConfigError: names the first key to change, and all changes with which it fits.
    """
    if plan.fits:
        return
    changes = _remedy(plan)
    needed = f"{size(plan.memory.total)} are needed per GPU, {plan.machine.name} has {size(plan.machine.memory)}"
    needed += f" ({USABLE:.0%} of it usable)"
    if changes is None:
        raise ConfigError(f"target: {plan.target.name} cannot fit: {needed}, whatever the other keys of pretrain")
    with_them = training_memory(
        replace(plan.config.pretrain, **changes), plan.target, plan.config.pack_corpus.block_size
    )
    settings = " ".join(f"--set pretrain.{key}={json.dumps(value)}" for key, value in changes.items())
    raise ConfigError(f"pretrain.{next(iter(changes))}: {needed}; it fits with {settings} ({size(with_them.total)})")


def _remedy(plan: PretrainPlan) -> dict[str, Any] | None:
    """The first changes that make it fit: each alone, then more and more of them, the cheapest in time first."""
    train, block_size = plan.config.pretrain, plan.config.pack_corpus.block_size
    single = list(_single_changes(train))
    together: dict[str, Any] = {}
    attempts = list(single)
    for change in single:
        together = {**together, **change}
        attempts.append(dict(together))
    workers = train.workers
    while (workers := 2 * workers) <= MOST_WORKERS:
        attempts.append({"workers": workers, **together, **_all_workers(train)})
    for changes in (_with_needs(train, attempt) for attempt in attempts):
        changed = replace(train, **changes)
        if _go_together(changed) and _fits(changed, training_memory(changed, plan.target, block_size), plan.machine):
            return changes
    return None


def _all_workers(train: Pretrain) -> dict[str, Any]:
    """What makes a training start with all its workers."""
    return {} if train.min_workers is None else {"min_workers": None}


def _single_changes(train: Pretrain) -> Iterator[dict[str, Any]]:
    if train.fewest_workers < train.workers:
        yield _all_workers(train)
    if not train.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if train.workers > 1:
        yield from ({"zero_stage": stage} for stage in range(train.zero_stage + 1, 4))
    smaller = train.micro_batch_blocks
    while smaller > 1:
        smaller //= 2
        yield {"micro_batch_blocks": smaller}
    if not train.offload_optimizer:
        yield {"offload_optimizer": True}
    if not train.offload_parameters:
        yield {"offload_parameters": True}


def _with_needs(train: Pretrain, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, and what they need: offloading needs ZeRO, and that and several workers need DeepSpeed."""
    needed = dict(changes)
    if "offload_optimizer" in changes and train.zero_stage == 0:
        needed.setdefault("zero_stage", 1)
    if "offload_parameters" in changes and train.zero_stage < 3:
        needed["zero_stage"] = 3
    if train.engine == "torch" and changes.keys() & {"offload_optimizer", "offload_parameters", "workers"}:
        needed["engine"] = "deepspeed"
    return needed


def _go_together(train: Pretrain) -> bool:
    try:
        check_pretrain(train)
    except ConfigError:
        return False
    return True


def _fits(train: Pretrain, memory: TrainingMemory, machine: Hardware) -> bool:
    return not train.resources.gpus or memory.total <= USABLE * machine.memory * min(1.0, train.resources.gpus)


def describe(plan: PretrainPlan) -> list[str]:
    """The plan as lines of text."""
    config, train, memory = plan.config, plan.config.pretrain, plan.memory
    block_size, estimate = config.pack_corpus.block_size, plan.estimate
    name = PENALISED if train.use_mask else BASELINE
    start = f"from {train.init_from}" if train.init_from else "from scratch"
    if train.lora is not None:
        start += f", adapters of {adapter_parameters(plan.target.skeleton, train.lora):,} parameters alone"
    accumulation = train.batch_blocks // (train.workers * train.micro_batch_blocks)
    parts = ", ".join(
        f"{part} {size(getattr(memory, part))}"
        for part in ("weights", "gradients", "optimizer", "buffers", "activations", "head")
    )
    fewest = f"{train.fewest_workers} to " if train.fewest_workers < train.workers else ""
    checkpointing = "without" if train.activation_checkpointing else "with"
    limit = f" of {size(plan.machine.memory)}" if train.resources.gpus else ""
    place = f"GPU ({plan.machine.name})" if train.resources.gpus else "worker"
    place += f" of {train.fewest_workers}" if fewest else ""
    hours = "~" if estimate.extrapolated else ""
    engine = "engine torch" if train.engine == "torch" else f"ZeRO {train.zero_stage}"
    return [
        f"would train {name}: {plan.target.name} ({plan.target.known_from}), {plan.target.parameters:,} parameters,"
        f" {start}",
        f"{fewest}{train.workers} workers, {engine}, {train.dtype}, activation checkpointing"
        f" {'on' if train.activation_checkpointing else 'off'}, micro-batches of {train.micro_batch_blocks} blocks,"
        f" {accumulation} micro-batches to a step",
        f"memory per {place}: {size(memory.total)}{limit}: {parts}",
        f"activations {checkpointing} checkpointing: {size(plan.other.activations)}, {size(plan.other.total)} in all",
        f"{plan.steps:,} steps of {train.batch_blocks * block_size:,} tokens:"
        f" {train.epochs:g} epochs of {plan.tokens:.3g} tokens",
        f"{hours}{duration(estimate.seconds / 3600)} ({duration(estimate.low / 3600)} -"
        f" {duration(estimate.high / 3600)}), at least {duration(estimate.floor / 3600)};"
        f" {size(estimate.storage)} on disk",
        *_few_steps(plan),
        *plan.notes,
    ]


def _few_steps(plan: PretrainPlan) -> list[str]:
    """A warning where a training is over before its learning rate has risen and fallen."""
    blocks, wanted = plan.steps * plan.config.pretrain.batch_blocks, plan.config.pretrain.batch_blocks
    if plan.steps >= LEAST_STEPS or blocks < LEAST_STEPS:
        return []
    workers, most = plan.config.pretrain.workers, blocks // LEAST_STEPS
    micro = min(plan.config.pretrain.micro_batch_blocks, most // workers)
    said = f"few steps: pretrain.batch_blocks = {wanted} blocks are one step"
    if not micro:
        return [f"{said}, and {workers} workers want one of {workers} blocks at least; with fewer there can be more"]
    less = f" and pretrain.micro_batch_blocks = {micro}" if micro < plan.config.pretrain.micro_batch_blocks else ""
    batch = most // (workers * micro) * workers * micro
    return [f"{said}; with {batch}{less} there are {LEAST_STEPS} and more"]
