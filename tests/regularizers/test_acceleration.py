"""The acceleration along paths: against known ones, against differences, and in every mode that solves have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flowfactor as ff

R = ff.regularizers
D, K = 4, 2
FIELDS = {
    "mlp": lambda: ff.potentials.MLPPotential(D, K, (6, 5), init_scale=2.0),
    "resnet": lambda: ff.potentials.ResNetPotential(D, K, width=6, init_scale=2.0),
    "convex": lambda: ff.potentials.ConvexPotential(D, K, (6, 5), init_scale=2.0),
    "paper": lambda: ff.potentials.PaperPotential(D, K),
    "helmholtz": lambda: ff.fields.HelmholtzField(FIELDS["mlp"](), ff.fields.SolenoidalField(D, K, 7, init_scale=2.0)),
    "skew": lambda: ff.fields.SkewGradientField(FIELDS["mlp"]()),
    "free": lambda: ff.fields.FreeField(D, K, (6, 5), init_scale=2.0),
    "module": lambda: ff.fields.from_module([Wave(1.0), Wave(-2.0)], D),
}


class Wave(torch.nn.Module):
    """v = W sin(z + r t)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.weight = rate, torch.nn.Parameter(torch.randn(D, D))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (z + self.rate * t.unsqueeze(-1)).sin() @ self.weight


class Bend(torch.nn.Module):
    """The acceleration times a direction, so that its sign counts."""

    needs = ("acceleration",)
    many_stages = True

    def forward(self, evaluation: ff.fields.Evaluation) -> Tensor:
        assert evaluation.acceleration is not None
        return evaluation.acceleration @ torch.arange(1.0, D + 1).to(evaluation.z)


def straight() -> dict[str, ff.potentials.Potential]:
    """Solutions of the Hamilton-Jacobi equation: u = |z|^2 / 2 (1 + t), and a linear one."""
    b = torch.tensor([1.0, -2.0, 0.5, 0.0])
    return {
        "expanding": ff.potentials.from_module(lambda z, t: 0.5 * z.square().sum(-1) / (1 + t), D),
        "linear": ff.potentials.QuadraticPotential(D, S=torch.zeros(D, D), b=b),
    }


@pytest.mark.parametrize("name", ["expanding", "linear"])
def test_solutions_of_the_hamilton_jacobi_equation_are_not_accelerated(name: str) -> None:
    flow = ff.LatentFlow(straight()[name].double(), ff.Solver(rtol=1e-7, atol=1e-7))
    z0 = torch.randn(5, D, dtype=torch.float64)
    for t in ([0.0, 1.0, 3.0], [3.0, 1.0, 0.0]):
        path = flow(z0, t, costs={"bend": R.Acceleration(), "action": R.TransportCost()})
        assert float(path.costs["bend"].detach().abs().max()) < 1e-20 < float(path.costs["action"][-1].detach().min())


def test_a_residual_of_time_alone_bends_nothing() -> None:
    """u = b z + sin t: the Hamilton-Jacobi residual counts, and paths are straight."""
    b = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    flow = ff.LatentFlow(ff.potentials.from_module(lambda z, t: z @ b + t.sin(), D))
    costs = {"bend": R.Acceleration(), "hj": R.HamiltonJacobi()}
    path = flow(torch.randn(5, D, dtype=torch.float64), [0.0, 2.0], costs=costs)
    assert float(path.costs["bend"].abs().max()) == 0 and float(path.costs["hj"][-1].min()) > 1


