"""Two processes by DistributedDataParallel compute what one computes on the joint batch."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

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

    def __init__(self, turning: list[int] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"solver": {"method": "rk4"}, "field": "helmholtz", "turning": turning}
        self.model = ff.models.build_vae((1, 8, 8), 3, 6, hidden=(8, 8), **settings)

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


def _worker(rank: int, folder: str, steps: int, turning: list[int] | None) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides")  # kernels of one pixel: a matter of speed alone
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel(_Loss(turning))
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


@pytest.mark.parametrize(
    "turning", [None, pytest.param([2], marks=pytest.mark.slow)]
)  # one half has no flow that turns
def test_two_processes_have_the_gradients_of_the_joint_batch(
    turning: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    mp.start_processes(_worker, (str(tmp_path), 2, turning), nprocs=2, start_method="spawn")
    alone = _train(_Loss(turning), slice(None), 2)
    halves = [_train(_Loss(turning), part, 1) for part in (slice(0, 4), slice(4, 8))]
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt")
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.allclose(shared[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item()), name
    # So that the comparison can fail: neither half alone has these gradients.
    for half in halves:
        name = "gradient of model.flow.field.irrotational.potential.w1"
        assert not torch.allclose(half[name], alone[name], rtol=1e-2, atol=1e-2 * alone[name].abs().max().item())


class _Net(nn.Module):
    """A module of one's own, with parameters of its own."""

    def __init__(self, seed: int, out: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, out))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.net(z).squeeze(-1)


def _built_in() -> ff.potentials.Potential:
    torch.manual_seed(0)
    return ff.potentials.MLPPotential(2, 2, hidden=(4, 4), init_scale=1.0)


PARTS = {
    "built-in": _built_in,
    "own potentials": lambda: ff.potentials.from_module([_Net(0, 1), _Net(1, 1)], 2),
    "own fields": lambda: ff.fields.from_module([_Net(0, 2), _Net(1, 2)], 2),
}


class _OneFlow(nn.Module):
    """The sum over samples of what a solve ends with, where each process may follow a flow of its own."""

    def __init__(self, part: str, gradient: Any) -> None:
        super().__init__()
        self.flow = ff.LatentFlow(PARTS[part](), ff.Solver("rk4", step_size=0.1, gradient=gradient))

    def forward(self, z: Tensor, k: Tensor | int) -> Tensor:
        path = self.flow(z, [0.0, 1.0], k, log_det=True)
        assert path.log_det is not None
        return path.z[-1].square().sum() + path.log_det[-1].sum()


def _gradients(module: nn.Module, z: Tensor, k: Tensor | int) -> dict[str, Tensor]:
    module(z, k).backward()
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.grad is not None}


def _one_flow_each(rank: int, folder: str, cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    z = torch.linspace(-1, 1, 12).reshape(2, 3, 2)[rank]
    found = {}
    for part, gradient in cases:
        module = nn.parallel.DistributedDataParallel(_OneFlow(part, gradient), find_unused_parameters=True)
        found[part, gradient] = _gradients(module, z, rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_each_process_may_follow_a_flow_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    cases = [(part, gradient) for part in PARTS for gradient in ("direct", "adjoint", "checkpoint")]
    mp.start_processes(_one_flow_each, (str(tmp_path), cases), nprocs=2, start_method="spawn")
    shared = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    z, k = torch.linspace(-1, 1, 12).reshape(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    for part, gradient in cases:
        alone = _gradients(_OneFlow(part, gradient), z, k)
        for found in shared:
            assert found[part, gradient].keys() == alone.keys()
            for name, value in alone.items():  # processes share the mean of their gradients
                torch.testing.assert_close(2 * found[part, gradient][name], value, rtol=1e-4, atol=1e-5)
                assert bool(value.flatten(1).any() if name.endswith(("w1", "w2")) else value.any()), name
