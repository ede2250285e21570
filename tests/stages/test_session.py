"""The local Ray of this machine: who can reach it, and what it cannot hold."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ifguide.config import Config, ConfigError
from ifguide.pipeline import stage
from ifguide.run import Run
from tests.stages.conftest import own_environment

CONNECTED = """
import sys
from ifguide.config import Cluster
from ifguide.distributed.session import connect
from ifguide.distributed.tasks import run_task
from ifguide.config.resources import WorkerResources

connect(Cluster(num_cpus=1))
run_task(lambda: None, resources=WorkerResources(gpus=0))
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_local_ray_listens_on_loopback_alone(tmp_path: Path) -> None:
    environment = own_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen(
        [sys.executable, "-c", CONNECTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert driver.stdout is not None
        assert "connected\n" in driver.stdout
        listening = {pid: addresses for pid in descendants(driver.pid) if (addresses := listening_on(pid))}
        assert len(listening) >= 4  # the driver, Ray's two servers, and a worker at least
        assert {address for addresses in listening.values() for address in addresses} == {"127.0.0.1"}
    finally:
        assert driver.stdin is not None
        driver.stdin.close()
        driver.wait(60)


@pytest.mark.parametrize(("verb", "made"), [("pack_corpus", ["corpus"]), ("build_mask", ["ranking", "mask"])])
def test_a_task_that_the_machine_can_never_hold_is_refused(
    copied: Callable[..., Config], verb: str, made: list[str]
) -> None:
    config = copied(drop=tuple(made), **{f"{verb}__resources": {"cpus": 64, "gpus": 0}})
    with pytest.raises(ConfigError, match=rf"^{verb}\.resources\.cpus: 1 process of 64 CPU .* there are 2 CPU"):
        stage(verb)(Run(config=config))


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def listening_on(pid: int) -> set[str]:
    """The addresses of a process' listening TCP sockets."""
    addresses = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A":
                addresses[f"socket:[{rest[5]}]"] = plain(local.partition(":")[0])
    links = set()
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            links.add(os.readlink(path))
        except OSError:
            continue
    return {address for socket, address in addresses.items() if socket in links}


def plain(hexadecimal: str) -> str:
    """An address of /proc/net, which has words of four bytes in the machine's order."""
    words = [hexadecimal[i : i + 8] for i in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
