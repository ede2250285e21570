"""Keyed, resumable, retried work on shards with Ray Data: what every distributed stage runs on.

A row of the dataset is a small descriptor, never data: a worker reads its own inputs, publishes its own
output under a name that the descriptor fixes, then publishes `ledger/<key>.json` with its small result.
The ledger entry means done: a rerun, or a retry of Ray's, skips those keys.

A process whose device has failed ends itself: all that it does from then on would fail, and faster than others work.

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
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.data
from ray.util.metrics import Gauge

from ifguide.artifacts import write_json
from ifguide.config.resources import Resources
from ifguide.distributed.ledger import ACTORS, LEDGER, Attempts, finished_entries, forget, unfinished_attempts
from ifguide.distributed.session import cluster_cpus
from ifguide.storage import location, make_folder, sizes
from ifguide.telemetry import Progress, ProgressFile, configure_logging, log

__all__ = ["LEDGER", "Pool", "StageError", "Worker", "run_shards"]

NEW_ACTORS_PER_DEATH = 2  # actors in a row that may fail to start before the stage does


class StageError(RuntimeError):
    """Shards that failed after all their attempts; the message names each with its reason."""


class Worker(Protocol):
    """Holds the heavy state of a shard worker; `process` publishes the shard's output and returns its small result.

    In a pool with `in_flight` over 1 it is called by that many threads at once."""

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A stage's workers: `min_size` (default: `size`) to `size` actors, each of `resources`.

    An actor holds `in_flight` shards at once: with 2 it reads the next and writes the last while it computes."""

    size: int
    resources: Resources
    min_size: int | None = None
    in_flight: int = 1

    @classmethod
    def filling_cluster(cls, resources: Resources) -> Pool:
        """As many actors as the cluster has CPUs for."""
        return cls(size=max(1, int(cluster_cpus() / resources.cpus)), resources=resources)


