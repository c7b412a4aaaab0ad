"""Compiled solves against the same solves as written."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import flowfactor as ff
from flowfactor.solve import compiled

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer looks at it, and hides that itself

D, K, N = 3, 2, 20


class Bumps(ff.potentials.Potential):
    """A potential of the user's: separate modules, derivatives by automatic differentiation."""

    def __init__(self, num_flows: int = K) -> None:
        super().__init__(D, num_flows)
        parts = [nn.Sequential(nn.Linear(D + 1, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(num_flows)]
        self.parts = nn.ModuleList(parts).double()

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return self.parts[k](torch.cat([z, t.unsqueeze(-1)], -1)).squeeze(-1)


class Speed(nn.Module):
    """A running cost."""

    def forward(self, evaluation: ff.fields.Evaluation) -> Tensor:
        return evaluation.velocity.square().sum(-1)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Traces solves as for a compiler and runs what was traced; counts the programs."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compiled(f, dynamic=dynamic, backend=counter))
    yield counter
    torch._dynamo.reset()


def fields() -> dict[str, ff.fields.Field | ff.potentials.Potential]:
    return {
        "own": Bumps(),
        "resnet": ff.potentials.ResNetPotential(D, K, width=4, depth=2, init_scale=1.0).double(),
        "free": ff.fields.FreeField(D, K, (4, 5), rank=1, time_features=2, init_scale=1.0).double(),
        "timeless": ff.potentials.MLPPotential(D, K, (4, 4), time_features=0, init_scale=1.0).double(),
        "helmholtz": ff.fields.HelmholtzField(Bumps(), ff.potentials.MLPPotential(D, K, (4, 4))).double(),
        "turning": ff.fields.HelmholtzField(Bumps(), ff.fields.SolenoidalField(D, K, 4), turning=[1]).double(),
    }


def controls() -> dict[str, ff.Control]:
    index, weights = torch.arange(N) % K, torch.rand(N, K).double()
    return {"one": 1, "index": index, "weights": weights, "schedule": ff.Schedule([(0.0, 0), (0.7, weights)])}


@pytest.mark.parametrize("method", [*compiled.ONE_STEP_METHODS, "explicit_adams", "dopri5", "bosh3"])
def test_same_paths_and_gradients_by_every_method(method: str, programs: CompileCounter) -> None:
    agree(fields()["free"], ff.Solver(method), "exact", controls()["index"])
    assert programs.frame_count


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", ["own", "resnet", "timeless", "helmholtz", "turning"])
def test_same_paths_and_gradients_of_every_field(name: str, divergence: str, programs: CompileCounter) -> None:
    agree(fields()[name], ff.Solver("midpoint"), divergence, controls()["index"])
    assert programs.frame_count


@pytest.mark.parametrize("control", ["one", "weights", "schedule"])
def test_same_paths_and_gradients_under_every_control(control: str, programs: CompileCounter) -> None:
    agree(fields()["own"], ff.Solver("euler", step_size=0.4), "hutchinson", controls()[control])
    assert programs.frame_count


def agree(field: Any, solver: ff.Solver, divergence: Any, control: ff.Control) -> None:
    z0, times = torch.randn(N, D).double(), torch.tensor([0.0, 0.5, 2.0])
    costs = {"speed": Speed()} | ({"hj": ff.regularizers.HamiltonJacobi()} if hasattr(field, "derivatives") else {})
    found = []
    for compile in (False, True):
        settings = {name: getattr(solver, name) for name in solver.__dataclass_fields__} | {"compile": compile}
        flow = ff.LatentFlow(field, ff.Solver(**settings), divergence)
        z, t = z0.clone().requires_grad_(), times.clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        path = flow(z, t, control, log_det=True, costs=costs, generator=generator)
        loss = path.z.cos().mean() + path.log_det.square().mean() + sum(c[-1].mean() for c in path.costs.values())
        wanted = [z, t, *field.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append(([path.z, path.log_det, *path.costs.values()], gradients, path.stats))
    (values, gradients, stats), (own_values, own_gradients, own_stats) = found
    assert stats == own_stats
    for value, own in zip([*values, *gradients], [*own_values, *own_gradients], strict=True):
        assert (value is None) == (own is None)
        if value is not None:
            torch.testing.assert_close(own, value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_one_program_serves_all_batch_sizes_and_all_numbers_of_steps(method: str, programs: CompileCounter) -> None:
    field = ff.fields.FreeField(D, K, (4, 5))
    flow = ff.LatentFlow(field, ff.Solver(method, compile=True))
    for batch, frames in ((23, 3), (41, 9), (31, 5), (17, 2)):
        index = torch.arange(batch) % K
        index[0] = K - 1  # groups of unequal sizes, out of order
        flow(torch.randn(batch, D, requires_grad=True), torch.arange(frames), index).z.sum().backward()
    assert programs.frame_count == 1


def test_every_field_has_a_count_of_programs_of_its_own(programs: CompileCounter) -> None:
    z, settings = torch.randn(4, D), ff.Solver("euler", compile=True)
    for width in range(3, 13):  # torch runs as written from the ninth program of one function
        ff.LatentFlow(ff.fields.FreeField(D, K, (width, 3)), settings)(z, [0.0, 1.0])
    assert programs.frame_count == 10


def test_a_program_goes_with_its_field(programs: CompileCounter) -> None:
    field = ff.fields.FreeField(D, K, (4, 3))
    flow = ff.LatentFlow(field, ff.Solver("euler", compile=True))
    flow(torch.randn(4, D, requires_grad=True), [0.0, 1.0]).z.sum().backward()
    known = weakref.ref(field)
    del field, flow
    gc.collect()
    assert programs.frame_count and known() is None


def test_one_program_serves_all_flows_of_a_stacked_field(programs: CompileCounter) -> None:
    flow = ff.LatentFlow(ff.fields.FreeField(D, 12, (4, 5)), ff.Solver("euler", compile=True))
    for k in range(12):
        flow(torch.randn(7, D), [0.0, 1.0, 2.0], k)
    assert programs.frame_count <= 2  # one for flow 0, whose parameters begin where the storage does


def test_transforms_and_double_gradients_run_as_written(programs: CompileCounter) -> None:
    field = Bumps()
    flow = ff.LatentFlow(field, ff.Solver("rk4", compile=True))
    plain = ff.LatentFlow(field, ff.Solver("rk4"))
    z = torch.randn(N, D).double()

    def end(flow: ff.LatentFlow) -> Callable[[Tensor], Tensor]:
        return lambda z: flow(z, [0.0, 1.0]).z[-1].square().sum()

    torch.testing.assert_close(torch.func.grad(end(flow))(z), torch.func.grad(end(plain))(z))
    tangent = torch.randn_like(z)
    for found, expected in zip(*(torch.func.jvp(end(f), (z,), (tangent,)) for f in (flow, plain)), strict=True):
        torch.testing.assert_close(found, expected)
    assert not programs.frame_count


def test_distributions_go_on_checking_their_parameters() -> None:
    program = """
import torch, flowfactor as ff
flow = ff.LatentFlow(ff.fields.FreeField(2, 1, (3, 3)), ff.Solver("euler", compile=True))
compiled = torch.compile
torch.compile = lambda f, dynamic, options: compiled(f, dynamic=dynamic, backend="eager")
flow(torch.ones(4, 2), [0.0, 1.0])
torch.distributions.Normal(torch.tensor(float("nan")), 1.0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "found invalid values" in done.stderr


def test_what_a_field_raises_comes_through(programs: CompileCounter) -> None:
    wrong = ff.fields.from_module(lambda z, t: z[..., :1], dim=D)
    with pytest.raises(ValueError, match=r"a field must return a velocity of the state's shape \[5, 3\]"):
        ff.LatentFlow(wrong, ff.Solver("rk4", compile=True))(torch.ones(5, D), [0.0, 1.0])


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_failures_are_explained_as_those_of_solves_as_written(method: str, programs: CompileCounter) -> None:
    explosive = ff.fields.from_module(lambda z, t: z.square().square(), dim=D)
    errors = []
    for compile in (False, True):
        with pytest.raises(ff.FlowSolveError) as caught:
            flow = ff.LatentFlow(explosive, ff.Solver(method, compile=compile, max_steps=2_000))
            flow(torch.full((5, D), 3.0), [0.0, 10.0])
        errors.append(caught.value)
    assert errors[0].reason == errors[1].reason
    assert str(errors[0]) == str(errors[1])


def test_settings_that_do_not_go_together_are_refused() -> None:
    for wrong in ({"gradient": "adjoint"}, {"gradient": "checkpoint"}, {"method": "scipy_solver"}):
        with pytest.raises(ValueError, match=r"compile=True goes with gradient=\"direct\" and a method of torch"):
            ff.Solver(**wrong, compile=True)
    with pytest.raises(ValueError, match="compile must be True or False, got 'yes'"):
        ff.Solver(compile="yes")  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own internals
def test_torchs_compiler_makes_the_same_solve() -> None:
    torch._dynamo.reset()
    agree(Bumps(), ff.Solver("euler"), "hutchinson", controls()["index"])
