"""Outputs between the ends of adaptive steps: how accurate they are, what they cost, and samples with times of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

import flowfactor as ff
from flowfactor.solve.runge_kutta import Tableau, tableau

F64 = torch.float64
B, D = 4, 3


def network() -> ff.potentials.MLPPotential:
    return ff.potentials.MLPPotential(D, 2, (9, 7), init_scale=0.5, generator=torch.Generator().manual_seed(1)).to(F64)


def slope(t: float, y: np.ndarray) -> np.ndarray:
    return np.array([np.sin(y[1]) + t * y[0] / 3, np.cos(t) - y[0] * y[1]])


def one_step(table: Tableau, h: float) -> tuple[np.ndarray, np.ndarray]:
    """The start of a step of ``h``, and its k."""
    y, k = np.array([0.7, -0.4]), np.zeros((table.size, 2))
    for i in range(table.size):
        k[i] = slope(0.3 + table.c[i] * h, y + h * table.a[i] @ k)
    return y, k


def error_inside(table: Tableau, h: float) -> float:
    """The largest error inside of a step."""
    y, k = one_step(table, h)
    worst, accurate = 0.0, tableau("dopri8")
    assert accurate is not None
    for x in (0.2, 0.4, 0.6, 0.8):
        y0, fine = one_step(accurate, x * h)
        worst = max(worst, float(np.abs(y + h * table.inside(x) @ k - y0 - x * h * accurate.b @ fine).max()))
    return worst


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_a_step_is_read_inside_where_that_is_as_accurate_as_its_end(method: str) -> None:
    """Errors of a solve by steps of h are of the order of the method; those inside of steps do not add up."""
    table = tableau(method)
    assert table is not None
    dense = table.dense
    if not dense:  # torchdiffeq's quartic would not do
        table = replace(table, middle=SOLVERS[method].mid.double().numpy())
    order = np.log2(error_inside(table, 0.1) / error_inside(table, 0.05))
    assert (order > table.order - 0.1) == dense


@pytest.mark.parametrize("engine", ["closed form", "general"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_outputs_inside_of_steps_cost_nothing_and_are_accurate(method: str, engine: Any) -> None:
    flow = ff.LatentFlow(network(), ff.Solver(method, rtol=1e-4, atol=1e-4, engine=engine))
    z, many = torch.randn(B, D, dtype=F64), torch.linspace(0, 2, 41, dtype=F64)
    few, path = flow(z, many[[0, -1]], log_det=True), flow(z, many, log_det=True)
    if method == "dopri8":
        assert path.stats.nfe > 2 * few.stats.nfe
    else:
        assert path.stats == few.stats
        assert torch.equal(path.z[-1], few.z[-1])
    flow.solver = ff.Solver("dopri8", rtol=1e-10, atol=1e-10)
    exact = flow(z, many, log_det=True)
    torch.testing.assert_close(path.z, exact.z, rtol=0, atol=1e-3)
    torch.testing.assert_close(path.log_det, exact.log_det, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_steps_land_where_a_schedule_switches(method: str) -> None:
    """Outputs beside the switch must not be read off across it."""
    u = ff.potentials.QuadraticPotential(1, 2, S=torch.zeros(2, 1, 1), b=torch.tensor([[1.0], [-3.0]])).to(F64)
    flow = ff.LatentFlow(u, ff.Solver(method, rtol=1e-1, atol=1e-1))
    path = flow(torch.zeros(1, 1, dtype=F64), [0.0, 0.9, 1.1, 2.0], ff.Schedule([(0.0, 0), (1.0, 1)]))
    torch.testing.assert_close(path.z.flatten(), torch.tensor([0.0, 0.9, 0.7, -2.0], dtype=F64))


class Speed(nn.Module):
    many_stages = True

    def forward(self, e: ff.fields.Evaluation) -> Tensor:
        return e.velocity.square().sum(-1) * (1 + e.t.square())


T_OWN = torch.tensor(
    [[0, 0.4, 1, 1], [1.5, 1.1, 0.9, 0.2], [0.5, 0.5, 1.4, 1.9], [0.3, 0.3, 0.3, 0.3]], dtype=F64
).mT  # one rests at its end, one at its start, one always, and one goes back


def solve(field: Any, solver: ff.Solver, control: Any, t: Tensor = T_OWN) -> tuple[Any, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(B, D, generator=g, dtype=F64).requires_grad_()
    path = ff.LatentFlow(field, solver)(z, t, control, log_det=True, costs={"speed": Speed()})
    w = torch.linspace(1, 2, len(t), dtype=F64).unsqueeze(-1)
    assert path.log_det is not None
    loss = (path.z.sin() * w.unsqueeze(-1)).sum() + (w * path.log_det).sum() + (w * path.costs["speed"]).sum()
    return path, list(torch.autograd.grad(loss, [z, *field.parameters()]))


@pytest.mark.parametrize("control", [1, [1, 0, 1, 0], [[0.3, 1.0], [1.0, -0.5], [0.2, 0.2], [0.0, 1.0]]], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_own_times_by_the_closed_form_as_by_autograd(method: str, control: Any) -> None:
    """Values and gradients of the very same steps: direct and checkpoint to rounding, the adjoint to the tolerance."""
    field = network()
    control = torch.tensor(control) if isinstance(control, list) else control
    control = control.to(F64) if isinstance(control, Tensor) and control.ndim > 1 else control
    solver = ff.Solver(method, rtol=1e-6, atol=1e-6, engine="closed form")
    path, found = solve(field, replace(solver, engine="general"), control)
    assert path.z.grad_fn is not None
    for gradient in ("direct", "checkpoint", "adjoint"):
        closed, gradients = solve(field, replace(solver, gradient=gradient), control)
        assert closed.stats.nfe == path.stats.nfe
        for one, other in (
            (closed.z, path.z),
            (closed.log_det, path.log_det),
            (closed.costs["speed"], path.costs["speed"]),
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        near = 1e-3 if gradient == "adjoint" else 1e-8
        for one, other in zip(gradients, found, strict=True):
            torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize("engine", ["closed form", "general"])
def test_own_times_are_exact_at_both_ends(engine: Any) -> None:
    field = network()
    z = torch.randn(B, D, dtype=F64)
    path = ff.LatentFlow(field, ff.Solver(engine=engine))(z, T_OWN, log_det=True)
    assert torch.equal(path.z[0], z)
    assert torch.equal(path.z[:, 3], z[3].expand(4, D))  # rests always
    assert torch.equal(path.z[1, 2], z[2])  # at its start
    assert torch.equal(path.z[2, 0], path.z[3, 0])  # at its end
    assert path.log_det is not None
    assert torch.equal(path.log_det[2, 0], path.log_det[3, 0])
    assert not path.log_det[:, 3].any()


@pytest.mark.parametrize("engine", ["closed form", "general"])
def test_the_last_own_times_are_the_end_of_the_last_step(engine: Any) -> None:
    """Bit for bit: the times of the fastest sample make the clock, and the ends alone are one grid, stretched."""
    flow, z = ff.LatentFlow(network(), ff.Solver(rtol=1e-3, atol=1e-3, engine=engine)), torch.randn(B, D, dtype=F64)
    t = torch.tensor([[0, 0, 0, 0], [0.5, 0.1, 0.2, -0.4], [1.1, 0.6, 0.8, -0.9], [2.0, 1.5, 1.4, -1.7]], dtype=F64)
    many, ends = flow(z, t, log_det=True), flow(z, t[[0, -1]], log_det=True)
    assert many.stats == ends.stats
    assert torch.equal(many.z[-1], ends.z[-1])


@pytest.mark.parametrize("engine", ["closed form", "general"])
def test_more_own_times_cost_no_more_evaluations(engine: Any) -> None:
    field = network()
    flow = ff.LatentFlow(field, ff.Solver("dopri5", rtol=1e-8, atol=1e-8, engine=engine))
    z, g = torch.randn(B, D, dtype=F64), torch.Generator().manual_seed(2)
    t = torch.rand(31, B, generator=g, dtype=F64).cumsum(0) / 5
    few, many = flow(z, t[[0, 10, 30]]), flow(z, t)
    assert many.stats.nfe < 1.1 * few.stats.nfe
    torch.testing.assert_close(many.z[[0, 10, 30]], few.z, rtol=1e-6, atol=1e-6)
