"""Sets how many files a process may open, and so how many connections it takes: getrlimit(2)."""

from __future__ import annotations

import resource


def open_files(wanted: int) -> int:
    """Returns how many files this process may open. Raises that to `wanted` first, as far as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:  # below 0: no limit
        soft = min(wanted, hard) if hard >= 0 else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft if soft >= 0 else wanted
