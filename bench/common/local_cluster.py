"""Two Ray nodes on this machine, and drivers of a run on them, to be killed and started again."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.common.places import ROOT
from ifguide.config import config_from_mapping

ACTOR = "MapWorker"  # Ray gives an actor's process the title ray::MapWorker(...)
VERBS = (
    "import sys; from ifguide.cli import main;"
    " sys.exit(next((1 for verb in sys.argv[2:] if main([verb, '--config', sys.argv[1]])), 0))"
)
# How soon the head notices that a node is gone; Ray's defaults take 15 s or more.
DETECTION = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
# How long Ray waits for its processes to start; its defaults of 30 to 100 seconds are too short for a busy machine.
PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
}
WAIT_SECONDS = 600.0
RUN_SECONDS = 3000.0  # of a verb
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # the first and the last of the ports that the system gives


def write_config(run_dir: Path, tree: dict[str, Any]) -> None:
    """The run's config as a file in its directory, after a check."""
    config_from_mapping(tree)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))


class LocalCluster:
    """Two Ray nodes of one CPU each on 127.0.0.1, started by `ray start`; the second can be killed and replaced."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_ports(2)
        self.address = f"127.0.0.1:{self.port}"
        self.head: subprocess.Popen[bytes] | None = None
        self.node: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self.folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.temp = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: socket paths have at most 107 bytes
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = {
            **inherited,
            **{f"RAY_{name}": str(value) for name, value in DETECTION.items()},
            **PATIENCE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.head = self._start_node(
            "--head",
            f"--port={self.port}",
            f"--ray-client-server-port={self.port + 1}",
            "--include-dashboard=false",
        )
        deadline = time.monotonic() + WAIT_SECONDS
        while not _listens(self.port):
            if self.head.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the head node did not start: {(self.folder / 'nodes.log').read_text()[-2000:]}")
            time.sleep(0.1)
        self.node = self._start_node(f"--address={self.address}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.node, self.head):
            if process is not None:
                _kill_tree(process)
        shutil.rmtree(self.temp, ignore_errors=True)

    def run(self, run_dir: Path, *verbs: str) -> None:
        """Run verbs to their end on one actor.

        Raises:
            RuntimeError: one failed; with its last lines.
        """
        process = self.start(run_dir, 1, *verbs)
        try:
            if process.wait(timeout=RUN_SECONDS):
                raise RuntimeError(f"{verbs} ended with {process.returncode}; {self.log_of(run_dir)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, run_dir: Path, actors: int, *verbs: str) -> subprocess.Popen[bytes]:
        """Start a driver for verbs on that many actors."""
        tree = yaml.safe_load((run_dir / "config.yaml").read_text())
        tree["score_corpus"] |= {"min_actors": 1, "max_actors": actors}
        write_config(run_dir, tree)
        with (run_dir / "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", VERBS, str(run_dir / "config.yaml"), *verbs],
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=ROOT,
            )

    def log_of(self, run_dir: Path) -> str:
        """The last lines that the drivers of a run wrote."""
        return (run_dir / "driver.log").read_text(errors="replace")[-3000:]

    def kill_actor(self, rng: random.Random) -> bool:
        """Kill -9 one actor of the scoring pool; False when none is alive."""
        processes = [*_tree(self.head), *_tree(self.node)]
        actors = [process for process in processes if ACTOR in _title(process)]
        if not actors:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(actors).kill()
            return True
        return False

    def kill_node(self) -> bool:
        """Kill -9 every process of the second node, and start another one."""
        assert self.node is not None
        if not any(ACTOR in _title(process) for process in _tree(self.node)):
            return False
        _kill_tree(self.node)
        self.node = self._start_node(f"--address={self.address}")
        return True

    def _start_node(self, *arguments: str) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).with_name("ray")
        # Free ports for workers and agents, because nodes share one address; --block: the process lives with its node.
        command = [
            str(ray), "start", *arguments, "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1",
            "--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={self.temp}",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        with (self.folder / "nodes.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment)


def _title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


def _tree(process: subprocess.Popen[bytes] | None) -> list[psutil.Process]:
    """A process and all that came of it."""
    if process is None or process.poll() is not None:
        return []
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    for member in _tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on; Ray's head node ends where one of its own is taken.

    They lie below those that the system gives to whoever asks for any port, so that no other process is given one
    before it is used.
    """
    end = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_000
    while True:
        first = random.SystemRandom().randrange(min(11_000, end // 2), min(32_000, end) - count)
        if not any(_listens(port) for port in range(first, first + count)):
            return first


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
