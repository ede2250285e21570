"""What one process of a stage takes of the cluster: the same nested section wherever processes are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ifguide.config.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """One worker's share of the cluster.

    Attributes:
        cpus: CPUs.
        gpus: GPUs; a fraction shares one.
        memory: bytes that Ray sets aside. Null: none.
    """

    cpus: float = option(1.0, above=0, affects_result=False)
    gpus: float = option(1.0, at_least=0, affects_result=False)
    memory: int | None = option(None, at_least=1, affects_result=False)


@dataclass(frozen=True, kw_only=True)
class Resources(WorkerResources):
    """A task's or an actor's share of the cluster.

    Attributes:
        cpus: CPUs.
        gpus: GPUs; a fraction shares one.
        memory: bytes that Ray sets aside. Null: none.
        attempts: how often a piece of work is tried before it is given up.
    """

    attempts: int = option(3, at_least=1, affects_result=False)


RESOURCES = option(Resources(), affects_result=False)  # of a stage that computes with a model
CPU_RESOURCES = option(Resources(gpus=0.0), affects_result=False)  # of a stage that does not
ONE_CPU = WorkerResources(gpus=0.0)


def moved(kind: str) -> dict[str, str]:
    """The keys that `resources` replaced in a section whose processes were called `kind`, for its `RENAMED`."""
    keys = {f"{name}_per_{kind}": f"resources.{name}" for name in ("cpus", "gpus")}
    return keys | {"memory": "resources.memory", "max_attempts": "resources.attempts"}
