"""Keyed, resumable, retried work on shards with Ray Data: what every distributed stage runs on.

A row of the dataset is a small descriptor, never data: a worker reads its own inputs, publishes its own
output under a name that the descriptor fixes, then publishes `ledger/<key>.json` with its small result.
The ledger entry means done: a rerun, or a retry of Ray's, skips those keys. It holds the digests of what the worker
published, taken when that was written: a rerun checks them, and does a shard again whose files have changed.

Ray restarts an actor whose process died, and runs its shards again, without end. So attempts are counted on storage, in
`ledger/<key>.attempts`, before the work starts: a shard that kills its process is given up after `attempts` of its
resources, and so is an actor that does not survive its constructor; one that cannot count its start, on a full disk for
instance, gives that as the reason of its shards. A shard that has failed before runs alone in its actor: a neighbour
that it takes down pays one attempt and no more. A failed shard does not stop the others; the stage then ends with every
failed key and reason. An actor whose restart fails ends Ray Data's run: the shards that are left go to a new pool, as
long as each pool finishes some.

Cost: two small files a shard. It does not tell a preempted machine from a shard that kills its process: where machines
come and go, raise `resources.attempts`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray

from ifguide.artifacts import FileEntry, damaged_files
from ifguide.config.resources import WorkerResources
from ifguide.distributed.ledger import LEDGER, Entry, Failure, finished_entries, forget, unfinished_attempts
from ifguide.distributed.metrics import stage_progress
from ifguide.distributed.pool import Pool, work_off
from ifguide.distributed.tasks import StageError, reason_of, run_tasks
from ifguide.distributed.worker import Shard, Worker, WorkerSource
from ifguide.storage import make_folder
from ifguide.telemetry import Progress, log

__all__ = ["LEDGER", "Pool", "ShardResults", "StageError", "Worker", "run_shards"]

Settings = TypeVar("Settings")
Work = TypeVar("Work", bound=Shard)

SHOWN_FAILURES = 20
CHECKED_AT_ONCE = 64  # shards: a task each would take longer to start than to read
CHECK_RESOURCES = WorkerResources(gpus=0.0)


def run_shards(
    verb: str,
    shards: Sequence[Work],
    make_worker: Callable[[Settings], Worker],
    settings: Settings,
    *,
    folder: Path,
    pool: Pool,
    unit: str = "shards",
    amount: Callable[[Work], float] = lambda shard: 1.0,
) -> ShardResults:
    """Process every shard once; returns key -> result. Each actor makes its worker of `settings`, a dataclass.

    Results are small dicts. Those of an earlier run are taken from `folder`/ledger, unless a file that the shard
    published is gone or has changed: that shard is done again.

    Raises:
        StageError: some shards failed and all others were done, or no worker could be started.
    """
    ledger = folder / LEDGER
    make_folder(ledger)
    weights = {shard.key: amount(shard) for shard in shards}
    assert len(weights) == len(shards), "keys are not unique"
    done = _sound(verb, folder, {key: entry for key, entry in finished_entries(ledger).items() if key in weights})
    tally = _Tally(weights=weights, done=done)
    todo = tally.left(shards)
    if todo:
        for leftover in unfinished_attempts(ledger):
            leftover.unlink()  # a rerun is a fresh start for shards that failed before
        source = WorkerSource(
            make_worker=make_worker,
            settings=settings,
            ledger=str(ledger),
            resources=pool.resources,
            in_flight=pool.in_flight,
        )
        already = sum(weights[key] for key in done)
        with stage_progress(verb, folder, sum(weights.values()), unit, already=already) as progress:
            progress.publish(**tally.counts())
            _run_rounds(verb, todo, source, pool, tally, progress)
    if tally.failures:
        listing = "\n".join(f"  {key}: {reason}" for key, reason in sorted(tally.failures.items())[:SHOWN_FAILURES])
        raise StageError(f"{verb}: {len(tally.failures)} of {len(shards)} shards failed\n{listing}")
    return ShardResults(tally.done[key] for key in weights)


class ShardResults(dict[str, dict[str, Any]]):
    """The result of every shard by key. `files`: the digests of what the shards published, by path in the folder."""

    def __init__(self, entries: Iterable[Entry]):
        entries = list(entries)
        super().__init__((entry.key, entry.result) for entry in entries)
        self.files: dict[str, FileEntry] = {name: file for entry in entries for name, file in entry.files.items()}


def _sound(verb: str, folder: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries whose files are as they were published; the others are forgotten, and said."""
    keys, groups = list(entries), []
    for start in range(0, len(keys), CHECKED_AT_ONCE):
        files = {
            name: file for key in keys[start : start + CHECKED_AT_ONCE] for name, file in entries[key].files.items()
        }
        groups.append((folder, files))
    damaged: dict[str, str] = {}
    for reasons in run_tasks(CHECK_RESOURCES)(damaged_files, (group for group in groups if group[1])):
        damaged |= reasons
    sound = {}
    for key, entry in entries.items():
        bad = next((name for name in entry.files if name in damaged), None)
        if bad is None:
            sound[key] = entry
            continue
        log(verb, f"{folder / bad} {damaged[bad]} since it was made: it is made again", level=logging.WARNING)
        forget(folder / LEDGER, key)
    return sound


@dataclass(kw_only=True)
class _Tally:
    """What the shards have come to so far; `amounts` and `seconds` are of the work of this run."""

    weights: Mapping[str, float]
    done: dict[str, Entry]
    failures: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    amounts: float = 0
    seconds: float = 0

    @property
    def ended(self) -> int:
        """Shards that are done or were given up."""
        return len(self.done) + len(self.failures)

    def left(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards that are neither done nor given up."""
        ended = self.done.keys() | self.failures.keys()
        return [shard for shard in shards if shard.key not in ended]

    def add(self, entry: Entry | Failure) -> float:
        """Record what a shard came to; returns the amount of work that it newly finishes."""
        if isinstance(entry, Failure):
            self.failures[entry.key] = entry.reason
            return 0.0
        if entry.key in self.done:
            return 0.0
        self.done[entry.key] = entry
        self.retries += entry.attempts - 1
        self.amounts += self.weights[entry.key]
        self.seconds += entry.seconds
        return self.weights[entry.key]

    def counts(self) -> dict[str, Any]:
        """What the progress line and the metrics say besides amount, rate and ETA."""
        return {
            "shards_done": len(self.done),
            "shards_total": len(self.weights),
            "per_second_per_actor": self.amounts / self.seconds if self.seconds else 0.0,
            "retries": self.retries,
            "failed": len(self.failures),
        }


def _run_rounds(
    verb: str, todo: Sequence[Shard], source: WorkerSource, pool: Pool, tally: _Tally, progress: Progress
) -> None:
    """Run pools of actors until every shard is done or given up."""
    while todo:
        before = tally.ended
        try:
            # Closed whatever happens: actors that nobody waits for would keep their resources.
            with progress.never_silent(), contextlib.closing(work_off(todo, source, pool)) as entries:
                for entry in entries:
                    progress.advance(tally.add(entry), **tally.counts())
        except ray.exceptions.RayError as error:
            reason = reason_of(error)
            if tally.ended == before:
                raise StageError(f"{verb}: no worker could be started: {reason}") from error
            log(verb, f"a worker is lost for good ({reason}); the shards left go to new ones", level=logging.WARNING)
        left = tally.left(todo)
        if len(left) == len(todo):
            raise StageError(f"{verb}: no result for {len(left)} shards, among them {left[0].key}")
        todo = left
    progress.publish(**tally.counts())
