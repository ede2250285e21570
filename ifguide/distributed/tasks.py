"""Single Ray tasks: one function on many arguments, or once, with its error as it was raised.

Attempts of a task whose process died are counted here. Ray counts none that its memory monitor ended, and would try a
task that is too large for its machine for ever; with `max_retries` of 0 it tries none again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from ifguide import interrupts
from ifguide.config.resources import Resources, WorkerResources
from ifguide.distributed.session import cluster_cpus
from ifguide.telemetry import Progress, format_seconds, log

SAID_EVERY_SECONDS = 60.0
ATTEMPTS = Resources().attempts  # of a task whose resources name none
LOST = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)  # the process or its machine is gone


class StageError(RuntimeError):
    """Work that failed after all its attempts; the message names each piece with its reason."""


def run_task(function: Callable[..., Any], *arguments: Any, resources: WorkerResources) -> Any:
    """`function(*arguments)` on a worker of the cluster, waited for. Once a minute a line says that it is at work.

    Raises:
        what the function raises, unwrapped. StageError: its process died at each of its attempts.
    """
    task, started = _Task(function, arguments, resources), time.monotonic()
    while True:
        reference = _start(function, arguments, resources)
        while not ray.wait([reference], timeout=SAID_EVERY_SECONDS)[0]:
            log(function.__name__, f"at work for {format_seconds(time.monotonic() - started)}")
        try:
            return _result(function, reference)
        except LOST as error:
            task.lose(error)


def run_tasks(resources: WorkerResources) -> Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]:
    """`RunTasks` of `ifguide.selection.distributed` on the Ray cluster: each task has `resources`, attempts of its own,
    and the errors of `run_task`. What takes more than a few seconds says how far it is.

    A task that was lost is started again after the others, and alone if memory ran out."""

    def run(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        # Twice what can run: results wait in the object store, and a histogram is half a megabyte.
        most = max(8, int(2 * cluster_cpus() / resources.cpus))
        waiting, pending = deque(_Task(function, arguments, resources) for arguments in calls), dict[Any, _Task]()
        progress = Progress(function.__name__, len(waiting), "tasks", says_end=False)
        with progress.never_silent(SAID_EVERY_SECONDS):
            while waiting or pending:
                while waiting and len(pending) < (1 if _one_runs_alone(waiting[0], *pending.values()) else most):
                    task = waiting.popleft()
                    pending[_start(function, task.arguments, resources)] = task
                (ready,), _ = ray.wait(list(pending))
                task = pending.pop(ready)
                try:
                    result = _result(function, ready)
                except LOST as error:
                    task.lose(error)
                    waiting.append(task)
                    continue
                progress.advance(1)
                yield result

    return run


@dataclass
class _Task:
    """`lost`: attempts whose process died. `alone`: the memory of a machine did not suffice for it and its
    neighbours."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resources: WorkerResources
    lost: int = 0
    alone: bool = False

    def lose(self, error: RayError) -> None:
        """Count an attempt, and say it. Raises StageError: it was the last one."""
        self.lost += 1
        name, most = self.function.__name__, getattr(self.resources, "attempts", ATTEMPTS)
        if self.lost >= most or interrupts.requested():
            raise _given_up(self.function, error, f"gave up after {self.lost} attempts: ") from error
        self.alone = isinstance(error, OutOfMemoryError)
        log(name, f"lost, attempt {self.lost + 1} of {most} follows: {reason_of(error)}", level=logging.WARNING)


def _one_runs_alone(*tasks: _Task) -> bool:
    return any(task.alone for task in tasks)


def _start(function: Callable[..., Any], arguments: tuple[Any, ...], resources: WorkerResources) -> Any:
    remote = ray.remote(function).options(
        num_cpus=resources.cpus, num_gpus=resources.gpus or None, memory=resources.memory, max_retries=0
    )
    return remote.remote(*arguments)


def _result(function: Callable[..., Any], reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause or error) from error
    except LOST:
        raise
    except RayError as error:
        raise _given_up(function, error) from error


def _given_up(function: Callable[..., Any], error: RayError, how: str = "") -> StageError:
    advice = "what was finished is kept, and the same command goes on from there"
    if isinstance(error, OutOfMemoryError):
        advice = f"give it a machine with more memory, or less to do at once; {advice}"
    return StageError(f"{function.__name__}: {how}{reason_of(error).rstrip('.')}; {advice}")


def reason_of(error: BaseException) -> str:
    """The last line of a remote error, which names the exception; of a process that died, the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[0] if lines else repr(error))
