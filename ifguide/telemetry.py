"""What a person watching a run sees: log lines, one-line progress with rate and ETA, metrics as JSONL.

Logging is set up only by entry points (`configure_logging`); modules use `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ifguide.config import redact
from ifguide.gauges import GAUGES
from ifguide.storage import is_remote, upload_folder, work_folder

ROOT = "ifguide"
PROGRESS = "progress.jsonl"
METRICS = "metrics.jsonl"  # of a training
TENSORBOARD = "tensorboard"  # folder of its event files
REMOTE_SECONDS = 60.0

Sink = Callable[[dict[str, Any]], None]  # where a stage's figures go, by the names of `GAUGES`


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

    `already` counts work found finished from an earlier run; the rate leaves it out. `says_end`: the end has a line of
    its own, even where none is due. Each line's values also go to the `sinks`: `verb`, `unit`, and by the names of
    `GAUGES` `done`, `total`, `per_second`, `eta_seconds` (None where unknown) and the caller's counts.
    """

    def __init__(
        self,
        verb: str,
        total: float,
        unit: str,
        *,
        already: float = 0,
        every_seconds: float = 5.0,
        says_end: bool = True,
        sinks: Iterable[Sink] = (),
    ):
        self.verb, self.total, self.unit, self.says_end = verb, total, unit, says_end
        self.done = self.already = already
        self.every_seconds, self.sinks = every_seconds, tuple(sinks)
        self.started = self.last_shown = time.monotonic()
        if already:
            self._say_already()

    def begin(self, total: float, *, already: float = 0) -> None:
        """Begin anew, where the work is known only once it begins."""
        self.total, self.done, self.already = total, already, already
        self.started = self.last_shown = time.monotonic()
        if already:
            self._say_already()
        self.publish()

    def _say_already(self) -> None:
        log(self.verb, f"resuming: {self.already:,.0f} of {self.total:,.0f} {self.unit} already done")

    def advance(self, amount: float, **counts: Any) -> None:
        """Add finished work; shows a line when due, and at the end."""
        self.done += amount
        now = time.monotonic()
        if (self.says_end and self.done >= self.total) or now - self.last_shown >= self.every_seconds:
            self.last_shown = now
            log(self.verb, self.line(now - self.started, **counts))
            self.publish(**counts)

    @contextlib.contextmanager
    def never_silent(self, every_seconds: float = 60.0) -> Iterator[None]:
        """Inside, a line is shown where none was for so long, for one piece of work may take many minutes."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, every_seconds)):
                if (now := time.monotonic()) - self.last_shown >= every_seconds:
                    self.last_shown = now
                    waited = format_seconds(now - self.started)
                    log(self.verb, f"{self.done:,.0f}/{self.total:,.0f} {self.unit}, at work for {waited}")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

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
    """The progress line of values as a sink gets them: `shards_done`, `shards_total`, `per_second_per_actor`, `loss`,
    `retries` and `failed` are shown where they are known."""
    unit, done, total = values["unit"], values["done"], values["total"]
    shards, per_actor = values.get("shards_total"), values.get("per_second_per_actor")
    parts = [
        f"{values['shards_done']:,}/{shards:,} shards" if shards is not None and unit != "shards" else "",
        f"{done:,.0f}/{total:,.0f} {unit} ({done / total if total else 1.0:.0%})",
        f"loss {values['loss']:.4f}" if values.get("loss") is not None else "",
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
            raise writing_failed(error, self.path) from error


class TensorBoard:
    """An event file in `folder`/tensorboard; also a sink of `Progress`, of what `GAUGES` names, against the work done.

    Each step is on disk when `write` returns, and what the disk refuses is raised there; tensorboard's own writer works
    in a thread. It is appended to: that of a remote folder is written on this machine, and uploaded by `close`.
    """

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder = folder
        self.local = work_folder(TENSORBOARD, folder) if is_remote(folder) else folder / TENSORBOARD
        self.local.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        # ordered by time, as readers take a folder's files
        self.path = self.local / f"events.out.tfevents.{now // 10**9}.{now % 10**9:09}.{os.getpid()}"
        self.file = self.path.open("xb", buffering=0)
        self.records = RecordWriter(self.file)
        self._append(file_version="brain.Event:2")

    def __call__(self, values: Mapping[str, Any]) -> None:
        self.write(int(values["done"]), {gauge.name: values.get(gauge.name) for gauge in GAUGES})

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Plot the values of one step; those that are None are left out.

        Raises:
            OSError: they could not be written; names the file.
        """
        points = [{"tag": name, "simple_value": value} for name, value in values.items() if value is not None]
        self._append(step=step, summary={"value": points})

    def _append(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            self.records.write(Event(wall_time=time.time(), **event).SerializeToString())
        except OSError as error:
            raise writing_failed(error, self.path) from error

    def close(self) -> None:
        """End the file; upload it where the folder is remote."""
        self.file.close()
        if is_remote(self.folder):
            upload_folder(self.local, self.folder / TENSORBOARD)
            shutil.rmtree(self.local)


def writing_failed(error: OSError, path: Path) -> OSError:
    """The error of a write, with the file's name, which the system's own leaves out."""
    return OSError(error.errno, f"writing failed: {error.strerror or error}", str(path))


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
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self.file = path.open("a", encoding="utf-8")
        self.tensorboard = TensorBoard(path.parent)
        self.wandb = None if wandb is None else _wandb_run(path.parent, wandb, config or {})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step; `None` values stay in the JSONL and are not plotted."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.tensorboard.write(step, values)
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        """Flush and close all sinks."""
        self.file.close()
        self.tensorboard.close()
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
