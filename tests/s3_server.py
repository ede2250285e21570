"""An S3 server on loopback, for the time of a test."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifguide.storage import location

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """The port of a server with an empty bucket `lake`, which this process reaches as s3://lake; its log is in
    `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
                patch.setenv(name, value)
            location("s3://lake").fs.mkdir("lake")  # type: ignore[attr-defined]
            yield port
    finally:
        server.terminate()
        server.wait(timeout=20)
        log.close()
