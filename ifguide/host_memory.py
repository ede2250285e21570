"""Memory that the C library keeps from one product, or one training step, to the next.

What a training step takes on a CPU is hundreds of megabytes of activations and gradients, the same in every step.
glibc gives each large piece back to the system as soon as it is freed and takes it anew, page by page, each page
cleared first. Kept, no page is taken after the first steps. The process then holds its peak between steps, too. That
peak is the same if memory is kept from the second step on: what stays, such as the optimizer's state, has places of its
own by then.

It is of the whole process, so a training ends it when it ends; a process that does nothing but score need not. Where
the C library is another, nothing is changed.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, as in malloc.h
DEFAULTS = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65536}
NEVER = -1


def keep_freed_memory(trim_above: int = NEVER) -> bool:
    """Have this process keep what it frees, but for what is over `trim_above` bytes at the heap's end; False: its C
    library cannot. No piece is mapped apart, for that would be given back with it."""
    return _set({TRIM_THRESHOLD: trim_above, MMAP_MAX: 0})


def release_freed_memory() -> None:
    """As it was before, and give back what is free."""
    if _set(DEFAULTS):
        trim()


def trim() -> None:
    """Give the memory that is free back to the system, where the C library can."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> bool:
    if not _is_glibc():
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, value) for name, value in options.items())


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
