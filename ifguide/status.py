"""How far a run is, from the files in its run directory alone: what `ifguide status` prints.

A folder with a manifest is complete, one with a plan is in progress, any other is not begun. Of a stage that works on
shards the ledger says how many are done, which are being retried, and which were given up and why; the last line of
its progress file gives total, rate and ETA. Nothing is asked of Ray, so a run whose driver died looks like one that is
slow: the line says how old its news are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from ifguide.artifacts import MANIFEST, PLAN, has_ended, read_holder, read_manifest
from ifguide.distributed.ledger import LEDGER, read_attempts, unfinished_attempts
from ifguide.telemetry import format_seconds, last_progress, progress_text

SHOWN_FAILURES = 20


def run_status(run_dir: Path, artifacts: Iterable[str]) -> list[str]:
    """Who works in a run directory, one line per artifact by its folder's name, and one more per shard that failed.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} does not exist; `ifguide run` makes it")
    holder = read_holder(run_dir)
    lines = []
    if holder:
        lines.append(f"left by {holder}, which has ended" if has_ended(holder) else f"in use by {holder}")
    for name in artifacts:
        text, *failures = _folder_status(run_dir / name)
        lines += [f"{name:16} {text}", *(f"{'':16}   {failure}" for failure in failures)]
    return lines


def _folder_status(folder: Path) -> list[str]:
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        rows = ", ".join(f"{count:,} {unit}" for unit, count in manifest.rows.items())
        return [f"complete     {rows} ({format_seconds(manifest.seconds)})"]
    if not (folder / PLAN).exists():
        return ["not begun"]
    values = last_progress(folder)
    if values is None:
        return [f"in progress  begun {_age((folder / PLAN).stat().st_mtime)}"]
    ledger = folder / LEDGER
    attempts = {path.stem: read_attempts(path) for path in unfinished_attempts(ledger)}
    failed = {key: content["reason"] for key, content in attempts.items() if content["given_up"]}
    retried = sum(content["attempts"] > 1 for key, content in attempts.items() if key not in failed)
    values = {**values, "failed": len(failed)}
    newest = max([values["time"], *(path.stat().st_mtime for path in ledger.glob("*.json"))])
    text = f"in progress  {progress_text(values)}; last news {_age(newest)}"
    if retried:
        text += f"; {retried} shards are being tried again"
    return [text, *(f"failed {key}: {reason}" for key, reason in sorted(failed.items())[:SHOWN_FAILURES])]


def _age(then: float) -> str:
    return f"{format_seconds(max(0.0, time.time() - then))} ago"
