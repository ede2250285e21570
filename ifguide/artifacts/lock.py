"""One driver works in a run directory: `lock.json` there says who, where, and since when.

The holder writes a beat into the file every BEAT_SECONDS. Whoever comes later is refused, unless the holder is gone:
its process on this machine has ended, or its beat, from another machine, stands still for STALE_SECONDS. Beats are
compared with each other, never with a clock: machines' clocks differ. A holder that finds itself replaced, after its
machine slept for instance, interrupts its own work.

Cost: a small file every ten seconds. A store without conditional writes (S3 has them) leaves a gap of milliseconds in
which two drivers that start together both find no file; the one whose record is overwritten then gives way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ifguide.artifacts.files import write_json
from ifguide.storage import create, is_remote, is_storage_error, make_folder
from ifguide.telemetry import log

LOCK = "lock.json"
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
SETTLE_SECONDS = 1.0  # after which of two that wrote at once both see the last one's record
JOIN_SECONDS = 10.0  # that a beat on its way has at the end: it would come after the record is removed

_held: dict[str, int] = {}  # of this process: how often each folder is held


class HeldError(OSError):
    """Another driver works in the run directory; the message says who, where and since when."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run directory. `machine` is where `pid` counts: a boot and its namespace of processes, which a host's
    name alone is not; `started` tells a process from a later one of its number."""

    token: str
    command: str
    user: str
    host: str
    machine: str
    pid: int
    started: str
    since: str  # UTC, ISO 8601
    beat: int = 0

    def __str__(self) -> str:
        return f"`ifguide {self.command}` of {self.user} on {self.host} (process {self.pid}, since {self.since})"


@contextlib.contextmanager
def hold(folder: Path, command: str) -> Iterator[None]:
    """Hold a run directory while `command` works in it; within one process as often as wanted.

    Raises:
        HeldError: another driver holds it, and is alive.
    """
    key = str(folder)
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    make_folder(folder)
    holder = _acquire(folder / LOCK, command)
    _held[key] = 1
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(folder / LOCK, holder, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        del _held[key]
        ended.set()
        beating.join(JOIN_SECONDS)
        if _is_mine(folder / LOCK, holder):
            (folder / LOCK).unlink(missing_ok=True)
        if not is_remote(folder):
            with contextlib.suppress(OSError):  # not empty, as a rule; a command that failed at once leaves nothing
                folder.rmdir()


def read_holder(folder: Path) -> Holder | None:
    """Who holds a run directory, or was killed while it did."""
    return _read(folder / LOCK)


def has_ended(holder: Holder) -> bool:
    """Whether a holder is known to be gone: its process was one of this machine. Of another machine's nothing is known
    at once."""
    return holder.machine == _machine() and _start_of(holder.pid) != holder.started


def _acquire(path: Path, command: str) -> Holder:
    me = Holder(
        token=secrets.token_hex(8),
        command=command,
        user=_user(),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    while True:
        written = create(path, _text(me))
        if written and not is_remote(path):
            return me
        if not written:
            other = _read(path)
            if other is None and not path.exists():
                continue  # it was given back meanwhile
            if _is_alive(path, other):
                raise HeldError(f"{path.parent} is in use by {other}: wait for it, stop it, or set another run_dir")
            if not path.exists():
                continue
            log(command, f"{path.parent} was left by {other}: taken over", level=logging.WARNING)
            write_json(path, dataclasses.asdict(me))
        time.sleep(SETTLE_SECONDS)
        if _is_mine(path, me):
            return me


def _is_alive(path: Path, holder: Holder | None) -> bool:
    """Whether whoever wrote the record still works. None is a record that is not whole, as a killed writer leaves."""
    if holder is not None and holder.machine == _machine():
        return not has_ended(holder)
    seconds = BEAT_SECONDS if holder is None else STALE_SECONDS
    deadline = time.monotonic() + seconds
    said = False
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        now = _read(path)
        if now != holder:
            return now is not None  # it beats; or it has ended
        if not said:
            log("lock", f"{path.parent} is held by {holder}: waiting up to {seconds:.0f} s for a sign of life")
            said = True
    return False


def _beat(path: Path, holder: Holder, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        try:
            if not _is_mine(path, holder):
                if not ended.is_set():
                    log("lock", f"{path.parent} was taken over by {_read(path)}: ending", level=logging.ERROR)
                    os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread; raised here it would not
                return
            write_json(path, dataclasses.asdict(dataclasses.replace(holder, beat=beat)))
        except Exception as error:  # a store that is away for a moment: the next beat may reach it
            if not is_storage_error(error):
                raise


def _is_mine(path: Path, holder: Holder) -> bool:
    current = _read(path)
    return current is not None and current.token == holder.token


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder), indent=2) + "\n"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has a number alone
        return f"user {os.getuid()}"


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a process of this machine started; None of one that has ended. Where there is no /proc, the same for all."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    return None if state == "Z" else fields[18]
