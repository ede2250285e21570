"""A process that has imported what Ray's workers import, and forks each of them.

A worker imports ray, torch, transformers and pyarrow, which takes 7 to 9 seconds of CPU. A stage starts several, so
that the tests spent most of their time there. A fork has them in a tenth of a second. All else is Ray's: its raylet
asks for the worker, and the worker runs Ray's own main module and registers there.

A variable that a module reads as it is imported cannot be changed afterwards. So the imports happen under the
environment of the first worker, and a worker with another environment is left to start by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sitecustomize

MODULES = (
    "ray._private.workers.default_worker",
    "ray.data",
    "ray.train.torch",
    "profanity_check",
    "ifguide.corpus.workers",
    "ifguide.evaluation.worker",
    "ifguide.influence.factor_worker",
    "ifguide.influence.query_worker",
    "ifguide.influence.scoring_worker",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "torch._inductor.compile_fx",
    "deepspeed",
    "s3fs",
)
# of one worker, one test or one cluster, and read by nothing as it is imported
VOLATILE = {
    "_",
    "IFGUIDE_CACHE",
    "OLDPWD",
    "PWD",
    "PYTEST_CURRENT_TEST",
    "PYTHONBREAKPOINT",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "SHLVL",
    "TMPDIR",
    sitecustomize.IMPATIENT,
}
VOLATILE_PREFIXES = (
    "AWS_",
    "KMP_",
    "PYTEST_XDIST_",
    "RAY_CLIENT_",
    "RAY_JOB_",
    "RAY_NODE_",
    "RAY_RAYLET_",
    "RAY_SESSION_",
    "RAY_WARN_",
)

log = logging.getLogger(__name__)


def lasting(environment: dict[str, str]) -> dict[str, str]:
    """The variables that an import may read."""
    return {k: v for k, v in environment.items() if k not in VOLATILE and not k.startswith(VOLATILE_PREFIXES)}


class Server:
    """Forks the workers that are asked for on the socket at `path`, one a connection."""

    def __init__(self, path: Path):
        self.environment: dict[str, str] | None = None  # of the imports, once they were made
        self.refusal = ""  # why no worker can be forked
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(64)
        self.listener.settimeout(2)

    def serve(self) -> None:
        """Answer until the parent process is gone."""
        parent = os.getppid()
        while os.getppid() == parent:
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(None)
                try:
                    self._answer(connection)
                except (OSError, ValueError):
                    log.exception("a worker was not forked")

    def _answer(self, connection: socket.socket) -> None:
        """Fork the worker, or have it start by itself."""
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)  # its standard input, output and error
        try:
            with connection.makefile("rb") as file:
                request = json.load(file)
            if self.environment is None:
                self._prepare(request["environment"])
            reason = self._obstacle(request)
            if reason:
                log.warning("not forked: %s", reason)
                connection.sendall(b"n")
                return
            connection.sendall(b"y")  # before the fork: Ray may have given the worker up meanwhile
            if os.fork() == 0:
                connection.close()
                self.listener.close()
                be_worker(request, streams)
        finally:
            for stream in streams:
                os.close(stream)

    def _prepare(self, environment: dict[str, str]) -> None:
        self.environment = lasting(environment)
        os.environ.clear()
        # pyarrow's allocator would start a thread, and a fork has the thread alone that forks. Ray's core reads here
        # which raylet it ends with. That of the first cluster would take the workers of all others with it: it is told
        # this process, and each worker looks after its own raylet.
        os.environ.update(environment, JE_ARROW_MALLOC_CONF="background_thread:false", RAY_RAYLET_PID=str(os.getpid()))
        with unstarted_random_numbers():
            for name in MODULES:
                importlib.import_module(name)
        if ray_id_of_fork() == ray_id_of_fork():
            self.refusal = "Ray's random numbers have begun: two forks would use the same"

    def _obstacle(self, request: dict[str, Any]) -> str:
        """Why the worker would not be what it is when it starts by itself; empty if it would."""
        assert self.environment is not None
        differing = {name for name, _ in lasting(request["environment"]).items() ^ self.environment.items()}
        if differing:
            return f"other values of {sorted(differing)}"
        return "threads, which a fork does not have" if len(os.listdir("/proc/self/task")) > 1 else self.refusal


@contextlib.contextmanager
def unstarted_random_numbers() -> Iterator[None]:
    """Leave Ray's own generator alone: seeded before a fork, it would give the same ids to objects of two workers.

    Decorating an actor class draws from it."""
    import ray.actor

    class Ids:
        @staticmethod
        def from_random() -> ray.ActorClassID:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    before, ray.actor.ActorClassID = ray.actor.ActorClassID, Ids
    try:
        yield
    finally:
        ray.actor.ActorClassID = before


def ray_id_of_fork() -> bytes:
    """The first id that Ray draws in a fork of this process."""
    import ray

    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, ray.ObjectID.from_random().binary())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return file.read()


def end_with(pid: int) -> None:
    """End this process once that one is gone."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(1)
    os._exit(1)


def be_worker(request: dict[str, Any], streams: list[int]) -> None:
    """Run Ray's main module of workers in this process; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sitecustomize.settle()
        raylet = int(request["environment"]["RAY_RAYLET_PID"])
        threading.Thread(target=end_with, args=(raylet,), daemon=True).start()
        arguments = request["arguments"]
        sys.argv = arguments[next(i for i, word in enumerate(arguments) if word.endswith(sitecustomize.WORKER)) :]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until the tests end."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("socket", type=Path, help="where to listen")
    logging.basicConfig(level=logging.INFO)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they end this process
    Server(parser.parse_args().socket).serve()


if __name__ == "__main__":
    main()
