"""Checkpoints written by a thread while training goes on.

One is written at a time, and its files are published as ever: all of them by one rename. A process that is killed
leaves the checkpoint before. What fails is raised in the training's own thread, at the next look.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class CheckpointWriter:
    """Runs one function at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, once the one before is done.

        Raises:
            OSError: the one before could not be written; and what else it raised.
        """
        self.wait()
        self._writing = self._thread.submit(write)

    def check(self) -> None:
        """Raise what a finished write has raised; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raises as `start`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish what is being written, whatever comes of it, and end the thread."""
        self._thread.shutdown()
