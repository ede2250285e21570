"""Progress as gauges of Ray's own metrics: what the cluster's dashboard and Prometheus read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

NAMES = (
    "done",
    "total",
    "per_second",
    "per_second_per_actor",
    "eta_seconds",
    "shards_done",
    "shards_total",
    "retries",
    "failed",
)


class RayMetrics:
    """A sink of `telemetry.Progress`, tagged by stage.

    Ray forgets a gauge that is not set for half a minute, and a shard may take longer: a thread sets them again."""

    def __init__(self, verb: str):
        self.tags = {"stage": verb}
        self.gauges = {name: Gauge(f"ifguide_{name}", f"Progress of a stage: {name}", ("stage",)) for name in NAMES}
        self.values: Mapping[str, Any] = {}
        self.closed = threading.Event()
        threading.Thread(target=self._repeat, daemon=True).start()

    def __call__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        for name, gauge in self.gauges.items():
            if values.get(name) is not None:
                gauge.set(float(values[name]), self.tags)

    def close(self) -> None:
        self.closed.set()

    def _repeat(self) -> None:
        while not self.closed.wait(10):
            self(self.values)
