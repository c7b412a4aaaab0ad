"""The error estimate of one step: by hand, against torchdiffeq's step, and what it is zero for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import product
from small_fields import small_fields
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import _runge_kutta_step

import flowfactor as ff

R, P, F = ff.regularizers, ff.potentials, ff.fields
D, K = 3, 2
DOUBLE = {"dtype": torch.float64}


FIELDS = small_fields(D, (1.0, -2.0), 3.0)


def by_torchdiffeq(method: str, flow: Any, z: Tensor, t: Any, control: Any, h: Any, **context: Any) -> Tensor:
    """The squared norm of the error estimate of torchdiffeq's step of size h, sample by sample."""
    table, found = SOLVERS[method].tableau, []
    for n in range(len(z)):

        def rate(t: Tensor, z: Tensor, perturb: object = None, n: int = n) -> Tensor:
            each = {name: c[n] for name, c in context.items()}
            return flow.velocity(z, t, control if isinstance(control, int) else control[n], **each)

        at, size = torch.as_tensor(t, **DOUBLE).expand(len(z))[n], torch.as_tensor(h, **DOUBLE).expand(len(z))[n]
        found.append(_runge_kutta_step(rate, z[n], rate(at, z[n]), at, size, at + size, table)[2].square().sum())
    return torch.stack(found)


def test_a_linear_field_by_hand() -> None:
    """bosh3's stages of v = A z, written out, and what is left of them: e = -(h A)^3 (1 + h A) z / 48."""
    A, z, h = torch.randn(D, D, **DOUBLE), torch.randn(5, D, **DOUBLE), 0.7
    field = F.from_module(lambda z, t: z @ A.mT, D)
    first = z @ A.mT
    second = (z + h / 2 * first) @ A.mT
    third = (z + h * 3 / 4 * second) @ A.mT
    end = z + h * (2 / 9 * first + 1 / 3 * second + 4 / 9 * third)
    other = z + h * (7 / 24 * first + 1 / 4 * second + 1 / 3 * third + 1 / 8 * (end @ A.mT))
    found = R.SolverError(step=h)(field, z)
    torch.testing.assert_close(found, (end - other).square().sum(-1))
    M = h * A.mT
    torch.testing.assert_close(found, (z @ M @ M @ M @ (torch.eye(D, **DOUBLE) + M) / 48).square().sum(-1))


@product(name=list(FIELDS), context=[0, 2], method=["bosh3", "dopri5", "dopri8"])
def test_values_are_those_of_the_steps_of_torchdiffeq(name: str, context: int, method: str) -> None:
    flow = ff.LatentFlow(FIELDS[name](context)).double()
    z, t, h = torch.randn(4, D, **DOUBLE), torch.tensor([0.1, 0.7, -0.4, 3.0], **DOUBLE), torch.rand(4, **DOUBLE) + 0.5
    c = {"context": torch.randn(4, context, **DOUBLE)} if context else {}
    for control in (1, torch.tensor([0, 1, 1, 0]), torch.randn(4, K, **DOUBLE)):
        found = R.SolverError(method)(flow, z, t, control, step=h, **c)
        known = by_torchdiffeq(method, flow, z, t, control, h, **c)
        assert float(known.detach().min()) > 1e-20  # and not both nothing
        torch.testing.assert_close(found, known, rtol=1e-6, atol=1e-24)
        torch.testing.assert_close(  # one time and one step for all
            R.SolverError(method, -0.8)(flow.field, z, 0.3, control, **c),
            by_torchdiffeq(method, flow, z, 0.3, control, -0.8, **c), rtol=1e-6, atol=1e-24,
        )  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    field, estimate = FIELDS[name](2).double(), R.SolverError()
    z, t, c = torch.randn(2, D, **DOUBLE), torch.tensor([0.2, 1.0], **DOUBLE), torch.randn(2, 2, **DOUBLE)
    inputs = [z, t, c, torch.randn(2, K, **DOUBLE), torch.tensor([1.0, -0.7], **DOUBLE)]
    own = dict(field.named_parameters())

    def found(z: Tensor, t: Tensor, c: Tensor, weights: Tensor, step: Tensor, *parameters: Tensor) -> Tensor:
        swapped = dict(zip(own, parameters, strict=True))
        one = ff.fields.GradientField(field) if isinstance(field, P.Potential) else field
        prefix = "potential." if isinstance(field, P.Potential) else ""
        named = {f"{prefix}{name}": value for name, value in swapped.items()}
        with torch.nn.utils.stateless._reparametrize_module(one, named):
            return estimate(one, z, t, weights, step=step, context=c)

    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *own.values())]
    assert torch.autograd.gradcheck(found, leaves, fast_mode=True)
    pulled = torch.autograd.grad(found(*leaves).sum(), leaves)
    assert all(bool(grad.any()) for grad in pulled[: len(inputs)])


