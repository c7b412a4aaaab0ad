"""Context, and times of one's own, against one solve for each sample: states, log-determinants, costs and all gradients."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import pairwise, product
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import flowfactor as ff
from flowfactor.context import Context
from flowfactor.control import Control

D, K, C, B = 4, 3, 2, 6
F64 = torch.float64


class Kinetic(nn.Module):
    """A cost that sees the time of each sample."""

    many_stages = True

    def forward(self, e: ff.fields.Evaluation) -> Tensor:
        return e.velocity.square().sum(-1) * (1 + e.t.square())


class Own(ff.fields.Field):
    def __init__(self, g: torch.Generator) -> None:
        super().__init__(D, K, context=C)
        self.w = nn.Parameter(torch.randn(K, D, D, generator=g) / 2)
        self.e = nn.Parameter(torch.randn(K, D, C, generator=g) / 2)

    def flow_velocity(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        assert isinstance(context, Tensor)
        return torch.tanh(z @ self.w[k].mT + context @ self.e[k].mT + torch.sin(t).unsqueeze(-1))


def part(name: str) -> Any:
    g = torch.Generator().manual_seed(1)
    how: dict[str, Any] = {"context": C, "generator": g}
    makers: dict[str, Any] = {
        "mlp": lambda: ff.potentials.MLPPotential(D, K, (9, 7), init_scale=0.5, **how),
        "convex": lambda: ff.potentials.ConvexPotential(D, K, (9, 7), init_scale=0.5, **how),
        "paper": lambda: ff.potentials.PaperPotential(D, K, **how),
        "resnet": lambda: ff.potentials.ResNetPotential(D, K, width=7, depth=2, init_scale=0.5, **how),
        "quadratic": lambda: ff.potentials.QuadraticPotential(D, K, **how),
        "free": lambda: ff.fields.FreeField(D, K, (9, 7), init_scale=0.5, **how),
        "solenoidal": lambda: ff.fields.SolenoidalField(D, K, 9, init_scale=0.5, **how),
        "skew": lambda: ff.fields.SkewGradientField(part("mlp"), generator=g),
        "helmholtz": lambda: ff.fields.HelmholtzField(part("mlp"), part("solenoidal")),
        "stacked": lambda: ff.fields.HelmholtzField(part("mlp"), part("mlp"), generator=g),
        "mlp without time": lambda: ff.potentials.MLPPotential(D, K, (9, 7), init_scale=0.5, time_features=0, **how),
        "paper without time": lambda: ff.potentials.PaperPotential(D, K, time_features=0, **how),
        "free without time": lambda: ff.fields.FreeField(D, K, (9, 7), init_scale=0.5, time_features=0, **how),
        "ridges without time": lambda: ff.fields.SolenoidalField(D, K, 9, init_scale=0.5, time_features=0, **how),
        "own": lambda: Own(g),
        "modules": lambda: ff.potentials.from_module(
            [lambda z, t, c, k=k: ((z * (k + 1)).sin() + c.sum(-1, keepdim=True) * z).sum(-1) for k in range(K)],
            D,
            context=C,
        ),
    }
    return makers[name]().to(F64)


PARTS = ("mlp", "free", "helmholtz", "stacked", "resnet", "own")
OTHERS = ("convex", "paper", "quadratic", "solenoidal", "skew", "modules")
TIMELESS = ("mlp without time", "paper without time", "free without time", "ridges without time")


def controls(name: str) -> Control:
    g = torch.Generator().manual_seed(2)
    index, weights = torch.tensor([0, 1, 2, 0, 1, 1]), torch.rand(B, K, generator=g, dtype=F64)
    return {
        "int": 1,
        "index": index,
        "weights": weights,
        "schedule": ff.Schedule([(-9.0, 0), (0.7, index), (1.3, 2)]),
        "schedule of weights": ff.Schedule([(-9.0, index), (0.7, weights)]),
    }[name]


def of_sample(control: Control, b: int) -> Control:
    if isinstance(control, ff.Schedule):
        return ff.Schedule([(s, of_sample(c, b)) for s, c in zip(control.starts, control.controls, strict=True)])
    return control[b : b + 1] if isinstance(control, Tensor) else control


def times(name: str) -> Tensor:
    grid = torch.tensor([0.0, 1.0, 1.8], dtype=F64)
    if name == "common":
        return grid
    if name == "stretched":
        return grid.unsqueeze(-1) * torch.linspace(0.3, -1.2, B, dtype=F64) + torch.linspace(0, 1, B, dtype=F64)
    columns = [[0, 0.4, 1], [1.5, 1.1, 0.2], [0.5, 0.5, 1.4], [0.3, 0.3, 0.3], [1.2, 0.9, 0.9], [0.1, 1.7, 1.8]]
    return torch.tensor(columns, dtype=F64).mT


def solve(
    flow: ff.LatentFlow, z: Tensor, t: Tensor, control: Control, c: Tensor, back: bool
) -> tuple[Any, list[Tensor]]:
    z, c = z.clone().requires_grad_(), c.clone().requires_grad_()
    path = (flow.inverse if back else flow)(z, t, control, context=c, log_det=True, costs={"kinetic": Kinetic()})
    w = torch.linspace(1, 2, len(path.z), dtype=z.dtype).unsqueeze(-1)
    loss = (path.z.sin() * w.unsqueeze(-1)).sum() + (w * path.log_det).sum() + (w * path.costs["kinetic"]).sum()
    leaves = [z, c, *flow.parameters()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return path, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


SOLVERS = {
    "dopri5": ff.Solver("dopri5", rtol=1e-8, atol=1e-8),
    "dopri8": ff.Solver("dopri8", rtol=1e-8, atol=1e-8),
    "euler": ff.Solver("euler"),
    "rk4": ff.Solver("rk4"),
}


AXES: dict[str, tuple[Any, ...]] = {
    "name": PARTS,
    "acting": ("int", "index", "weights", "schedule", "schedule of weights"),
    "t": ("common", "stretched", "irregular"),
    "solver": tuple(SOLVERS),
    "gradient": ("direct", "adjoint", "checkpoint"),
    "back": (False, True),
}
CASES = pairwise(*map(len, AXES.values()))  # the whole product is what `benchmarks.properties` draws from


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_as_one_solve_for_each_sample(case: tuple[int, ...]) -> None:
    check_samples(*(values[i] for values, i in zip(AXES.values(), case, strict=True)))


@product(name=OTHERS + TIMELESS, t=("common", "stretched", "irregular"), acting=("index", "weights"))
def test_other_parts_as_one_solve_for_each_sample(name: str, t: str, acting: str) -> None:
    check_samples(name, acting, t, "rk4", "direct", False)


def check_samples(name: str, acting: str, t: str, solver: str, gradient: Any, back: bool) -> None:
    """A batch against its samples, each solved alone; a sample that has common times as such."""
    control, clocks = controls(acting), times(t)
    if isinstance(control, ff.Schedule) and clocks.ndim > 1:
        solver = "dopri5"  # where steps of fixed size end depends on what switches when
    flow = ff.LatentFlow(part(name), replace(SOLVERS[solver], gradient=gradient))
    g = torch.Generator().manual_seed(3)
    z, c = torch.randn(B, D, generator=g, dtype=F64), torch.randn(B, C, generator=g, dtype=F64)
    path, found = solve(flow, z, clocks, control, c, back)
    assert path.t.shape == clocks.shape
    total = [torch.zeros_like(x) for x in found]
    for b in range(B):
        own = clocks if clocks.ndim == 1 else clocks[:, b]
        if clocks.ndim > 1 and bool((own.diff() == 0).any()):
            own = own.unsqueeze(-1)  # a sample that rests has no common times
        alone, gradients = solve(flow, z[b : b + 1], own, of_sample(control, b), c[b : b + 1], back)
        pairs = [(path.z, alone.z), (path.log_det, alone.log_det), (path.costs["kinetic"], alone.costs["kinetic"])]
        for batch, one in pairs:
            torch.testing.assert_close(batch[:, b], one[:, 0], rtol=1e-6, atol=1e-6)
        for i, gradient_b in enumerate(gradients):
            if i < 2:
                total[i][b] = gradient_b[0]
            else:
                total[i] += gradient_b
    for one, other in zip(found, total, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_sample_that_rests_stays_where_it_is() -> None:
    flow = ff.LatentFlow(part("mlp"))
    t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=F64)
    z = torch.randn(2, D, dtype=F64)
    path = flow(z, t, context=torch.zeros(C, dtype=F64), log_det=True)
    assert torch.equal(path.z[1], path.z[2])
    assert torch.equal(path.z[:, 1], z[1].expand(4, D))
    assert path.log_det is not None
    assert not path.log_det[:, 1].any()
    still = flow(z, t[:1].expand(3, 2), context=torch.zeros(C, dtype=F64))
    assert torch.equal(still.z, z.expand(3, 2, D))


def test_samples_of_the_same_grid_cost_what_common_times_cost() -> None:
    """One stretched grid is one solve without restarts; with times for all, it is as if they were common."""
    flow = ff.LatentFlow(part("mlp"), ff.Solver("dopri5"))
    z, c = torch.randn(B, D, dtype=F64), torch.zeros(C, dtype=F64)
    grid = torch.linspace(0, 2, 5, dtype=F64)
    common = flow(z, grid, context=c)
    every = flow(z, grid.unsqueeze(-1).expand(-1, B), context=c)
    assert every.stats == common.stats
    assert every.stats.engine == "closed form"
    torch.testing.assert_close(every.z, common.z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("name", ["mlp", "own"])
def test_times_of_ones_own_have_gradients(name: str, gradient: Any) -> None:
    flow = ff.LatentFlow(part(name), ff.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient))
    z, c = torch.randn(B, D, dtype=F64), torch.randn(B, C, dtype=F64)
    t = times("irregular").requires_grad_()
    path = flow(z, t, torch.arange(B) % K, context=c)
    path.z[1:].sum().backward()
    assert t.grad is not None
    for i in (1, 2):  # dz_i/dt_i = v, and later outputs do not depend on an output's own time
        v = flow.velocity(path.z[i], t.detach()[i], torch.arange(B) % K, context=c).sum(-1)
        torch.testing.assert_close(t.grad[i], v, rtol=1e-5, atol=1e-6)


def test_a_conditional_gaussian_has_its_density() -> None:
    """dz/dt = S z + E c pushes N(0, 1) to a Gaussian whose mean follows the context, in closed form."""
    S = torch.tensor([[0.3, 0.1], [0.1, -0.4]], dtype=F64)
    u = ff.potentials.QuadraticPotential(2, S=S, context=3).to(F64)
    flow = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-8, atol=1e-8))
    c = torch.randn(5, 3, dtype=F64)
    base = Independent(Normal(torch.zeros(2, dtype=F64), 1.0), 1)
    q = flow.push(base, 1.5, context=c)
    assert q.batch_shape == (5,)
    E = torch.linalg.matrix_exp(1.5 * S)
    mean = (torch.linalg.solve(S, E - torch.eye(2, dtype=F64)) @ (c @ u.vector_context[0].mT).mT).mT
    exact = MultivariateNormal(mean.detach(), E @ E.mT)
    x = torch.randn(7, 5, 2, dtype=F64)
    torch.testing.assert_close(q.log_prob(x), exact.log_prob(x), rtol=1e-4, atol=1e-4)
    own = flow.push(base, 1.5, context=c[2])
    torch.testing.assert_close(own.log_prob(x[:, 2]), exact.log_prob(x)[:, 2], rtol=1e-4, atol=1e-4)


def test_a_mapping_is_its_features_side_by_side() -> None:
    g = torch.Generator().manual_seed(0)
    u = ff.potentials.MLPPotential(D, context={"pose": 2, "class": 3}, generator=g).to(F64)
    z, pose, kind = (torch.randn(B, n, dtype=F64) for n in (D, 2, 3))
    value = u(z, 0.0, context={"class": kind, "pose": pose})  # by name, in whatever order
    g.manual_seed(0)
    joined = ff.potentials.MLPPotential(D, context=5, generator=g).to(F64)
    torch.testing.assert_close(value, joined(z, 0.0, context=torch.cat([pose, kind], -1)))
    assert u.context_size == {"pose": 2, "class": 3}
    assert u.context_dim == 5


def test_costs_see_the_context() -> None:
    class Pull(nn.Module):
        many_stages, needs = True, ("context",)

        def forward(self, e: ff.fields.Evaluation) -> Tensor:
            assert isinstance(e.context, Tensor)
            return (e.z[..., :C] - e.context).square().sum(-1)

    flow = ff.LatentFlow(part("mlp"), ff.Solver("rk4", step_size=0.1))
    z, c, k = torch.randn(B, D, dtype=F64), torch.randn(B, C, dtype=F64), torch.tensor([2, 0, 1, 1, 0, 2])
    closed = flow(z, [0.0, 1.0], k, context=c, costs={"pull": Pull()})
    flow.solver = replace(flow.solver, engine="general")
    general = flow(z, [0.0, 1.0], k, context=c, costs={"pull": lambda e: (e.z[..., :C] - e.context).square().sum(-1)})
    assert (closed.stats.engine, general.stats.engine) == ("closed form", "general")
    torch.testing.assert_close(closed.costs["pull"], general.costs["pull"])


@pytest.mark.parametrize(
    ("context", "error", "match"),
    [
        (None, ValueError, "built with context=2 and got none"),
        (torch.zeros(B, 3), ValueError, r"must have 2 features, shape \[\*batch, 2\]; got \[6, 3\]"),
        (torch.zeros(B + 1, 2), ValueError, r"does not fit a batch that needs \[6, 2\]"),
        (torch.zeros(B, 2, dtype=F64), TypeError, "float64"),
        (torch.full((2,), torch.nan), ValueError, "NaN or infinity"),
        ({"pose": torch.zeros(2)}, TypeError, "takes a tensor"),
        ([0.0, 1.0], TypeError, "must be a tensor"),
    ],
)
def test_bad_contexts(context: Any, error: type[Exception], match: str) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(D, K, (5, 5), context=2))
    with pytest.raises(error, match=match):
        flow(torch.zeros(B, D), [0.0, 1.0], context=context)


def test_contexts_of_other_parts_are_refused() -> None:
    plain, steered = ff.potentials.MLPPotential(D), ff.potentials.MLPPotential(D, context=2)
    with pytest.raises(ValueError, match="takes no context and got one"):
        ff.LatentFlow(plain)(torch.zeros(B, D), [0.0, 1.0], context=torch.zeros(2))
    for call in (plain, plain.derivatives, ff.fields.GradientField(plain), ff.LatentFlow(plain).velocity):
        with pytest.raises(ValueError, match="takes no context"):
            call(torch.zeros(B, D), 0.0, context=torch.zeros(2))
    with pytest.raises(ValueError, match="one context or none"):
        ff.fields.HelmholtzField(steered, ff.fields.SolenoidalField(D, context=3))
    both = ff.fields.HelmholtzField(steered, ff.fields.SolenoidalField(D))  # one of its parts takes it
    assert ff.LatentFlow(both)(torch.zeros(B, D), [0.0, 1.0], context=torch.ones(2)).z.shape == (2, B, D)
    named = ff.potentials.MLPPotential(D, context={"pose": 2})
    for context, match in (({"poes": torch.zeros(2)}, "did you mean pose"), ({}, "lacks 'pose'")):
        with pytest.raises(ValueError, match=match):
            named(torch.zeros(B, D), 0.0, context=context)


def test_a_part_remembers_its_context() -> None:
    u = pickle.loads(pickle.dumps(part("mlp")))
    assert u.context_size == C
    names = [name for name, _ in ff.potentials.MLPPotential(D).named_parameters()]
    assert not any("context" in name for name in names)


@pytest.mark.parametrize("scheduled", [False, True])
def test_an_empty_batch_with_own_times_comes_to_rest(scheduled: bool) -> None:
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2))
    z, t = torch.zeros(0, 2, requires_grad=True), torch.zeros(3, 0)
    path = flow(z, t, ff.Schedule([(-9.0, 0), (0.5, 0)]) if scheduled else 0, log_det=True)
    assert path.log_det is not None
    assert path.z.shape == (3, 0, 2)
    assert path.log_det.shape == (3, 0)
    assert path.t.shape == (3, 0)
    assert torch.autograd.grad(path.z.sum(), z)[0].shape == (0, 2)


def test_a_push_names_contexts_that_do_not_fit_one_another() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(D, context={"pose": 2, "kind": 1}))
    base = Independent(Normal(torch.zeros(D), 1.0), 1)
    with pytest.raises(ValueError, match=r"must broadcast to one batch shape, got \[3\] and \[4\]"):
        flow.push(base, 1.0, context={"pose": torch.zeros(3, 2), "kind": torch.zeros(4, 1)})
