"""A flow that is trained by one solver and evaluated by another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

import flowfactor as ff

T = [0.0, 0.5, 1.0]
COARSE, FINE = ff.Solver("euler", step_size=0.5), ff.Solver("dopri5", rtol=1e-8, atol=1e-8)


def flow(**how: Any) -> ff.LatentFlow:
    u = ff.potentials.MLPPotential(3, 2, (8, 8), init_scale=1.0, generator=torch.Generator().manual_seed(0)).double()
    return ff.LatentFlow(u, **{"solver": COARSE, "evaluation_solver": FINE, **how})


def states(count: int = 4) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def base() -> Independent:
    return Independent(Normal(torch.zeros(3).double(), torch.ones(3).double()), 1)


def test_the_mode_says_which_one_acts() -> None:
    one = flow()
    assert one.acting_solver is one.solver is COARSE
    assert one.eval().acting_solver is one.evaluation_solver is FINE
    assert flow(evaluation_solver=None).eval().acting_solver is COARSE
    assert one(states(), T).stats.method == "dopri5"
    assert one.train()(states(), T).stats.method == "euler"


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_solved_by_the_one_that_acts(training: bool) -> None:
    both = flow().train(training)
    alone = flow(solver=COARSE if training else FINE, evaluation_solver=None)
    other = flow(solver=FINE if training else COARSE, evaluation_solver=None)
    z = states()

    def made(one: ff.LatentFlow) -> list[Tensor]:
        path = one(z, T, 1, log_det=True, costs={"action": ff.regularizers.TransportCost()})
        back, q = one.inverse(z, T, 1), one.push(base(), 1.0, 1)
        found = one.until(z, lambda z, t: z.sum(-1) - 100.0, t_max=1.0, control=1)
        return [
            path.z[-1], path.log_det, path.costs["action"], back.z, q.log_prob(z), one.density(base(), 1.0).log_prob(z),
            one.transform(0.0, 1.0)(z), found.z, one.round_trip_error(z, T), one.solver_error(z, T),
        ]  # fmt: skip

    for ours, same, differs in zip(made(both), made(alone), made(other), strict=True):
        torch.testing.assert_close(ours, same, rtol=0, atol=0)
        assert float((ours - differs).detach().abs().max()) > 1e-6


def test_the_error_of_a_solver_is_against_an_accurate_one_in_either_mode() -> None:
    one = flow()
    coarse, fine = one.solver_error(states(), T), one.eval().solver_error(states(), T)
    assert float(coarse.min()) > 1e-3
    assert float(fine.max()) < 1e-6
    torch.testing.assert_close(flow(solver=FINE, evaluation_solver=COARSE).eval().solver_error(states(), T), coarse)


def test_a_kept_solve_does_not_outlive_its_mode() -> None:
    one, x = flow(), states()
    there = one.transform(0.0, 1.0)
    y = there(x)
    one.eval()
    torch.testing.assert_close(there.log_abs_det_jacobian(x, y), one.transform(0.0, 1.0).log_abs_det_jacobian(x, y))
    back = there.inv(y)
    assert float((back - x).detach().abs().max()) > 1e-3  # y came of coarse steps, and the way back is accurate


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
def test_gradients_of_evaluation_are_those_of_its_solver(gradient: Any) -> None:
    fine = ff.Solver("dopri5", rtol=1e-8, atol=1e-8, gradient=gradient)
    one, alone = flow(evaluation_solver=fine).eval(), flow(solver=fine, evaluation_solver=None)
    for each in (one, alone):
        each(states(), T, 1, log_det=True).z[-1].square().sum().backward()
    for a, b in zip(one.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
        assert bool(a.grad is not None and a.grad.isfinite().all())


def test_engines_and_fixed_steps_may_differ_too() -> None:
    one = flow(evaluation_solver=ff.Solver("rk4", step_size=0.25, engine="general"))
    assert one(states(), T).stats.engine == "closed form"
    assert one.eval()(states(), T).stats.engine == "general"
    assert one.train()(states(), T).stats.engine == "closed form"


def test_steps_are_remembered_by_the_training_alone() -> None:
    loose = ff.Solver("bosh3", rtol=1e-4, atol=1e-4, remember_steps=True)
    one = flow(solver=loose)
    assert one.step_memory is not None
    one.eval()(states(), T)
    assert not one.step_memory.sizes.any()
    one.train()(states(), T)
    assert one.step_memory.sizes[0] > 0
    late = flow(evaluation_solver=loose)
    late.eval()(states(), T)
    late.train()(states(), T)
    assert late.step_memory is None and not any("memory" in name for name in late.state_dict())


def test_other_things_are_no_solvers() -> None:
    with pytest.raises(TypeError, match=r"evaluation_solver must be a flowfactor\.Solver, got 'dopri5'"):
        flow(evaluation_solver="dopri5")
