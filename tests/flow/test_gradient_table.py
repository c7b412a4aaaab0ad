"""The table of docs/gradients.md: each of its cells is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import flowfactor as ff
from flowfactor.solve.runge_kutta import tableau

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer looks at it, and hides that itself

PAGE = Path(__file__).parents[2] / "docs" / "gradients.md"
COLUMNS = [
    (gradient, engine) for gradient in ("direct", "adjoint", "checkpoint") for engine in ("closed form", "general")
]
FINE = {"rtol": 1e-9, "atol": 1e-9}


def table() -> dict[str, list[str]]:
    """The rows of the page's table by name."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = [f"`{gradient}`, {engine}" for gradient, engine in COLUMNS]
    assert rows[0][1:] == header, "the columns of the table"
    return {row[0]: row[1:] for row in rows[2:]}


def _flow(
    gradient: Any, engine: Any, part: nn.Module | None = None, method: str = "dopri5", **how: Any
) -> ff.LatentFlow:
    torch.manual_seed(0)
    tight = FINE if method in ff.solver.ADAPTIVE_METHODS else {}
    part = ff.potentials.MLPPotential(2, hidden=(4, 4), init_scale=1.0) if part is None else part
    return ff.LatentFlow(part.double(), ff.Solver(method, gradient=gradient, engine=engine, **tight, **how))  # type: ignore[arg-type]


def _start() -> Tensor:
    return torch.linspace(-1, 1, 6).double().reshape(3, 2).requires_grad_()


def _of_times(gradient: Any, engine: Any) -> Tensor:
    t = torch.tensor([0.0, 1.0]).double().requires_grad_()
    return torch.autograd.grad(_flow(gradient, engine)(_start(), t).z[-1].square().sum(), t)[0]


def _twice(gradient: Any, engine: Any) -> Tensor:
    z = _start()
    end = _flow(gradient, engine)(z, [0.0, 1.0]).z[-1]
    (first,) = torch.autograd.grad(end.square().sum(), z, create_graph=True)
    return torch.autograd.grad(first.square().sum(), z)[0]


def _replaced(gradient: Any, engine: Any) -> Tensor:
    flow, z = _flow(gradient, engine), _start()
    end = flow(z, [0.0, 1.0]).z[-1]
    potential: Any = flow.field.potential
    potential.w1 = nn.Parameter(potential.w1.detach() + 1)
    return torch.autograd.grad(end.square().sum(), z)[0]


class _Own(ff.fields.Field):
    def __init__(self) -> None:
        super().__init__(2)
        self.w = nn.Parameter(torch.eye(2))

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return torch.sin(z @ self.w)


def _own_replaced(gradient: Any, engine: Any) -> Tensor:
    flow, z = _flow(gradient, engine, _Own()), _start()
    end = flow(z, [0.0, 1.0]).z[-1]
    field: Any = flow.field
    field.w = nn.Parameter(field.w.detach() + 1)
    return torch.autograd.grad(end.square().sum(), z)[0]


def _own_functional(gradient: Any, engine: Any) -> Tensor:
    flow, z = _flow(gradient, engine, _Own()), _start()
    end = torch.func.functional_call(flow, {"field.w": 2 * torch.eye(2).double().requires_grad_()}, (z, [0.0, 1.0])).z[
        -1
    ]
    return torch.autograd.grad(end.square().sum(), z)[0]


def _other_mode(gradient: Any, engine: Any) -> Tensor:
    flow, z = _flow(gradient, engine), _start()
    end = flow(z, [0.0, 1.0]).z[-1]
    flow.eval()
    return torch.autograd.grad(end.square().sum(), z)[0]


def _functional(gradient: Any, engine: Any) -> Tensor:
    flow, z = _flow(gradient, engine), _start()
    weights = {name: p.detach().clone().requires_grad_() for name, p in flow.named_parameters()}
    end = torch.func.functional_call(flow, weights, (z, [0.0, 1.0])).z[-1]
    return torch.autograd.grad(end.square().sum(), z)[0]


def _captured(gradient: Any, engine: Any) -> Tensor:
    shift = torch.ones(2).double().requires_grad_()
    field = ff.fields.from_module(lambda z, t: torch.sin(z + shift), 2)
    end = _flow(gradient, engine, field)(_start(), [0.0, 1.0]).z[-1]
    return torch.autograd.grad(end.square().sum(), shift)[0]


