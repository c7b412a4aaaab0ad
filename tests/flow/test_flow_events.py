"""Events: each sample is followed until its own function changes sign, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff

F64 = torch.float64
FINE = {"rtol": 1e-10, "atol": 1e-10}


def growth(gradient: Any = "direct", method: str = "dopri5", **how: Any) -> ff.LatentFlow:
    """z_t = e^t z_0 in closed form."""
    u = ff.potentials.QuadraticPotential(1, S=torch.eye(1)).to(F64)
    return ff.LatentFlow(u, ff.Solver(method, gradient=gradient, **(how or FINE)))


def reaches(level: float | Tensor) -> Any:
    return lambda z, t: z[..., 0] - level


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
def test_an_exponential_reaches_a_level(gradient: Any) -> None:
    z0 = torch.tensor([[0.5], [0.25], [0.01], [0.9]], dtype=F64, requires_grad=True)
    level = torch.tensor(1.0, dtype=F64, requires_grad=True)
    speed = {"length": lambda e: e.velocity[..., 0]}
    how = {"rtol": 1e-7, "atol": 1e-7} if gradient == "adjoint" else FINE
    found = growth(gradient, **how).until(z0, reaches(level), 2.0, log_det=True, costs=speed)
    there = torch.tensor([True, True, False, True])
    start = z0.detach()[:, 0]
    exact = torch.where(there, -start.log(), 2.0)
    assert torch.equal(found.happened, there)
    torch.testing.assert_close(found.t, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.z[there, 0], torch.ones(3, dtype=F64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_det, exact, rtol=1e-6, atol=1e-6)
    # t* = ln(level / z_0), where z is the level; the log-determinant is t*, the length level - z_0.
    for value, by_start, by_level in (
        (found.t, -1 / start, 1.0),
        (found.z[:, 0], torch.zeros(4), 1.0),
        (found.log_det, -1 / start, 1.0),
        (found.costs["length"], -torch.ones(4), 1.0),
    ):
        of_start, of_level = torch.autograd.grad(value[there].sum(), [z0, level], retain_graph=True)
        expected = torch.where(there, by_start, 0).to(F64)
        torch.testing.assert_close(of_start[:, 0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(float(of_level), 3 * by_level, rtol=1e-5, atol=1e-5)
    (late,) = torch.autograd.grad(found.t[2], z0)
    assert not late.any()  # it was stopped by the clock


def test_backwards_in_time() -> None:
    found = growth().until(torch.tensor([[2.0], [3.0]], dtype=F64), reaches(1.0), -1.0)
    assert found.happened.tolist() == [True, False]
    torch.testing.assert_close(found.t[0].item(), -torch.tensor(2.0).log().item(), rtol=1e-8, atol=1e-8)
    assert found.t[1] == -1.0


def test_an_event_of_time_alone() -> None:
    z0 = torch.ones(3, 1, dtype=F64)
    when = torch.tensor([0.2, 0.7, 1.5], dtype=F64, requires_grad=True)
    found = growth().until(z0, lambda z, t: t - when, 2.0)
    torch.testing.assert_close(found.t, when, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found.z.sum(), when)[0], when.detach().exp(), rtol=1e-6, atol=1e-6)


def test_finite_differences_through_weights_controls_and_contexts() -> None:
    g = torch.Generator().manual_seed(0)
    u = ff.potentials.MLPPotential(2, 3, (8, 8), init_scale=2.0, context=2, generator=g).to(F64)
    flow = ff.LatentFlow(u, ff.Solver("dopri5", **FINE))
    z0 = torch.randn(5, 2, generator=g, dtype=F64)
    k, c = torch.tensor([2, 0, 1, 1, 0]), torch.randn(5, 2, generator=g, dtype=F64)
    with torch.no_grad():
        level = flow(z0, [0.0, 0.6], k, context=c).z[-1, :, 0]

    def loss() -> Tensor:
        found = flow.until(z0, lambda z, t: z[..., 0] - level, 1.5, k, context=c)
        assert found.happened.all()
        return (found.t * torch.arange(1, 6)).sum() + found.z[:, 1].sum()

    weight = u.w1
    (gradient,) = torch.autograd.grad(loss(), weight)
    for index in ((0, 3, 1), (1, 2, 0), (2, 5, 1)):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += step
                ends.append(float(loss()))
                weight[index] -= step
        torch.testing.assert_close(float(gradient[index]), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-6)


def test_a_schedule_and_many_batch_dimensions() -> None:
    u = ff.potentials.QuadraticPotential(1, 2, S=torch.tensor([[[1.0]], [[2.0]]])).to(F64)
    flow = ff.LatentFlow(u, ff.Solver("dopri5", **FINE))
    z0 = torch.full((2, 3, 1), 0.2, dtype=F64)
    found = flow.until(z0, reaches(1.0), 3.0, ff.Schedule([(0.0, 0), (0.5, 1)]))
    exact = 0.5 + (-torch.tensor(0.2).log() - 0.5) / 2
    assert found.t.shape == (2, 3)
    torch.testing.assert_close(found.t, exact.to(F64).expand(2, 3), rtol=1e-6, atol=1e-6)


def test_the_first_of_several_and_what_a_start_at_0_is() -> None:
    spin = ff.fields.from_module(lambda z, t: torch.stack([-z[..., 1], z[..., 0]], -1), dim=2)
    flow = ff.LatentFlow(spin, ff.Solver("dopri5", **FINE))
    z0 = torch.tensor([[1.0, 0.0]], dtype=F64)
    first = flow.until(z0, lambda z, t: z[..., 0], 10.0)  # cos t
    torch.testing.assert_close(first.t.item(), torch.pi / 2, rtol=1e-8, atol=1e-8)
    second = flow.until(z0, lambda z, t: z[..., 1], 10.0)  # sin t, which is 0 at the start
    torch.testing.assert_close(second.t.item(), torch.pi, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("when", [0.50001, 0.5000001, 1e-5, 0.3])
def test_one_state_without_a_batch(when: float) -> None:
    """Also where its event is just behind a look at it, or the start: no time between the two can be told apart."""
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(1, S=torch.eye(1)))
    z0 = torch.ones(1, requires_grad=True)
    found = flow.until(z0, lambda z, t: t - when + 0 * z[0], 1.0, log_det=True)
    assert (found.t.shape, found.z.shape, found.happened.shape) == ((), (1,), ())
    torch.testing.assert_close(found.t.item(), when, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found.z[0], z0)[0].item(), found.z.item(), rtol=1e-3, atol=1e-3)
    assert flow.until(torch.ones(0, 1), reaches(1.0), 1.0).z.shape == (0, 1)


def test_float32_and_fixed_steps() -> None:
    flow = ff.LatentFlow(ff.fields.from_module(lambda z, t: z, dim=1), ff.Solver("rk4", step_size=0.05))
    found = flow.until(torch.tensor([[0.5]]), reaches(1.0), 2.0)
    torch.testing.assert_close(found.t.item(), 0.6931472, rtol=1e-4, atol=1e-4)
    assert found.t.dtype == torch.float32


def test_what_only_touches_0_has_no_gradient() -> None:
    z0 = torch.ones(1, 1, dtype=F64, requires_grad=True)
    touches = lambda z, t: (t - 0.5) * (t - 0.5).abs() + 0 * z[..., 0]  # noqa: E731 - its slope at 0.5 is 0
    with torch.no_grad():
        assert growth().until(z0, touches, 1.0).happened.all()
    with pytest.raises(ValueError, match="only touches 0"):
        growth().until(z0, touches, 1.0)


@pytest.mark.parametrize(
    ("event", "how", "error", "match"),
    [
        (3.0, {}, TypeError, "called as g"),
        (lambda z, t: z, {}, ValueError, r"shape \[2\]; got torch.float64 \[2, 1\]"),
        (lambda z, t: z[..., 0] > 1, {}, ValueError, "torch.bool"),
        (lambda z, t: 1.0, {}, TypeError, "must return a tensor"),
        (lambda z, t: z[..., 0] / 0 * 0, {}, ValueError, "NaN"),
        (reaches(1.0), {"t_max": 0.0}, ValueError, "must differ from t0"),
        (reaches(1.0), {"checks": 0}, ValueError, "checks must be at least 1"),
        (reaches(1.0), {"t_max": torch.inf}, ValueError, "t_max must be a finite time"),
    ],
)
def test_bad_events(event: Any, how: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        growth().until(torch.ones(2, 1, dtype=F64), event, **{"t_max": 1.0, **how})
