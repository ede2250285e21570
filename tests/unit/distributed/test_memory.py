"""ifguide.distributed.memory: a process that is killed for memory has said so."""

import threading
import time

import pytest

from ifguide.distributed import memory
from ifguide.distributed.ledger import DIED, Attempts


def test_an_attempt_that_dies_while_little_is_left_is_one_of_memory(tmp_path, monkeypatch):
    left = [50]
    monkeypatch.setattr(memory, "memory_left", lambda: (left[0] * 10**9, 100 * 10**9))
    monkeypatch.setattr(memory, "own_memory", lambda: 9_900_000_000)
    attempts = Attempts(tmp_path, "chunk")
    attempts.begin()
    watch = memory.MemoryWatch()
    with watch.over(attempts):
        time.sleep(3 * memory.SECONDS)
        assert Attempts(tmp_path, "chunk").reason == DIED
        left[0] = 3
        deadline = time.monotonic() + 300
        while Attempts(tmp_path, "chunk").reason == DIED and time.monotonic() < deadline:
            time.sleep(0.05)
    reason = Attempts(tmp_path, "chunk").reason
    attempts.begin()
    with watch.over(attempts):  # the next one is told as well, though the process is no larger
        while Attempts(tmp_path, "chunk").reason == DIED and time.monotonic() < deadline:
            time.sleep(0.05)
    assert Attempts(tmp_path, "chunk").reason == reason
    assert reason.startswith(
        "its process died of memory, most likely: it held 9.9 GB, and 3.0 of its machine's 100.0 GB"
    )


def test_nothing_is_said_of_attempts_that_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_left", lambda: (1, 100))
    watch, attempts = memory.MemoryWatch(), Attempts(tmp_path, "chunk")
    attempts.begin()
    time.sleep(3 * memory.SECONDS)
    assert Attempts(tmp_path, "chunk").reason == DIED
    assert threading.active_count() >= 2
    assert not watch.begun.is_set()


MEMINFO = "MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  600 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (600 * 1024, 1000 * 1024)),
        ({"memory.max": "max", "memory.current": "5"}, (600 * 1024, 1000 * 1024)),
        (
            {"memory.max": "500000", "memory.current": "450000", "memory.stat": "anon 9\ninactive_file 50000\n"},
            (100_000, 500_000),
        ),
        (
            {"memory/memory.limit_in_bytes": "500000", "memory/memory.usage_in_bytes": "450000"},
            (50_000, 500_000),
        ),
    ],
)
def test_a_containers_limit_counts_and_file_caches_do_not(tmp_path, monkeypatch, files, expected):
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    read = memory._read
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_read", lambda path: MEMINFO if path.name == "meminfo" else read(path))
    assert memory.memory_left() == expected
