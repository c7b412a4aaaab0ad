"""Matching without a solve: known lines, moving Gaussians, and what the two losses have in common."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flowfactor as ff

R = ff.regularizers
D = 3
DRIFTS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.5, 1.5]], dtype=torch.float64)


def lines(frames: int = 4, samples: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Samples that drift at the constant velocity of their flow: states, times and flows."""
    t = torch.linspace(0, 2, frames, dtype=torch.float64)
    k = torch.arange(samples) % 2
    start = torch.randn(samples, D, dtype=torch.float64)
    return start + t[:, None, None] * DRIFTS[k], t, k


def test_flow_matching_recovers_the_velocity_of_known_lines() -> None:
    torch.manual_seed(0)
    z, t, k = lines()
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(D, 2).double())
    optimiser = torch.optim.LBFGS(flow.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = R.FlowMatching()(flow, z, t, k, generator=torch.Generator().manual_seed(1)).mean()
        loss.backward()
        return loss

    before = closure().item()
    optimiser.step(closure)
    assert before > 1 and closure().item() < 1e-8
    torch.testing.assert_close(flow.velocity(z[2], t[2], k), DRIFTS[k], atol=1e-3, rtol=0)
    torch.testing.assert_close(flow(z[0], t, k).z, z, atol=1e-3, rtol=0)


def test_what_a_resting_field_misses_is_the_squared_speed_over_time() -> None:
    """Own times, which run forwards, backwards or rest, and count as an integral over time."""
    still = ff.fields.from_module(lambda z, t: 0 * z, 1)
    z = torch.tensor([0.0, 2.0, 3.0])[:, None, None].expand(3, 3, 1)
    t = torch.tensor([[0.0, 1.0, 5.0], [4.0, 0.0, 5.0], [5.0, -1.0, 5.0]])
    loss = R.FlowMatching()(still, z, t)
    torch.testing.assert_close(loss, torch.tensor([4 / 4 + 1 / 1, 4 / 1 + 1 / 1, 0.0]))


def test_points_lie_on_the_lines_at_their_times() -> None:
    """v = c(t) z along z = t w is exact where points and times belong together: w = z / t."""
    z, t = torch.randn(50, D, dtype=torch.float64), torch.tensor([1.0, 1.5, 4.0], dtype=torch.float64)
    radial = ff.fields.from_module(lambda z, t: z / t.unsqueeze(-1), D)
    assert float(R.FlowMatching()(radial, t[:, None, None] * z, t).abs().max()) < 1e-24
    late = ff.fields.from_module(lambda z, t: z / (t + 0.1).unsqueeze(-1), D)
    assert float(R.FlowMatching()(late, t[:, None, None] * z, t).min()) > 1e-5


def test_a_schedule_switches_where_it_says() -> None:
    drifts = ff.fields.from_module([lambda z, t, d=d: d.expand_as(z) for d in DRIFTS], D)
    _, _, k = lines()
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    z = torch.stack([torch.zeros_like(DRIFTS[k]), DRIFTS[k], DRIFTS[k] + DRIFTS[1]])
    switch = ff.Schedule([(0.0, k), (1.0, 1)])
    assert float(R.FlowMatching()(drifts, z, t, switch).max()) == 0
    assert float(R.FlowMatching()(drifts, z, t, k)[k == 0].min()) > 1


class Steered(ff.fields.Field):
    """v = c."""

    def flow_velocity(self, z: Tensor, t: Tensor, k: int, context: ff.context.Context | None = None) -> Tensor:
        assert isinstance(context, Tensor)
        return context


def test_a_context_reaches_every_point() -> None:
    z, t, k = lines()
    loss = R.FlowMatching()(Steered(D, context=D), z, t, context=DRIFTS[k])
    assert loss.shape == k.shape and float(loss.max()) < 1e-24


def test_gradients_reach_states_that_are_learned() -> None:
    z, t, k = lines()
    z.requires_grad_()
    for matching in (R.FlowMatching(), R.ActionMatching()):
        u = ff.potentials.QuadraticPotential(D, 2).double()
        (gradient,) = torch.autograd.grad(matching(u, z, t, k).sum(), z)
        assert float(gradient.abs().min(0).values.max()) > 0


A, B = 0.3, torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)


