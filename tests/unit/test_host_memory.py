"""What is freed is kept and taken again, until it is released: seen by the pages that the system has to give."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import torch

from ifguide.host_memory import keep_freed_memory, release_freed_memory, trim

VALUES = 16 << 20
PR_SET_THP_DISABLE = 41  # of prctl, as in linux/prctl.h


def pages_taken() -> list[int]:
    """By ten tensors, one after the other: of 64 MB before and while memory is kept, of 256 MB after.

    Those are larger than anything that the heap may still have in one piece. Pages are small ones: of huge ones, which
    an environment may ask for, one stands for 512."""
    assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0

    def taken(values: int = VALUES) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(values)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = [taken()]
    assert keep_freed_memory()
    taken()
    found.append(taken())
    release_freed_memory()
    return [*found, taken(4 * VALUES)]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def released() -> int:
    """Bytes that go back when it ends."""
    keep_freed_memory()
    torch.ones(VALUES)
    before = resident()
    release_freed_memory()
    trim()
    return before - resident()


def test_no_page_is_taken_anew_while_it_is_kept() -> None:
    code = "from tests.unit.test_host_memory import *; print(*pages_taken(), released())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    before, kept, after, back = map(int, done.stdout.split())
    pages = 4 * VALUES // resource.getpagesize()
    assert before > 9 * pages
    assert kept < pages / 10
    assert after > 9 * 4 * pages
    assert back > 4 * VALUES * 0.9
