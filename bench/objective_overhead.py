"""What the objective costs: a step with a mask against the same without, and against Hugging Face's `labels=` loss.

    python bench/objective_overhead.py [--blocks 4] [--block-size 512] [--rounds 11] [--threads N]
    python bench/objective_overhead.py --device cuda --shape EleutherAI/pythia-160m --blocks 16 --block-size 1024
    python bench/objective_overhead.py --device cuda --shape meta-llama/Llama-3.2-1B --blocks 4 --block-size 1024

A step is the forward pass, the backward pass and AdamW, on random tokens of which 2% are masked. `mask` and `plain`
are one model (`ifguide.training.lm_loss`), `hf` another of the same weights. The sides take turns in one process, each
first in its turn; a ratio is the median over rounds of the ratio within a round. float32 on a CPU, bfloat16 weights
on a GPU.

Memory is what the forward and backward pass take above model and optimizer: on a CPU the rise of the resident set's
peak (VmHWM, reset after a first step), in a process of its own for each side whose allocator gives freed memory back at
once; on a GPU the rise of torch's peak of allocated bytes. Gradients are part of it, on every side.

The last line is one JSON object: mask_time_ratio (at most 1.01 is wanted), hf_time_ratio (1.0), hf_memory_ratio (0.5).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ifguide.config import ModelSource
from ifguide.hardware import hardware_of_device
from ifguide.models import load_model
from ifguide.shapes import published_shapes, shape_of_fields
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.objective import Objective

SIDES = ("mask", "plain", "hf")
MASKED = 0.02
SMALL = {
    "model_type": "gpt_neox",
    "vocab_size": 50_304,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}


@dataclass
class Work:
    """One side: `backward` takes a micro-batch forward and back, `step` moves the weights as well."""

    backward: Callable[[], None]
    step: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="a hub id of ifguide/shapes.yaml (default: a GPT-NeoX of 64M parameters)")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1, help="of each side in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chunk-tokens", type=int, help="instead of the device's own")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(resident_rise(workers(options, [options.memory_of])[options.memory_of])))
        return
    work = workers(options, SIDES)
    times = take_turns(work, options)
    memory = {side: memory_of(side, work[side], options) for side in SIDES}
    tokens = options.blocks * options.block_size
    for side in SIDES:
        seconds = median(times[side])
        print(
            f"{side:6} {1000 * seconds:9.1f} ms a step, {tokens / seconds:10,.0f} tokens/s"
            f"{mfu(options, tokens / seconds)}, {memory[side] / 1e6:9.1f} MB above model and optimizer"
        )
    result = {
        "mask_time_ratio": round(ratio(times, "mask", "plain"), 4),
        "hf_time_ratio": round(ratio(times, "mask", "hf"), 4),
        "hf_memory_ratio": round(memory["mask"] / memory["hf"], 4),
        "rounds": options.rounds,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, no GPU",
        "threads": options.threads,
        "sizes": {"blocks": options.blocks, "block_size": options.block_size, **sizes(fields_of(options))},
        "seconds": {side: round(median(times[side]), 4) for side in SIDES},
        "megabytes": {side: round(memory[side] / 1e6, 1) for side in SIDES},
    }
    print(json.dumps(result))


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """The model's config fields."""
    if options.shape:
        return dict(published_shapes()[options.shape]["fields"])
    return {**SMALL, "max_position_embeddings": options.block_size}


def sizes(fields: dict[str, Any]) -> dict[str, int]:
    """What the cost depends on."""
    shape = shape_of_fields("target", "its fields", fields)
    return {
        "parameters": shape.parameters,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "vocabulary": shape.vocabulary,
    }


def workers(options: argparse.Namespace, sides: Any) -> dict[str, Work]:
    """The sides, ready to run; those of the chunked loss share a model."""
    generator = torch.Generator().manual_seed(0)
    fields = fields_of(options)
    shape = (options.blocks, options.block_size)
    tokens = torch.randint(fields["vocab_size"], shape, generator=generator).to(options.device)
    mask = (torch.rand(shape, generator=generator) < MASKED).to(options.device)
    lengths = torch.full((options.blocks,), options.block_size, device=options.device)
    count = options.blocks * (options.block_size - 1)
    made: dict[str, Work] = {}
    if {"mask", "plain"} & set(sides):
        ours = LanguageModelLoss(model_of(options), Objective(), chunk_tokens=options.chunk_tokens)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-5)
        for side, own in (("mask", mask), ("plain", None)):
            made[side] = work_of(optimizer, lambda own=own: ours(tokens, lengths, own, count)[0])  # type: ignore[misc]
    if "hf" in sides:
        plain = model_of(options)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5)
        made["hf"] = work_of(optimizer, lambda: plain(input_ids=tokens, labels=tokens, use_cache=False).loss)
    return {side: made[side] for side in sides}


def model_of(options: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return load_model(ModelSource(architecture=fields_of(options)), dtype=dtype, device=options.device).train()


def work_of(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> Work:
    def backward() -> None:
        loss().backward()

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Work(backward=backward, step=step)


def take_turns(work: dict[str, Work], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each side in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {side: [] for side in work}
    names = list(work)
    for turn in range(-1, options.rounds):
        first = turn % len(names)
        for side in names[first:] + names[:first]:
            synchronize(options)
            started = time.perf_counter()
            for _ in range(options.steps):
                work[side].step()
            synchronize(options)
            if turn >= 0:
                times[side].append((time.perf_counter() - started) / options.steps)
    return times


def synchronize(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def ratio(times: dict[str, list[float]], side: str, other: str) -> float:
    """The median over rounds of one side's time over the other's."""
    return median(a / b for a, b in zip(times[side], times[other], strict=True))


def mfu(options: argparse.Namespace, tokens_per_second: float) -> str:
    gpu = hardware_of_device(torch.cuda.get_device_name()) if options.device == "cuda" else None
    if gpu is None:
        return ""
    per_token = shape_of_fields("target", "its fields", fields_of(options)).training_flop(options.block_size)
    return f", MFU {tokens_per_second * per_token / gpu.peak('bfloat16'):.1%}"


def memory_of(side: str, work: Work, options: argparse.Namespace) -> int:
    """Bytes that a forward and backward pass of a side takes at its peak above what was there before."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.backward()
        peak = torch.cuda.max_memory_allocated() - before
        work.step()  # drops the gradients
        return peak
    # memory above 64 kB then goes back to the system as soon as it is freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "bench.objective_overhead", *sys.argv[1:], "--memory-of", side]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.split()[-1])


def resident_rise(work: Work) -> int:
    """The rise of this process' peak resident set over a forward and backward pass, in bytes (Linux)."""
    work.step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = status_bytes("VmRSS")
    work.backward()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    main()