def test_it_is_zero_where_the_method_is_exact() -> None:
    z = torch.randn(4, D, **DOUBLE)
    drift, ramp = torch.randn(D, **DOUBLE), torch.randn(D, **DOUBLE)
    constant = F.from_module(lambda z, t: drift.expand_as(z), D)
    linear = F.from_module(lambda z, t: drift + t.unsqueeze(-1) * ramp, D)
    cubic = F.from_module(lambda z, t: drift + t.unsqueeze(-1) ** 3 * ramp, D)
    for field, method in ((constant, "bosh3"), (linear, "bosh3"), (cubic, "dopri5")):
        assert float(R.SolverError(method)(field, z, 0.4).max()) < 1e-28
    assert float(R.SolverError()(cubic, z, 0.4).min()) > 1e-4
    # Samples at speeds of their own, along straight lines: a velocity that each keeps, though the field depends on z.
    fan = F.from_module(lambda z, t: z / (1 + t.unsqueeze(-1)), D)
    assert float(R.SolverError()(fan, z, 0.4).max()) < 1e-28


@pytest.mark.parametrize(("method", "order"), [("bosh3", 3), ("dopri5", 5)])
def test_it_falls_with_the_order_of_the_method(method: str, order: int) -> None:
    field, z = FIELDS["module"](0).double(), torch.randn(20, D, **DOUBLE)
    whole, half = (R.SolverError(method, step)(field, z).sum().detach() for step in (2e-2, 1e-2))
    assert float(whole / half) == pytest.approx(4**order, rel=0.1)


def test_a_sample_has_what_it_has_alone_and_steps_of_nothing_err_by_nothing() -> None:
    field, z, t = FIELDS["free"](2), torch.randn(2, 4, D), torch.rand(2, 4)
    k, c, h = torch.tensor([0, 1, 1, 0]), torch.randn(4, 2), torch.tensor([1.0, 0.0, -2.0, 1.0])
    found = R.SolverError()(field, z, t, k, step=h.expand(2, 4), context=c)
    assert found.shape == (2, 4) and not found[:, 1].any()
    for i, n in [(0, 0), (1, 2), (1, 3)]:
        alone = R.SolverError(step=float(h[n]))(field, z[i, n], t[i, n], int(k[n]), context=c[n])
        torch.testing.assert_close(found[i, n], alone, rtol=1e-4, atol=1e-9)
    assert R.SolverError()(field, z[:, :0], context=c[:0]).shape == (2, 0)
    with torch.no_grad():
        assert not R.SolverError()(field, z, t, k, context=c).requires_grad


