"""Single tasks on a worker: what is said while one is at work, and its error as it was raised."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from ifguide.config.resources import Resources, WorkerResources
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


@pytest.mark.usefixtures("cluster")
def test_a_task_that_kills_its_process_is_tried_as_often_as_its_resources_say(tmp_path: Path) -> None:
    def fatal(folder: Path, survives: int) -> int:
        attempt = len(list(folder.iterdir())) + 1
        (folder / str(attempt)).touch()
        if attempt < survives:
            os._exit(1)
        return attempt

    folders = [tmp_path / name for name in ("once", "never", "many")]
    for folder in folders:
        folder.mkdir()
    twice = Resources(cpus=1.0, gpus=0.0, attempts=2)
    assert tasks.run_task(fatal, folders[0], 2, resources=twice) == 2
    with pytest.raises(tasks.StageError, match=r"^fatal: gave up after 2 attempts: The worker died"):
        tasks.run_task(fatal, folders[1], 9, resources=twice)
    assert len(list(folders[1].iterdir())) == 2
    assert list(tasks.run_tasks(twice)(fatal, [(folders[2], 2)])) == [2]
