"""Single Ray tasks: one function on many arguments, or once, with its error as it was raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from ifguide.config.resources import WorkerResources
from ifguide.distributed.session import cluster_cpus


def run_task(function: Callable[..., Any], *arguments: Any, resources: WorkerResources) -> Any:
    """`function(*arguments)` on a worker of the cluster, waited for.

    Raises:
        what the function raises, unwrapped. ray.exceptions.RayError: its process died.
    """
    task = ray.remote(function).options(num_cpus=resources.cpus, num_gpus=resources.gpus, memory=resources.memory)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def run_tasks(resources: WorkerResources) -> Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]:
    """`RunTasks` of `ifguide.selection.distributed` on the Ray cluster, each task with `resources`."""

    def run(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        task = ray.remote(function).options(num_cpus=resources.cpus, memory=resources.memory)
        # Twice what can run: results wait in the object store, and a histogram is half a megabyte.
        most = max(8, int(2 * cluster_cpus() / resources.cpus))
        pending: list[Any] = []
        for each in arguments:
            if len(pending) >= most:
                (ready,), pending = ray.wait(pending)
                yield ray.get(ready)
            pending.append(task.remote(*each))
        while pending:
            (ready,), pending = ray.wait(pending)
            yield ray.get(ready)

    return run
