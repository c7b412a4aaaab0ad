"""Freed memory is kept for the next tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from flowfactor.training._allocator import keep_freed_memory
torch.set_num_threads(1)
def faults():
    x = torch.ones(5_000_000)                                  # 20 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        y = x + 1
        z = y + 1
        del y, z
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = faults()
print(keep_freed_memory(), without, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_tensors_reuse_the_pages_of_those_before() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    taken, without, kept = done.stdout.split()
    if taken != "True":
        pytest.skip("the C library has no mallopt")
    assert int(kept) < int(without) / 2
