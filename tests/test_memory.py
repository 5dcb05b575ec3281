"""What a burst has needed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.servers import ROOT

# Prints what is left, in MB: of the address space for the arenas of eight threads, and of forty blocks of one MB, each
# before a small one that stays.
BURST = """
import sys, threading
from pathlib import Path
from process import memory

def size(which):
    return int(Path("/proc/self/statm").read_text().split()[which]) * 4096 // 2**20

for name in sys.argv[1:2]:
    getattr(memory, name)()
threading.stack_size(2**20)
start, meet, before = size(0), threading.Barrier(9), size(1)
for _ in range(8):
    threading.Thread(target=lambda: (bytes(9000), meet.wait(), meet.wait())).start()
meet.wait()
arenas = size(0) - start
meet.wait()
bytes(2**23)
pairs = [(b"x" * 2**20, bytes(9000 + number)) for number in range(40)]
kept = [small for _, small in pairs]
del pairs
for name in sys.argv[2:]:
    getattr(memory, name)()
print(arenas // 64, (size(1) - before) // 20)  # glibc reserves 64 MB for each further arena
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
@pytest.mark.parametrize(
    ("first", "last", "arenas", "blocks"),
    [
        ("use_one_arena", "", "0", "2"),
        ("return_large_blocks", "", "8", "0"),
        ("use_one_arena", "return_free_memory", "0", "0"),
    ],
)
def test_what_threads_and_large_blocks_have_needed_is_given_back(
    first: str, last: str, arenas: str, blocks: str
) -> None:
    names = [name for name in (first, last) if name]
    ran = subprocess.run([sys.executable, "-c", BURST, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [arenas, blocks]
