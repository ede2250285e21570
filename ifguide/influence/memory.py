"""What scoring takes in memory, and the micro-batch that fits.

The estimate counts what grows: weights in both precisions, V, and per block the widest layer's streams, the attention
weights of one chunk (the whole of them for the exact engine), and for `position` the activations that the backward
pass needs. It is an upper bound by intent; an allocation that fails all the same halves the micro-batch.

`keep_memory` stops a CPU process from giving its memory back between two products and taking it again page by page,
which cost a quarter of the time of the `fast` preset.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ifguide.host_memory import keep_freed_memory
from ifguide.influence.head_derivatives import CHUNK_VALUES
from ifguide.influence.paired_attention import QUERY_CHUNK

# Beyond these, larger batches gain nothing: caches on a CPU, full tensor cores on a GPU.
MAX_TOKENS = {"cpu": 2048, "cuda": 65_536}
USABLE = 0.6
TRIM_ABOVE = (1 << 31) - 1  # bytes


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes: `fixed` whatever the micro-batch, `per_block` for each block of it."""

    fixed: int
    per_block: int

    def micro_batch(self, block_size: int, device: torch.device, available: int) -> int:
        """The largest power of two of blocks within MAX_TOKENS and the usable part of `available` bytes, or 1."""
        by_speed = max(1, MAX_TOKENS.get(device.type, MAX_TOKENS["cpu"]) // block_size)
        by_memory = max(1, int(USABLE * available - self.fixed) // self.per_block)
        return 1 << (min(by_speed, by_memory).bit_length() - 1)


def estimate_memory(
    model: PreTrainedModel,
    names: list[str],
    *,
    engine: str,
    precision: str,
    rank: int | None,
    behaviours: int,
    block_size: int,
) -> MemoryEstimate:
    """engine: forward, difference, or backward (`position`)."""
    config = model.config.get_text_config()
    linears = [model.get_submodule(name) for name in names]
    shapes = [(module.out_features, module.in_features) for module in linears if isinstance(module, nn.Linear)]
    tracked = sum(out * inner for out, inner in shapes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    low = 2 if precision == "bfloat16" else 4
    folded = engine == "difference" and precision == "float32" and rank is None
    directions = behaviours * sum(out * inner if rank is None else rank * (out + inner) for out, inner in shapes)
    copies = behaviours if engine == "difference" and rank is None else 1  # of the weights, each beside a direction
    fixed = 4 * parameters + low * directions + (low * tracked * copies if precision == "bfloat16" else 0)
    fixed += 8 * behaviours * tracked if folded else 0
    fixed += 4 * 4 * CHUNK_VALUES.get(model.device.type, CHUNK_VALUES["cpu"])
    widest, width, heads = max(out + inner for out, inner in shapes), config.hidden_size, config.num_attention_heads
    if engine == "backward":
        per_layer = sum(out + inner for out, inner in shapes) / config.num_hidden_layers + 4 * width
        per_block = block_size * config.num_hidden_layers * per_layer * 4 * 1.5
    elif engine == "difference":
        streams = 2 * behaviours
        per_block = block_size * streams * 4 * (2 * widest + 6 * width)
        per_block += 4 * 4 * heads * min(QUERY_CHUNK, block_size) * block_size
    else:
        per_block = block_size * 2 * 4 * (2 * widest + 6 * width) + 8 * 4 * heads * block_size**2
    return MemoryEstimate(fixed=int(fixed), per_block=int(per_block))


def keep_memory() -> None:
    """Let this process keep the memory it frees, in large pages: for processes that do nothing but score.

    By default glibc returns every large block at once, and its next use faults each page of 4 kB in again. Call it
    before the first tensor is made; large pages are torch's own option (THP_MEM_ALLOC_ENABLE), read then. Elsewhere
    than on Linux with glibc it changes nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory(TRIM_ABOVE)


def available_bytes(device: torch.device, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be had on the device. On a CPU that counts the page cache, which the kernel gives back when asked:
    without it a file that was just written would look like memory in use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a CPU, torch raises a RuntimeError that only its text tells apart."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
