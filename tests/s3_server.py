"""An S3 server on loopback, for the time of a test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from ifguide.storage import location

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
# prints the port that the system gave it
SERVER = """
import threading
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """The port of a server with an empty bucket `lake`, which this process reaches as s3://lake; its log is in
    `folder`."""
    log = (folder / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=log)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, Path(log.name).read_text()
        port = int(line)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
                patch.setenv(name, value)
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a server before this one, at its port
            location("s3://lake").fs.mkdir("lake")  # type: ignore[attr-defined]
            yield port
    finally:
        server.terminate()
        server.communicate()
        log.close()
