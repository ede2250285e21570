"""Settings of all tests."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread a process, and for what it starts: `pytest -n` fills the cores, and threads that wait for each other's
# turn double the time of small matrices. Read when torch and numpy are imported; Ray's workers have their own number.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from bench.common.local_cluster import PATIENCE

os.environ |= PATIENCE  # before Ray is imported, for it and for what it starts

# Without a GPU, Triton's kernels are interpreted; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PREFORK = Path(__file__).parent / "prefork"
SOCKET = "IFGUIDE_PREFORK_SOCKET"
_servers: list[subprocess.Popen[bytes]] = []


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that Ray's workers are forked from: one for all processes of `pytest -n`."""
    if SOCKET in os.environ:
        return
    path = Path(tempfile.mkdtemp(prefix="prefork-")) / "socket"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PREFORK), os.environ.get("PYTHONPATH")]))
    os.environ[SOCKET] = str(path)
    with open(path.with_name("log"), "wb") as log:
        _servers.append(subprocess.Popen([sys.executable, PREFORK / "server.py", path], stderr=log, stdout=log))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop it."""
    for server in _servers:
        server.terminate()
        server.wait()
        shutil.rmtree(Path(os.environ[SOCKET]).parent)


# a busy machine is no failure: examples have no time limit of their own, tests have pytest's
settings.register_profile("ifguide", deadline=None)
settings.load_profile("ifguide")


# the longest files: one makes the run that stage tests share, while the others need none of it
FIRST = ("tests/stages/test_kill.py", "tests/stages/test_s3.py", "tests/unit/bench/test_gpu.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long comes first: with `pytest -n` the many short tests then fill the end of the session."""
    items.sort(key=lambda item: (not item.nodeid.startswith(FIRST), not item.nodeid.startswith("tests/stages/")))
