"""Training programs keep freed memory for the next tensors, and take denormal numbers as zero."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowfactor.cli import main
from flowfactor.training import process

PROGRAM = """
import resource, torch
from flowfactor.training.process import keep_freed_memory
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


FLUSHED = """
import torch
from flowfactor.training.process import prepare_process
prepare_process()
torch.set_num_threads(2)
tiny = torch.full((1_000_000,), 2e-38)                             # enough of them for both threads
print(int((tiny * 0.01).count_nonzero()), int(tiny.count_nonzero()))
"""


def test_every_thread_takes_denormal_numbers_as_zero() -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")
    assert float(torch.tensor(2e-38) * 0.01) > 0
    done = subprocess.run([sys.executable, "-c", FLUSHED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1000000"]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", ["train", "demo", "--train.batch_size", "2"]),
        ("demo", ["demo", "--minutes", "-1"]),
        ("benchmark", ["benchmark", "digits", "--steps", "0"]),
    ],
)
def test_the_programs_that_train_ask_for_it(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("yaml", reason="needs the extra train")
    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"flowfactor.cli.{module}.prepare_process", lambda: asked.append(module))
    with pytest.raises(SystemExit):  # a setting is wrong; what comes before any work has been done
        main(arguments)
    assert asked == [module]


def test_a_worker_asks_for_it_where_it_is_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(process, "prepare_process", lambda: asked.append("worker"))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])  # where there is nothing to do
    name = "flowfactor.comparison.worker"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(name, run_name="__main__")
    assert asked == ["worker"]
