"""Two processes by DistributedDataParallel compute what one computes on the joint batch."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import flowfactor as ff

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


class _Loss(nn.Module):
    """A mean over sequences without draws, so that halves of a batch add up to the whole; all parameters take part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = ff.models.build_vae((1, 8, 8), 3, 6, hidden=(8, 8), solver={"method": "rk4"})

    def forward(self, frames: Tensor, k: Tensor) -> Tensor:
        model, t = self.model, torch.arange(float(frames.shape[1]))
        q = model.encode(frames[:, 0])
        costs = {"hj": model.hamilton_jacobi}
        path = model.flow(q.mean, t, k, log_det=True, costs=costs)
        assert path.log_det is not None
        fit = model.decoder(path.z).log_prob(frames.movedim(1, 0)).sum(0)
        spread = q.stddev.square().sum(-1)
        return (path.costs["hj"][-1] - fit - path.log_det[-1] + spread).mean()


def _batch() -> tuple[Tensor, Tensor]:
    """Eight sequences, whose halves hold different shares of the three flows: one of them lacks a flow."""
    frames = torch.rand(8, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return frames, torch.tensor([0, 0, 1, 1, 0, 2, 2, 1])


def _worker(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides")  # kernels of one pixel: a matter of speed alone
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel(_Loss())
    torch.save(_train(module, slice(4 * rank, 4 * rank + 4), steps), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _train(module: nn.Module, part: slice, steps: int) -> dict[str, Tensor]:
    """Gradients of the first step, and parameters after the last."""
    frames, k = (x[part] for x in _batch())
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        module(frames, k).backward()
        for name, parameter in module.named_parameters():
            name = name.removeprefix("module.")
            assert parameter.grad is not None, f"{name} takes no part"
            if step == 0:
                found[f"gradient of {name}"] = parameter.grad.clone()
        optimizer.step()
    after = {name.removeprefix("module."): p.detach().clone() for name, p in module.named_parameters()}
    return found | after


def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    mp.start_processes(_worker, (str(tmp_path), 2), nprocs=2, start_method="spawn")
    alone = _train(_Loss(), slice(None), 2)
    halves = [_train(_Loss(), part, 1) for part in (slice(0, 4), slice(4, 8))]
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt")
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.allclose(shared[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item()), name
    # So that the comparison can fail: neither half alone has these gradients.
    for half in halves:
        name = "gradient of model.flow.field.irrotational.potential.w1"
        assert not torch.allclose(half[name], alone[name], rtol=1e-2, atol=1e-2 * alone[name].abs().max().item())