def run_shards(
    verb: str,
    descriptors: Sequence[Mapping[str, Any]],
    make_worker: Callable[..., Worker],
    settings: Mapping[str, Any],
    *,
    folder: Path,
    pool: Pool,
    unit: str = "shards",
    amount: Callable[[Mapping[str, Any]], float] = lambda descriptor: 1.0,
    output: Callable[[Mapping[str, Any]], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Process every descriptor once (each a JSON-able dict with a unique `key`); returns key -> result.

    Results are small dicts. Those of an earlier run are taken from `folder`/ledger, unless the file of `folder` that
    `output` names is gone: that shard is done again.

    Raises:
        StageError: some shards failed and all others were done, or no worker could be started.
    """
    ledger = folder / LEDGER
    make_folder(ledger)
    weights = {descriptor["key"]: amount(descriptor) for descriptor in descriptors}
    assert len(weights) == len(descriptors), "keys are not unique"
    done = {key: entry["result"] for key, entry in finished_entries(ledger).items() if key in weights}
    if output and done:
        names = {descriptor["key"]: output(descriptor) for descriptor in descriptors if descriptor["key"] in done}
        there = sizes(folder, names.values())
        for key in [key for key, name in names.items() if name not in there]:
            forget(ledger, key)
            del done[key]
    state = _State(results=done)
    todo = [descriptor for descriptor in descriptors if descriptor["key"] not in state.results]
    if todo:
        for leftover in unfinished_attempts(ledger):
            leftover.unlink()  # a rerun is a fresh start for shards that failed before
        already = sum(weights[key] for key in state.results)
        with contextlib.closing(_RayMetrics(verb)) as metrics:
            sinks = (ProgressFile(folder), metrics)
            progress = Progress(verb, sum(weights.values()), unit, already=already, sinks=sinks)
            progress.publish(**state.counts(len(weights)))
            _run_rounds(verb, todo, make_worker, dict(settings), ledger, pool, state, progress, weights)
    if state.failures:
        listing = "\n".join(f"  {key}: {reason}" for key, reason in sorted(state.failures.items())[:20])
        raise StageError(f"{verb}: {len(state.failures)} of {len(descriptors)} shards failed\n{listing}")
    return {key: state.results[key] for key in weights}


@dataclass
class _State:
    """What is known of the shards so far; `amounts` and `seconds` are of the work of this run."""

    results: dict[str, dict[str, Any]]
    failures: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    amounts: float = 0
    seconds: float = 0

    def add(self, entry: Mapping[str, Any], weight: float) -> float:
        """Record an entry; returns the amount of work that it newly finishes."""
        key = entry["key"]
        if "error" in entry:
            self.failures[key] = entry["error"]
        elif key not in self.results:
            self.results[key] = entry["result"]
            self.retries += entry["attempts"] - 1
            self.amounts += weight
            self.seconds += entry["seconds"]
            return weight
        return 0.0

    def counts(self, total: int) -> dict[str, Any]:
        """What the progress line and the metrics say besides amount, rate and ETA."""
        return {
            "shards_done": len(self.results),
            "shards_total": total,
            "per_second_per_actor": self.amounts / self.seconds if self.seconds else 0.0,
            "retries": self.retries,
            "failed": len(self.failures),
        }


def _run_rounds(
    verb: str,
    todo: Sequence[Mapping[str, Any]],
    make_worker: Callable[..., Worker],
    settings: dict[str, Any],
    ledger: Path,
    pool: Pool,
    state: _State,
    progress: Progress,
    weights: Mapping[str, float],
) -> None:
    """Run pools of actors until every shard is done or given up."""
    while todo:
        before = len(state.results) + len(state.failures)
        try:
            # Closed whatever happens: actors that nobody waits for would keep their resources.
            with contextlib.closing(_map(todo, make_worker, settings, ledger, pool)) as entries:
                for entry in entries:
                    new = state.add(entry, weights[entry["key"]])
                    progress.advance(new, **state.counts(len(weights)))
        except ray.exceptions.RayError as error:
            reason = _reason(error)
            if len(state.results) + len(state.failures) == before:
                raise StageError(f"{verb}: no worker could be started: {reason}") from error
            log(verb, f"a worker is lost for good ({reason}); the shards left go to new ones", level=logging.WARNING)
        left = [item for item in todo if item["key"] not in state.results and item["key"] not in state.failures]
        if len(left) == len(todo):
            raise StageError(f"{verb}: no result for {len(left)} shards, among them {left[0]['key']}")
        todo = left
    progress.publish(**state.counts(len(weights)))


def _map(
    todo: Sequence[Mapping[str, Any]], make_worker: Any, settings: dict[str, Any], ledger: Path, pool: Pool
) -> Generator[dict[str, Any], None, None]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may take hours, and so may waiting for a machine
    context.max_consecutive_actor_init_deaths = NEW_ACTORS_PER_DEATH
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # another actor when all are busy
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"descriptor": json.dumps(descriptor)} for descriptor in todo]
    size = min(pool.size, len(rows))
    # Ahead of a busy actor only where there is plenty: else a shard would wait there for an actor that starts next.
    in_flight = pool.in_flight if len(rows) > pool.in_flight * size else 1
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _LedgerWorker,
        fn_constructor_kwargs={
            "make_worker": make_worker,
            "settings": settings,
            "ledger": str(ledger),
            "pool": pool,
        },
        compute=ray.data.ActorPoolStrategy(
            min_size=min(size, pool.min_size or size),
            max_size=size,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.resources.cpus,
        num_gpus=pool.resources.gpus or None,
        memory=pool.resources.memory,
        batch_size=1,
    )
    for row in dataset.iter_rows():
        yield json.loads(row["entry"])


class _LedgerWorker:
    """The Ray Data callable around a `Worker`: attempts, ledger, errors as rows."""

    def __init__(self, make_worker: Callable[..., Worker], settings: dict[str, Any], ledger: str, pool: Pool):
        import torch

        configure_logging()
        torch.set_num_threads(max(1, int(pool.resources.cpus)))
        self.ledger, self.pool = location(ledger), pool
        self.turn, self.slots = threading.Lock(), threading.Semaphore(pool.in_flight)
        starts = Attempts(self.ledger / ACTORS, str(ray.get_runtime_context().get_actor_id()))
        if starts.made >= pool.resources.attempts:
            raise RuntimeError(f"its process died {starts.made} times while it started")
        self.storage_error = ""
        try:
            starts.begin()
        except OSError as error:  # raised here, it would have Ray start this actor again, for ever
            self.storage_error = _said(error)
            return
        self.worker = make_worker(**settings)
        starts.forget()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = [self._run_one(json.loads(text)) for text in batch["descriptor"]]
        return {"entry": [json.dumps(row) for row in rows]}

    def _run_one(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        if self.storage_error:
            return {"key": descriptor["key"], "error": self.storage_error}
        try:
            return self._attempt(descriptor)
        except OSError as error:  # of the ledger itself
            return {"key": descriptor["key"], "error": _said(error)}

    def _attempt(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        key = descriptor["key"]
        done = self.ledger / f"{key}.json"
        attempts = Attempts(self.ledger, key)
        while not done.exists():
            with self._slots(self.pool.in_flight if attempts.made else 1):
                if attempts.made >= self.pool.resources.attempts:
                    return attempts.give_up(f"gave up after {attempts.made} attempts: {attempts.reason}")
                attempts.begin()
                started = time.monotonic()
                try:
                    result = self.worker.process(descriptor)
                except ValueError as error:
                    if not isinstance(error.__cause__, OSError):  # bad input is the same next time: say it once
                        return attempts.give_up(str(error))
                    attempts.failed(str(error))
                except Exception as error:
                    attempts.failed(traceback.format_exc(limit=-3).strip())
                    if _is_device_lost(error):
                        os._exit(1)
                else:
                    seconds = result.get("seconds", time.monotonic() - started)
                    write_json(done, {"key": key, "result": result, "attempts": attempts.made, "seconds": seconds})
        attempts.forget()
        return json.loads(done.read_text())

    @contextlib.contextmanager
    def _slots(self, count: int) -> Iterator[None]:
        """`count` of the actor's slots for shards; all of them means alone."""
        with self.turn:  # or two that want all of them would wait for each other
            for _ in range(count):
                self.slots.acquire()
        try:
            yield
        finally:
            self.slots.release(count)


class _RayMetrics:
    """Progress as gauges of Ray's own metrics, tagged by stage: what the cluster's dashboard and Prometheus read.

    Ray forgets a gauge that is not set for half a minute, and a shard may take longer: a thread sets them again."""

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

    def __init__(self, verb: str):
        self.tags = {"stage": verb}
        self.gauges = {
            name: Gauge(f"ifguide_{name}", f"Progress of a stage: {name}", ("stage",)) for name in self.NAMES
        }
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


def _is_device_lost(error: Exception) -> bool:
    """Whether torch can use the device of this process no more; memory that ran out is another error."""
    import torch

    return isinstance(error, torch.AcceleratorError)


def _said(error: OSError) -> str:
    return f"{type(error).__name__}: {error}"


def _reason(error: BaseException) -> str:
    """The last line of a remote error, which names the exception; of a process that died, the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[0] if lines else repr(error))