def gaussian(samples: int = 20_000, frames: int = 65) -> tuple[Tensor, Tensor]:
    """A normal cloud that u = A |z|^2 / 2 + B.z moves and expands: states and times, of antithetic samples."""
    t = torch.linspace(0, 1, frames, dtype=torch.float64)
    half = torch.randn(samples // 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, growth = torch.cat([half, -half]), (A * t).exp()[:, None, None]
    return growth * start + (growth - 1) * B / A, t


def quadratic(a: float, b: Tensor) -> ff.potentials.QuadraticPotential:
    return ff.potentials.QuadraticPotential(D, S=a * torch.eye(D), b=b).double()


def squared_speed(a: float, b: Tensor) -> float:
    """The integral of E|a z + b|^2 over the cloud's way."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    growth = (A * t).exp()
    mean = a * (growth - 1)[:, None] * B / A + b
    return float(torch.trapezoid(mean.square().sum(-1) + D * (a * growth).square(), t))


def test_action_matching_is_least_at_the_potential_that_moves_a_gaussian() -> None:
    z, t = gaussian()

    def loss(u: ff.potentials.Potential) -> float:
        return R.ActionMatching()(u, z, t, generator=torch.Generator().manual_seed(2)).mean().item()

    least = loss(quadratic(A, B))
    assert least == pytest.approx(-0.5 * squared_speed(A, B), rel=0.01)
    for a, b in ((0.1, torch.zeros(D)), (-0.2, torch.tensor([0.3, 0.0, 0.0])), (0.0, torch.tensor([0.0, 0.5, -0.5]))):
        above = 0.5 * squared_speed(a, b.double())
        assert loss(quadratic(A + a, B + b)) - least == pytest.approx(above, rel=0.05), (a, b)


def test_action_matching_finds_that_potential() -> None:
    z, t = gaussian(4000, 17)
    u = ff.potentials.QuadraticPotential(D).double()
    optimiser = torch.optim.LBFGS(u.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = R.ActionMatching()(u, z, t, generator=torch.Generator().manual_seed(3)).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    origin, apart = torch.zeros(1, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    flow = ff.LatentFlow(u)
    torch.testing.assert_close(flow.velocity(origin, 0.0)[0], B, atol=0.05, rtol=0)
    torch.testing.assert_close(flow.velocity(apart, 0.0) - B, A * apart, atol=0.1, rtol=0)


def test_action_matching_is_half_of_flow_matching_less_the_action_of_the_lines() -> None:
    """On average over the times that are drawn; here of four samples, each drawn many times."""
    torch.manual_seed(0)
    u = ff.potentials.MLPPotential(D, 2, (8, 8), init_scale=1.0).double()
    t = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    z, k, draws = torch.randn(3, 4, D, dtype=torch.float64), torch.tensor([0, 1, 1, 0]), 40_000
    many = z.unsqueeze(1).expand(3, draws, 4, D)
    with torch.no_grad():
        action = R.ActionMatching()(u, many, t, k)
        flow = R.FlowMatching()(u, many, t, k)
    cost = 0.5 * (z.diff(dim=0).square().sum(-1) / t.diff().unsqueeze(-1)).sum(0)
    error = (action.std(0) + 0.5 * flow.std(0)) / math.sqrt(draws)
    assert bool(((action.mean(0) - (0.5 * flow.mean(0) - cost)).abs() < 4 * error).all())
    assert bool((error < 0.02 * flow.mean(0)).all() and ((flow.mean(0) - 2 * cost).abs() > 20 * error).all())


@pytest.mark.parametrize("matching", [R.FlowMatching(), R.ActionMatching()])
@pytest.mark.parametrize("own", [False, True])
def test_the_way_back_is_the_same_way(matching: R.FlowMatching | R.ActionMatching, own: bool) -> None:
    """On average: the times that are drawn are others."""
    z, t, _ = lines(2)
    z = z.repeat(1, 500, 1)
    t = t[:, None].expand(z.shape[:-1]) if own else t
    u = ff.potentials.from_module(lambda z, t: z.square().sum(-1) / (2 + t), D)
    there, back = matching(u, z, t), matching(u, z.flip(0), t.flip(0))
    assert there.shape == back.shape == z.shape[1:-1]
    assert there.mean().item() == pytest.approx(back.mean().item(), rel=0.02)


def test_what_cannot_be_matched_is_refused_by_name() -> None:
    z, t, k = lines()
    z, t = z.float(), t.float()
    action, flow = R.ActionMatching(), R.FlowMatching()
    u = ff.potentials.MLPPotential(D, 2)
    helmholtz = ff.fields.HelmholtzField(u, ff.fields.SolenoidalField(D, 2, 5))
    for field in (helmholtz, ff.LatentFlow(ff.fields.FreeField(D, 2))):
        with pytest.raises(ValueError, match=r"a (Helmholtz|Free)Field does not move along one: take a GradientField"):
            action(field, z, t, k)
    with pytest.raises(ValueError, match="takes no Schedule"):
        action(u, z, t, ff.Schedule([(0.0, 0), (1.0, 1)]))
    with pytest.raises(TypeError, match="FlowMatching takes a LatentFlow, Field or Potential, got Linear"):
        flow(torch.nn.Linear(D, D), z, t, k)
    with pytest.raises(TypeError, match="ActionMatching takes a LatentFlow, GradientField or Potential, got Linear"):
        action(torch.nn.Linear(D, D), z, t, k)
    for matching in (action, flow):
        with pytest.raises(ValueError, match="two frames or more"):
            matching(u, z[:1], t[:1], k)
        with pytest.raises(ValueError, match="states of 4 frames and t 3 times"):
            matching(u, z, t[:3], k)
        with pytest.raises(ValueError, match="strictly increasing"):
            matching(u, z, t[[0, 2, 1, 3]], k)
        with pytest.raises(ValueError, match="first in frame 2"):
            matching(u, z.index_fill(0, torch.tensor([2]), math.nan), t, k)
        with pytest.raises(ValueError, match=r"a state must have shape"):
            matching(u, z[..., :2], t, k)


def test_a_gradient_field_of_ones_own_is_no_gradient() -> None:
    class Doubled(ff.fields.GradientField):
        def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
            return 2 * z

    z, t, _ = lines()
    with pytest.raises(ValueError, match="a Doubled does not move along one"):
        R.ActionMatching()(Doubled(quadratic(A, B)), z, t)
