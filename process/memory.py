"""Says to the C library how much memory a process may keep that it no longer needs."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # mallopt(3)


def give_memory_back() -> None:
    """Fixes the size from which glibc's malloc returns a freed block to the system. By itself it raises this after each
    large block, and keeps what its threads have once needed."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 * 1024)
