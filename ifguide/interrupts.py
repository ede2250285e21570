"""Ctrl-C and SIGTERM, the same for every verb: it ends within ten seconds, says what is kept, and the next run goes on.

The first signal raises `Interrupted` in the main thread, wherever that waits or computes. A training saves first: while
it is `deferring`, the signal only makes `requested` true, and the training ends by itself. A second signal, or the end
of `grace_seconds`, kills this process with all that it has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ifguide.config import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEPT = "what was finished is kept"
SECONDS = 8.5  # to save and to end in; who sent SIGTERM often kills after ten
GRACE = "IFGUIDE_GRACE_SECONDS"
LEAST = 5.0  # or Ray could not end in it


class Interrupted(KeyboardInterrupt):
    """A signal has ended the verb. `kept` says what the next run goes on from."""

    def __init__(self, number: int, kept: str):
        super().__init__(kept)
        self.number, self.kept = number, kept


class _State:
    """Of the process: the signal that has come, whether it waits for a training, whether there are handlers."""

    received: int | None = None
    deferred = 0
    lock = threading.Lock()  # of `deferred`: trainings may run side by side
    handled = False


def grace_seconds() -> float:
    """The time to save and to end in: `IFGUIDE_GRACE_SECONDS`, for checkpoints that take longer, where who sends the
    signal waits for longer; by default `SECONDS`.

    Raises:
        ConfigError: it is no number, or too small.
    """
    text = os.environ.get(GRACE)
    if text is None:
        return SECONDS
    with contextlib.suppress(ValueError):
        if LEAST <= float(text) < float("inf"):
            return float(text)
    raise ConfigError(f"{GRACE} = {text}: give a number of seconds from {LEAST:g} on, or unset it")


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle both signals as this module says; for entry points. In another thread than the main one, nothing.

    Raises:
        ConfigError: of `grace_seconds`.
    """
    grace_seconds()  # said now, not when a signal comes
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.handled, _State.received = True, None
    install()
    try:
        yield
    finally:
        _State.handled = False
        for number, handler in before.items():
            signal.signal(number, handler)


def install() -> None:
    """Handle the signals again, if an entry point had them handled: Ray puts handlers of its own in their place."""
    if _State.handled and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _on_signal)


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Within it a first signal raises nothing: look at `requested`, save, and raise `interruption`. Raises that at its
    end where nobody did."""
    with _State.lock:
        _State.deferred += 1
    try:
        yield
    finally:
        with _State.lock:
            _State.deferred -= 1
    if requested():
        raise interruption(KEPT)


def requested() -> bool:
    """Whether a signal has asked this process to end."""
    return _State.received is not None


def request() -> None:
    """Have this process end as by SIGTERM, if an entry point has that handled."""
    if _State.handled:
        os.kill(os.getpid(), signal.SIGTERM)


def exit_code() -> int:
    """Of a process that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (_State.received or signal.SIGINT)


def interruption(kept: str) -> Interrupted:
    """What to raise when a signal was `requested` and what could be saved is saved."""
    return Interrupted(_State.received or signal.SIGINT, kept)


def _on_signal(number: int, frame: object) -> None:
    if _State.received is not None:
        _end(128 + number)
    _State.received = number
    threading.Thread(target=_end_late, args=(128 + number,), daemon=True).start()
    if not _State.deferred:
        raise Interrupted(number, KEPT)


def _end_late(code: int) -> None:
    time.sleep(grace_seconds())
    os.write(2, b"ended before all was saved; the same command goes on from what is there\n")
    _end(code)


def _end(code: int) -> None:
    end_children()
    os._exit(code)


def end_children() -> None:
    """Kill every process that this one has started, and theirs; where the system tells them."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
        ours |= more
    for pid in ours - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
