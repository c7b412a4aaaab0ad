"""Gradients of times of each sample where some or all of the samples rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff

RATES = (1.0, -2.0)
TIMES = {
    "one rests": [[0.0, 0.2], [0.5, 0.6], [0.5, 1.0], [1.0, 1.2]],
    "all rest": [[0.0, 0.2], [0.5, 0.6], [0.5, 0.6], [1.0, 1.2]],
    "all rest throughout": [[0.5, 0.6], [0.5, 0.6], [0.5, 0.6], [0.5, 0.6]],
    "one comes back": [[0.0, 1.2], [0.3, 0.7], [0.5, 0.7], [1.0, 0.1]],
}


def growth(method: str, gradient: Any) -> ff.LatentFlow:
    u = ff.potentials.QuadraticPotential(1, 2, S=torch.tensor(RATES).reshape(2, 1, 1)).double()
    how: Any = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"step_size": 0.02}
    return ff.LatentFlow(u, ff.Solver(method, gradient=gradient, **how))


def exponents(t: Tensor, schedule: bool) -> Tensor:
    """ln z_t: the integral of the rate, which changes at 0.75 under the schedule."""
    if not schedule:
        return t - t[0]
    both = torch.where(t < 0.75, RATES[0] * t, RATES[0] * 0.75 + RATES[1] * (t - 0.75))
    return both - both[0]


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("times", TIMES)
def test_times_that_rest_have_gradients(times: str, schedule: bool, method: str, gradient: Any) -> None:
    t = torch.tensor(TIMES[times]).double().requires_grad_()
    weights = torch.linspace(1, 2, t.numel()).double().reshape(t.shape)
    control: Any = ff.Schedule([(-torch.inf, 0), (0.75, 1)]) if schedule else 0
    path = growth(method, gradient)(torch.ones(2, 1).double(), t, control, log_det=True)
    assert path.log_det is not None
    (found,) = torch.autograd.grad((weights * (path.z[..., 0] + path.log_det)).sum(), t)
    s = t.detach().requires_grad_()
    log = exponents(s, schedule)
    torch.testing.assert_close(path.log_det, log, rtol=1e-6, atol=1e-6)
    (expected,) = torch.autograd.grad((weights * (log.exp() + log)).sum(), s)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("back", [False, True])
def test_a_learned_switch_at_an_output_of_one_sample(back: bool, gradient: Any) -> None:
    s = torch.tensor(0.75).double().requires_grad_()
    times = torch.tensor([[0.0, 0.2], [0.75, 0.6], [1.0, 1.2]]).double()
    path = growth("dopri5", gradient)(
        torch.ones(2, 1).double(), times.flip(0) if back else times, ff.Schedule([(-torch.inf, 0), (s, 1)])
    )
    # ln z_t is (t - t_0) of the rates, so that beyond the switch it moves by their difference; at the switch it rests.
    moves = torch.tensor([[0.0, 0.0], [0.0, float(back)], [1.0, 1.0]]) * (RATES[0] - RATES[1]) * (-1 if back else 1)
    for i in range(3):
        for j in range(2):
            (found,) = torch.autograd.grad(path.z[i, j, 0].log(), s, retain_graph=True, allow_unused=True)
            torch.testing.assert_close(float(found), float(moves[i, j]), rtol=1e-5, atol=1e-5)
