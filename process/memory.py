"""Sets how memory is kept and looked through: glibc's malloc, by mallopt(3) and malloc_trim(3); Python's collector.

Where the C library is another one, malloc stays as it is.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE = 256 * 1024  # bytes
YOUNG = 10_000  # objects


def use_one_arena() -> None:
    """Lets all threads share one arena: each would keep in its own what it has once needed. Call it before the first
    thread is started."""
    _call("mallopt", M_ARENA_MAX, 1)


def return_large_blocks() -> None:
    """Fixes the size from which a freed block goes back to the system at once: by itself malloc raises it after each
    large block. A mail of 1.5 MB takes 13 ms more to send so."""
    _call("mallopt", M_MMAP_THRESHOLD, LARGE)


def return_free_memory() -> None:
    """Gives back to the system what is free now. Takes some milliseconds after a burst: call it now and then."""
    _call("malloc_trim", 0)


def collect_seldom() -> None:
    """Looks for cycles of garbage every YOUNG objects. At Python's 700 that is in each request and each mail, and one
    that is accepted, or sent, leaves no cycle behind: a tenth of its CPU."""
    gc.set_threshold(YOUNG)


def _call(name: str, *arguments: int) -> None:
    with suppress(OSError, AttributeError):  # another C library
        getattr(ctypes.CDLL(None), name)(*arguments)
