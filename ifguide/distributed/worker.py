"""What runs in an actor's process: a stage's worker, with attempts, ledger, and errors as results.

A process whose device has failed ends itself: all that it does from then on would fail, and faster than others work.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray

from ifguide.artifacts import recording
from ifguide.config.resources import Resources
from ifguide.distributed.ledger import ACTORS, Attempts, Entry, Failure, read_entry, write_entry
from ifguide.distributed.memory import MemoryWatch
from ifguide.storage import is_storage_error, location
from ifguide.telemetry import configure_logging


class Shard(Protocol):
    """One piece of a stage's work: a small frozen dataclass. Its key is unique and names its output.

    A class with `__str__` says in failures what the key alone does not, a file for instance."""

    @property
    def key(self) -> str: ...


class Worker(Protocol):
    """Holds the heavy state of a shard worker; `process` publishes the shard's output and returns its small result.

    In a pool with `in_flight` over 1 it is called by that many threads at once."""

    def process(self, shard: Any, /) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class WorkerSource:
    """What an actor makes its worker from, and where it keeps the ledger."""

    make_worker: Callable[[Any], Worker]
    settings: Any
    ledger: str
    resources: Resources
    in_flight: int


@dataclass(frozen=True)
class Parcel:
    """An object on its way between driver and actor, which Ray Data must not take apart."""

    content: Any


class LedgerWorker:
    """The Ray Data callable around a `Worker`."""

    def __init__(self, source: WorkerSource):
        import torch

        configure_logging()
        torch.set_num_threads(max(1, int(source.resources.cpus)))
        self.ledger, self.attempts = location(source.ledger), source.resources.attempts
        self.in_flight = source.in_flight
        self.memory = MemoryWatch()
        self.turn, self.slots = threading.Lock(), threading.Semaphore(source.in_flight)
        starts = Attempts(self.ledger / ACTORS, str(ray.get_runtime_context().get_actor_id()))
        if starts.made >= self.attempts:
            raise RuntimeError(f"its process died {starts.made} times while it started")
        self.storage_error = ""
        try:
            starts.begin()
        except Exception as error:  # raised here, it would have Ray start this actor again, for ever
            if not is_storage_error(error):
                raise
            self.storage_error = _said(error)
            return
        self.worker = source.make_worker(source.settings)
        starts.forget()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Parcel]]:
        return {"entry": [Parcel(self._run_one(parcel.content)) for parcel in batch["shard"]]}

    def _run_one(self, shard: Shard) -> Entry | Failure:
        if self.storage_error:
            return Failure(key=shard.key, reason=self.storage_error)
        try:
            return self._attempt(shard)
        except Exception as error:  # of the ledger itself
            if not is_storage_error(error):
                raise
            return Failure(key=shard.key, reason=_said(error))

    def _attempt(self, shard: Shard) -> Entry | Failure:
        key = shard.key
        attempts = Attempts(self.ledger, key)
        while (entry := read_entry(self.ledger, key)) is None:
            with self._slots(self.in_flight if attempts.made else 1):
                if attempts.made >= self.attempts:
                    reason = f"gave up after {attempts.made} attempts: {attempts.reason}"
                    return attempts.give_up(f"{shard}: {reason}" if _says_what_it_is(shard) else reason)
                attempts.begin()
                started = time.monotonic()
                try:
                    with self.memory.over(attempts), recording() as published:
                        result = self.worker.process(shard)
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
                    files = {self._name(path): entry for path, entry in published.items()}
                    done = Entry(key=key, result=result, attempts=attempts.made, seconds=seconds, files=files)
                    write_entry(self.ledger, done)
        attempts.forget()
        return entry

    def _name(self, path: Path) -> str:
        folder = self.ledger.parent
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

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


def _says_what_it_is(shard: Shard) -> bool:
    """Whether its class has words for it, a file for instance."""
    return "__str__" in vars(type(shard))


def _is_device_lost(error: Exception) -> bool:
    """Whether torch can use the device of this process no more; memory that ran out is another error."""
    import torch

    return isinstance(error, torch.AcceleratorError)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