def _by_func(gradient: Any, engine: Any) -> Tensor:
    flow = _flow(gradient, engine, method="rk4", step_size=0.1)
    return torch.func.grad(lambda z: flow(z, [0.0, 1.0]).z[-1].square().sum())(_start().detach())


def _by_jvp(gradient: Any, engine: Any) -> Tensor:
    flow, z = _flow(gradient, engine, method="rk4", step_size=0.1), _start().detach()
    return torch.func.jvp(lambda z: flow(z, [0.0, 1.0]).z[-1], (z,), (torch.ones_like(z),))[1]  # type: ignore[return-value]


def _by_vmap(gradient: Any, engine: Any) -> Tensor:
    flow = _flow(gradient, engine, method="rk4", step_size=0.1)
    return torch.func.vmap(lambda z: flow(z, [0.0, 1.0]).z[-1])(_start().detach())


def _switching(gradient: Any, engine: Any) -> Tensor:
    torch.manual_seed(0)
    part = ff.potentials.MLPPotential(2, 2, hidden=(4, 4), init_scale=1.0)
    schedule, z = ff.Schedule([(0.0, 0), (0.4, 1)]), _start()
    return torch.autograd.grad(_flow(gradient, engine, part)(z, [0.0, 1.0], schedule).z[-1].square().sum(), z)[0]


def _steered() -> nn.Module:
    torch.manual_seed(0)
    return ff.potentials.MLPPotential(2, 2, hidden=(4, 4), init_scale=1.0, context=3)


def _of_switch(gradient: Any, engine: Any) -> Tensor:
    s = torch.tensor(0.4).double().requires_grad_()
    torch.manual_seed(0)
    part = ff.potentials.MLPPotential(2, 2, hidden=(4, 4), init_scale=1.0)
    end = _flow(gradient, engine, part)(_start(), [0.0, 1.0], ff.Schedule([(0.0, 0), (s, 1)])).z[-1]
    return torch.autograd.grad(end.square().sum(), s)[0]


def _of_context(gradient: Any, engine: Any) -> Tensor:
    c = torch.linspace(-1, 1, 9).double().reshape(3, 3).requires_grad_()
    path = _flow(gradient, engine, _steered())(_start(), [0.0, 1.0], torch.tensor([1, 0, 1]), context=c, log_det=True)
    assert path.log_det is not None
    return torch.autograd.grad(path.z[-1].square().sum() + path.log_det[-1].sum(), c)[0]


_OWN_TIMES = torch.tensor([[0.0, 0.5, 1.0], [0.7, 0.5, 0.2], [1.0, 1.5, 0.1]]).double()


def _own_times(gradient: Any, engine: Any) -> Tensor:
    z = _start()
    end = _flow(gradient, engine)(z, _OWN_TIMES).z[-1]
    return torch.autograd.grad(end.square().sum(), z)[0]


def _of_own_times(gradient: Any, engine: Any) -> Tensor:
    t = _OWN_TIMES.clone().requires_grad_()
    return torch.autograd.grad(_flow(gradient, engine)(_start(), t).z[-1].square().sum(), t)[0]


def _from_inside(gradient: Any, engine: Any) -> Tensor:
    z, flow = _start(), _flow(gradient, engine)
    paths = [flow(z, [0.0, 0.5, 1.0], start=start).z for start in (1, torch.tensor([2, 0, 1]))]
    return torch.autograd.grad(torch.stack(paths).sin().sum(), z)[0]


def _by_method(method: str) -> Callable[[Any, Any], Tensor]:
    def run(gradient: Any, engine: Any) -> Tensor:
        z = _start()
        options = {"step_size": 0.01} if method in ff.solver.FIXED_METHODS else {}
        end = _flow(gradient, engine, method=method, **options)(z, [0.0, 1.0]).z[-1]
        return torch.autograd.grad(end.square().sum(), z)[0]

    return run


def _with_layer(layer: Callable[[], nn.Module]) -> Callable[[Any, Any], Tensor]:
    def run(gradient: Any, engine: Any) -> Tensor:
        net, z = nn.Sequential(nn.Linear(2, 2), layer()), _start()

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, z: Tensor, t: Tensor) -> Tensor:
                return self.net(z)

        end = _flow(gradient, engine, ff.fields.from_module(Own(), 2))(z, [0.0, 1.0]).z[-1]
        return torch.autograd.grad(end.square().sum(), z)[0]

    return run


def _compiled(gradient: Any, engine: Any) -> Tensor:
    ff.Solver(gradient=gradient, engine=engine, compile=True)  # what it computes: test_flow_compiled.py
    return torch.zeros(())


