"""What a training says of itself at each logging step: the rate, the share of the hardware's peak, the time left.

    MFU = tokens a second * model FLOP a token / (workers * peak FLOP a second of one device)

The FLOP are those of the forward and backward pass (`ModelShape.training_flop`): what is computed again for
activation checkpointing is not counted, and attention is counted as causal. Peaks are the data sheets' dense ones in
`ifguide/hardware.yaml`; on any other device, a CPU for one, there is no MFU.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ifguide.config import Pretrain
from ifguide.hardware import hardware_of_device
from ifguide.shapes import shape_of_fields
from ifguide.storage import is_remote
from ifguide.telemetry import Sink, cut_torn_line, format_seconds, log
from ifguide.training.adapters import adapter_parameters


class Meter:
    """Rates between two logging steps. `flop_per_second` is the peak of all workers together; None: not known."""

    def __init__(
        self,
        *,
        step: int,
        steps: int,
        tokens_per_step: int,
        flop_per_token: float | None = None,
        flop_per_second: float | None = None,
    ):
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.flop_per_token, self.flop_per_second = flop_per_token, flop_per_second
        self.step, self.time = step, time.monotonic()

    def values(self, step: int) -> dict[str, Any]:
        """`tokens_per_second`, `mfu` (None where unknown), `steps`, `eta_seconds`, since this was last called."""
        now = time.monotonic()
        seconds, done = max(now - self.time, 1e-9), step - self.step
        self.step, self.time = step, now
        rate = done * self.tokens_per_step / seconds
        has_peak = self.flop_per_token is not None and self.flop_per_second is not None
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flop_per_token / self.flop_per_second if has_peak else None,  # type: ignore[operator]
            "steps": self.steps,
            "eta_seconds": seconds / max(done, 1) * (self.steps - step),
        }


def meter_of(
    fields: Mapping[str, Any],
    train: Pretrain,
    *,
    block_size: int,
    step: int,
    steps: int,
    device: torch.device,
    workers: int,
) -> Meter:
    """The meter of a training of a model with these config `fields`, on `workers` devices like this one."""
    machine = hardware_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    per_token = None
    if machine is not None:  # else it would be counted for nothing
        with contextlib.suppress(ValueError):  # of a model whose FLOP are not known
            shape = shape_of_fields("target", "its config", dict(fields), traced=False)
            adapters = adapter_parameters(shape.skeleton, train.lora) if train.lora else None
            per_token = shape.training_flop(block_size, adapters=adapters)
    return Meter(
        step=step,
        steps=steps,
        tokens_per_step=train.batch_blocks * block_size,
        flop_per_token=per_token,
        flop_per_second=None if machine is None else workers * machine.peak(train.dtype),
    )


def training_line(name: str, values: Mapping[str, Any]) -> str:
    """One logging step on one line; what is None is left out."""

    def shown(key: str, text: str) -> str:
        return "" if values.get(key) is None else text.format(values[key])

    return (
        f"{name} step {values['step']}/{values['steps']}: loss {values['loss_benign']:.4f}"
        + shown("loss_masked", ", masked {:.4f}")
        + f", lr {values['learning_rate']:.2e}"
        + shown("gradient_norm", ", grad norm {:.2f}")
        + f", {values['tokens_per_second']:,.0f} tok/s"
        + shown("mfu", ", MFU {:.1%}")
        + f", ETA {format_seconds(values['eta_seconds'])}"
    )


class ShownMetrics:
    """Shows what rank 0 appends to its metrics file as progress lines of the driver, while training runs, and gives it
    to the sinks.

    Workers' own output stays in Ray's logs: theirs would come with a prefix, late, and among that of others.
    """

    def __init__(self, verb: str, name: str, path: Path, sinks: Sequence[Sink]):
        self.verb, self.name, self.path, self.sinks = verb, name, path, sinks
        self.seconds = 10.0 if is_remote(path) else 1.0
        if not is_remote(path):  # a remote one is uploaded whole
            cut_torn_line(path)
        self.offset = path.stat().st_size if path.exists() else 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self._show_new()

    def _follow(self) -> None:
        while not self.stop.wait(self.seconds):
            self._show_new()

    def _show_new(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self.offset += len(complete)
        for line in complete.splitlines():
            row = json.loads(line)
            log(self.verb, training_line(self.name, row))
            for sink in self.sinks:
                sink({**row, "unit": "steps", "done": row["step"], "total": row["steps"]})
