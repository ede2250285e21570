"""What a person watching a run sees: log lines, one-line progress with rate and ETA, metrics as JSONL.

Logging is set up only by entry points (`configure_logging`); modules use `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ifguide.config import redact
from ifguide.storage import is_remote

ROOT = "ifguide"
PROGRESS = "progress.jsonl"
METRICS = "metrics.jsonl"  # of a training
REMOTE_SECONDS = 60.0


def configure_logging(level: int = logging.INFO) -> None:
    """Log the project's lines to stderr as `HH:MM:SS verb | text`; for entry points and Ray workers."""
    logger = logging.getLogger(ROOT)
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


class _StderrHandler(logging.StreamHandler):
    """Writes to what is `sys.stderr` at the time of the line: notebooks and tests replace it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: object) -> None:
        pass


def log(verb: str, text: str, *, level: int = logging.INFO) -> None:
    """One line with the verb as its prefix, without credentials."""
    logging.getLogger(ROOT).log(level, "%-12s | %s", verb, redact(text))


class Progress:
    """A throttled progress line: done / total, share, rate and ETA of this run's own work.

    `already` counts work found finished from an earlier run; the rate leaves it out. Each line's values also go to the
    `sinks`: `verb`, `unit`, `done`, `total`, `per_second`, `eta_seconds` (None where unknown) and the caller's counts.
    """

    def __init__(
        self,
        verb: str,
        total: float,
        unit: str,
        *,
        already: float = 0,
        every_seconds: float = 5.0,
        sinks: Iterable[Callable[[dict[str, Any]], None]] = (),
    ):
        self.verb, self.total, self.unit = verb, total, unit
        self.done = self.already = already
        self.every_seconds, self.sinks = every_seconds, tuple(sinks)
        self.started = self.last_shown = time.monotonic()
        if already:
            log(verb, f"resuming: {already:,.0f} of {total:,.0f} {unit} already done")

    def advance(self, amount: float, **counts: Any) -> None:
        """Add finished work; shows a line when due, and always at the end."""
        self.done += amount
        now = time.monotonic()
        if self.done >= self.total or now - self.last_shown >= self.every_seconds:
            self.last_shown = now
            log(self.verb, self.line(now - self.started, **counts))
            self.publish(**counts)

    def publish(self, **counts: Any) -> None:
        """Give the values of this moment to the sinks."""
        values = self._values(time.monotonic() - self.started, counts)
        for sink in self.sinks:
            sink(values)

    def line(self, elapsed_seconds: float, **counts: Any) -> str:
        """The progress text after `elapsed_seconds` of work."""
        return progress_text(self._values(elapsed_seconds, counts))

    def _values(self, elapsed_seconds: float, counts: Mapping[str, Any]) -> dict[str, Any]:
        rate = (self.done - self.already) / max(elapsed_seconds, 1e-9)
        return {
            "verb": self.verb,
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "per_second": rate,
            "eta_seconds": (self.total - self.done) / rate if rate else None,
            **counts,
        }


def progress_text(values: Mapping[str, Any]) -> str:
    """The progress line of values as a sink gets them: `shards_done`, `shards_total`, `per_second_per_actor`,
    `retries` and `failed` are shown where they are known."""
    unit, done, total = values["unit"], values["done"], values["total"]
    shards, per_actor = values.get("shards_total"), values.get("per_second_per_actor")
    parts = [
        f"{values['shards_done']:,}/{shards:,} shards" if shards is not None and unit != "shards" else "",
        f"{done:,.0f}/{total:,.0f} {unit} ({done / total if total else 1.0:.0%})",
        _rate(values["per_second"], unit),
        f"{_rate(per_actor, unit)} per actor" if per_actor else "",
        f"ETA {format_seconds(float('inf') if values['eta_seconds'] is None else values['eta_seconds'])}",
        *(f"{values[name]:,} {name}" for name in ("retries", "failed") if values.get(name)),
    ]
    return ", ".join(part for part in parts if part)


class ProgressFile:
    """A sink of `Progress`: one JSON object a line in `folder`/progress.jsonl, each with its `time` (Unix seconds).

    An object store cannot append: there the whole file is written again, so at most every REMOTE_SECONDS."""

    def __init__(self, folder: Path):
        self.path, self.written = folder / PROGRESS, float("-inf")
        remote = is_remote(self.path)
        self.text: str | None = (
            (self.path.read_text(encoding="utf-8") if self.path.exists() else "") if remote else None
        )

    def __call__(self, values: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **values}) + "\n"
        if self.text is not None:
            if values["done"] >= values["total"] or time.monotonic() - self.written >= REMOTE_SECONDS:
                self.text, self.written = self.text + line, time.monotonic()
                self.path.write_text(self.text, encoding="utf-8")
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, f"writing failed: {error.strerror or error}", str(self.path)) from error


def last_line(path: Path, use: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """The last line of JSON that `use` can use; one that was cut short or damaged is passed over."""
    if not path.exists():
        return None
    for line in reversed(path.read_bytes().splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            values: dict[str, Any] = json.loads(line)
            use(values)
            return values
    return None


def last_progress(folder: Path) -> dict[str, Any] | None:
    """The last whole line of a folder's progress file."""
    return last_line(folder / PROGRESS, lambda values: (progress_text(values), float(values["time"])))


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
    """Metrics of a run: JSONL at `path`, TensorBoard event files beside it and, if `wandb` says where, W&B.

    wandb: `project`, `entity` and the run's `name`; a resumed run goes on in the same W&B run, whose id is in
    `wandb.json`. config: what W&B shows as the run's settings.

    Raises:
        ValueError: `wandb` is given and its package is not installed.
    """

    def __init__(self, path: Path, *, wandb: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None):
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self.file = path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(path.parent / "tensorboard"))
        self.wandb = None if wandb is None else _wandb_run(path.parent, wandb, config or {})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step; `None` values stay in the JSONL and are not plotted."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in values.items() if value is not None}
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close all sinks."""
        self.file.close()
        self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def cut_torn_line(path: Path) -> None:
    """Remove a last line that has no end, as a machine that went down may leave one, so that lines can be appended."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _wandb_run(folder: Path, where: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("pretrain.wandb: the package is not installed; pip install wandb, or unset it") from error
    kept = folder / "wandb.json"
    try:
        run_id = str(json.loads(kept.read_bytes())["id"]) if kept.exists() else secrets.token_hex(8)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{kept} does not say which W&B run this is; delete it to begin another") from error
    kept.write_text(json.dumps({"id": run_id}))
    return wandb.init(
        project=where["project"],
        entity=where.get("entity"),
        name=where["name"],
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=dict(config),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics JSONL by step; of a step written twice (a resumed run) the last one counts.

    Raises:
        ValueError: a line is no row of a step; names file and line.
    """
    if not path.exists():
        return []
    rows: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")[:-1]  # what stands behind the last end was torn
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                rows[int(row["step"])] = row
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not the row of a step ({error}); delete the line: its figures are lost"
                ) from error
    return [rows[step] for step in sorted(rows)]
