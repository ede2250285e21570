"""The Ray cluster that stages work on: joined or started once, and asked whether it can hold what they need."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray._private import ray_constants

from ifguide import interrupts
from ifguide.config import Cluster, ConfigError
from ifguide.config.resources import WorkerResources
from ifguide.telemetry import log

NOTICE_SECONDS = 5.0  # between looks for Ray's notice
FIXED = "IFGUIDE_FIXED_CLUSTER"  # set where no machine can join, as in the nodes of a Slurm job


def connect(cluster: Cluster) -> None:
    """Join the cluster named by `cluster.address` or RAY_ADDRESS, or start a local one; once per process."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = _address(cluster)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the backend warns of what Ray Data does by design
    # Stages show their own progress; workers' output stays in Ray's logs, and their errors come back.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **options)
        threading.Thread(target=_heed_notice, args=(ray.get_runtime_context().get_node_id(),), daemon=True).start()
    else:
        with _on_loopback():
            ray.init(
                address="local",  # without it Ray joins whatever cluster somebody has started on this machine
                num_cpus=cluster.num_cpus,
                include_dashboard=False,
                **options,
            )
    interrupts.install()  # Ray has put its own handlers there


def _heed_notice(node: str) -> None:
    """End as by SIGTERM when Ray says that the driver's machine will be taken away, as of a pod that ends: what trains
    is saved then, and the same command goes on elsewhere. A node that has nothing else to do ends at once."""
    with contextlib.suppress(Exception):  # this process has left the cluster, or the cluster is gone
        while node in {other["NodeID"] for other in ray.nodes() if other["Alive"]}:
            if node in ray._private.state.state.get_draining_nodes():
                break
            time.sleep(NOTICE_SECONDS)
        log("cluster", "this machine is being taken away", level=logging.WARNING)
        interrupts.request()


def disconnect() -> None:
    """Leave the cluster, and end it if this process started it; where there is none, nothing."""
    ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a local Ray listen on 127.0.0.1 alone, as it does by itself on macOS; else all interfaces have its ports.

    Ray reads the variable when it is imported, and so do the processes that it starts: both are told. `ray.init` has an
    address for this too, but replaces a loopback one by that of the network."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def cluster_cpus() -> float:
    """The CPUs of the cluster that this process has joined."""
    return float(ray.cluster_resources().get("CPU", 1))


def require_resources(
    cluster: Cluster, verb: str, resources: WorkerResources, count: int = 1, *, number: str = "their number"
) -> None:
    """Refuse `count` processes of a stage that this machine can never hold: Ray would wait for ever.

    A cluster that was joined may grow, unless `FIXED` says that it does not: there it says what it waits for. number:
    what to lower for fewer of them.

    Raises:
        ConfigError: Ray runs on this machine alone, or on a cluster that cannot grow, and is too small; names the key.
    """
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory or 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def room(*names: str) -> int:
        shares = [[node.get(name, 0) / wanted[name] for name in names if wanted[name]] for node in nodes]
        return sum(int(min(of_node, default=count) + 1e-6) for of_node in shares)

    if room(*wanted) >= count:
        return
    keys = {"GPU": "gpus", "memory": "memory", "CPU": "cpus"}
    key = next((key for name, key in keys.items() if room(name) < count), "cpus")
    named = [name for name in wanted if name != "memory" or wanted[name]]
    there = {name: sum(node.get(name, 0) for node in nodes) for name in named}
    text = f"{verb}.resources.{key}: {count} process{'es' * (count > 1)} of {_amounts(wanted, named)} asked for, there"
    text += f" are {_amounts(there, named)}"
    if len(nodes) > 1:
        text += f" on {len(nodes)} machines"
    if is_fixed(cluster):
        raise ConfigError(f"{text}; lower it" + (f" or {number}" if count > 1 else ""))
    log(verb, f"waiting for the cluster to grow: {text}", level=logging.WARNING)


def _amounts(of: Mapping[str, float], names: Sequence[str]) -> str:
    """As people read them; memory is in bytes."""
    return " and ".join(f"{of[name] / 2**30:.4g} GiB" if name == "memory" else f"{of[name]:g} {name}" for name in names)


def is_fixed(cluster: Cluster) -> bool:
    """Whether no machine will join: Ray runs on this one alone, or the environment says so."""
    return not _address(cluster) or bool(os.environ.get(FIXED))


def _address(cluster: Cluster) -> str | None:
    """Of the cluster to join; None where Ray runs on this machine alone."""
    return cluster.address or os.environ.get("RAY_ADDRESS")
