"""Sets what a process may take of its machine: how many files it may open, how much memory it may keep unused."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # mallopt(3)


def give_memory_back() -> None:
    """Fixes the size from which glibc's malloc returns a freed block to the system. By itself it raises this after each
    large block, and keeps what its threads have once needed."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 * 1024)


def open_files(wanted: int) -> int:
    """Returns how many files this process may open. Raises that to `wanted` first, as far as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:  # below 0: no limit
        soft = min(wanted, hard) if hard >= 0 else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft if soft >= 0 else wanted
