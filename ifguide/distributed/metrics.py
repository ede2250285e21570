"""The sinks of a long stage: its progress file, Ray's own metrics, which Prometheus reads, and TensorBoard."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from ifguide.config import redact
from ifguide.gauges import GAUGES, PREFIX, TAGS
from ifguide.telemetry import Progress, ProgressFile, Sink, TensorBoard


@contextlib.contextmanager
def stage_progress(verb: str, folder: Path, total: float, unit: str, *, already: float = 0) -> Iterator[Progress]:
    """The progress of a stage that makes `folder`, on its driver or on a worker, with every sink."""
    with contextlib.closing(TensorBoard(folder)) as tensorboard, ray_metrics(verb, folder) as gauges:
        sinks: tuple[Sink, ...] = (ProgressFile(folder), tensorboard, *gauges)
        yield Progress(verb, total, unit, already=already, sinks=sinks)


@contextlib.contextmanager
def ray_metrics(verb: str, folder: Path) -> Iterator[tuple[Sink, ...]]:
    """The sink that exports by Ray; none in a process that is in no cluster, as when one process trains alone."""
    if not ray.is_initialized():
        yield ()
        return
    with contextlib.closing(RayMetrics(verb, folder)) as metrics:
        yield (metrics,)


class RayMetrics:
    """A sink of `telemetry.Progress`: what `GAUGES` names, as gauges with the tags `TAGS`.

    Ray forgets a gauge that is not set for half a minute, and a shard may take longer: a thread sets them again."""

    def __init__(self, verb: str, folder: Path):
        # Ray takes ASCII alone
        artifact = redact(str(folder)).encode("ascii", "backslashreplace").decode()
        self.tags = {"stage": verb, "artifact": artifact}
        self.gauges = {
            gauge.name: Gauge(f"{PREFIX}{gauge.name}", f"{gauge.help} ({gauge.unit})", TAGS) for gauge in GAUGES
        }
        self.values: Mapping[str, Any] = {}
        self.closed = threading.Event()
        threading.Thread(target=self._repeat, daemon=True).start()

    def __call__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        for name, gauge in self.gauges.items():
            if values.get(name) is not None:
                gauge.set(float(values[name]), {**self.tags, "unit": values["unit"]})

    def close(self) -> None:
        self.closed.set()

    def _repeat(self) -> None:
        while not self.closed.wait(10):
            self(self.values)
