"""Keyed, resumable, retried work on shards with Ray Data: what every distributed stage runs on.

A row of the dataset is a small descriptor, never data: a worker reads its own inputs, publishes its own
output under a name that the descriptor fixes, then publishes `ledger/<key>.json` with its small result.
The ledger entry means done: a rerun skips those keys. Attempts are counted on storage before the work
starts, so that a shard that kills its process is given up after `max_attempts` instead of being retried
for ever. A failed shard does not stop the others; the stage then ends with every failed key and reason.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.data

from ifguide.artifacts import write_json
from ifguide.telemetry import Progress, configure_logging

LEDGER = "ledger"


class StageError(RuntimeError):
    """Shards that failed after all their attempts; the message names each with its reason."""


class Worker(Protocol):
    """Holds the heavy state of a shard worker; `process` publishes the shard's output and returns its small result."""

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Resources of a stage's workers. `size` actors live as long as the stage."""

    size: int
    cpus: float
    gpus: float
    max_attempts: int = 3


class _LedgerWorker:
    """The Ray Data callable around a `Worker`: attempts, ledger, errors as rows."""

    def __init__(self, make_worker: Callable[..., Worker], settings: dict[str, Any], ledger: str, pool: Pool):
        import torch

        configure_logging()
        torch.set_num_threads(max(1, int(pool.cpus)))
        self.worker = make_worker(**settings)
        self.ledger, self.max_attempts = Path(ledger), pool.max_attempts

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = [self._run_one(json.loads(text)) for text in batch["descriptor"]]
        return {"entry": [json.dumps(row) for row in rows]}

    def _run_one(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        key, error = descriptor["key"], "its process died each time"
        counter = self.ledger / f"{key}.attempts"
        while True:
            attempts = int(counter.read_text()) if counter.exists() else 0
            if attempts >= self.max_attempts:
                return {"key": key, "error": f"gave up after {attempts} attempts: {error}"}
            counter.write_text(str(attempts + 1))
            try:
                entry = {"key": key, "result": self.worker.process(descriptor)}
            except ValueError as bad_input:  # the same next time: say it once
                counter.unlink()
                return {"key": key, "error": str(bad_input)}
            except Exception:
                error = traceback.format_exc(limit=-3).strip()
            else:
                write_json(self.ledger / f"{key}.json", entry)
                counter.unlink()
                return entry


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
) -> dict[str, dict[str, Any]]:
    """Process every descriptor once (each a JSON-able dict with a unique `key`); returns key -> result.

    Results are small dicts. Those of an earlier run are taken from `folder`/ledger.

    Raises:
        StageError: some shards failed; all others were done.
    """
    ledger = folder / LEDGER
    ledger.mkdir(parents=True, exist_ok=True)
    done = {path.stem: json.loads(path.read_text()) for path in ledger.glob("*.json")}
    weights = {descriptor["key"]: amount(descriptor) for descriptor in descriptors}
    assert len(weights) == len(descriptors), "keys are not unique"
    results = {key: done[key]["result"] for key in weights if key in done}
    progress = Progress(verb, sum(weights.values()), unit, already=sum(weights[key] for key in results))
    todo = [descriptor for descriptor in descriptors if descriptor["key"] not in results]
    failures: dict[str, str] = {}
    if todo:
        for leftover in ledger.glob("*.attempts"):
            leftover.unlink()  # a rerun is a fresh start for shards that failed before
        for entry in _map(todo, make_worker, dict(settings), ledger, pool):
            if "error" in entry:
                failures[entry["key"]] = entry["error"]
            else:
                results[entry["key"]] = entry["result"]
                progress.advance(weights[entry["key"]])
    if failures:
        listing = "\n".join(f"  {key}: {reason}" for key, reason in sorted(failures.items())[:20])
        raise StageError(f"{verb}: {len(failures)} of {len(descriptors)} shards failed\n{listing}")
    missing = weights.keys() - results.keys()
    if missing:
        raise StageError(f"{verb}: no result for {len(missing)} shards, among them {min(missing)}")
    return {key: results[key] for key in weights}


def _map(
    todo: Sequence[Mapping[str, Any]], make_worker: Any, settings: dict[str, Any], ledger: Path, pool: Pool
) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"descriptor": json.dumps(descriptor)} for descriptor in todo]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _LedgerWorker,
        fn_constructor_kwargs={
            "make_worker": make_worker,
            "settings": settings,
            "ledger": str(ledger),
            "pool": pool,
        },
        # one at a time: queued behind a busy actor, a shard would not go to the actor that starts next
        compute=ray.data.ActorPoolStrategy(size=min(pool.size, len(rows)), max_tasks_in_flight_per_actor=1),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        batch_size=1,
    )
    for row in dataset.iter_rows():
        yield json.loads(row["entry"])
