"""A watch on the memory of a worker's machine, so that a death by memory is called one.

Whoever kills a process for memory (the kernel, or Ray, which does at 95% of a machine's) lets it say nothing any more.
So the worker says it beforehand: while less than LOW_SHARE is left, the reason that its attempts have in case they die
is memory, with the sizes. An attempt that survives forgets it.

Cost: three small files are read five times a second.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from ifguide.distributed.ledger import Attempts
from ifguide.storage import is_storage_error

LOW_SHARE = 0.12
SECONDS = 0.2
GROUPS = Path("/sys/fs/cgroup")


class MemoryWatch:
    """Watches while attempts are in work."""

    def __init__(self) -> None:
        self.told: dict[Attempts, int] = {}  # of each attempt in work, the size that it was last told of
        self.lock, self.begun = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def over(self, attempts: Attempts) -> Iterator[None]:
        """Give an attempt its reason, should the process die for memory within."""
        with self.lock:
            self.told[attempts] = 0
        self.begun.set()
        try:
            yield
        finally:
            with self.lock:
                del self.told[attempts]
                if not self.told:
                    self.begun.clear()

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            self.begun.wait()
            left, total = memory_left()
            if left < LOW_SHARE * total:
                own = own_memory()
                with self.lock:
                    self._tell(own, left, total)
            pause.wait(SECONDS)

    def _tell(self, own: int, left: int, total: int) -> None:
        try:
            for attempts, told in self.told.items():
                if own > 1.1 * told:
                    attempts.failed(death_by_memory(own, left, total))
                    self.told[attempts] = own
        except Exception as error:  # the next look may reach the ledger
            if not is_storage_error(error):
                raise


def death_by_memory(own: int, left: int, total: int) -> str:
    """The reason of a process that died when it had `own` bytes, and its machine `left` of `total`."""
    return (
        f"its process died of memory, most likely: it held {own / 1e9:.1f} GB, and {left / 1e9:.1f} of its machine's"
        f" {total / 1e9:.1f} GB were left; give each process more (resources.memory, fewer at once) or less to do"
    )


def memory_left() -> tuple[int, int]:
    """Bytes that this process can still have, and those that there are: of the machine, or of its container if that
    has less. What only caches files counts as left."""
    fields = dict(line.split(":") for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    sizes = {name: 1024 * int(value.split()[0]) for name, value in fields.items()}
    left, total = sizes.get("MemAvailable", 1), sizes.get("MemTotal", 1)
    for limit, used, caches, cached in (
        (GROUPS / "memory.max", GROUPS / "memory.current", GROUPS / "memory.stat", "inactive_file"),
        (
            GROUPS / "memory/memory.limit_in_bytes",
            GROUPS / "memory/memory.usage_in_bytes",
            GROUPS / "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        most = _read(limit).strip()
        if most.isdigit() and int(most) < total:
            statistics = dict(line.split() for line in _read(caches).splitlines() if line.startswith(cached))
            in_use = int(_read(used).strip() or 0) - int(statistics.get(cached, 0))
            left, total = min(left, int(most) - in_use), int(most)
    return left, total


def own_memory() -> int:
    """Bytes of this process in memory."""
    pages = _read(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or another version of its control groups
        return ""