def _compiled_and_steered(gradient: Any, engine: Any) -> Tensor:
    c = torch.linspace(-1, 1, 9).double().reshape(3, 3).requires_grad_()
    t, compile_ = _OWN_TIMES.clone().requires_grad_(), torch.compile
    # What would be compiled is traced, and run as it is.
    with mock.patch.object(torch, "compile", lambda f, options, **how: compile_(f, **how, backend="eager")):
        flow = _flow(gradient, engine, _steered(), method="rk4", step_size=0.1, compile=True)
        path = flow(_start(), t, torch.tensor([1, 0, 1]), context=c, log_det=True)
    assert path.log_det is not None
    return torch.cat(
        [x.flatten() for x in torch.autograd.grad(path.z[-1].square().sum() + path.log_det[-1].sum(), (c, t))]
    )


CLAIMS: dict[str, Callable[[Any, Any], Tensor]] = {
    "gradients of times": _of_times,
    "gradients of tensors that a function captures": _captured,
    "gradients of gradients": _twice,
    "a parameter replaced before `backward`, built-in part": _replaced,
    "a parameter replaced before `backward`, part of your own": _own_replaced,
    "`eval()` or `train()` before `backward`": _other_mode,
    "`torch.func.functional_call`, built-in part": _functional,
    "`torch.func.functional_call`, part of your own": _own_functional,
    "`torch.func.grad`, fixed steps": _by_func,
    "`torch.func.jvp`, fixed steps": _by_jvp,
    "`torch.func.vmap`": _by_vmap,
    "schedules": _switching,
    "gradients of a schedule's switching times": _of_switch,
    "a context, and its gradients": _of_context,
    "times of each sample": _own_times,
    "gradients of times of each sample": _of_own_times,
    "a start inside of the times, of all samples or of each": _from_inside,
    "BatchNorm in training mode": _with_layer(lambda: nn.BatchNorm1d(2)),
    "Dropout in training mode": _with_layer(lambda: nn.Dropout(0.5)),
    "Dropout in evaluation mode": _with_layer(lambda: nn.Dropout(0.5).eval()),
    "adams methods": _by_method("explicit_adams"),
    "`scipy_solver`": _by_method("scipy_solver"),
    "`compile=True`": _compiled,
    "`compile=True`, gradients of contexts and of times of each sample": _compiled_and_steered,
}


def what_happens(row: str, column: tuple[str, str]) -> str:
    """Runs a claim: ``yes`` where its gradient is that of `direct` by the general engine (or there is nothing else)."""
    try:
        found = CLAIMS[row](*column)
    except (ValueError, RuntimeError) as error:
        ours = ("gradient=", "engine=", "training mode", "torch.func", "torch.vmap", "scipy_solver")
        assert any(words in str(error) for words in ours), f"not an error of ours: {error}"
        return "refused"
    if row != "`scipy_solver`":
        loose = 1e-2 if row == "adams methods" else 1e-4  # the continuous adjoint of fixed steps has steps of its own
        torch.testing.assert_close(found, CLAIMS[row]("direct", "general"), rtol=loose, atol=loose)
    return "yes"


def test_the_table_has_a_row_for_each_claim() -> None:
    assert list(table()) == list(CLAIMS)


@pytest.mark.parametrize("column", COLUMNS, ids=" ".join)
@pytest.mark.parametrize("row", CLAIMS)
def test_cells(row: str, column: tuple[str, str]) -> None:
    assert table()[row][COLUMNS.index(column)] == what_happens(row, column)


def test_compiled_gradients_of_contexts_and_own_times_are_those_of_the_solve_as_written() -> None:
    with mock.patch.object(ff, "Solver", lambda *args, compile, **how: ff.solver.Solver(*args, **how)):
        written = _compiled_and_steered("direct", "general")
    torch.testing.assert_close(_compiled_and_steered("direct", "general"), written, rtol=1e-9, atol=1e-9)
    assert written.any()


@pytest.mark.parametrize("engine", ["auto", "closed form", "general"])
def test_forward_derivatives_of_adaptive_steps_are_refused_by_name(engine: Any) -> None:
    tableau.cache_clear()  # as in a process whose first solve this is
    flow, z = _flow("direct", engine), _start().detach()
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.jvp(lambda z: flow(z, [0.0, 1.0]).z[-1], (z,), (torch.ones_like(z),))
