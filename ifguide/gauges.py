"""What a long stage says of itself while it works: each figure's name, unit and meaning, in one place.

Every sink gets them by these names: progress.jsonl, TensorBoard, and Ray's metrics, where Prometheus reads each as
`PREFIX` and its name, with the tags `TAGS`. A stage gives those that it has.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "ifguide_"  # Ray puts its own `ray_` before it
TAGS = ("stage", "artifact", "unit")  # verb, folder, and what `done` and `total` count


@dataclass(frozen=True)
class Gauge:
    """One figure; `unit` is `tag` where the tag of that name says it."""

    name: str
    unit: str
    help: str


GAUGES = (
    Gauge("done", "tag", "Work that is finished, of earlier runs too"),
    Gauge("total", "tag", "Work that there is"),
    Gauge("per_second", "tag/s", "Rate of this run's own work"),
    Gauge("per_second_per_actor", "tag/s", "Rate of one actor while it works"),
    Gauge("eta_seconds", "s", "Time left at this rate"),
    Gauge("shards_done", "shards", "Shards that are finished"),
    Gauge("shards_total", "shards", "Shards that there are"),
    Gauge("retries", "attempts", "Attempts beyond the first of the finished shards"),
    Gauge("failed", "shards", "Shards that were given up"),
    Gauge("loss", "nats", "Loss of the last step, as it is minimised; of a reward model its squared error"),
    Gauge("loss_benign", "nats", "Mean loss of the last step's tokens outside the mask"),
    Gauge("loss_masked", "nats", "Mean loss of the last step's masked tokens"),
    Gauge("loss_heldout", "nats", "Mean loss of the held-out blocks' tokens"),
    Gauge("benign_rise", "nats", "Rise of the smoothed benign loss over its lowest"),
    Gauge("learning_rate", "1", "Learning rate of the last step"),
    Gauge("gradient_norm", "1", "Norm of the last step's gradient before clipping"),
    Gauge("tokens_per_second", "tokens/s", "Rate of a training"),
    Gauge("mfu", "1", "Share of the devices' peak FLOP a second that a training uses"),
)