@pytest.mark.parametrize("engine", ["general", "closed form"])
def test_the_acceleration_of_a_linear_flow_is_known(engine: str) -> None:
    """v = S z: Dv/Dt = S S z."""
    S = torch.diag(torch.tensor([0.5, -1.0, 0.2, 0.3], dtype=torch.float64))
    u = ff.potentials.MLPPotential(D, rank=D).double()
    with torch.no_grad():
        u.w3.zero_()
        u.quad.copy_(torch.eye(D))
        u.scale.copy_(S.diagonal().view_as(u.scale))
    flow = ff.LatentFlow(u, ff.Solver(rtol=1e-10, atol=1e-10, engine=engine))
    z0 = torch.randn(4, D, dtype=torch.float64)
    path = flow(z0, [0.0, 1.5], costs={"bend": R.Acceleration(), "along": Bend()})
    rates = S.diagonal()
    known = z0.square() * rates**4 * ((3 * rates).exp() - 1) / (2 * rates)
    torch.testing.assert_close(path.costs["bend"][-1], known.sum(-1), rtol=1e-8, atol=1e-8)
    along = z0 * rates * ((1.5 * rates).exp() - 1) * torch.arange(1, D + 1)
    torch.testing.assert_close(path.costs["along"][-1], along.sum(-1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("control", ["index", "weights"])
def test_it_is_the_change_of_the_velocity_along_the_path(name: str, control: str) -> None:
    r"""$\int Dv/Dt\,dt$ is the difference of the velocities at both ends, whatever the field is."""
    flow = ff.LatentFlow(FIELDS[name]().double(), ff.Solver(rtol=1e-7, atol=1e-7))
    acting = torch.tensor([0, 1, 1, 0, 1]) if control == "index" else 0.5 * torch.randn(5, K, dtype=torch.float64)
    z0, direction = torch.randn(5, D, dtype=torch.float64), torch.arange(1.0, D + 1).double()
    path = flow(z0, [0.2, 0.8, 1.3], acting, costs={"bend": Bend()})
    start, *rest = (flow.velocity(z, t, acting) @ direction for z, t in zip(path.z, path.t, strict=True))
    expected = torch.stack([end - start for end in rest])
    assert float(expected.detach().abs().max()) > 1e-3
    torch.testing.assert_close(path.costs["bend"][1:], expected, rtol=1e-4, atol=1e-6)
    assert path.stats.engine == ("general" if name in ("module", "resnet", "convex") else "closed form")


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("name", ["helmholtz", "free", "module"])
def test_contexts_and_times_of_each_sample(name: str, gradient: str) -> None:
    """One solve of samples with contexts and times of their own against one solve for each, with gradients."""
    if name == "module":

        def pushed(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return (z + t.unsqueeze(-1)).sin() * context.sum(-1, keepdim=True)

        field = ff.fields.from_module(pushed, D, context=2)
    elif name == "free":
        field = ff.fields.FreeField(D, 1, (6, 5), init_scale=1.0, context=2)
    else:
        parts = (ff.potentials.MLPPotential(D, 1, (6, 5), init_scale=1.0, context=2) for _ in range(2))
        field = ff.fields.HelmholtzField(*parts)
    flow = ff.LatentFlow(field.double(), ff.Solver("rk4", step_size=0.1, gradient=gradient))
    z0, context = torch.randn(3, D, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64)
    t = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.2, 0.5], [1.0, 0.0, 1.5]], dtype=torch.float64)
    inputs = [z0, *flow.parameters()]
    path = flow(z0, t, context=context, costs={"bend": R.Acceleration()})
    rows = [
        flow(
            z0[i : i + 1],
            t[:, i].unique() if i != 1 else t[:, i],
            context=context[i : i + 1],
            costs={"bend": R.Acceleration()},
        )
        for i in range(3)
    ]
    expected = torch.cat([row.costs["bend"][-1] for row in rows])
    torch.testing.assert_close(path.costs["bend"][-1], expected, rtol=1e-3, atol=1e-5)
    found = torch.autograd.grad(path.costs["bend"][-1].sum(), inputs)
    known = torch.autograd.grad(expected.sum(), inputs)
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


def test_gradients_of_gradients() -> None:
    flow = ff.LatentFlow(FIELDS["helmholtz"]().double(), ff.Solver("midpoint", step_size=0.5))
    z0 = torch.randn(2, D, dtype=torch.float64, requires_grad=True)

    def bent(z: Tensor) -> Tensor:
        return flow(z, [0.0, 1.0], costs={"bend": R.Acceleration()}).costs["bend"][-1]

    assert torch.autograd.gradgradcheck(bent, (z0,))


def test_it_costs_no_steps_and_stays_in_closed_form() -> None:
    flow = ff.LatentFlow(FIELDS["helmholtz"](), ff.Solver("bosh3", 1e-2, 1e-2, engine="closed form"))
    z0, t = torch.randn(4, D), torch.arange(4.0)
    plain, bent = flow(z0, t), flow(z0, t, costs={"bend": R.Acceleration()})
    assert bent.stats == plain.stats and bent.stats.nfe == plain.stats.nfe
    torch.testing.assert_close(plain.z, bent.z, rtol=0, atol=0)


def test_what_has_no_acceleration_is_named() -> None:
    with pytest.raises(TypeError, match="Acceleration needs that of a solve"):
        R.Acceleration()(ff.fields.Evaluation(torch.zeros(1, 2), torch.zeros(()), torch.zeros(1, 2)))


def test_compiled_solves_refuse_it_by_name() -> None:
    flow = ff.LatentFlow(FIELDS["module"](), ff.Solver("euler", compile=True))
    with pytest.raises(ValueError, match=r"cost 'bend' needs the acceleration.*without compile=True"):
        flow(torch.zeros(1, D), [0.0, 1.0], costs={"action": R.TransportCost(), "bend": R.Acceleration()})


def test_an_acceleration_of_ones_own_takes_a_stage_at_a_time() -> None:
    class Halved(R.Acceleration):
        def forward(self, evaluation: ff.fields.Evaluation) -> Tensor:
            return 0.5 * super().forward(evaluation)

    flow = ff.LatentFlow(FIELDS["helmholtz"](), ff.Solver("rk4"))
    path = flow(torch.randn(3, D), [0.0, 1.0], costs={"half": Halved(), "whole": R.Acceleration()})
    torch.testing.assert_close(2 * path.costs["half"], path.costs["whole"])
    assert R.Acceleration().many_stages and path.stats.engine == "general" and "Halved" in path.stats.reason
