"""Freed memory is kept for the next tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowfactor.cli import main
from flowfactor.training import _allocator, worker

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


def test_the_programs_that_train_ask_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_allocator, "keep_freed_memory", lambda: asked.append("train"))
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: asked.append("worker"))
    monkeypatch.setattr(worker, "execute", lambda folder: {})
    assert worker.main([str(tmp_path)]) == 0
    with pytest.raises(SystemExit):  # there is no data folder; what comes before any work has been done
        main(["train", "mnist-small", "--data.root", str(tmp_path), "--output", str(tmp_path / "run")])
    assert asked == ["worker", "train"]
