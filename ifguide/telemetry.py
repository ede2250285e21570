"""What a person watching a run sees: log lines, one-line progress with rate and ETA, metrics as JSONL.

Logging is set up only by entry points (`configure_logging`); modules use `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

ROOT = "ifguide"


def configure_logging(level: int = logging.INFO) -> None:
    """Log the project's lines to stderr as `HH:MM:SS verb | text`; for entry points and Ray workers."""
    logger = logging.getLogger(ROOT)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


def log(verb: str, text: str, *, level: int = logging.INFO) -> None:
    """One line with the verb as its prefix."""
    logging.getLogger(ROOT).log(level, "%-12s | %s", verb, text)


class Progress:
    """A throttled progress line: done / total, share, rate and ETA of this run's own work.

    `already` counts work found finished from an earlier run; the rate leaves it out.
    """

    def __init__(self, verb: str, total: float, unit: str, *, already: float = 0, every_seconds: float = 5.0):
        self.verb, self.total, self.unit = verb, total, unit
        self.done = self.already = already
        self.every_seconds = every_seconds
        self.started = self.last_shown = time.monotonic()
        if already:
            log(verb, f"resuming: {already:,.0f} of {total:,.0f} {unit} already done")

    def advance(self, amount: float, note: str = "") -> None:
        """Add finished work; shows a line when due, and always at the end."""
        self.done += amount
        now = time.monotonic()
        if self.done >= self.total or now - self.last_shown >= self.every_seconds:
            self.last_shown = now
            log(self.verb, self.line(now - self.started) + (f", {note}" if note else ""))

    def line(self, elapsed_seconds: float) -> str:
        """The progress text after `elapsed_seconds` of work."""
        rate = (self.done - self.already) / max(elapsed_seconds, 1e-9)
        remaining = (self.total - self.done) / rate if rate else float("inf")
        share = self.done / self.total if self.total else 1.0
        return (
            f"{self.done:,.0f}/{self.total:,.0f} {self.unit} ({share:.0%}),"
            f" {_rate(rate, self.unit)}, ETA {format_seconds(remaining)}"
        )


def _rate(per_second: float, unit: str) -> str:
    """`1,234 tokens/s`, or `28 s each` for units that take long."""
    return f"{per_second:,.0f} {unit}/s" if per_second >= 1 or not per_second else f"{1 / per_second:,.0f} s each"


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`; unknown -> `?`."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class MetricsLog:
    """Metrics of a run: JSONL at `path` and TensorBoard event files beside it."""

    def __init__(self, path: Path):
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(path.parent / "tensorboard"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step; `None` values stay in the JSONL and are not plotted."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both sinks."""
        self.file.close()
        self.writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics JSONL by step; of a step written twice (a resumed run) the last one counts."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({row["step"]: row for row in sorted(rows, key=lambda row: row["step"])}.values())
