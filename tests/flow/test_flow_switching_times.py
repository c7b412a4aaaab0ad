"""Gradients in the switching times of a schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flowfactor as ff

MATRICES = torch.tensor(
    [[[0.3, 1.0, 0.0], [-0.7, 0.2, 0.4], [0.1, 0.0, -0.5]], [[0.0, 0.2, 0.9], [0.5, -0.4, 0.0], [0.0, 1.1, 0.3]]]
).double()
STATES = torch.tensor([[0.4, -1.0, 0.7], [1.2, 0.3, -0.2]]).double()
SPANS = [[0.0, 1.0], [1.0, 0.0], [0.0, 0.3, 1.0], [0.0, 0.5, 1.0], [1.0, 0.5, 0.2, 0.0], [0.0, 0.5, 0.55, 0.7, 1.0]]


def linear(gradient: str = "direct") -> ff.LatentFlow:
    field = ff.fields.from_module([lambda z, t, m=m: z @ m.T for m in MATRICES], 3)
    return ff.LatentFlow(field, ff.Solver(rtol=1e-10, atol=1e-10, gradient=gradient))


def moment(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_the_closed_form_of_two_linear_flows(gradient: str) -> None:
    """Beyond the switch at s, dz/ds = Phi (v_a - v_b); at an output on the switch itself it is 0."""
    s = moment(0.5)
    path = linear(gradient)(STATES, [0.0, 0.5, 1.0], ff.Schedule([(0.0, 0), (s, 1)]), log_det=True)
    middle = STATES @ torch.linalg.matrix_exp(0.5 * MATRICES[0]).T
    jump = middle @ (MATRICES[0] - MATRICES[1]).T @ torch.linalg.matrix_exp(0.5 * MATRICES[1]).T
    for i, j in ((0, 0), (1, 2)):
        (found,) = torch.autograd.grad(path.z[-1, i, j], s, retain_graph=True)
        torch.testing.assert_close(found, jump[i, j], rtol=1e-6, atol=1e-8)
    (found,) = torch.autograd.grad(path.z[1].sum(), s, retain_graph=True)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(path.log_det[-1, 0], s)
    torch.testing.assert_close(found, MATRICES[0].trace() - MATRICES[1].trace(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("t", SPANS, ids=str)
def test_finite_differences(t: list[float], back: bool, gradient: str) -> None:
    torch.manual_seed(1)
    u = ff.potentials.MLPPotential(3, 2, (5, 4), rank=2, time_features=4, init_scale=1.5).double()
    flow = ff.LatentFlow(u, ff.Solver(rtol=1e-10, atol=1e-10, gradient=gradient))

    def total(first: Tensor, second: Tensor) -> Tensor:
        schedule = ff.Schedule([(-1.0, 0), (first, 1), (second, torch.tensor([0, 1]))])
        costs = {"kinetic": lambda e: e.velocity.square().sum(-1), "action": ff.regularizers.TransportCost()}
        path = (flow.inverse if back else flow)(STATES, t, schedule, log_det=True, costs=costs)
        return path.z[-1].sin().sum() + path.log_det[-1].sum() + sum(cost[-1].sum() for cost in path.costs.values())

    now = moment(0.5), moment(0.7)
    found = torch.autograd.grad(total(*now), now)
    with torch.no_grad():
        for i, gradient_there in enumerate(found):
            up, down = ([x + (sign * 1e-5 if i == j else 0) for j, x in enumerate(now)] for sign in (1, -1))
            torch.testing.assert_close(gradient_there, (total(*up) - total(*down)) / 2e-5, rtol=1e-5, atol=1e-6)


def test_an_optimizer_may_move_a_switch_but_not_past_the_next() -> None:
    s = moment(0.5)
    schedule = ff.Schedule([(0.0, 0), (s, 1), (0.8, 0)])
    with torch.no_grad():
        s.fill_(0.6)
    assert schedule.starts == (0.0, 0.6, 0.8) and schedule.at(0.55) == 0
    with torch.no_grad():
        s.fill_(0.9)
    with pytest.raises(ValueError, match="increase strictly"):
        linear()(STATES, [0.0, 1.0], schedule)


def test_a_switch_that_is_not_passed_has_a_gradient_of_zero() -> None:
    s = moment(3.0)
    path = linear()(STATES, [0.0, 1.0], ff.Schedule([(0.0, 0), (s, 1)]))
    assert float(torch.autograd.grad(path.z.sum(), s)[0]) == 0


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match='gradient="checkpoint" gives the switching times'):
        linear("checkpoint")(STATES, [0.0, 1.0], ff.Schedule([(0.0, 0), (moment(0.5), 1)]))
    with pytest.raises(ValueError, match="must be one real number"):
        ff.Schedule([(0.0, 0), (torch.tensor([0.5, 0.6], requires_grad=True), 1)])
    with pytest.raises(TypeError, match=r"piece 1 .* number of frames, got 'soon'"):
        ff.Schedule([(0.0, 0), ("soon", 1)])


def test_diffusion_and_travelled_frames_have_the_gradient_too() -> None:
    s = moment(0.5)
    schedule = ff.Schedule([(0.0, 0), (s, 1)])
    prior = ff.priors.Diffusion(ff.priors.StandardNormal(2), 2, init=(0.5, 2.0)).double()
    rates = prior.diffusivity.detach()
    (found,) = torch.autograd.grad(prior.added_variance(torch.tensor(1.0).double(), schedule), s)
    torch.testing.assert_close(found, 2 * (rates[0] - rates[1]))
    frames = ff.control.travelled(schedule, torch.tensor([2.0, 0.2]).double(), 1, 2)
    torch.testing.assert_close(frames[-1, 0], torch.tensor([-0.3, -1.5]).double())
    assert float(torch.autograd.grad(frames[-1, 0, 1], s)[0]) == 1


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_what_a_field_captures_beside_its_log_det(gradient: str) -> None:
    """The divergence of one's own field comes from torch.func, whose results are not captured tensors."""
    scale = moment(0.7)
    field = ff.fields.from_module(lambda z, t: torch.tanh(z * scale) * scale.exp(), 3)

    def found(mode: str) -> Tensor:
        path = ff.LatentFlow(field, ff.Solver(rtol=1e-9, atol=1e-9, gradient=mode))(STATES, [0.0, 1.0], log_det=True)
        return torch.autograd.grad(path.z.sin().sum() + path.log_det.sum(), scale)[0]

    torch.testing.assert_close(found(gradient), found("direct"), rtol=1e-6, atol=1e-6)
