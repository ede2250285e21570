"""What computes a training's steps: DeepSpeed on any number of ranks, or plain torch on one device.

An engine is given micro-batches and a learning rate and does what depends on the device and on other ranks: it
adds up the gradients of a step's micro-batches over ranks, clips their norm, and moves the weights (AdamW). The loss
has one global token count for its only denominator; DeepSpeed divides gradients by the accumulation steps and
averages over ranks, so its loss is scaled to undo both.

A DeepSpeed checkpoint of another number of ranks is converted to DeepSpeed's universal form first. DeepSpeed reads its
files with pickle: only those are given to it whose digests the training wrote down. Whoever can write both is trusted,
as the run directory's owner. Torch's are read with `weights_only`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ifguide.artifacts import remove_tree
from ifguide.config import ConfigError, Pretrain
from ifguide.training.adapters import load_trained, trained_state
from ifguide.training.checkpoints import STATE, UNIVERSAL, Checkpoint
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.losses import Loss, MicroBatch
from ifguide.training.schedule import accumulation_steps, deepspeed_config, parameter_groups

CLIPPING_EPSILON = 1e-6  # added to the norm, as torch's own clipping does
PREFIX = "model."  # of the LM's weights in a LanguageModelLoss


class Engine(Protocol):
    """One rank of a training."""

    device: torch.device
    module: LanguageModelLoss

    def loss(self, batch: MicroBatch) -> Loss:
        """The objective of `LanguageModelLoss` on a micro-batch."""

    def begin_step(self, learning_rate: float) -> None:
        """Before the first micro-batch of a step."""

    def backward(self, loss: Tensor) -> None:
        """Once for each micro-batch."""

    def end_step(self) -> Tensor | float | None:
        """Clip, move the weights, and give the gradient's norm before clipping (None: the engine does not tell). A
        tensor is left on the device: reading it waits."""

    def save(self, folder: Path) -> None:
        """Write this rank's files under `folder`."""

    def copied(self) -> Callable[[Path], None] | None:
        """What does `save` of the state as it is now, while training goes on; None: the engine cannot."""

    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The LM's trained weights in a checkpoint by their own names, in full precision; on one rank alone."""


def build_optimizer(module: LanguageModelLoss, config: Pretrain) -> torch.optim.Optimizer:
    """AdamW over the trained weights. Raises ConfigError where it is to be DeepSpeed's, which cannot be built here."""
    groups = parameter_groups(module, config.weight_decay)
    if config.acceleration.deepspeed_optimizer:
        return _deepspeed_adamw(groups, config)
    fused = config.acceleration.fused_optimizer or None  # None: as torch chooses
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def _deepspeed_adamw(groups: list[dict[str, Any]], config: Pretrain) -> torch.optim.Optimizer:
    """DeepSpeed's kernel for where the optimizer's state is: the device, or the CPU."""
    import deepspeed.ops.adam as adam

    on_gpu = config.resources.gpus > 0 and not config.offload_optimizer
    kind = adam.FusedAdam if on_gpu else adam.DeepSpeedCPUAdam
    try:
        made: torch.optim.Optimizer = kind(groups, lr=config.learning_rate, betas=config.betas)
    except Exception as error:  # of its build: whatever ninja, a compiler or the machine has to say
        raise ConfigError(
            f"pretrain.acceleration.deepspeed_optimizer: {kind.__name__} cannot be built here ({error}); it takes ninja"
            f" and {'nvcc' if on_gpu else 'g++'}: install them, or unset it"
        ) from error
    return made


class TorchEngine:
    """One device; bfloat16 is autocast over float32 weights."""

    def __init__(self, config: Pretrain, build: Callable[[], LanguageModelLoss], checkpoint: Checkpoint | None):
        if config.resources.gpus and not torch.cuda.is_available():
            raise ConfigError(
                f"pretrain.resources.gpus: {config.resources.gpus:g} is set, and torch sees no GPU here; set it to 0,"
                " or train on a machine with one"
            )
        self.config = config
        self.device = torch.device("cuda" if config.resources.gpus else "cpu")
        self.module = build().to(self.device).train()
        self.module.check(documents=config.document_attention)
        self.module.taken_back_as_is = True
        self.optimizer = build_optimizer(self.module, config)
        if checkpoint is not None:
            state = torch.load(checkpoint.state / "torch.pt", map_location=self.device, weights_only=True)
            load_trained(self.module.model, state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def loss(self, batch: MicroBatch) -> Loss:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return Loss(*self.module(*batch))

    def begin_step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def end_step(self) -> Tensor:
        if not self.config.acceleration.fused_optimizer:
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.gradient_clipping)
            self.optimizer.step()
            return norm
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # The kernel divides each gradient by this as it reads it: clipping takes no pass of its own.
        excess = ((norm + CLIPPING_EPSILON) / self.config.gradient_clipping).clamp(min=1.0).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = excess, torch.zeros_like(excess)  # type: ignore[attr-defined]
        self.optimizer.step()
        return norm

    def save(self, folder: Path) -> None:
        _write_torch(self._state(), folder)

    def copied(self) -> Callable[[Path], None]:
        state = self._state()
        return partial(_write_torch, tree_map_only(Tensor, lambda value: value.detach().to("cpu", copy=True), state))

    def _state(self) -> dict[str, Any]:
        return {"model": trained_state(self.module.model), "optimizer": self.optimizer.state_dict()}

    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        return torch.load(checkpoint.state / "torch.pt", map_location="cpu", weights_only=True)["model"]


