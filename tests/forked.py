"""`subprocess.Popen` of a Python command whose process, and those of its Ray workers, are forks: see tests/prefork.

What a process is started for here, it does as when it starts by itself; it only has its imports already.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

SOCKET = "IFGUIDE_PREFORK_SOCKET"
PREFORK = Path(__file__).parent / "prefork"
PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
_NUMBERS = itertools.count()  # of drivers: the socket of one that has ended stays for a moment
_LOST = 9  # the status of a driver whose supervisor is gone: killed


class Popen(subprocess.Popen[Any]):
    """A Python command, or a script of this environment's `bin`; other commands start as they always do."""

    supervisor: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *options: Any) -> None:
        pass_fds, cwd, environment, _, _, shell, *descriptors = options[:12]
        session = options[-2]
        command = python_command(args)
        if command and not (executable or preexec_fn or pass_fds or shell) and SOCKET in os.environ:
            streams = [given if given != -1 else own for own, given in enumerate((descriptors[0], *descriptors[3::2]))]
            if self._fork(command, dict(os.environ if environment is None else environment), cwd, session, streams):
                self._child_created = True
                self._close_pipe_fds(*descriptors)
                return
        super()._execute_child(args, executable, preexec_fn, close_fds, *options)

    def _fork(
        self, command: list[str], environment: dict[str, str], folder: Any, session: bool, streams: list[int]
    ) -> bool:
        """Whether there is a process now."""
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        if str(PREFORK) not in paths:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PREFORK), *paths]))
        request = {
            "arguments": command,
            "environment": environment,
            "folder": os.fspath(folder or os.getcwd()),
            "session": session,
            "socket": f"{os.environ[SOCKET]}-{os.getpid()}-{next(_NUMBERS)}",
        }
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(os.environ[SOCKET])
        socket.send_fds(connection, [b"f"], streams)
        connection.sendall(json.dumps(request).encode() + b"\n")
        number = connection.recv(4, socket.MSG_WAITALL) if connection.recv(1) == b"y" else b""
        if len(number) < 4:
            connection.close()
            return False
        self.pid, self.supervisor = struct.unpack("i", number)[0], connection
        return True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self.supervisor is None:
            return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self.supervisor], [], [], 0)[0]:
            return 0, 0
        status = self.supervisor.recv(4, socket.MSG_WAITALL)
        self.supervisor.close()
        return self.pid, struct.unpack("i", status)[0] if len(status) == 4 else _LOST

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.supervisor is None:
            return super()._internal_poll(_deadstate)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def python_command(args: Any) -> list[str] | None:
    """`python ...` of it; None if it is none of this environment's."""
    words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else [os.fspath(args)]
    if words[0] == sys.executable:
        return words if len(words) > 1 else None
    return [sys.executable, *words] if words[0] == str(Path(sys.executable).with_name("ray")) else None


def run(
    *args: Any, timeout: float | None = None, check: bool = False, capture_output: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    with Popen(*args, **options) as process:
        try:
            outputs = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, *outputs)
    if check:
        done.check_returncode()
    return done
