"""Flows against closed solutions: matrix exponentials, for every method, control and gradient mode."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import flowfactor as ff
from flowfactor.solver import ADAPTIVE_METHODS, SOLVER_METHODS

D, K = 3, 3
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def quadratic(scale: float = 1.0) -> ff.potentials.QuadraticPotential:
    S = torch.randn(K, D, D, dtype=torch.float64) / D * scale
    return ff.potentials.QuadraticPotential(D, K, S=S, b=scale * torch.randn(K, D, dtype=torch.float64))


def exact(S: Tensor, b: Tensor, z0: Tensor, time: float) -> Tensor:
    """Solves dz/dt = S z + b by the exponential of the augmented matrix."""
    A = torch.zeros(*S.shape[:-2], D + 1, D + 1, dtype=torch.float64)
    A[..., :D, :D], A[..., :D, D] = S, b
    one = torch.cat([z0, torch.ones_like(z0[..., :1])], -1)
    return (torch.linalg.matrix_exp(A * time) @ one.unsqueeze(-1)).squeeze(-1)[..., :D]


# Step sizes and spans at which each method can reach 1e-8 quickly: low orders get a mild field and a short way.
CASES = {
    "dopri5": (1.0, 1.0, None), "dopri8": (1.0, 1.0, None), "bosh3": (0.3, 0.3, None),
    "fehlberg2": (0.02, 0.1, None), "adaptive_heun": (0.02, 0.1, None), "euler": (1e-3, 0.05, 0.0025),
    "midpoint": (0.05, 0.2, 0.01), "heun2": (0.05, 0.2, 0.01), "heun3": (0.2, 0.3, 0.01), "rk4": (1.0, 1.0, 0.02),
    "explicit_adams": (0.3, 1.0, 0.02), "implicit_adams": (0.3, 1.0, 0.02), "fixed_adams": (0.3, 1.0, 0.02),
    "scipy_solver": (1.0, 1.0, None),
}  # fmt: skip


def test_every_method_has_a_case() -> None:
    assert set(CASES) == set(SOLVER_METHODS)


@pytest.mark.parametrize("method", SOLVER_METHODS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_method_meets_the_matrix_exponential(method: str, backward: bool) -> None:
    scale, span, step = CASES[method]
    u = quadratic(scale)
    tolerance = 1e-10 if method in ("fehlberg2", "adaptive_heun") else 1e-11
    flow = ff.LatentFlow(u, ff.Solver(method, rtol=tolerance, atol=tolerance, step_size=step))
    z0, k = torch.randn(4, D, dtype=torch.float64), torch.tensor([2, 0, 1, 2])
    times = [0.0, 0.3 * span, span]
    times = times[::-1] if backward else times
    with torch.no_grad():
        path = flow(z0, times, k, log_det=True)
        back = flow.inverse(path.z[-1], times, k, log_det=True)
    for i, t in enumerate(times):
        expected = exact(u.S[k], u.b[k], z0, t - times[0])
        torch.testing.assert_close(path.z[i], expected, rtol=0, atol=1e-8)
        trace = u.S[k].diagonal(dim1=-2, dim2=-1).sum(-1) * (t - times[0])
        torch.testing.assert_close(path.log_det[i], trace, rtol=0, atol=1e-8)
    torch.testing.assert_close(back.z[-1], z0, rtol=0, atol=2e-8)
    torch.testing.assert_close(back.log_det[-1], -path.log_det[-1], rtol=0, atol=2e-8)
    assert path.stats.nfe > 0 and path.stats.method == method
    if method in ADAPTIVE_METHODS:
        assert path.stats.accepted > 0


def _controls() -> dict[str, tuple[ff.Control, Tensor]]:
    index, weights = torch.tensor([2, 0, 1, 1, 0]), torch.randn(5, K, dtype=torch.float64)
    eye = torch.eye(K, dtype=torch.float64)
    return {
        "int": (1, eye[[1] * 5]),
        "index": (index, eye[index]),
        "weights": (weights, weights),
        "weights-shared": (weights[0], weights[:1].expand(5, K)),
    }


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("kind", ["int", "index", "weights", "weights-shared"])
@pytest.mark.parametrize("times", [[0.0, 0.1, 0.75, 1.0, 1.6], [2.0, 1.9, 0.4, -0.2]])
def test_every_control_meets_the_matrix_exponential(kind: str, times: list[float], gradient: str) -> None:
    u = quadratic()
    control, weights = _controls()[kind]
    S, b = torch.einsum("nk,kij->nij", weights, u.S), weights @ u.b
    flow = ff.LatentFlow(u, ff.Solver("dopri8", gradient=gradient, **TIGHT))
    z0 = torch.randn(5, D, dtype=torch.float64)
    path = flow(z0, times, control, log_det=True)
    assert torch.equal(path.z[0], z0)
    for i, t in enumerate(times):
        torch.testing.assert_close(path.z[i], exact(S, b, z0, t - times[0]), rtol=0, atol=1e-8)
        trace = S.diagonal(dim1=-2, dim2=-1).sum(-1) * (t - times[0])
        torch.testing.assert_close(path.log_det[i], trace, rtol=0, atol=1e-8)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("backward", [False, True])
def test_schedules_switch_exactly(method: str, gradient: str, backward: bool) -> None:
    u = quadratic(0.7)
    w = torch.randn(4, K, dtype=torch.float64) / 2
    schedule = ff.Schedule([(-math.inf, 0), (0.7, torch.tensor([1, 2, 0, 1])), (1.0, w), (1.35, 2)])
    eye = torch.eye(K, dtype=torch.float64)
    pieces = [(0.0, 0.7, eye[[0] * 4]), (0.7, 1.0, eye[[1, 2, 0, 1]]), (1.0, 1.35, w), (1.35, 2.0, eye[[2] * 4])]
    step = 0.02 if method == "rk4" else None
    flow = ff.LatentFlow(u, ff.Solver(method, gradient=gradient, step_size=step, **TIGHT))
    z0 = torch.randn(4, D, dtype=torch.float64)
    times = [2.0, 1.0, 0.3, 0.0] if backward else [0.0, 0.3, 1.0, 2.0]
    path = flow(z0, times, schedule, log_det=True)
    assert len(path.t) == 4

    def follow(z: Tensor, t0: float, t1: float) -> tuple[Tensor, Tensor]:
        trace = torch.zeros(4, dtype=torch.float64)
        for a, b, weights in pieces if t1 >= t0 else reversed(pieces):
            low, high = max(a, min(t0, t1)), min(b, max(t0, t1))
            if low < high:
                span = (high - low) if t1 >= t0 else (low - high)
                S = torch.einsum("nk,kij->nij", weights, u.S)
                z = exact(S, weights @ u.b, z, span)
                trace = trace + S.diagonal(dim1=-2, dim2=-1).sum(-1) * span
        return z, trace

    for i, t in enumerate(times):
        z, trace = follow(z0, times[0], t)
        torch.testing.assert_close(path.z[i], z, rtol=0, atol=1e-8)
        torch.testing.assert_close(path.log_det[i], trace, rtol=0, atol=1e-8)


def test_one_time_and_integer_times() -> None:
    flow = ff.LatentFlow(quadratic(), ff.Solver(**TIGHT))
    z0 = torch.randn(2, D, dtype=torch.float64)
    alone = flow(z0, [3.0], log_det=True)
    assert torch.equal(alone.z, z0.unsqueeze(0)) and torch.equal(alone.log_det, torch.zeros(1, 2).double())
    torch.testing.assert_close(flow(z0, torch.arange(3)).z, flow(z0, [0.0, 1.0, 2.0]).z)


def test_the_flow_property() -> None:
    flow = ff.LatentFlow(
        ff.potentials.MLPPotential(D, K, (8, 8), init_scale=2.0).double(), ff.Solver("dopri8", **TIGHT)
    )
    z0, k = torch.randn(5, D, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        whole = flow(z0, [0.0, 2.0], k, log_det=True)
        first = flow(z0, [0.0, 0.8], k, log_det=True)
        second = flow(first.z[-1], [0.8, 2.0], k, log_det=True)
    assert (whole.z[-1] - z0).norm(dim=-1).min() > 0.1
    torch.testing.assert_close(second.z[-1], whole.z[-1], rtol=0, atol=1e-8)
    torch.testing.assert_close(first.log_det[-1] + second.log_det[-1], whole.log_det[-1], rtol=0, atol=1e-8)


def test_log_det_is_that_of_the_jacobian_of_the_flow() -> None:
    field = ff.fields.FreeField(D, 1, (8, 8), init_scale=2.0).double()
    flow = ff.LatentFlow(field, ff.Solver("dopri8", rtol=1e-9, atol=1e-9))
    z0 = torch.randn(D, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda z: flow(z, [0.0, 1.0]).z[-1], z0)
    log_det = flow(z0, [0.0, 1.0], log_det=True).log_det[-1].detach()
    assert abs(float(log_det)) > 1e-3
    torch.testing.assert_close(log_det, torch.linalg.slogdet(J)[1], rtol=0, atol=1e-7)


def test_hutchinson_log_dets_average_to_the_exact_one() -> None:
    u = quadratic()
    flow = ff.LatentFlow(u, ff.Solver(**TIGHT), divergence="hutchinson")
    z0 = torch.zeros(4096, D, dtype=torch.float64)
    with torch.no_grad():
        found = flow(z0, [0.0, 1.0], log_det=True, generator=torch.Generator().manual_seed(1)).log_det[-1]
        again = flow(z0, [0.0, 1.0], log_det=True, generator=torch.Generator().manual_seed(1)).log_det[-1]
    assert torch.equal(found, again)
    assert abs(found.mean() - u.S[0].trace()) < 5 * found.std() / 64
    S = u.S[0].detach()
    values = {
        round(float(S.trace() + 2 * (a * S[0, 1] + b * S[0, 2] + a * b * S[1, 2])), 6) for a in (-1, 1) for b in (-1, 1)
    }
    assert {round(float(x), 6) for x in found} <= values | {round(v + e, 6) for v in values for e in (-1e-6, 1e-6)}


def test_push_has_the_gaussian_closed_form() -> None:
    u = quadratic()
    flow = ff.LatentFlow(u, ff.Solver("dopri8", **TIGHT))
    q0 = Normal(torch.zeros(D).double(), torch.ones(D).double())
    q1 = flow.push(q0, 0.8, 1)
    E = torch.linalg.matrix_exp(0.8 * u.S[1]).detach()
    mean = exact(u.S[1], u.b[1], torch.zeros(D).double(), 0.8).detach()
    z = q1.sample((6,))
    expected = MultivariateNormal(mean, E @ E.mT).log_prob(z)
    torch.testing.assert_close(q1.log_prob(z), expected, rtol=0, atol=1e-8)
    fresh = torch.randn(6, D).double()  # not from the cache
    expected = MultivariateNormal(mean, E @ E.mT).log_prob(fresh)
    torch.testing.assert_close(q1.log_prob(fresh), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["gradient", "helmholtz", "free"])
def test_pushed_densities_integrate_to_one(kind: str) -> None:
    P = ff.potentials
    if kind == "free":
        field = ff.fields.FreeField(2, 2, (8, 8), rank=0, init_scale=1.5)
    else:
        u = P.MLPPotential(2, 2, (8, 8), rank=0, init_scale=1.5)
        field = (
            u
            if kind == "gradient"
            else ff.fields.HelmholtzField(u, P.MLPPotential(2, 2, (8, 8), rank=0, init_scale=1.5))
        )
    flow = ff.LatentFlow(field.double(), ff.Solver(rtol=1e-5, atol=1e-5))
    q1 = flow.push(Normal(torch.zeros(2).double(), torch.full((2,), 0.5).double()), 1.0, 1)
    axis = torch.linspace(-6.0, 6.0, 81, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_q = q1.log_prob(z)
        moved = flow(z, [0.0, 1.0], 1, log_det=True)
    assert moved.log_det.abs().max() > 0.05
    assert abs(float(log_q.exp().sum() * (axis[1] - axis[0]) ** 2) - 1.0) < 1e-4


@pytest.mark.parametrize("steps", [10, 20, 40, 80])
def test_explicit_adams_is_stable_at_usual_steps(steps: int) -> None:
    """dz/dt = -z cos t, z(2) = exp(-sin 2): Adams-Bashforth of the highest order torchdiffeq has is off by a fifth at 40."""
    field = ff.fields.from_module(lambda z, t: -z * t.cos().unsqueeze(-1), dim=1)
    flow = ff.LatentFlow(field, ff.Solver("explicit_adams", step_size=2 / steps))
    found = flow(torch.ones(1, 1, dtype=torch.float64), [0.0, 2.0]).z[-1].item()
    assert abs(found - math.exp(-math.sin(2))) < 3 / steps**2
