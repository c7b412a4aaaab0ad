"""Gradients through solves: finite differences for the direct mode, and the direct mode for the other two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import product
from torch import Tensor, nn

import flowfactor as ff

D, K = 2, 2
TIMES = [0.0, 0.7, 1.5]


def potential() -> ff.potentials.Potential:
    return ff.potentials.MLPPotential(D, K, (5, 4), rank=2, time_features=4, init_scale=1.5).double()


def solver(name: str, gradient: ff.solver.Gradient) -> ff.Solver:
    if name == "dopri5":
        return ff.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient)
    return ff.Solver(name, step_size=0.05, gradient=gradient)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("what", ["state", "weights", "time", "parameters"])
def test_gradcheck_of_the_direct_mode(method: str, what: str) -> None:
    u = potential()
    flow = ff.LatentFlow(u, ff.Solver("rk4", step_size=0.17) if method == "rk4" else solver(method, "direct"))
    z0, k = (
        torch.randn(2, D).double()[: 2 if method == "rk4" else 1],
        torch.tensor([1, 0])[: 2 if method == "rk4" else 1],
    )

    def out(z: Tensor, t: Tensor, control: ff.Control) -> tuple[Tensor, ...]:
        path = flow(z, t, control, log_det=True, costs={"kinetic": lambda e: e.velocity.square().sum(-1)})
        return path.z[1:], path.log_det[-1], path.costs["kinetic"][-1]

    t = torch.tensor([0.0, 0.2, 0.35], dtype=torch.float64)  # no multiples of the step, at which steps would appear
    cases: dict[str, tuple[Callable, tuple[Tensor, ...]]] = {
        "state": (lambda z: out(z, t, k), (z0.clone().requires_grad_(),)),
        "weights": (lambda w: out(z0, t, w), (torch.randn(len(z0), K).double().requires_grad_(),)),
        "time": (lambda t: out(z0, t, k), (t.clone().requires_grad_(),)),
    }
    if what == "parameters":
        p = u.w3
        (g,) = torch.autograd.grad(sum(x.sum() for x in out(z0, t, k)), p)
        direction = torch.randn_like(p)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * 1e-5 * direction)
                values.append(sum(x.sum() for x in out(z0, t, k)))
                p.sub_(sign * 1e-5 * direction)
        torch.testing.assert_close((g * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-7)
        return
    function, inputs = cases[what]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-5, rtol=1e-4)


def _loss(path: ff.FlowPath) -> Tensor:
    total = path.z.sin().sum() + (path.z[1] ** 3).sum()
    if path.log_det is not None:
        total = total + path.log_det[1].cos().sum() + path.log_det[-1].sum()
    return total + sum((cost[-1] ** 2).sum() + cost[1].sum() for cost in path.costs.values())


def _agree(run: Callable[[ff.solver.Gradient], list[Tensor]], gradient: ff.solver.Gradient, atol: float) -> None:
    expected, found = run("direct"), run(gradient)
    for a, b in zip(found, expected, strict=True):
        assert bool(b.abs().sum() > 1e-6), "the reference gradient vanishes: the case tests nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


MODES, METHODS = ["adjoint", "checkpoint"], ["dopri5", "rk4", "midpoint"]
modes = pytest.mark.parametrize("gradient", MODES)
methods = pytest.mark.parametrize("method", METHODS)


def tolerance(method: str, gradient: str) -> float:
    """Checkpoint has direct's gradient; the adjoint's differs by the discretisation."""
    if gradient == "checkpoint":
        return 1e-6 if method == "dopri5" else 1e-8  # adaptive steps begin anew at every output time
    return {"dopri5": 1e-6, "rk4": 1e-4, "midpoint": 5e-2}[method]


@product(gradient=MODES, method=METHODS, kind=["int", "index", "schedule"])
def test_states_and_parameters(method: str, gradient: ff.solver.Gradient, kind: str) -> None:
    u = potential()
    z0 = torch.randn(3, D).double().requires_grad_()
    index = torch.tensor([1, 0, 1])
    control = {"int": 1, "index": index, "schedule": ff.Schedule([(0.0, 1), (0.4, index), (0.7, 0)])}[kind]
    weights = [u.w1, u.w2, u.v1, u.quad, u.linear, u.b1]

    def run(mode: ff.solver.Gradient) -> list[Tensor]:
        flow = ff.LatentFlow(u, solver(method, mode))
        path = flow(z0, TIMES, control, log_det=True, costs={"kinetic": lambda e: e.velocity.square().sum(-1)})
        found = torch.autograd.grad(_loss(path), [z0, *weights])
        if mode != "direct":
            assert path.stats.nfe_backward > 0
        return list(found)

    _agree(run, gradient, tolerance(method, gradient))


class _Context(ff.fields.Field):
    """A field steered by tensors that it holds as attributes."""

    def __init__(self) -> None:
        super().__init__(D, 1)
        self.net = nn.Linear(D, D).double()
        self.context: Tensor | None = None
        self.second: Tensor | None = None

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        v = torch.tanh(self.net(z))
        if self.context is not None:
            v = v + self.context * torch.cos(z)
        return v if self.second is None else v * (1 + self.second)


@product(gradient=MODES, method=METHODS, kind=["leaf", "non-leaf", "dependent", "from-z0", "encoder-shared"])
def test_captured_context(method: str, gradient: ff.solver.Gradient, kind: str) -> None:
    field = _Context()
    leaf = torch.randn(3, D).double().requires_grad_()
    z_leaf = torch.randn(3, D).double().requires_grad_()

    def run(mode: ff.solver.Gradient) -> list[Tensor]:
        z0, field.second = z_leaf, None
        if kind == "leaf":
            field.context = leaf
        elif kind == "non-leaf":
            field.context = torch.sin(leaf * 2)
        elif kind == "dependent":
            field.context = torch.sin(leaf * 2)
            field.second = field.context * 0.5 + leaf * 0.1  # depends on the other captured tensor, and on its leaf
        elif kind == "from-z0":
            z0 = leaf * 1.5
            field.context = torch.sin(leaf)  # state and context come from one tensor
        else:
            field.context = field.net(leaf)  # made by a parameter that the field uses as well
        path = ff.LatentFlow(field, solver(method, mode))(z0, TIMES)
        return list(torch.autograd.grad(_loss(path), [leaf, field.net.weight, field.net.bias]))

    _agree(run, gradient, tolerance(method, gradient))


@modes
@methods
def test_closures_weights_and_forces_of_costs(method: str, gradient: ff.solver.Gradient) -> None:
    u = potential()
    raw = torch.randn(3, K).double().requires_grad_()
    force = torch.randn(3, D).double().requires_grad_()
    scale = torch.tensor(0.7).double().requires_grad_()
    z0 = torch.randn(3, D).double()
    moved = ff.fields.from_module(lambda z, t: torch.tanh(z * scale) * scale.exp(), D)

    def run(mode: ff.solver.Gradient) -> list[Tensor]:
        work = force * 2

        def cost(e: ff.fields.Evaluation) -> Tensor:
            return (e.velocity * work).sum(-1) + e.z.square().sum(-1)

        path = ff.LatentFlow(u, solver(method, mode))(z0, TIMES, raw.softmax(-1), log_det=True, costs={"work": cost})
        other = ff.LatentFlow(moved, solver(method, mode))(z0, TIMES)
        return list(torch.autograd.grad(_loss(path) + _loss(other), [raw, force, scale, u.w1]))

    _agree(run, gradient, tolerance(method, gradient))


@modes
def test_a_field_need_not_depend_on_the_state(gradient: ff.solver.Gradient) -> None:
    drift = torch.tensor([1.0, -2.0]).double().requires_grad_()
    field = ff.fields.from_module(lambda z, t: drift.expand(z.shape), D)
    z0 = torch.zeros(3, D).double().requires_grad_()
    path = ff.LatentFlow(field, solver("rk4", gradient))(z0, [0.0, 2.0])
    g_drift, g_z = torch.autograd.grad(path.z[-1].sum(), [drift, z0])
    torch.testing.assert_close(g_drift, torch.full((D,), 6.0).double())
    torch.testing.assert_close(g_z, torch.ones(3, D).double())


@modes
def test_nothing_to_differentiate(gradient: ff.solver.Gradient) -> None:
    field = ff.fields.from_module(lambda z, t: -z, D)
    path = ff.LatentFlow(field, solver("rk4", gradient))(torch.ones(3, D).double(), [0.0, 1.0])
    assert not path.z.requires_grad


@pytest.mark.parametrize("method", ["dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
def test_checkpoint_replays_the_other_methods(method: str) -> None:
    u = potential()
    z0 = torch.randn(3, D).double().requires_grad_()

    def run(mode: ff.solver.Gradient) -> list[Tensor]:
        flow = ff.LatentFlow(u, ff.Solver(method, rtol=1e-5, atol=1e-5, gradient=mode))
        return list(torch.autograd.grad(_loss(flow(z0, TIMES, 1, log_det=True)), [z0, u.w1]))

    # Step sizes differ where an interval begins, and so do the errors of the solve.
    _agree(run, "checkpoint", 1e-3)


def test_gradients_that_cannot_be_had_are_refused() -> None:
    flow = ff.LatentFlow(potential(), ff.Solver("scipy_solver"))
    z0 = torch.ones(1, D).double()
    with pytest.raises(ValueError, match="adjoint"):
        flow(z0, TIMES)
    with torch.no_grad():
        assert flow(z0, TIMES).z.shape == (3, 1, D)
    with pytest.raises(ValueError, match="checkpoint"):
        ff.LatentFlow(potential(), ff.Solver("scipy_solver", gradient="checkpoint"))(z0, TIMES)
    times = torch.tensor(TIMES).double().requires_grad_()
    with pytest.raises(ValueError, match="gives times no gradient"):
        ff.LatentFlow(potential(), ff.Solver(gradient="checkpoint"))(z0, times)


def test_scipy_has_the_adjoint() -> None:
    u = potential()
    z0 = torch.randn(2, D).double().requires_grad_()

    def run(mode: ff.solver.Gradient) -> list[Tensor]:
        tight = {"rtol": 1e-9, "atol": 1e-9}
        s = ff.Solver("dopri5", **tight) if mode == "direct" else ff.Solver("scipy_solver", gradient=mode, **tight)
        return list(torch.autograd.grad(_loss(ff.LatentFlow(u, s)(z0, TIMES, 1)), [z0, u.w1]))

    _agree(run, "adjoint", 1e-5)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("backwards", [False, True])
def test_times_in_a_list_keep_their_gradients(gradient: Any, backwards: bool) -> None:
    """dz/dT is the velocity at the end, whether T comes in a tensor or in a list."""
    flow = ff.LatentFlow(
        ff.potentials.MLPPotential(3).double(), ff.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient)
    )
    z, end = torch.randn(4, 3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    there = flow.inverse(z, [end, 2.0]) if backwards else flow(z, [0.0, end])
    (found,) = torch.autograd.grad(there.z[-1].sum(), end)
    expected = flow.velocity(there.z[-1], 0.8).sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_times_at_which_a_user_has_a_jump_are_landed_on_once() -> None:
    solver = ff.Solver("dopri5", options={"jump_t": torch.tensor([0.5, 1.0], dtype=torch.float64)})
    field = ff.fields.from_module(lambda z, t: torch.where(t < 0.5, 1.0, 3.0).unsqueeze(-1) + 0 * z, dim=1)
    path = ff.LatentFlow(field, solver)(torch.zeros(2, 1), [0.0, 0.5, 1.0])
    torch.testing.assert_close(path.z[:, 0, 0], torch.tensor([0.0, 0.5, 2.0]))


class Scaled(nn.Module):
    """A velocity of the user's own, -c z, with dropout that does nothing (and still has a mode)."""

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.c = nn.Parameter(c) if isinstance(c, nn.Parameter) else c
        self.drop = nn.Dropout(0.0)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return -self.c * self.drop(z)


