"""Single tasks on a worker: what is said while one is at work, and its error as it was raised."""

from __future__ import annotations

import logging
import time

import pytest

from ifguide.config.resources import WorkerResources
from ifguide.distributed import tasks

CPU = WorkerResources(cpus=1.0, gpus=0.0)


@pytest.mark.usefixtures("cluster")
def test_a_long_task_says_that_it_is_at_work(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tasks, "SAID_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(logging.getLogger("ifguide"), "propagate", True)

    def long_task(seconds: float) -> int:
        time.sleep(seconds)
        return 7

    with caplog.at_level(logging.INFO, "ifguide"):
        assert tasks.run_task(long_task, 1.0, resources=CPU) == 7
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 2
    assert all(line.startswith("long_task    | at work for ") for line in said)


@pytest.mark.usefixtures("cluster")
def test_the_error_of_a_task_is_the_one_that_it_raised() -> None:
    def broken() -> None:
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match=r"^no such layer$"):
        tasks.run_task(broken, resources=CPU)