def _write_torch(state: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "torch.pt")


class DeepSpeedEngine:
    """One rank of `world_size`, whose process group is there already. `leads`: it prepares its machine's files, and the
    others wait for it at the `barrier`."""

    def __init__(
        self,
        config: Pretrain,
        build: Callable[[], LanguageModelLoss],
        checkpoint: Checkpoint | None,
        *,
        leads: bool,
        world_size: int,
        barrier: Callable[[], None],
    ):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.config, self.scale = config, world_size * accumulation_steps(config, world_size)
        source = None
        if checkpoint is not None:
            reshape = checkpoint.world_size != world_size and config.zero_stage > 0
            source = _universal(checkpoint, leads, config, barrier) if reshape else checkpoint.folder
        universal = source is not None and source.suffix == UNIVERSAL
        settings = deepspeed_config(config, world_size=world_size, load_universal=universal)
        # alive while the model is built: HF then partitions ZeRO-3 parameters as it initialises them
        kept = HfDeepSpeedConfig(settings) if config.zero_stage == 3 else None
        module = build()
        del kept
        optimizer = build_optimizer(module, config)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # until `begin_step`: no weight moves before
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        if config.zero_stage == 0 and config.dtype == "bfloat16":
            self._forget_steps()
        self.device = torch.device(self.engine.device)
        self.module = self.engine.module
        if config.acceleration.deepspeed_compile:
            self.engine.compile()
        if config.zero_stage < 3:  # under it the order of the modules' calls is recorded from the first on
            self.module.check(documents=config.document_attention)
        self.engine.train()
        if source is not None:
            path, _ = self.engine.load_checkpoint(str(source), tag=STATE, load_module_strict=not config.lora)
            if path is None:
                raise ValueError(f"{source} cannot be loaded; delete it to go on from the checkpoint before it")
        if universal and config.zero_stage == 3:
            self._part_groups()

    def _forget_steps(self) -> None:
        """Take back what the optimizer counts: without ZeRO DeepSpeed has it take a step on gradients of zero, as it
        copies the bfloat16 weights."""
        optimizer = self.engine.optimizer.optimizer
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group.pop("step", None)  # where DeepSpeed's own AdamW counts

    def _part_groups(self) -> None:
        """Give each group of weights its own decay and count of steps again: DeepSpeed has loaded the first one's into
        all of them, and one count for all, which each would count on."""
        optimizer = self.engine.optimizer.optimizer
        for group, decay in zip(optimizer.param_groups, (self.config.weight_decay, 0.0), strict=False):
            group["weight_decay"] = decay
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):  # DeepSpeed's own AdamW has a number, or a count for a group
                state["step"] = state["step"].clone()

    def loss(self, batch: MicroBatch) -> Loss:
        return Loss(*self.engine(*batch))

    def begin_step(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.scale)
        self.engine.step()  # moves the weights after the last micro-batch of a step

    def end_step(self) -> Tensor | float | None:
        norm: Tensor | float | None = self.engine.get_global_grad_norm()
        return norm

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=self.config.lora is not None
        )

    def copied(self) -> None:
        return None  # all ranks write together, and wait for each other

    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        if self.config.zero_stage == 0:
            path = checkpoint.state / "mp_rank_00_model_states.pt"
            content = torch.load(path, map_location="cpu", weights_only=False)
            state = content["module"] | self._masters(content["optimizer"].get("fp32_groups", []))
        else:
            state = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.folder), tag=STATE, exclude_frozen_parameters=self.config.lora is not None
            )
        return {name.removeprefix(PREFIX): value for name, value in state.items()}

    def _masters(self, values: list[list[Tensor]]) -> dict[str, Tensor]:
        """The optimizer's float32 copies, by group, under all names of the bfloat16 weights they are of."""
        groups = [group["params"] for group in parameter_groups(self.module, 0.0)][: len(values)]
        of_parameter = {
            id(parameter): value
            for group, masters in zip(groups, values, strict=True)
            for parameter, value in zip(group, masters, strict=True)
        }
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: of_parameter[id(parameter)] for name, parameter in named if id(parameter) in of_parameter}


def _universal(checkpoint: Checkpoint, leads: bool, config: Pretrain, barrier: Callable[[], None]) -> Path:
    """The checkpoint in DeepSpeed's universal form beside it: converted once, by the rank that leads."""
    final = checkpoint.folder.with_suffix(UNIVERSAL)
    if leads:
        remove_tree(final)  # of an attempt that was killed: nothing says whether it is whole
        from deepspeed.checkpoint import ds_to_universal

        part = final.with_suffix(f"{UNIVERSAL}-part")
        remove_tree(part)
        part.mkdir()
        processes = max(1, int(config.resources.cpus))
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=str(checkpoint.state),
                    output_folder=str(part / STATE),
                    num_extract_workers=processes,
                    num_merge_workers=processes,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        part.rename(final)
    barrier()
    return final
