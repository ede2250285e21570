"""Processes that have imported what Ray's workers import, and are forked to be workers, and drivers of tests.

A worker imports ray, torch, transformers and pyarrow, which takes 7 to 9 seconds of CPU, and a driver of `ifguide` 5. A
stage starts several, so that the tests spent most of their time there. A fork has them in a tenth of a second. All else
is as it is without: Ray's raylet asks for the worker, which runs Ray's own main module and registers there.

A variable that a module reads as it is imported cannot be changed afterwards. So for each environment that is asked for
there is a `Zygote` of its own, which imports under it. A driver (tests/forked.py) is the parent of another one, a copy
of the zygote that it came from, which forks the workers of that driver: they are its descendants, as without forks.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sitecustomize

MODULES = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "ray._private.workers.default_worker",
    "ray.data",
    "ray.train.torch",
    "profanity_check",
    "ifguide.corpus.workers",
    "ifguide.evaluation.worker",
    "ifguide.influence.factor_worker",
    "ifguide.influence.query_worker",
    "ifguide.influence.scoring_worker",
    "ifguide.stages.compare",
    "tensorboard.summary.writer.record_writer",
    "transformers.integrations.deepspeed",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "torch._inductor.compile_fx",
    "s3fs",
)
# of one worker, one test or one cluster, and read by nothing as it is imported; or again later
VOLATILE = {
    "_",
    "DS_ACCELERATOR",
    "IFGUIDE_CACHE",
    "IFGUIDE_GRACE_SECONDS",
    "OLDPWD",
    "PWD",
    "PYTEST_CURRENT_TEST",
    "PYTHONBREAKPOINT",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_ADDRESS",
    "RAY_BACKEND_LOG_LEVEL",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",  # which `enter` sees to
    "RAY_LD_PRELOAD_ON_WORKERS",
    "RAY_USAGE_STATS_ENABLED",
    "SHLVL",
    "SPT_NOENV",
    "TMPDIR",
    "TOKENIZERS_PARALLELISM",
    sitecustomize.IMPATIENT,
    sitecustomize.SOCKET,
}
VOLATILE_PREFIXES = (
    sitecustomize.HOLDS,
    "AWS_",
    "KMP_",
    "PYTEST_XDIST_",
    "RAY_AUTH_",  # of Ray's core, as those in lower case: `enter` has it read them anew
    "RAY_CLIENT_",
    "RAY_JOB_",
    "RAY_NODE_",
    "RAY_RAYLET_",
    "RAY_SESSION_",
    "RAY_TRAIN_PREEMPTION_",
    "RAY_WARN_",
    "RAY_agent_",
    "RAY_gcs_",
    "RAY_health_",
    "RAY_raylet_",
    "RAY_worker_",
)
MOST_ZYGOTES = 4  # each holds 0.7 GB
Request = dict[str, Any]  # arguments, environment, folder; of a driver also whether it has a session of its own

log = logging.getLogger("prefork")


def lasting(environment: dict[str, str]) -> dict[str, str]:
    """The variables that an import may read."""
    return {k: v for k, v in environment.items() if k not in VOLATILE and not k.startswith(VOLATILE_PREFIXES)}


class Front:
    """Passes each request on to the zygote of its environment, which it makes when there is none."""

    def __init__(self, path: Path):
        self.listener, self.zygotes = listener_at(path), dict[frozenset[tuple[str, str]], socket.socket]()

    def serve(self) -> None:
        """Answer until the parent process is gone."""
        listen(self.listener, self._pass_on, os.getppid())

    def _pass_on(self, request: Request, connection: socket.socket, streams: list[int]) -> None:
        key = frozenset(lasting(request["environment"]).items())
        if key not in self.zygotes:
            if len(self.zygotes) == MOST_ZYGOTES:
                connection.sendall(b"n")
                return
            self.zygotes[key], other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            front = os.getpid()
            if os.fork() == 0:
                self.listener.close()
                connection.close()
                close(streams)
                with ending():
                    Zygote(request["environment"]).serve(other, front)
            other.close()
        try:
            socket.send_fds(self.zygotes[key], [json.dumps(request).encode()], [connection.fileno(), *streams])
        except OSError:
            self.zygotes.pop(key).close()  # its imports failed: who asks starts by itself
            raise


class Zygote:
    """Imports under an environment, then forks what is asked for."""

    def __init__(self, environment: dict[str, str]):
        self.environment = lasting(environment)
        os.environ.clear()
        os.environ.update(
            environment,
            DS_ACCELERATOR="cpu",  # which DeepSpeed reads as it is imported; tests train with it on the CPU alone
            JE_ARROW_MALLOC_CONF="background_thread:false",  # pyarrow's; a fork has the thread alone that forks
            RAY_JOB_ID="ffffffff",  # none yet, as of any worker that starts
            # Ray's core reads here once which raylet it ends with, and that of one worker would take all others with
            # it: it is told this process, and each worker looks after its own raylet.
            RAY_RAYLET_PID=str(os.getpid()),
            SPT_NOENV="1",
        )
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[1:1] = [path for path in paths if path and path not in sys.path]
        with unstarted_random_numbers():
            for name in MODULES:
                importlib.import_module(name)
        importlib.import_module("ray_ports").any_agent_port()
        started = ray_id_of_fork() == ray_id_of_fork()
        self.refusal = "Ray's random numbers have begun: two forks would use the same" if started else ""

    def serve(self, control: socket.socket, front: int) -> None:
        """Answer what the process `front` passes on, until it is gone."""
        control.settimeout(2)
        while os.getppid() == front:
            try:
                text, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
            except TimeoutError:
                continue
            if not text:
                break
            with socket.socket(fileno=descriptors[0]) as connection, log_of_errors():
                streams = descriptors[1:]
                try:
                    self.answer(json.loads(text), connection, streams)
                finally:
                    close(streams)

    def answer(self, request: Request, connection: socket.socket, streams: list[int]) -> None:
        """Fork a process, or have it start by itself."""
        reason = self._obstacle(request)
        if reason:
            log.warning("not forked: %s: %s", reason, request["arguments"][1:4])
            connection.sendall(b"n")
            return
        connection.sendall(b"y")  # before the fork: Ray may have given the worker up meanwhile
        if os.fork() == 0:
            with ending():
                if "session" in request:
                    supervise(self, request, connection, streams)
                else:
                    connection.close()
                    be_worker(request, streams)

    def _obstacle(self, request: Request) -> str:
        """Why the process would not be what it is when it starts by itself; empty if it would."""
        differing = {name for name, _ in lasting(request["environment"]).items() ^ self.environment.items()}
        if differing:
            return f"other values of {sorted(differing)}"
        return "threads, which a fork does not have" if len(os.listdir("/proc/self/task")) > 1 else self.refusal


def listener_at(path: Path) -> socket.socket:
    """A socket that is listened on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def listen(listener: socket.socket, answer: Callable[[Request, socket.socket, list[int]], None], parent: int) -> None:
    """Have each request answered, with its standard input, output and error, until `parent` is gone."""
    listener.settimeout(2)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection, log_of_errors():
            connection.settimeout(None)
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            try:
                with connection.makefile("rb") as file:
                    request = json.loads(file.readline())
                answer(request, connection, streams)
            finally:
                close(streams)


