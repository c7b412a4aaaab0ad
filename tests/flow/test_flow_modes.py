"""What holds in every gradient mode: where fields are asked, what they may hold, and what is refused by name."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from cases import product
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, TransformedDistribution

import flowfactor as ff

MODES = ("direct", "adjoint", "checkpoint")
SPAN = (0.3, 1.7)


class _Fenced(ff.fields.Field):
    """A slow field that may be asked between two times only."""

    def __init__(self, low: float, high: float, scale: float) -> None:
        super().__init__(2)
        self.w = nn.Parameter(scale * torch.tensor([[-0.3, 0.2], [0.1, -0.5]]))
        self.low, self.high = low, high

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        for now in (float(t.detach().min()), float(t.detach().max())):
            if not self.low <= now <= self.high:
                raise RuntimeError(f"asked at {now}")
        return torch.sin(z @ self.w.T) + 0.01 * t.unsqueeze(-1)


@pytest.mark.filterwarnings("ignore:Functional iteration")
@product(
    method=ff.solver.SOLVER_METHODS, gradient=MODES, log_det=(False, True), back=(False, True), outputs=(2, 4),
    scale=(1e-3, 1.0),
)  # fmt: skip
def test_fields_are_never_asked_outside_the_times_of_a_solve(
    method: str, gradient: Any, log_det: bool, back: bool, outputs: int, scale: float
) -> None:
    if method == "scipy_solver" and gradient != "adjoint":
        pytest.skip("SciPy has no gradients in this mode")
    if gradient == "checkpoint" and method in ff.solver.MULTISTEP_METHODS:
        pytest.skip("refused")
    flow = ff.LatentFlow(_Fenced(*SPAN, scale).double(), ff.Solver(method, gradient=gradient))
    t = [SPAN[0], 0.31, 1.1, SPAN[1]] if outputs == 4 else list(SPAN)
    follow = flow.inverse if back else flow
    path = follow(torch.ones(3, 2).double(), t, log_det=log_det)
    path.z[1:].square().sum().backward()
    assert flow.field.w.grad is not None and bool(flow.field.w.grad.any())


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_field_with_log_determinant_has_directs_gradient(gradient: Any) -> None:
    grads = []
    for mode in ("direct", gradient):
        field = _Fenced(0.0, 1.0, 1.0).double()
        flow = ff.LatentFlow(field, ff.Solver(rtol=1e-9, atol=1e-9, gradient=mode))
        path = flow(torch.linspace(-1, 1, 6).double().reshape(3, 2), [0.0, 1.0], log_det=True)
        assert path.log_det is not None
        (path.z[-1].square().sum() + path.log_det[-1].sum()).backward()
        grads.append(field.w.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6)


@product(gradient=MODES, engine=("general", "closed form"), method=("dopri5", "rk4"), backward=(False, True))
def test_a_path_kept_on_its_flow_is_freed_without_the_collector(
    gradient: Any, engine: Any, method: str, backward: bool
) -> None:
    flow: Any = ff.LatentFlow(ff.potentials.MLPPotential(2), ff.Solver(method, gradient=gradient, engine=engine))
    gc.collect()
    gc.disable()
    try:
        path = flow(torch.randn(3, 2), [0.0, 0.5, 1.0], log_det=True, costs={"a": ff.regularizers.TransportCost()})
        if backward:
            path.z.sum().backward()
        flow.last, gone = path, weakref.ref(path.z)
        del path, flow
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize(
    ("gradient", "engine"), [("direct", "general"), *((gradient, "closed form") for gradient in MODES)]
)
def test_a_path_kept_on_the_field_of_a_potential_is_freed_too(gradient: Any, engine: Any, log_det: bool) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2), ff.Solver("rk4", gradient=gradient, engine=engine))
    gc.collect()
    gc.disable()
    try:
        path = flow(torch.randn(3, 2), [0.0, 0.5, 1.0], log_det=log_det)
        flow.field.last, gone = path, weakref.ref(path.z)  # type: ignore[assignment]
        del path, flow
        assert gone() is None
    finally:
        gc.enable()


class _Own(ff.potentials.Potential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(2)
        self.net = nn.Sequential(nn.Linear(2, 4), *layers, nn.Tanh(), nn.Linear(4, 1))

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return self.net(z).squeeze(-1)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.AlphaDropout(0.1), nn.RReLU()])
@pytest.mark.parametrize("held", ["part", "closure"])
@pytest.mark.parametrize("gradient", MODES)
def test_modules_that_change_between_evaluations_are_refused_in_training_mode(
    layer: nn.Module, held: str, gradient: Any
) -> None:
    own = _Own(layer)
    part = own if held == "part" else ff.potentials.from_module(lambda z, t: own.net(z).squeeze(-1), 2)
    flow = ff.LatentFlow(part, ff.Solver("rk4", gradient=gradient))
    own.train()
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} \(.*training mode.*\.eval\(\).*context"):
        flow(torch.ones(3, 2), [0.0, 1.0])
    own.eval()
    flow(torch.ones(3, 2), [0.0, 1.0], log_det=True).z[-1].sum().backward()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_derivatives_refuse_modules_in_training_mode(layer: nn.Module) -> None:
    own = _Own(layer)
    potentials = [own, ff.potentials.from_module(lambda z, t: own.net(z).squeeze(-1), 2)]
    fields = [
        ff.fields.GradientField(own),
        ff.fields.from_module(nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 2)), 2),
    ]
    refused = rf"{type(layer).__name__} \(.*training mode.*\.eval\(\)"
    for u in potentials:
        own.train()
        with pytest.raises(ValueError, match=refused):
            u.derivatives(torch.ones(3, 2), 0.0, laplacian="exact")
        own.eval()
        u.derivatives(torch.ones(3, 2), 0.0, laplacian="exact")
    for field in fields:
        layer.train()
        with pytest.raises(ValueError, match=refused):
            field.divergence(torch.ones(3, 2), 0.0)


class _Cost(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1))

    def forward(self, e: ff.fields.Evaluation) -> Tensor:
        return self.net(e.z).squeeze(-1)


@pytest.mark.parametrize("held", ["module", "closure", "force"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_costs_refuse_modules_in_training_mode(layer: nn.Module, held: str) -> None:
    own = _Cost(layer)
    force = ff.regularizers.HamiltonJacobi(lambda z, t: own.net(z).squeeze(-1))
    cost: Any = {"module": own, "closure": lambda e: own(e), "force": force}[held]
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2), ff.Solver("rk4"))
    own.train()
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} \(.*cost 'mine'.*training mode.*\.eval\(\)"):
        flow(torch.ones(3, 2), [0.0, 1.0], costs={"mine": cost})
    own.eval()
    flow(torch.ones(3, 2), [0.0, 1.0], costs={"mine": cost})


def test_dropout_of_probability_zero_moves_nothing() -> None:
    ff.LatentFlow(_Own(nn.Dropout(0.0)), ff.Solver("rk4"))(torch.ones(3, 2), [0.0, 1.0])


@pytest.mark.parametrize("engine", ["general", "closed form"])
@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("log_det", [False, True])
def test_a_cost_may_need_the_divergence(engine: Any, gradient: Any, log_det: bool) -> None:
    class Compression(nn.Module):
        many_stages, needs = True, ("divergence",)

        def forward(self, e: ff.fields.Evaluation) -> Tensor:
            assert e.divergence is not None
            return 2 * e.divergence

    torch.manual_seed(0)
    u = ff.potentials.MLPPotential(2, init_scale=3.0).double()
    flow = ff.LatentFlow(u, ff.Solver(rtol=1e-9, atol=1e-9, engine=engine, gradient=gradient))
    z, weights = torch.randn(3, 2).double(), list(u.parameters())
    path = flow(z, [0.0, 1.0], log_det=log_det, costs={"c": Compression()})
    found = torch.autograd.grad(path.costs["c"][-1].sum(), weights, allow_unused=True)
    plain = ff.LatentFlow(u, ff.Solver(rtol=1e-9, atol=1e-9, engine="general"))(z, [0.0, 1.0], log_det=True).log_det
    assert plain is not None
    torch.testing.assert_close(path.costs["c"][-1], 2 * plain[-1], rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(2 * plain[-1].sum(), weights, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            *(torch.zeros(1).double() if g is None else g for g in (one, other)), rtol=0, atol=1e-5
        )


def test_a_sample_and_its_density_come_from_one_solve() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 2, init_scale=3.0).double(), ff.Solver("rk4", step_size=0.02))
    mean = torch.zeros(2).double().requires_grad_()
    q1: Any = flow.push(Normal(mean, torch.ones(2).double()), 1.0, 1)
    torch.manual_seed(1)
    z, log_q = q1.rsample_and_log_prob((5,))
    weights = [mean, *flow.parameters()]
    got = torch.autograd.grad(log_q.sum() + z.square().sum(), weights, allow_unused=True)
    base = Independent(Normal(mean, torch.ones(2).double()), 1)
    torch.manual_seed(1)
    z0 = base.rsample((5,))
    path = flow(z0, [0.0, 1.0], 1, log_det=True)
    assert path.log_det is not None
    want_q = base.log_prob(z0) - path.log_det[-1]
    wanted = torch.autograd.grad(want_q.sum() + path.z[-1].square().sum(), weights, allow_unused=True)
    torch.testing.assert_close((z, log_q, got), (path.z[-1], want_q, wanted))
    torch.testing.assert_close(q1.log_prob(z.detach()), log_q, rtol=0, atol=1e-5)
    drawn, density = q1.sample_and_log_prob((5,))
    assert not drawn.requires_grad and not density.requires_grad
    assert repr(q1).startswith("PushedDistribution(base=Independent(Normal(") and "t=0 to t=1, control=1" in repr(q1)
    wider = q1.expand((4,))
    assert type(wider) is type(q1) and wider.rsample_and_log_prob((3,))[1].shape == (3, 4)
    plain = TransformedDistribution(base, [flow.transform(0.0, 1.0, 1)])
    torch.testing.assert_close(plain.log_prob(z.detach()), q1.log_prob(z.detach()))


def test_a_base_without_rsample_is_refused_by_name() -> None:
    q0 = MixtureSameFamily(Categorical(torch.ones(3)), Independent(Normal(torch.zeros(3, 2), 1.0), 1))
    q1: Any = ff.LatentFlow(ff.potentials.MLPPotential(2)).push(q0, 1.0)
    with pytest.raises(NotImplementedError, match=r"MixtureSameFamily has no rsample.*sample_and_log_prob"):
        q1.rsample_and_log_prob()
    assert q1.sample_and_log_prob((5,))[1].shape == (5,)


def test_accuracy_is_measured_by_solving_again() -> None:
    field = ff.fields.from_module(lambda z, t: torch.stack([-z[..., 1], z[..., 0]], -1), 2)
    z, t = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), [0.0, 1.0]
    coarse, fine = ff.LatentFlow(field, ff.Solver("euler")), ff.LatentFlow(field, ff.Solver("rk4", step_size=0.01))
    # One Euler step there and one back multiply by (1 + J)(1 - J) = 2; its length is 1.
    torch.testing.assert_close(coarse.round_trip_error(z, t), torch.tensor([1.0, 0.0]).double())
    exact = torch.tensor([1.0, 1.0]).double() - torch.tensor([1.0, 1.0]).double().cos_() * 0
    exact = exact - torch.stack([torch.tensor(1.0).cos(), torch.tensor(1.0).sin()]).double()
    torch.testing.assert_close(coarse.solver_error(z, t)[0], exact.norm(), rtol=0, atol=1e-6)
    assert fine.round_trip_error(z, t).max() < 1e-9 and fine.solver_error(z, t).max() < 1e-7


@pytest.mark.parametrize("log_det", [2, 1.0, "yes", None])
def test_log_det_is_true_or_false(log_det: Any) -> None:
    with pytest.raises(TypeError, match="log_det must be True or False"):
        ff.LatentFlow(ff.potentials.MLPPotential(2))(torch.ones(3, 2), [0.0, 1.0], log_det=log_det)


def test_inputs_that_no_solve_knows_are_named() -> None:
    flow, z = ff.LatentFlow(ff.potentials.MLPPotential(2, 2)), torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"a state must be a dense tensor.*sparse"):
        flow(z.to_sparse(), [0.0, 1.0])
    with pytest.raises(TypeError, match="times must be a dense tensor"):
        flow(z, torch.tensor([0.0, 1.0]).to_sparse())
    with pytest.raises(TypeError, match="a control must be a dense tensor"):
        flow(z, [0.0, 1.0], torch.tensor([0, 1, 1]).to_sparse())
    nested = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)], layout=torch.jagged)
    with pytest.raises(TypeError, match="nested"):
        flow(nested, [0.0, 1.0])
    unsigned = torch.tensor([0, 1, 1], dtype=torch.uint64)
    torch.testing.assert_close(flow(z, [0.0, 1.0], unsigned).z, flow(z, [0.0, 1.0], unsigned.long()).z)
    with pytest.raises(ValueError, match=r"too large for torch\.float32"):
        flow(z, [0.0, 1e39])
    with pytest.raises(ValueError, match=r"too large for torch\.float64"):
        flow.double()(z.double(), [-1e308, 1e308])


@pytest.mark.parametrize("many", [False, True])
def test_a_cost_of_another_dtype_is_refused(many: bool) -> None:
    def cost(e: ff.fields.Evaluation) -> Tensor:
        return e.velocity.double().square().sum(-1)

    cost.many_stages = many  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"cost 'speed' returns torch.float64 and the state is torch.float32.*\.to"):
        ff.LatentFlow(ff.potentials.MLPPotential(2))(torch.ones(3, 2), [0.0, 1.0], costs={"speed": cost})


@pytest.mark.parametrize("make", [ff.potentials.from_module, ff.fields.from_module])
def test_a_module_that_takes_the_time_first_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"m\(z, t\), state first; this one takes \(t, z\)"):
        make(lambda t, z: z, 2)


@pytest.mark.parametrize(("method", "within"), [("dopri5", 5e-5), ("bosh3", 1e-5), ("dopri8", 1e-5)])
def test_the_way_back_lands_on_outputs(method: str, within: float) -> None:
    """Steps beyond an output, read off between, would cost the accuracy of the steps."""
    field = ff.fields.from_module(lambda z, t: torch.sin(z + 3 * t.unsqueeze(-1)), 2)
    grads = []
    for gradient in ("direct", "adjoint"):
        z = torch.linspace(-1, 1, 6).double().reshape(3, 2).requires_grad_()
        path = ff.LatentFlow(field, ff.Solver(method, gradient=gradient, rtol=1e-6, atol=1e-6))(z, [0.0, 0.5, 1.0])
        grads.append(torch.autograd.grad(path.z[1:].square().sum(), z)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=within)


def test_a_density_whose_divergence_is_negative_is_known_by_its_solver_error() -> None:
    # The flow carries N(0, e^-20) to N(0, 1). Steps of 1/4 follow the log-determinant exactly, and not the states: what is
    # called a density then holds more than a mass of one.
    rate, one = 10.0, torch.ones(2).double()
    u = ff.potentials.QuadraticPotential(2, S=rate * torch.eye(2)).double()
    data = Independent(Normal(0 * one, math.exp(-rate) * one), 1)
    x = data.sample((1000,))

    def measured(solver: ff.Solver) -> tuple[float, float, float]:
        flow = ff.LatentFlow(u, solver)
        with torch.no_grad():
            divergence = (data.log_prob(x) - flow.density(Normal(0 * one, one)).log_prob(x)).mean()
        return (
            float(divergence),
            float(flow.solver_error(x, [0.0, 1.0]).median()),
            float(flow.round_trip_error(x, [0.0, 1.0]).median()),
        )

    divergence, off, missed = measured(ff.Solver("rk4", step_size=0.25))
    assert divergence < -0.5 and off > 0.3 and missed > 0.1  # states of the base are of size 1
    divergence, off, missed = measured(ff.Solver(rtol=1e-9, atol=1e-9))
    assert abs(divergence) < 1e-4 and off < 1e-4 and missed < 1e-4
