"""What an actor makes of a ledger that it cannot reach."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from ifguide.distributed import worker
from ifguide.distributed.ledger import Failure
from ifguide.distributed.memory import MemoryWatch
from ifguide.distributed.worker import LedgerWorker


def ledger_worker(ledger: Path) -> LedgerWorker:
    """An actor's callable without an actor; its work gives an empty result."""
    made = LedgerWorker.__new__(LedgerWorker)
    made.ledger, made.attempts, made.in_flight, made.storage_error = ledger, 3, 1, ""
    made.turn, made.slots, made.memory = threading.Lock(), threading.Semaphore(1), MemoryWatch()
    made.worker = SimpleNamespace(process=lambda shard: {})
    return made


@pytest.mark.parametrize("error", [OSError("no space"), EndpointConnectionError(endpoint_url="s3")])
def test_a_store_that_is_away_fails_its_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def away(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "write_entry", away)
    shard: Any = SimpleNamespace(key="a")
    failure = ledger_worker(tmp_path)._run_one(shard)
    assert isinstance(failure, Failure)
    assert type(error).__name__ in failure.reason


def test_a_fault_of_the_program_is_no_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise KeyError("files")

    monkeypatch.setattr(worker, "write_entry", wrong)
    shard: Any = SimpleNamespace(key="a")
    with pytest.raises(KeyError):
        ledger_worker(tmp_path)._run_one(shard)
