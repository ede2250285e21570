"""A training step taken apart, beside transformers' `Trainer` and a plain compiled PyTorch loop.

    python bench/training_step.py [--dtype bfloat16] [--set acceleration.fused_optimizer=false] [--rounds 11]
    python bench/training_step.py --device cuda --shape EleutherAI/pythia-160m --blocks 16 --block-size 2048
    python bench/training_step.py --small

The sides have one architecture (a GPT-NeoX of 64M parameters unless told otherwise), one batch and one precision:

- `mask`: this project's training loop, 2% of the tokens masked, with what `--set` says; `plain`: without a mask;
- `before`: the same with every switch of the step off;
- `trainer`: transformers' `Trainer` with its defaults;
- `compiled`: a plain loop of the compiled model, clipping and fused AdamW.

Each is a process of its own (but with `--small`). They take turns, each first in its turn; a ratio is the median over
rounds of the ratio within a round. `--process-time` counts the process' own time instead of the clock's, for a machine
that others use: with one thread. Memory is a step's peak of the resident set (on a GPU, of the allocator's) over what
is held between steps when all that is free was given back. `bench.common.step_profile` says what launches, bytes and
waits are.

The last line is one JSON object: trainer_time_ratio (at most .85 is wanted), compiled_loop_ratio (1.02),
mask_time_ratio (1.01), memory_ratio (to `before`: 1), syncs_per_step (0), launches_per_step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.common.step_processes import Ask, serve, started
from bench.common.step_profile import Parts, host_reads, launches_and_bytes
from bench.common.step_sides import Side, Sizes, compiled_side, own_side, trainer_side
from bench.objective_overhead import SMALL as NEOX
from ifguide.config import Pretrain
from ifguide.config.typed_yaml import apply_override
from ifguide.hardware import hardware_of_device
from ifguide.host_memory import trim
from ifguide.planning.training_memory import training_memory
from ifguide.shapes import published_shapes, shape_of_fields

OWN = ("mask", "plain", "before")
SIDES = (*OWN, "trainer", "compiled")
SWITCHES_OFF = {
    "acceleration": {
        "compiled_layers": False,
        "compiled_loss": False,
        "fused_optimizer": False,
        "prefetched_batches": False,
        "kept_memory": False,
        "background_checkpoints": False,
    },
}
TINY = {**NEOX, "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"blocks": 2, "block_size": 32, "rounds": 1, "warm_up": 1}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.serve:
        with sides(options, [options.serve]) as made:
            serve(lambda request: answer(made[options.serve], request, options))
        return
    with asked(options) as ask:
        times = take_turns(ask, options)
        print(f"seconds a step, round by round: {json.dumps(times)}", flush=True)
        memory = {side: ask(side, "memory") for side in options.sides}
        checkpoint = ask("mask", "checkpoint")
        figures = {side: ask(side, "counted") for side in options.sides if side in OWN}
    peak = memory["mask"][1]
    memory = {side: rise for side, (rise, _) in memory.items()}
    seconds = {side: median(each) for side, each in times.items()}
    for side in options.sides:
        tokens = options.blocks * options.block_size / seconds[side]
        print(f"{side:9} {1000 * seconds[side]:9.1f} ms a step, {tokens:9,.0f} tokens/s, {memory[side] / 1e6:8.1f} MB")
    for side, each in figures.items():
        print(f"{side}: " + ", ".join(f"{name} {1000 * part:.1f} ms" for name, part in each["parts"].items()))
    print(
        "slowest operators of mask: "
        + ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in figures["mask"]["slowest"].items())
    )
    result = {
        "trainer_time_ratio": ratio(times, "mask", "trainer"),
        "compiled_loop_ratio": ratio(times, "mask", "compiled"),
        "mask_time_ratio": ratio(times, "mask", "plain"),
        "memory_ratio": round(memory["mask"] / memory["before"], 4) if "before" in memory else None,
        "syncs_per_step": figures["mask"]["syncs"],
        "launches_per_step": figures["mask"]["launches"],
        "before_time_ratio": ratio(times, "mask", "before"),
        "launches_before": figures["before"]["launches"] if "before" in figures else None,
        "allocated_megabytes": {side: round(each["bytes"] / 1e6, 1) for side, each in figures.items()},
        "checkpoint_seconds": checkpoint,
        "peak_megabytes": round(peak / 1e6, 1),
        **of_peak(options, options.blocks * options.block_size / seconds["mask"]),
        "seconds": {side: round(value, 4) for side, value in seconds.items()},
        "megabytes": {side: round(value / 1e6, 1) for side, value in memory.items()},
        "settings": {
            name: getattr(options, name) for name in ("dtype", "blocks", "block_size", "rounds", "threads", "set")
        },
    }
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="a hub id of ifguide/shapes.yaml (default: a GPT-NeoX of 64M parameters)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--process-time", action="store_true", help="instead of the clock's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of `pretrain`, for our sides")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--small", action="store_true", help="toy sizes, one round: whether it runs")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    if options.process_time and (options.device == "cuda" or options.threads > 1):
        parser.error("--process-time: on a CPU with --threads 1 alone; threads that wait take time, too")
    if "mask" not in options.sides:
        parser.error("--sides: mask is what the others are set beside")
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    """What the sides have in common."""
    if options.shape:
        fields = dict(published_shapes()[options.shape]["fields"])
    else:
        fields = {**(TINY if options.small else NEOX), "max_position_embeddings": options.block_size}
    names = ("blocks", "block_size", "dtype", "device", "threads")
    return Sizes(fields=fields, **{name: getattr(options, name) for name in names})


def of_peak(options: argparse.Namespace, tokens_per_second: float) -> dict[str, Any]:
    """The rate of `mask`, its share of a GPU's peak, and the memory that `pretrain --dry-run` plans."""
    shape = shape_of_fields("target", "its fields", dict(sizes_of(options).fields))
    batch = {"batch_blocks": options.blocks, "micro_batch_blocks": options.blocks}
    train = Pretrain(dtype=options.dtype, engine="torch", zero_stage=0, **batch)
    planned = round(training_memory(train, shape, options.block_size).total / 1e6, 1)
    machine = hardware_of_device(torch.cuda.get_device_name()) if options.device == "cuda" else None
    flop = tokens_per_second * shape.training_flop(options.block_size)
    return {
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu": None if machine is None else round(flop / machine.peak(options.dtype), 4),
        "planned_megabytes": planned,
    }


