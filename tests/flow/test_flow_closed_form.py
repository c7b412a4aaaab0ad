"""Solves in closed form against the same solves by the general engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from cases import product
from torch import Tensor

import flowfactor as ff

D, K = 4, 3
T = TypeVar("T")


class Value(torch.nn.Module):
    """The value of the potential as a cost that takes many stages at once."""

    needs = ("potential", "value")
    many_stages = True

    def forward(self, evaluation: ff.fields.Evaluation) -> Tensor:
        assert evaluation.value is not None
        return evaluation.value


def field(kind: str, activation: str) -> ff.fields.Field | ff.potentials.Potential:
    def make() -> ff.potentials.MLPPotential:
        return ff.potentials.MLPPotential(
            D, K, (6, 5), rank=2, time_features=4, init_scale=1.5, activation=activation
        ).double()

    if kind == "paper":
        return ff.potentials.PaperPotential(D, K).double()
    if kind == "gradient":
        return make()
    if kind in ("solenoidal", "ridge"):
        ridge = ff.fields.SolenoidalField(D, K, 7, rank=2, time_features=4, init_scale=1.5).double()
        return ridge if kind == "solenoidal" else ff.fields.HelmholtzField(make(), ridge)
    return ff.fields.HelmholtzField(make(), make(), skew=kind).double()


@product(
    activation=["logcosh", "softplus", "tanh"],
    method=["dopri5", "rk4", "euler", "bosh3"],
    kind=["gradient", "learned", "canonical", "ridge"],
    divergence=["exact", "hutchinson"],
)
def test_same_steps_values_and_gradients(activation: str, method: str, kind: str, divergence: str) -> None:
    same_steps_values_and_gradients(field(kind, activation), ff.Solver(method), divergence)


@pytest.mark.parametrize("control", [torch.tensor([1, 0, 2, 2, 0]), torch.tensor(1)], ids=["filled up", "one flow"])
def test_same_steps_by_the_norm_of_the_whole_batch(control: Tensor) -> None:
    solver = ff.Solver("dopri5", norm="batch")
    control = control.expand(5)
    same_steps_values_and_gradients(field("gradient", "logcosh"), solver, "hutchinson", control)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_papers_potential(gradient: str, divergence: str) -> None:
    solver = ff.Solver("rk4", gradient=gradient)
    same_steps_values_and_gradients(field("paper", ""), solver, divergence)


@pytest.mark.parametrize(("method", "gradient"), [("dopri5", "direct"), ("rk4", "checkpoint"), ("euler", "direct")])
@pytest.mark.parametrize("kind", ["gradient", "learned", "canonical", "ridge", "paper"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_superpositions(method: str, gradient: str, kind: str, divergence: str) -> None:
    solver = ff.Solver(method, gradient=gradient)
    weights = (0.5 * torch.randn(5, K).double()).requires_grad_()
    same_steps_values_and_gradients(field(kind, "logcosh"), solver, divergence, weights, [weights])


@product(
    gradient=["direct", "checkpoint", "adjoint"],
    method=["euler", "midpoint", "rk4"],
    kind=["gradient", "learned", "ridge", "paper"],
)
def test_schedules_of_weights(method: str, gradient: str, kind: str) -> None:
    pieces = [(0.5 * torch.randn(5, K).double()).requires_grad_() for _ in range(3)]
    # One switch at an output, one between two of them, and the first piece begins before the solve does.
    control = ff.Schedule(list(zip([-1.0, 0.7, 1.1], pieces, strict=True)))
    solver = ff.Solver(method, gradient=gradient, step_size=0.3)
    same_steps_values_and_gradients(field(kind, "logcosh"), solver, "hutchinson", control, pieces)


@product(
    gradient=["direct", "checkpoint", "adjoint"],
    kind=["gradient", "learned", "ridge", "paper"],
    control=["index", "weights"],
    divergence=["exact", "hutchinson"],
)
def test_accelerations(gradient: str, kind: str, control: str, divergence: str) -> None:
    weights = [(0.5 * torch.randn(5, K).double()).requires_grad_()] if control == "weights" else []
    solver = ff.Solver("bosh3" if gradient == "direct" else "midpoint", 1e-2, 1e-2, gradient=gradient)
    acting = weights[0] if weights else None
    same_steps_values_and_gradients(field(kind, "logcosh"), solver, divergence, acting, weights, bend=True)


def test_a_schedule_of_weights_is_one_solve() -> None:
    flow = ff.LatentFlow(field("ridge", "logcosh"), ff.Solver("euler", step_size=1.0))
    z, weights = torch.randn(2, 5, D).double(), torch.randn(8, 2, 5, K).double()
    path = flow(z, torch.arange(9.0).double(), ff.Schedule([(float(i), w) for i, w in enumerate(weights)]))
    assert (
        path.stats.engine == "closed form" and path.stats.accepted == 8
    )  # stretches of one step go to the other engine
    now = z
    for i, w in enumerate(weights):
        now = now + flow.velocity(now, float(i), w)
        torch.testing.assert_close(path.z[i + 1], now)


def same_steps_values_and_gradients(
    field: ff.fields.Field | ff.potentials.Potential,
    solver: ff.Solver,
    divergence: str,
    control: Tensor | ff.Schedule | None = None,
    weights: Sequence[Tensor] = (),
    bend: bool = False,
) -> None:
    flow = ff.LatentFlow(field, solver, divergence=divergence)
    hj = ff.regularizers.HamiltonJacobi(ff.regularizers.NegativeSquare(D).double())
    costs = {
        "hj": hj,
        "action": ff.regularizers.TransportCost(),
        "value": Value(),
        "rest": ff.regularizers.Solenoidal(),
    }
    if bend:
        costs["bend"] = ff.regularizers.Acceleration()
    if control is None:
        control = torch.tensor([1, 0, 2, 2, 0])  # groups of unequal size
    z0 = torch.randn(5, D).double().requires_grad_()
    inputs = [z0, *flow.parameters(), *hj.parameters(), *weights]

    def run(times: list[float]) -> tuple[ff.FlowPath, list[Tensor | None]]:
        t = torch.tensor(times).double()
        path = flow(z0, t, control, log_det=True, costs=costs, generator=torch.Generator().manual_seed(3))
        assert path.log_det is not None
        loss = path.z.sin().sum() + (path.z[1] ** 3).sum() + path.log_det[1].cos().sum() + path.log_det.sum()
        loss = loss + sum((c**2).sum() + c[1].sum() for c in path.costs.values())
        return path, list(torch.autograd.grad(loss, inputs, allow_unused=True))

    for times in ([0.0, 0.7, 1.5], [1.5, 0.7, 0.0]):
        (path, found), (other, expected) = by_both_engines(flow, lambda times=times: run(times))
        assert (path.stats.engine, other.stats.engine) == ("closed form", "general")
        assert (path.stats.nfe, path.stats.accepted) == (other.stats.nfe, other.stats.accepted)
        torch.testing.assert_close(path.z, other.z)
        torch.testing.assert_close(path.log_det, other.log_det)
        for a, b in zip(found, expected, strict=True):
            b = torch.zeros(()).double() if b is None else b
            scale = float(b.abs().max()) + 1e-6
            assert float((torch.zeros_like(b) if a is None else a).sub(b).abs().max()) <= 1e-8 * scale


@pytest.mark.parametrize(
    "solver",
    [
        ff.Solver("dopri5"),
        ff.Solver("bosh3", rtol=1e-3, atol=1e-3),
        *(ff.Solver("rk4", gradient=gradient, step_size=0.2) for gradient in ("direct", "checkpoint", "adjoint")),
        ff.Solver("euler", step_size=0.05),
    ],
    ids=lambda solver: f"{solver.method}-{solver.gradient}",
)
@product(rank=[0, 2], control=["index", "weights", "schedule"], divergence=[None, "exact", "hutchinson"])
def test_free_fields(solver: ff.Solver, rank: int, control: str, divergence: Any) -> None:
    field = ff.fields.FreeField(D, K, (6, 5), rank=rank, time_features=4, init_scale=1.5).double()
    flow = ff.LatentFlow(field, solver, divergence or "exact")
    acting: Tensor | ff.Schedule = torch.tensor([1, 0, 2, 2, 0])
    weights = [(0.5 * torch.randn(5, K).double()).requires_grad_() for _ in range(2)]
    if control != "index":
        acting = weights[0] if control == "weights" else ff.Schedule([(0.0, weights[0]), (0.7, weights[1])])
    z0 = torch.randn(5, D).double().requires_grad_()
    inputs = [z0, *flow.parameters(), *weights]

    def run() -> Sequence[Tensor]:
        path = flow(
            z0, torch.tensor([0.0, 0.4, 1.5]).double(), acting, costs={"action": ff.regularizers.TransportCost()},
            log_det=divergence is not None, generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        loss = path.z.sin().sum() + path.costs["action"].square().sum()
        outputs = [path.z, *path.costs.values()]
        if path.log_det is not None:
            loss = loss + path.log_det[1].cos().sum() + path.log_det.square().sum()
            outputs.append(path.log_det)
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [*outputs, *(x for x in found if x is not None)]

    both_ways(flow, run)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_gradients_of_gradients_of_a_free_field(divergence: Any) -> None:
    field = ff.fields.FreeField(D, K, (6, 5), time_features=4, init_scale=1.5).double()
    flow = ff.LatentFlow(field, ff.Solver("rk4"), divergence)
    z = torch.randn(3, D).double().requires_grad_()
    inputs = [z, *flow.parameters()]

    def run() -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(3)
        path = flow(z, [0.0, 1.0], torch.tensor([2, 0, 1]), log_det=True, generator=generator)
        assert path.log_det is not None
        loss = path.z[-1].square().sum() + path.log_det.square().sum()
        (first,) = torch.autograd.grad(loss, z, create_graph=True)
        found = torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)
        return [x for x in found if x is not None]

    both_ways(flow, run)


def test_the_divergence_of_a_free_field_is_that_of_its_map() -> None:
    field = ff.fields.FreeField(D, K, (6, 5), time_features=4, init_scale=1.5).double()
    z = torch.randn(3, D).double()
    path = ff.LatentFlow(field, ff.Solver("rk4", step_size=0.05))(z, [0.0, 0.5], 1, log_det=True)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: _rolled(field, z)))(z)
    torch.testing.assert_close(path.log_det[-1], torch.linalg.slogdet(jacobian)[1], rtol=1e-5, atol=1e-6)


def _rolled(field: ff.fields.Field, z: Tensor) -> Tensor:
    """Ten rk4 steps of 0.05 written out."""
    for n in range(10):
        t = 0.05 * n
        k1 = field(z, t, 1)
        k2 = field(z + 0.025 * k1, t + 0.025, 1)
        k3 = field(z + 0.025 * k2, t + 0.025, 1)
        z = z + 0.05 / 6 * (k1 + 2 * k2 + 2 * k3 + field(z + 0.05 * k3, t + 0.05, 1))
    return z


def by_both_engines(flow: ff.LatentFlow, run: Callable[[], T]) -> tuple[T, T]:
    """What a run gives in closed form, of which nothing is left to the general engine, and by the general engine."""
    engines: tuple[ff.solver.EngineChoice, ...] = ("closed form", "general")
    results = []
    for engine in engines:
        flow.solver = replace(flow.solver, engine=engine)
        results.append(run())
    return results[0], results[1]


def both_ways(flow: ff.LatentFlow, run: Callable[[], Sequence[Tensor]]) -> None:
    """Holds the closed form against autograd."""
    for a, b in zip(*by_both_engines(flow, run), strict=True):
        torch.testing.assert_close(a, b)


@product(
    control=["some flows", "all flows", "weights"],
    kind=["gradient", "learned", "canonical", "ridge"],
    divergence=["exact", "hutchinson"],
)
def test_gradients_of_gradients(control: str, kind: str, divergence: str) -> None:
    flow = ff.LatentFlow(field(kind, "logcosh"), ff.Solver("rk4"), divergence=divergence)
    z = torch.randn(3, D).double().requires_grad_()
    acting = torch.tensor([2, 0, 2] if control == "some flows" else [2, 0, 1])
    if control == "weights":
        acting = (0.5 * torch.randn(3, K).double()).requires_grad_()
    inputs = [z, *flow.parameters(), *([acting] if acting.requires_grad else [])]

    def run() -> Sequence[Tensor]:
        g = torch.Generator().manual_seed(1)
        path = flow(z, [0.0, 1.0], acting, log_det=True, generator=g)
        assert path.log_det is not None
        first = torch.autograd.grad(path.z[-1].sin().sum() + path.log_det[-1].sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs, allow_unused=True)
        return [torch.zeros(()).double() if x is None else x for x in second]

    both_ways(flow, run)


def test_a_graph_that_is_kept_can_be_walked_again() -> None:
    flow = ff.LatentFlow(field("gradient", "logcosh"))
    z = torch.randn(3, D).double().requires_grad_()
    inputs = [z, *flow.parameters()]
    costs = {"hj": ff.regularizers.HamiltonJacobi(ff.regularizers.NegativeSquare(D).double())}
    path = flow(z, [0.0, 1.0], 1, log_det=True, costs=costs)
    assert path.log_det is not None
    loss = path.z[-1].sum() + path.log_det[-1].sum() + path.costs["hj"][-1].sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_costs_that_share_a_force() -> None:
    flow = ff.LatentFlow(field("gradient", "logcosh"), ff.Solver("rk4"))
    force = ff.regularizers.NegativeSquare(D).double()
    costs = {name: ff.regularizers.HamiltonJacobi(force) for name in ("one", "other")}
    z = torch.randn(3, D).double()

    def run() -> Sequence[Tensor]:
        path = flow(z, [0.0, 1.0], costs=costs)
        return torch.autograd.grad(path.costs["one"][-1].sum() + 2 * path.costs["other"][-1].sum(), force.parameters())

    both_ways(flow, run)


def test_a_cost_of_the_users_own_keeps_its_gradients() -> None:
    """A subclass may capture tensors, and may take one stage at a time only."""
    weight = torch.tensor([1.0, 2.0, 3.0]).double().requires_grad_()

    class Weighted(ff.regularizers.TransportCost):
        def forward(self, evaluation: ff.fields.Evaluation) -> Tensor:
            assert evaluation.velocity.shape == (3, D)
            return weight * super().forward(evaluation)

    flow = ff.LatentFlow(field("gradient", "logcosh"), ff.Solver("euler"))
    z = torch.randn(3, D).double()
    path = flow(z, [0.0, 1.0], costs={"mine": Weighted()})
    expected = 0.5 * flow.velocity(z, 0.0).square().sum(-1)
    torch.testing.assert_close(torch.autograd.grad(path.costs["mine"][-1].sum(), weight)[0], expected)


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_schedules_and_groups_of_unequal_size(norm: str) -> None:
    """Repeated rows count once in a mean, and tolerances know what a log-determinant holds already."""
    flow = ff.LatentFlow(field("gradient", "logcosh"), ff.Solver(rtol=1e-3, atol=1e-6, norm=norm))
    control = ff.Schedule([(0.0, torch.tensor([1, 0, 2, 2, 0])), (0.6, 1), (1.3, torch.tensor([2, 2, 0, 0, 1]))])
    z = torch.randn(5, D).double().requires_grad_()

    def run() -> Sequence[Tensor]:
        path = flow(z, [0.0, 0.5, 2.0], control, log_det=True)
        assert path.log_det is not None
        steps = torch.tensor([path.stats.nfe, path.stats.accepted, path.stats.rejected])
        return [steps, path.z, path.log_det, *torch.autograd.grad(path.z.sum() + path.log_det.sum(), z)]

    both_ways(flow, run)


def test_the_limit_of_steps() -> None:
    u, z = field("gradient", "logcosh"), torch.randn(2, D).double()
    with pytest.raises(ff.FlowSolveError, match="max_steps"):
        ff.LatentFlow(u, ff.Solver("rk4", step_size=0.1, max_steps=9))(z, [0.0, 1.0])
    switch = ff.Schedule([(0.0, 0), (1.0, 1)])
    taken = ff.LatentFlow(u)(z, [0.0, 2.0], switch).stats
    attempted = taken.accepted + taken.rejected  # over the whole solve, on both sides of the switch
    assert ff.LatentFlow(u, ff.Solver(max_steps=attempted))(z, [0.0, 2.0], switch).stats == taken
    with pytest.raises(ff.FlowSolveError):
        ff.LatentFlow(u, ff.Solver(max_steps=attempted - 1))(z, [0.0, 2.0], switch)


def test_transforms_of_functions_go_to_the_general_engine() -> None:
    flow = ff.LatentFlow(field("gradient", "logcosh"), ff.Solver("rk4"))
    z, weights = torch.randn(2, D).double(), dict(flow.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(flow, weights, (z, [0.0, 1.0])).z[-1].square().sum()

    found = torch.func.grad(loss)(weights)
    expected = torch.autograd.grad(loss(weights), list(weights.values()), allow_unused=True)
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    along = torch.func.jvp(lambda z: flow(z, [0.0, 1.0]).z[-1], (z,), (torch.ones_like(z),))[1]
    step = 1e-6 * torch.ones_like(z)
    ahead, behind = (flow(z + s, [0.0, 1.0]).z[-1] for s in (step, -step))
    torch.testing.assert_close(along, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


@product(
    method=["dopri5", "rk4"],
    kind=["gradient", "learned", "canonical", "ridge", "paper"],
    times=[[0.0, 0.3, 4.0, 4.2], [4.0, 0.0]],
)
def test_checkpoint_takes_and_replays_the_steps_of_direct(method: str, kind: str, times: list[float]) -> None:
    """Many steps between two outputs, so that states at which a piece begins have to be found again."""
    made = field(kind, "logcosh")
    hj = ff.regularizers.HamiltonJacobi(ff.regularizers.NegativeSquare(D).double())
    z = torch.randn(5, D).double().requires_grad_()
    inputs = [z, *made.parameters(), *hj.parameters()]

    def run(gradient: str) -> tuple[ff.FlowPath, Sequence[Tensor]]:
        step = 0.1 if method == "rk4" else None
        solver = ff.Solver(method, 1e-8, 1e-8, gradient=gradient, step_size=step)
        flow = ff.LatentFlow(made, solver, divergence="hutchinson")
        g = torch.Generator().manual_seed(1)
        path = flow(z, times, torch.tensor([1, 0, 2, 2, 0]), log_det=True, costs={"hj": hj}, generator=g)
        assert path.log_det is not None
        loss = path.z.sin().sum() + path.log_det.sum() + path.costs["hj"].square().sum()
        return path, torch.autograd.grad(loss, inputs)

    (path, found), (expected, gradients) = run("checkpoint"), run("direct")
    assert path.stats.accepted == expected.stats.accepted > 16, "the case needs more than two pieces"
    assert path.stats.nfe_backward >= path.stats.nfe / 2
    torch.testing.assert_close(path.z, expected.z, rtol=0, atol=0)
    torch.testing.assert_close(path.log_det, expected.log_det)
    torch.testing.assert_close(path.costs["hj"], expected.costs["hj"])
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b)


@product(
    control=["index", "weights"],
    method=["dopri5", "rk4"],
    kind=["gradient", "learned", "canonical", "ridge", "paper"],
    divergence=["exact", "hutchinson"],
)
def test_the_adjoint_equation_has_the_gradient_of_the_solution(
    control: str, method: str, kind: str, divergence: str
) -> None:
    made = field(kind, "logcosh")
    hj = ff.regularizers.HamiltonJacobi(ff.regularizers.NegativeSquare(D).double())
    z = torch.randn(5, D).double().requires_grad_()
    acting = torch.tensor([1, 0, 2, 2, 0])  # groups of unequal size
    if control == "weights":
        acting = (0.5 * torch.randn(5, K).double()).requires_grad_()
    inputs = [z, *made.parameters(), *hj.parameters(), *([acting] if acting.requires_grad else [])]
    step = 0.02 if method == "rk4" else None

    def run(gradient: str, scale: float = 1.0) -> Sequence[Tensor]:
        solver = ff.Solver(method, 1e-9, 1e-9, gradient=gradient, step_size=step)
        flow = ff.LatentFlow(made, solver, divergence=divergence)
        g = torch.Generator().manual_seed(1)
        path = flow(z, [0.0, 0.3, 1.0], acting, log_det=True, costs={"hj": hj}, generator=g)
        assert path.log_det is not None
        loss = path.z.sin().sum() + path.log_det.sum() + path.costs["hj"].sum()
        found = torch.autograd.grad(scale * loss, inputs)
        assert (path.stats.nfe_backward > 0) == (gradient == "adjoint")
        return found

    expected = run("direct")
    for scale in (1.0, 1e-6):  # as accurate, whatever the scale of the loss
        for a, b in zip(run("adjoint", scale), expected, strict=True):
            assert float((a / scale - b).abs().max()) <= 1e-4 * float(b.abs().max())
