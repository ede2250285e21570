"""Single Ray tasks: one function on many arguments, or once, with its error as it was raised."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from ifguide.config.resources import Resources, WorkerResources
from ifguide.distributed.session import cluster_cpus
from ifguide.telemetry import Progress, format_seconds, log

SAID_EVERY_SECONDS = 60.0


def run_task(function: Callable[..., Any], *arguments: Any, resources: WorkerResources) -> Any:
    """`function(*arguments)` on a worker of the cluster, waited for. Once a minute a line says that it is at work.

    Raises:
        what the function raises, unwrapped. ray.exceptions.RayError: its process died.
    """
    reference, started = _start(function, arguments, resources), time.monotonic()
    while not ray.wait([reference], timeout=SAID_EVERY_SECONDS)[0]:
        log(function.__name__, f"at work for {format_seconds(time.monotonic() - started)}")
    return _result(reference)


def run_tasks(resources: WorkerResources) -> Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]:
    """`RunTasks` of `ifguide.selection.distributed` on the Ray cluster: each task has `resources`, and its error is
    that of `run_task`. What takes more than a few seconds says how far it is."""

    def run(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        # Twice what can run: results wait in the object store, and a histogram is half a megabyte.
        most = max(8, int(2 * cluster_cpus() / resources.cpus))
        waiting, pending = deque(calls), list[Any]()
        progress = Progress(function.__name__, len(waiting), "tasks", says_end=False)
        with progress.never_silent(SAID_EVERY_SECONDS):
            while waiting or pending:
                while waiting and len(pending) < most:
                    pending.append(_start(function, waiting.popleft(), resources))
                (ready,), pending = ray.wait(pending)
                result = _result(ready)
                progress.advance(1)
                yield result

    return run


def _start(function: Callable[..., Any], arguments: tuple[Any, ...], resources: WorkerResources) -> Any:
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus or None}
    if isinstance(resources, Resources):
        options["max_retries"] = (
            resources.attempts - 1
        )  # of a task whose process died; what it raises is not tried again
    return ray.remote(function).options(memory=resources.memory, **options).remote(*arguments)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from error