@contextmanager
def sides(options: argparse.Namespace, names: Any) -> Iterator[dict[str, Side]]:
    """The sides, ready to run."""
    sizes = sizes_of(options)
    chosen: dict[str, Any] = {}
    for override in options.set:
        apply_override(chosen, override)
    made: dict[str, Side] = {}
    with tempfile.TemporaryDirectory(prefix="training-step-") as temporary:
        for name in names:
            folder = Path(temporary) / name
            if name in OWN:
                switches = SWITCHES_OFF if name == "before" else chosen
                made[name] = own_side(folder, sizes, switches, masked=name != "plain")
            else:
                made[name] = trainer_side(folder, sizes) if name == "trainer" else compiled_side(sizes)
        try:
            yield made
        finally:
            for side in made.values():
                side.close()


@contextmanager
def asked(options: argparse.Namespace) -> Iterator[Ask]:
    """What asks the sides: in this process at toy size, else each in its own."""
    if options.small:
        with sides(options, options.sides) as made:
            yield lambda side, request: answer(made[side], request, options)
    else:
        with started(options.sides, ["-m", "bench.training_step", *sys.argv[1:], "--serve"]) as ask:
            yield ask


def answer(side: Side, request: str, options: argparse.Namespace) -> Any:
    """A figure of a side: the seconds of a `step`, its `memory`, a `checkpoint`'s seconds, or what is `counted`."""
    if request == "step":
        return timed(side, options)
    if request == "memory":
        return memory_rise(side, options)
    return checkpoint_seconds(side) if request == "checkpoint" else counted(side, options)


def take_turns(ask: Ask, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each side in each round, after the rounds that are not counted."""
    times: dict[str, list[float]] = {side: [] for side in options.sides}
    names = list(options.sides)
    for turn in range(-options.warm_up, options.rounds):
        first = turn % len(names)
        for side in names[first:] + names[:first]:
            seconds = ask(side, "step")
            if turn == -options.warm_up:
                print(f"{side}: the first step took {seconds:.1f} s", file=sys.stderr)
            if turn >= 0:
                times[side].append(seconds)
    return times


def timed(side: Side, options: argparse.Namespace, steps: int = 1) -> float:
    clock = time.process_time if options.process_time else time.perf_counter
    synchronize(options)
    started = clock()
    for _ in range(steps):
        side.step()
    synchronize(options)
    return clock() - started


def synchronize(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def ratio(times: dict[str, list[float]], side: str, other: str) -> float | None:
    """The median over rounds of one side's time over the other's; None where the other did not run."""
    if other not in times:
        return None
    return round(median(a / b for a, b in zip(times[side], times[other], strict=True)), 4)


def counted(side: Side, options: argparse.Namespace) -> dict[str, Any]:
    """Waits, launches, bytes and the parts' seconds of a side of ours. Its steps are slower from here on."""
    assert side.loop is not None
    while (side.loop.step + 1) % side.loop.train.log_steps < 3:  # three steps of which none is logged
        side.step()
    reads = host_reads(side.step)
    launches, allocated, slowest = launches_and_bytes(side.step, 1)
    parts, steps = Parts(side.loop, options.device), 1 if options.small else 3
    whole = timed(side, options, steps)
    return {
        "syncs": sum(reads.values()),
        "launches": launches,
        "bytes": allocated,
        "slowest": slowest,
        "parts": parts.of_step(whole, steps),
    }


def checkpoint_seconds(side: Side) -> float:
    """For how long a checkpoint holds up the steps."""
    assert side.loop is not None
    started = time.perf_counter()
    side.loop._save(None)
    return round(time.perf_counter() - started, 4)


def memory_rise(side: Side, options: argparse.Namespace) -> list[int]:
    """Bytes of a step's peak above what is held between steps, and that peak."""
    for _ in range(2):
        side.step()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        peak = torch.cuda.max_memory_allocated()
        return [peak - before, peak]
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    side.step()
    peak = status_bytes("VmHWM")
    gc.collect()
    trim()
    return [max(1, peak - status_bytes("VmRSS")), peak]


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    main()