def follow(module: nn.Module, gradient: Any) -> Tensor:
    flow = ff.LatentFlow(ff.fields.from_module(module, 1), ff.Solver("rk4", step_size=0.1, gradient=gradient))
    return flow(torch.ones(2, 1, dtype=torch.float64), [0.0, 1.0]).z[-1].sum()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
def test_an_attribute_that_is_replaced_before_the_backward_pass_is_seen(gradient: Any) -> None:
    a, b = scalar(1.0), scalar(2.0)
    module = Scaled(a)
    first = follow(module, gradient)
    module.c = b
    loss = first + follow(module, gradient)
    if gradient == "direct":
        found = torch.autograd.grad(loss, (a, b))
        torch.testing.assert_close(found, tuple(-2 * torch.exp(-x.detach()) for x in (a, b)), rtol=1e-4, atol=0)
    else:
        with pytest.raises(RuntimeError, match=f'other tensors than in the solve.*gradient="{gradient}"'):
            loss.backward()


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
def test_functional_call_that_has_ended_is_seen(gradient: Any) -> None:
    module = Scaled(nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    field = ff.fields.from_module(module, 1)
    flow = ff.LatentFlow(field, ff.Solver("rk4", step_size=0.1, gradient=gradient))
    (name,) = dict(flow.named_parameters())
    made = scalar(0.5)
    z0 = torch.ones(2, 1, dtype=torch.float64)
    end = torch.func.functional_call(flow, {name: made * 3}, (z0, [0.0, 1.0])).z[-1].sum()
    if gradient == "direct":
        (found,) = torch.autograd.grad(end, made)
        torch.testing.assert_close(found, -6 * torch.exp(torch.tensor(-1.5).double()), rtol=1e-4, atol=0)
    else:
        with pytest.raises(RuntimeError, match="functional_call has ended"):
            end.backward()


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_mode_that_changes_before_the_backward_pass_is_seen(gradient: Any) -> None:
    module = Scaled(scalar(1.0))
    end = follow(module, gradient)
    module.eval()
    with pytest.raises(RuntimeError, match="was in training mode in the solve and is in evaluation mode"):
        end.backward()


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
def test_gradients_of_gradients_of_modules_are_right_or_refused(gradient: Any) -> None:
    """z = exp(-c) from 1, two samples: dL/dc = -2 exp(-c), and the derivative of its square -8 exp(-2 c)."""
    c = scalar(0.5)
    end = follow(Scaled(c), gradient)
    if gradient == "direct":
        (slope,) = torch.autograd.grad(end, c, create_graph=True)
        (found,) = torch.autograd.grad(slope.square(), c)
        torch.testing.assert_close(found, -8 * torch.exp(-2 * c.detach()), rtol=1e-5, atol=0)
    else:
        with pytest.raises(RuntimeError, match=f'gradient="{gradient}" has no gradients of gradients'):
            torch.autograd.grad(end, c, create_graph=True)
