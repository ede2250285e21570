"""What training takes of a GPU's memory, by part, from the model's shape alone.

    weights + gradients + optimizer + buffers + activations + head

With P parameters of w bytes (2 in bfloat16) on N workers, ZeRO stage z splits over them the optimizer's states (z >= 1:
12 P bytes, float32 weights and two moments; 8 P without ZeRO in float32, where the weights are those of the model), the
gradients (z >= 2) and the weights (z = 3). DeepSpeed also holds what it sends (`buffers`). Activations are what
autograd keeps of one micro-batch: they are counted, not estimated from a formula, by running the blocks on torch's meta
device and adding up the tensors that are saved, with attention as a flash kernel keeps it. With checkpointing: each
block's input, and all of one block. Of adapters (`pretrain.lora`) gradients, states and buffers are theirs alone.
What is offloaded is in the CPU's memory, which is not counted. There are the optimizer's states and, from stage 2 on,
with them the gradients, of which a bucket waits on the GPU; and the weights, of which those are here that ZeRO-3 has
gathered for the layers at work.

Cost: a tenth of a second per model and no memory. The allocator's fragments are in none of the parts: see USABLE.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ifguide.config import Pretrain
from ifguide.models import transformer_blocks
from ifguide.shapes import ModelShape
from ifguide.training.adapters import adapter_parameters
from ifguide.training.lm_loss import CHUNK_VALUES

USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own, NCCL's, and what lies between allocations
BUCKET = 5e8  # elements that DeepSpeed reduces or gathers at once, by default
LIVE = 1e9  # parameters that ZeRO-3 holds gathered at once, by default


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one worker."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All parts: the peak, for the head's part is taken while all activations are kept."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.head


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that autograd keeps per block of the corpus: `whole`, and `checkpointed`."""

    whole: int
    checkpointed: int


def training_memory(config: Pretrain, shape: ModelShape, block_size: int) -> TrainingMemory:
    """The parts for a config and a target, blocks of `block_size` tokens; on as few workers as it may start with."""
    parameters, width, trained = float(shape.parameters), _width(config), _trained_parameters(config, shape)
    workers, stage = config.fewest_workers, 0 if config.engine == "torch" else config.zero_stage
    states = _state_bytes(config) * trained / (workers if stage >= 1 else 1)
    kept = count_activations(shape, block_size, config.dtype)
    per_block = kept.checkpointed if config.activation_checkpointing else kept.whole
    tokens = config.micro_batch_blocks * block_size
    return TrainingMemory(
        weights=_weights(config, parameters),
        gradients=_gradients(config, trained),
        optimizer=0.0 if config.offload_optimizer else states,
        buffers=_buffers(config, parameters, trained, width),
        activations=float(config.micro_batch_blocks * per_block),
        head=_head(tokens, shape, width, trained=config.lora is None),
    )


def checkpoint_bytes(config: Pretrain, shape: ModelShape) -> float:
    """One checkpoint, of all ranks: the weights that are trained, and the optimizer's state."""
    trained = _trained_parameters(config, shape)
    if config.engine == "torch":
        return 12.0 * trained  # float32, whatever the products are in
    return trained * (_width(config) + _state_bytes(config))


def _weights(config: Pretrain, parameters: float) -> float:
    if config.offload_parameters:
        return _held_width(config) * min(parameters, LIVE)
    return _held_width(config) * parameters / (config.fewest_workers if config.parts_parameters else 1)


def _gradients(config: Pretrain, trained: float) -> float:
    parted = config.engine == "deepspeed" and config.zero_stage >= 2
    held = trained / (config.fewest_workers if parted else 1)
    return _held_width(config) * (min(held, BUCKET) if parted and config.offload_optimizer else held)


def _width(config: Pretrain) -> int:
    """Of what products take."""
    return 2 if config.dtype == "bfloat16" else 4


def _held_width(config: Pretrain) -> int:
    """Of weights and gradients: the engine `torch` holds float32, and casts for each product."""
    return 4 if config.engine == "torch" else _width(config)


def _state_bytes(config: Pretrain) -> int:
    """Of the optimizer, for a weight that is trained: two moments and, unless that is one, a copy in float32."""
    return 8 if config.engine == "torch" or (config.dtype == "float32" and config.zero_stage == 0) else 12


def _trained_parameters(config: Pretrain, shape: ModelShape) -> float:
    return float(shape.parameters if config.lora is None else adapter_parameters(shape.skeleton, config.lora))


def _head(tokens: int, shape: ModelShape, width: int, *, trained: bool) -> float:
    """What `ifguide.training.lm_loss` takes: a chunk's logits twice in float32, its gradient of the head's weights in
    float32 (and once more in the weights' own precision where that is another), and that of the hidden states."""
    weights = (4 if width == 4 else 4 + width) * shape.head if trained else 0
    logits = min(CHUNK_VALUES["cuda"], tokens * shape.vocabulary)
    return float(8 * logits + weights + width * tokens * shape.hidden)


def _buffers(config: Pretrain, parameters: float, trained: float, width: int) -> float:
    """What is on its way between workers during the backward pass, or the gradients in float32 that a step makes of its
    share: the larger. With ZeRO, DeepSpeed takes a whole bucket, however few the workers and the parameters. Of the
    engine `torch` the weights in bfloat16, which autocast makes and keeps for the backward pass."""
    if config.engine == "torch":
        return width * parameters if width < 4 else 0.0
    workers, stage = config.fewest_workers, config.zero_stage
    alone, share = workers == 1, trained / workers if stage >= 1 else trained
    step = 0.0 if width == 4 or config.offload_optimizer else 4 * share
    if stage == 0:
        return max(0.0 if alone else width * min(trained, BUCKET), step)
    gathered = width * min(trained, LIVE) if stage == 3 and not alone and not config.offload_parameters else 0.0
    return max(width * BUCKET + gathered, step)


def count_activations(shape: ModelShape, block_size: int, dtype: str) -> Activations:
    """What the backbone (all but the LM head) keeps for the backward pass of one block of tokens."""
    model = copy.deepcopy(shape.skeleton).to(getattr(torch, dtype)).train().requires_grad_(True)
    _keep_as_flash_does(model)
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}  # the storages stay alive, so that no two have one address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    marks: list[int] = []

    def mark(*_: Any) -> None:
        marks.append(sum(storage.nbytes() for storage in kept.values()))

    for block in transformer_blocks(model)[1]:
        block.register_forward_pre_hook(mark)
        block.register_forward_hook(mark)
    tokens = torch.zeros(1, block_size, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.base_model(input_ids=tokens, use_cache=False)[0]
    except RuntimeError as error:  # experts in float32, for one: torch cannot multiply by them without data
        raise ValueError(f"{shape.name}: activations in {dtype} cannot be counted: {error}") from error
    mark()
    by_block = [after - before for before, after in zip(marks[:-1:2], marks[1::2], strict=True)]
    outside = marks[-1] - sum(by_block)
    return Activations(
        whole=marks[-1], checkpointed=outside + max(by_block) + len(by_block) * hidden.numel() * hidden.element_size()
    )


class _FlashAttention(torch.autograd.Function):
    """Saves what a flash kernel saves: queries, keys, values, the output, one float32 a row. It computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _keep_as_flash_does(model: Any) -> None:
    AttentionInterface.register("ifguide_counted", _attend)
    model.config._attn_implementation = "ifguide_counted"
    model.config.pad_token_id = None  # with one, transformers looks for it among the tokens, which meta cannot
