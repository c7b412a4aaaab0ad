"""Memory of the three gradient modes against the number of steps, counted in bytes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowfactor as ff
from flowfactor.solve import closed_form


class _Peak(TorchDispatchMode):
    """Counts the bytes of living storages that were made under it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def _measure(gradient: ff.solver.Gradient, steps: int) -> tuple[int, int]:
    """Bytes that autograd keeps after the forward pass, and the peak of the backward pass."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    field = ff.fields.from_module(lambda z, t: net(z), 4)
    flow = ff.LatentFlow(field, ff.Solver("rk4", step_size=1.0 / steps, gradient=gradient))
    z0 = torch.randn(32, 4, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = flow(z0, [0.0, 1.0]).z[-1].square().sum()
    peak = _Peak()
    with peak:
        loss.backward()
    assert z0.grad is not None and peak.peak > 0
    return sum(kept.values()), peak.peak


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_memory_does_not_grow_with_the_steps(gradient: ff.solver.Gradient) -> None:
    kept_few, peak_few = _measure(gradient, 56)  # the checkpoint mode cuts 56 and 400 into pieces of seven steps
    kept_many, peak_many = _measure(gradient, 400)
    assert kept_many <= kept_few * 1.05
    # The checkpoint mode holds a few states a level of its recursion, which deepens with the logarithm of the steps.
    assert peak_many <= peak_few * 1.3


def _measure_closed_form(gradient: ff.solver.Gradient, steps: int) -> tuple[int, int]:
    """The same for a potential with an adjoint in closed form, where what is kept are plain tensors."""
    torch.manual_seed(0)
    potential = ff.potentials.MLPPotential(4, hidden=(64, 64))
    flow = ff.LatentFlow(potential, ff.Solver("rk4", step_size=1.0 / steps, gradient=gradient))
    z0 = torch.randn(32, 4, requires_grad=True)
    with _Peak() as forward:
        path = flow(z0, [0.0, 1.0], log_det=True, costs={"action": ff.regularizers.TransportCost()})
        assert path.log_det is not None
        loss = path.z[-1].square().sum() + path.log_det.sum() + path.costs["action"].sum()
    kept = forward.now
    with _Peak() as backward:
        loss.backward()
    assert z0.grad is not None
    return kept, max(forward.peak, kept + backward.peak)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_memory_of_closed_forms_does_not_grow_with_the_steps(gradient: ff.solver.Gradient) -> None:
    kept_few, peak_few = _measure_closed_form(gradient, 24)
    kept_many, peak_many = _measure_closed_form(gradient, 96)
    assert kept_many <= kept_few * 1.05
    assert peak_many <= peak_few * 1.3
    assert _measure_closed_form("direct", 96)[0] > 5 * kept_many


def test_the_direct_mode_does_grow() -> None:
    """So that the measure above can fail."""
    kept_few, _ = _measure("direct", 20)
    kept_many, _ = _measure("direct", 400)
    assert kept_many > 10 * kept_few
    kept_checkpoint, _ = _measure("checkpoint", 400)
    assert kept_many > 50 * kept_checkpoint


def test_peaks_are_counted() -> None:
    with _Peak() as peak:
        x = torch.ones(1000)
        y = x + 1
        del x
        z = y + 1
        del y, z
    assert peak.peak == 2 * 4000 and peak.now == 0


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("control", [1, torch.tensor([[0.3, 0.7]])], ids=["index", "weights"])
def test_a_solve_goes_with_its_path(
    gradient: ff.solver.Gradient, control: int | torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[weakref.ref] = []
    forward = closed_form._Solve.forward

    def noting(ctx: object, plan: object, *arguments: object) -> object:
        plans.append(weakref.ref(plan))
        return forward(ctx, plan, *arguments)

    monkeypatch.setattr(closed_form._Solve, "forward", staticmethod(noting))
    flow = ff.LatentFlow(ff.potentials.MLPPotential(3, 2), ff.Solver("rk4", gradient=gradient))
    gc.disable()  # what a cycle holds would wait for the collector
    try:
        costs = {"hj": ff.regularizers.HamiltonJacobi()}
        path = flow(torch.randn(5, 3, requires_grad=True), [0.0, 1.0], control, log_det=True, costs=costs)
        path.z.sum().backward()
        del path
        assert plans and plans[-1]() is None
    finally:
        gc.enable()
