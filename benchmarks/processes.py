"""Training on one and two processes: ``python -m benchmarks.processes`` reports as JSON.

`torch.nn.parallel.DistributedDataParallel` over gloo, on the loopback interface, wraps the model as Lightning does. Every
process has one thread, so that two processes have twice the processors of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import flowfactor as ff
from benchmarks.peer import ROOT
from benchmarks.timing import Readings, Row

BATCH, FRAMES, SHAPE = 96, 9, (3, 28, 28)
_STEPS = 6


class Loss(nn.Module):
    """A model whose call gives its loss: what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, t: Tensor, k: Tensor, generator: torch.Generator) -> Tensor:
        return self.model(frames, t, k, generator=generator).loss


def processes(repeats: int) -> list[Row]:
    """Sequences per second of one process, of two, and of two that share nothing: the limit of the machine."""
    if not (dist.is_available() and dist.is_gloo_available()):
        print("  this torch has no gloo: left out")
        return []
    one = _launch(1, repeats, joined=False)
    two = _launch(2, repeats, joined=True)
    apart = _launch(2, repeats, joined=False)
    name = f"training steps, batch {BATCH} a process, one thread each"
    rows = [Row("processes", f"{name}: 1 process", one)]
    for what, readings in (("2 processes", two), ("2 processes that exchange nothing", apart)):
        rows.append(Row("processes", f"{name}: {what}", readings, one, "1 process"))
    # Two that exchange nothing are the limit: what else they share (memory, caches) is the machine's.
    return [*rows, Row("processes", f"{name}: 2 processes, share of that limit", two, apart, "exchanging nothing")]


def _launch(world: int, repeats: int, *, joined: bool) -> Readings:
    """Sequences per second of all processes together, turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        command = [sys.executable, "-m", "benchmarks.processes", folder, str(world), str(repeats), str(int(joined))]
        made = [
            subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in made]
        if any(process.returncode for process in made):
            raise RuntimeError(f"a process of {world} ended with {[process.returncode for process in made]}")
    turns = [json.loads(output.splitlines()[-1]) for output in outputs]
    return Readings([sum(rates) for rates in zip(*turns, strict=True)], "sequences/s")


def _train(folder: str, world: int, repeats: int, joined: bool, rank: int) -> list[float]:
    """Sequences per second of this process, one reading a turn; a turn begins when all are ready."""
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides")  # kernels of one pixel, which lose next to nothing
    torch.manual_seed(0)
    model: Any = ff.models.build_vae(SHAPE, 3, 48, frames_per_step=2).train()
    module: nn.Module = Loss(model)
    if joined and world > 1:
        module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(rank)
    frames = torch.rand(BATCH, FRAMES, *SHAPE, generator=generator)
    t, k = torch.arange(float(FRAMES)), (torch.arange(BATCH) % 3).sort().values

    def step() -> None:
        optimizer.zero_grad()
        module(frames, t, k, generator).backward()
        optimizer.step()

    for _ in range(3):
        step()
    rates = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(_STEPS):
            step()
        rates.append(BATCH * _STEPS / (time.perf_counter() - begin))
    dist.barrier()
    dist.destroy_process_group()
    return rates


def main() -> None:
    """One process."""
    folder, world, repeats, joined, rank = sys.argv[1], *map(int, sys.argv[2:6])
    print(json.dumps(_train(folder, world, repeats, bool(joined), rank)))


if __name__ == "__main__":
    main()