@contextlib.contextmanager
def log_of_errors() -> Iterator[None]:
    """A request that fails does not take the others with it."""
    try:
        yield
    except (OSError, ValueError):
        log.exception("nothing was forked")


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """End this process, a fork, with what is done within: it has no way back to what it was forked from."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


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
    """End this process at once when that one ends, whether or not somebody waits for it then."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)


def enter(request: Request, streams: list[int]) -> None:
    """Take over the streams, the folder and the environment that were asked for."""
    from ray._private import ray_constants
    from ray._raylet import Config

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    close(streams)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    Config.initialize("")
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, True)
    sitecustomize.settle()


def be_worker(request: Request, streams: list[int]) -> None:
    """Run Ray's main module of workers in this process."""
    os.setsid()
    enter(request, streams)
    raylet = int(request["environment"]["RAY_RAYLET_PID"])
    threading.Thread(target=end_with, args=(raylet,), daemon=True).start()
    arguments = request["arguments"]
    sys.argv = arguments[next(i for i, word in enumerate(arguments) if word.endswith(sitecustomize.WORKER)) :]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def supervise(zygote: Zygote, request: Request, connection: socket.socket, streams: list[int]) -> None:
    """Fork a driver, and tell who asked for it its number and how it ended; end it once that one is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    driver = os.fork()
    if driver == 0:
        with ending():
            connection.close()
            be_driver(zygote, request, streams)
    close(streams)
    connection.sendall(struct.pack("i", driver))
    while os.waitid(os.P_PID, driver, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if select.select([connection], [], [], 0.02)[0] and not connection.recv(1):
            os.kill(driver, signal.SIGKILL)
    connection.sendall(struct.pack("i", os.waitpid(driver, 0)[1]))


def be_driver(zygote: Zygote, request: Request, streams: list[int]) -> None:
    """Run a Python command in this process, and beside it a copy of the zygote for its workers."""
    if request["session"]:
        os.setsid()
    path, driver = Path(request["socket"]), os.getpid()
    listener = listener_at(path)
    if os.fork() == 0:
        with ending():
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            close(streams)
            listen(listener, zygote.answer, driver)
            path.unlink(missing_ok=True)
    listener.close()
    enter(request, streams)
    os.environ[sitecustomize.SOCKET] = str(path)
    try:
        run_python(request["arguments"][1:])
    finally:  # as at the end of any Python process
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def run_python(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does: a module, a command or a script."""
    option, *rest = arguments
    if option == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif option == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(option).parent)
        runpy.run_path(option, run_name="__main__")


def main() -> None:
    """Serve until the tests end."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("socket", type=Path, help="where to listen")
    log.addHandler(logging.StreamHandler())  # its own: a driver's log is the driver's
    log.propagate = False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they end this process
    Front(parser.parse_args().socket).serve()


if __name__ == "__main__":
    main()
