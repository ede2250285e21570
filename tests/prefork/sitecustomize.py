"""Makes Ray's workers of the tests forks of a process that has imported what they import: see server.py.

Python runs this file at every start, as its folder is on PYTHONPATH. It acts where Ray starts a worker, and where a
test asks for an impatient S3 client or for a hold.
"""

import contextlib
import os
import sys

SOCKET = "IFGUIDE_PREFORK_SOCKET"
IMPATIENT = "IFGUIDE_TESTS_IMPATIENT_S3"
HOLDS = "IFGUIDE_TESTS_HOLD_"
WORKER = "/ray/_private/workers/default_worker.py"


def settle() -> None:
    """Do what the environment asks of a process at its start.

    An S3 client waits half a second or more before it asks again: nearly all the time of a run whose requests fail."""
    if IMPATIENT in os.environ:
        from botocore.retries.standard import ExponentialBackoff

        ExponentialBackoff.delay_amount = lambda *_: 0.02
    if any(name.startswith(HOLDS) for name in os.environ):
        import holds

        holds.settle()


def hand_over(path: str) -> None:
    """Have the server at `path` fork this worker; returns only where it does not, and Ray's own start goes on.

    Raises:
        OSError: there is no server.
    """
    import json
    import socket

    request = json.dumps({"arguments": sys.orig_argv, "environment": dict(os.environ), "folder": os.getcwd()})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"f"], [0, 1, 2])
        connection.sendall(request.encode() + b"\n")
        if connection.recv(1) == b"y":
            os._exit(0)  # Ray knows a worker by the process that registers


# The script alone: with a runtime environment Ray runs another one first, which then starts this one.
script = next((argument for argument in sys.orig_argv[1:] if not argument.startswith("-")), "")
if SOCKET in os.environ and script.endswith(WORKER):
    with contextlib.suppress(OSError):
        hand_over(os.environ[SOCKET])
settle()