def test_a_schedule_acts_as_it_does_from_the_state_on() -> None:
    field, z = FIELDS["module"](0), torch.randn(4, D)
    weights = torch.randn(4, K)
    schedule = ff.Schedule([(0.0, torch.tensor([0, 1, 1, 0])), (1.0, 1), (2.5, weights)])
    estimate = R.SolverError()
    cases = [(0.5, 1.0, schedule.controls[0]), (1.0, 1.0, 1), (1.0, -1.0, schedule.controls[0]), (2.5, -1.0, 1)]
    for t, h, acting in [*cases, (2.5, 1.0, weights), (9.0, 1.0, weights)]:
        found, known = (estimate(field, z, t, one, step=h) for one in (schedule, acting))
        torch.testing.assert_close(found, known, rtol=1e-5, atol=0)
    t, h = torch.tensor([0.5, 1.0, 1.0, 2.5]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    mixed = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), weights[3]])
    torch.testing.assert_close(estimate(field, z, t, schedule, step=h), estimate(field, z, t, mixed, step=h))
    flushed = torch.set_flush_denormal(True)  # as trainings have it
    try:
        with pytest.raises(ValueError, match=r"starts at t=0 and says nothing about"):
            estimate(field, z, 0.0, schedule, step=-1.0)
    finally:
        if flushed:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (lambda: R.SolverError("euler"), ValueError, r"one of .*bosh3.* got 'euler': methods of fixed steps have none"),
        (lambda: R.SolverError("adaptive_heun"), ValueError, "other adaptive ones depends on the one before"),
        (lambda: R.SolverError(step=0.0), ValueError, "finite number of frames other than 0, got 0"),
        (lambda: R.SolverError(step=float("nan")), ValueError, "got nan"),
        (lambda: R.SolverError(step="1"), TypeError, "number of frames, got '1'"),  # type: ignore[arg-type]
        (
            lambda: R.SolverError()(torch.nn.Linear(2, 2), torch.zeros(1, 2)),
            TypeError,
            "SolverError takes .* got Linear",
        ),  # type: ignore[arg-type]
        (lambda: R.SolverError()(F.FreeField(D), torch.zeros(1, 2)), ValueError, "must have shape"),
        (lambda: R.SolverError()(F.FreeField(D), torch.zeros(2, D), torch.zeros(3)), ValueError, r"t must be .*\[2\]"),
        (lambda: R.SolverError()(F.FreeField(D), torch.zeros(2, D), step=torch.ones(3)), ValueError, "step must be"),
        (lambda: R.SolverError()(F.FreeField(D, 2), torch.zeros(1, D), 0.0, 2), ValueError, "flow 2 does not exist"),
        (lambda: R.SolverError()(F.FreeField(D, context=2), torch.zeros(1, D)), ValueError, "context"),
    ],
)
def test_what_does_not_fit_is_refused(made: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        made()


def test_modules_that_draw_at_random_are_refused() -> None:
    field = F.from_module(torch.nn.Dropout(0.5), D)
    with pytest.raises(ValueError, match=r"Dropout .* a step of a solver asks it"):
        R.SolverError()(field, torch.zeros(2, D))


class Fast(torch.nn.Module):
    """v = B sin(A z + 3 t)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((D, 8), (8, D)))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (2 * z @ self.inner + 3 * t.unsqueeze(-1)).sin() @ self.outer / 2


def trained(weight: float) -> tuple[list[float], list[float], list[int]]:
    """Estimates, mean squared speeds and evaluations before and after a training that keeps the speed."""
    torch.manual_seed(0)
    field = F.from_module(Fast(), D)
    flow, z0, t = ff.LatentFlow(field, ff.Solver("bosh3", rtol=1e-4, atol=1e-4)), torch.randn(32, D), torch.arange(4.0)
    optimizer, estimate = torch.optim.Adam(field.parameters(), 0.04), R.SolverError()
    errors, speeds, evaluations = [], [], []
    for step in range(21):
        if step % 5 == 0:
            with torch.no_grad():
                path = flow(z0, t)
        z, when = path.z, t.unsqueeze(-1).expand(4, 32)
        speed, error = flow.velocity(z, when).square().sum(-1).mean(), estimate(flow, z, when).mean()
        optimizer.zero_grad()
        (weight * error + (speed - 2).square()).backward()
        optimizer.step()
        if step in (0, 20):
            errors.append(float(error.detach()))
            speeds.append(float(speed.detach()))
            evaluations.append(path.stats.nfe)
    return errors, speeds, evaluations


def test_the_penalty_makes_a_flow_cheap_to_solve() -> None:
    (error, speed, cost), (bare, _, before) = trained(100.0), trained(0.0)
    assert error[-1] < 0.25 * min(error[0], bare[-1])
    assert cost[-1] < 0.75 * min(cost[0], before[-1])
    assert speed[-1] == pytest.approx(2.0, rel=0.15)  # and not by standing still
