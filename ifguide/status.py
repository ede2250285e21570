"""How far a run is, from the files in its run directory alone: what `ifguide status` prints.

A folder with a manifest is complete, one with a plan is in progress, any other is not begun. Of a stage that works on
shards the ledger says how many are done, which are being retried, and which were given up and why; the last line of
its progress file gives total, rate and ETA. Of a stage of several passes that with the newest line is shown. Of a
training the last line of its metrics gives step, loss, rate and ETA; its choices say what is compiled and why.
Nothing is asked of Ray, so a run whose driver died looks like one that is slow: the line says how old its news are.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ifguide.artifacts import MANIFEST, PLAN, has_ended, read_holder, read_manifest
from ifguide.distributed.ledger import LEDGER, read_attempts, unfinished_attempts
from ifguide.folders import COMPARE, TARGET
from ifguide.student.said import audit_line
from ifguide.telemetry import METRICS, PROGRESS, format_seconds, last_line, last_progress, progress_text
from ifguide.training.choices import read_choices

SHOWN_FAILURES = 20
# where there are artifacts that not every run has
FURTHER = ("*", f"{TARGET}/*", *(f"{COMPARE}/{deep}" for deep in ("*", "*/*", "*/*/*")))
State = Literal["complete", "in progress", "not begun"]


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One artifact. `text` is for people; `progress` is what its last line of progress or of metrics says, with
    `seconds_ago`, and the rows of a complete one; `failures` are shards that were given up, with their reasons."""

    name: str
    state: State
    text: str = ""
    progress: Mapping[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    def lines(self, width: int) -> list[str]:
        """One line, and one for each failure; `width` of the name's column."""
        failures = [f"{'':{width}}   failed {failure}" for failure in self.failures[:SHOWN_FAILURES]]
        return [f"{self.name:{width}} {self.state:12} {self.text}".rstrip(), *failures]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Who works in a run directory, and each artifact: those that every run has, then others that were begun."""

    holder: str | None
    holder_has_ended: bool
    stages: tuple[StageStatus, ...]

    def lines(self) -> list[str]:
        """What `ifguide status` prints."""
        said = f"left by {self.holder}, which has ended" if self.holder_has_ended else f"in use by {self.holder}"
        width = max(len(stage.name) for stage in self.stages)
        return [*([said] if self.holder else []), *(line for stage in self.stages for line in stage.lines(width))]

    def as_json(self) -> str:
        """All of it, as one JSON object."""
        return json.dumps(asdict(self))


def run_status(run_dir: Path, artifacts: Iterable[str]) -> RunStatus:
    """The status of the artifacts by their folders' names, and of others that are found.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} does not exist; `ifguide run` makes it")
    holder, named = read_holder(run_dir), list(artifacts)
    further = {
        folder.relative_to(run_dir).as_posix()
        for pattern in FURTHER
        for folder in run_dir.glob(pattern)
        if (folder / PLAN).exists() or (folder / MANIFEST).exists()
    }
    return RunStatus(
        holder=str(holder) if holder else None,
        holder_has_ended=bool(holder and has_ended(holder)),
        stages=tuple(_folder_status(name, run_dir / name) for name in [*named, *sorted(further - {*named})]),
    )


def _folder_status(name: str, folder: Path) -> StageStatus:
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        rows = ", ".join(f"{count:,} {unit}" for unit, count in manifest.rows.items())
        text = "; ".join(filter(None, (f"{rows} ({format_seconds(manifest.seconds)})", audit_line(manifest.summary))))
        return StageStatus(name=name, state="complete", text=text, progress=manifest.rows)
    if not (folder / PLAN).exists():
        return StageStatus(name=name, state="not begun")
    if (training := _training_status(name, folder)) is not None:
        return training
    working = {place: values for place in _places(folder) if (values := last_progress(place)) is not None}
    if not working:
        begun = _seconds_since((folder / PLAN).stat().st_mtime)
        text = f"begun {format_seconds(begun)} ago"
        return StageStatus(name=name, state="in progress", text=text, progress={"seconds_ago": begun})
    newest = max(working, key=lambda place: working[place]["time"])
    return _shards_status(name, newest, working[newest])


def _places(folder: Path) -> list[Path]:
    """Where a stage may work on shards: its folder, and the scratch folders of its earlier passes."""
    return [folder, *(path.parent for path in folder.glob(f"*/{PROGRESS}"))]


def _shards_status(name: str, folder: Path, values: dict[str, Any]) -> StageStatus:
    ledger = folder / LEDGER
    attempts = {path.stem: read_attempts(path) for path in unfinished_attempts(ledger)}
    failed = {key: content["reason"] for key, content in attempts.items() if content["given_up"]}
    retried = sum(content["attempts"] > 1 for key, content in attempts.items() if key not in failed)
    newest = max([values["time"], *(path.stat().st_mtime for path in ledger.glob("*.json"))])
    values = {**values, "failed": len(failed), "seconds_ago": _seconds_since(newest)}
    text = f"{progress_text(values)}; last news {format_seconds(values['seconds_ago'])} ago"
    if retried:
        text += f"; {retried} shards are being tried again"
    failures = tuple(f"{key}: {reason}" for key, reason in sorted(failed.items()))
    return StageStatus(name=name, state="in progress", text=text, progress=values, failures=failures)


def _training_status(name: str, folder: Path) -> StageStatus | None:
    """By the last line of its metrics; None where there is none."""
    path = folder / METRICS
    row = last_line(path, _training_text)
    if row is None:
        return None
    row["seconds_ago"] = _seconds_since(path.stat().st_mtime)
    text = f"{_training_text(row)}; last news {format_seconds(row['seconds_ago'])} ago"
    with contextlib.suppress(ValueError):  # of a damaged file, which the training itself refuses
        if (choices := read_choices(folder)) is not None:
            text, row["choices"] = f"{text}; {choices.text()}", choices.as_json()
    return StageStatus(name=name, state="in progress", text=text, progress=row)


def _training_text(row: Mapping[str, Any]) -> str:
    """The line of a row of metrics, as `training.loop` and `training.meter` write them."""
    step, steps = row["step"], row["steps"]
    eta = "" if row.get("eta_seconds") is None else f", ETA {format_seconds(row['eta_seconds'])}"
    return (
        f"step {step:,}/{steps:,} ({step / steps:.0%}), loss {row['loss']:.4f},"
        f" {row['tokens_per_second']:,.0f} tokens/s{eta}"
    )


def _seconds_since(then: float) -> float:
    return max(0.0, time.time() - then)
