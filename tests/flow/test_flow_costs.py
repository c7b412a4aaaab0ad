"""Running costs, batch independence and what a solve reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flowfactor as ff

D = 3


def field() -> ff.potentials.Potential:
    return ff.potentials.MLPPotential(D, 2, (6, 6), rank=2, init_scale=1.5).double()


def kinetic(e: ff.fields.Evaluation) -> Tensor:
    return e.velocity.square().sum(-1)


def where(e: ff.fields.Evaluation) -> Tensor:
    return torch.cos(e.z).sum(-1) * (1 + e.t)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("backward", [False, True])
@torch.no_grad()
def test_costs_are_integrals_along_the_path(backward: bool, gradient: ff.solver.Gradient) -> None:
    u = field()
    flow = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient))
    z0, k = torch.randn(4, D).double(), torch.tensor([1, 0, 0, 1])
    t = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
    t = t.flip(0) if backward else t
    fine = flow(z0, t, k)
    coarse = flow(z0, t[[0, 80, 200]], k, costs={"kinetic": kinetic, "where": where})
    rates = {
        "kinetic": torch.stack(
            [u.derivatives(z, s, k).gradient.square().sum(-1) for z, s in zip(fine.z, t, strict=True)]
        ),
        "where": torch.stack([torch.cos(z).sum(-1) * (1 + s) for z, s in zip(fine.z, t, strict=True)]),
    }
    for name, rate in rates.items():
        for i, end in ((1, 80), (2, 200)):
            f = rate[: end + 1]
            simpson = (f[0] + f[-1] + 4 * f[1:-1:2].sum(0) + 2 * f[2:-1:2].sum(0)) / 3 / 200  # elapsed time: positive
            torch.testing.assert_close(coarse.costs[name][i], simpson, rtol=0, atol=1e-6)
        assert torch.equal(coarse.costs[name][0], torch.zeros(4).double())
    assert bool((coarse.costs["kinetic"][-1] > 0).all())


def test_costs_do_not_steer_the_solve() -> None:
    flow = ff.LatentFlow(field())
    z0 = torch.randn(4, D).double()
    plain = flow(z0, [0.0, 1.0, 2.0], 1)

    def wild(e: ff.fields.Evaluation) -> Tensor:
        return 1e6 * torch.sin(300 * e.t) * e.z.sum(-1)

    costly = flow(z0, [0.0, 1.0, 2.0], 1, costs={"wild": wild, "kinetic": kinetic})
    assert costly.stats == plain.stats
    torch.testing.assert_close(costly.z, plain.z)


def test_costs_get_what_they_need() -> None:
    def everything(e: ff.fields.Evaluation) -> Tensor:
        assert e.value is not None and e.time is not None and e.gradient is not None and e.probe is not None
        assert e.probe.abs().eq(1).all() and e.probe.shape == e.z.shape
        return e.time + 0.5 * e.gradient.square().sum(-1) + e.value

    everything.needs = ("potential", "value", "time", "probe")
    z0 = torch.randn(2, 3, D).double()
    path = ff.LatentFlow(field())(z0, [0.0, 1.0], costs={"all": everything})
    assert path.costs["all"].shape == (2, 2, 3)
    with pytest.raises(TypeError, match="'all' needs a potential, and FreeField has none"):
        ff.LatentFlow(ff.fields.FreeField(D).double())(z0, [0.0, 1.0], costs={"all": everything})


def test_bad_costs_are_named() -> None:
    flow = ff.LatentFlow(field())
    z0 = torch.randn(4, D).double()
    for cost, got in (
        (lambda e: e.velocity, r"\[4, 3\]"),
        (lambda e: e.velocity.sum(), r"\[\]"),
        (lambda e: 1.0, "float"),
    ):
        with pytest.raises(ValueError, match=f"cost 'mine' must return one number per sample.*{got}"):
            flow(z0, [0.0, 1.0], costs={"mine": cost})
    with pytest.raises(TypeError, match="callable"):
        flow(z0, [0.0, 1.0], costs={"mine": 3.0})


def test_costs_over_a_schedule_add_up() -> None:
    flow = ff.LatentFlow(field(), ff.Solver(rtol=1e-9, atol=1e-9))
    z0 = torch.randn(4, D).double()
    whole = flow(z0, [0.0, 1.0], ff.Schedule([(0.0, 0), (0.4, 1)]), costs={"kinetic": kinetic})
    first = flow(z0, [0.0, 0.4], 0, costs={"kinetic": kinetic})
    second = flow(first.z[-1], [0.4, 1.0], 1, costs={"kinetic": kinetic})
    together = first.costs["kinetic"][-1] + second.costs["kinetic"][-1]
    torch.testing.assert_close(whole.costs["kinetic"][-1], together, rtol=0, atol=1e-7)


def _mixed(n: int) -> Tensor:
    """One quick sample among many that rest."""
    z0 = torch.zeros(n, 2, dtype=torch.float64)
    z0[0] = torch.tensor([1.0, 0.0])
    return z0


def _swing() -> ff.fields.Field:
    def v(z: Tensor, t: Tensor) -> Tensor:
        return 6.0 * torch.stack([-z[..., 1], z[..., 0]], -1) * (1 + z.square().sum(-1, keepdim=True))

    return ff.fields.from_module(v, 2)


@torch.no_grad()
def test_a_sample_is_as_accurate_among_many_as_alone() -> None:
    tight = ff.LatentFlow(_swing(), ff.Solver("dopri8", rtol=1e-12, atol=1e-12))(_mixed(1), [0.0, 1.0]).z[-1, 0]
    sample = ff.LatentFlow(_swing(), ff.Solver(rtol=1e-5, atol=1e-5))
    alone, among = sample(_mixed(1), [0.0, 1.0]), sample(_mixed(4096), [0.0, 1.0])
    assert (alone.z[-1, 0] - tight).norm() < 2e-3
    assert (among.z[-1, 0] - tight).norm() < 2e-3
    assert among.stats.accepted == alone.stats.accepted  # the resting samples cost no accuracy
    batch = ff.LatentFlow(_swing(), ff.Solver(rtol=1e-5, atol=1e-5, norm="batch"))
    lax = batch(_mixed(4096), [0.0, 1.0])
    assert lax.stats.accepted < among.stats.accepted
    assert (lax.z[-1, 0] - tight).norm() > 5 * (among.z[-1, 0] - tight).norm()


@torch.no_grad()
def test_stats_count() -> None:
    calls = [0]

    def v(z: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return -z

    path = ff.LatentFlow(ff.fields.from_module(v, 2), ff.Solver("rk4", step_size=0.1))(
        torch.ones(1, 2), [0.0, 0.5, 1.0]
    )
    assert path.stats == ff.SolveStats(nfe=40, accepted=10, method="rk4") and calls[0] == 40
    calls[0] = 0
    path = ff.LatentFlow(ff.fields.from_module(v, 2))(torch.ones(1, 2), [0.0, 1.0])
    assert path.stats.nfe == calls[0] and path.stats.accepted > 0


def test_fixed_steps_land_on_outputs() -> None:
    solver = ff.Solver("rk4", step_size=0.1)
    grid = solver.grid(torch.tensor([0.0, 1.0, 1.25, 1.27], dtype=torch.float64))
    assert len(grid) == 1 + 10 + 3 + 1
    assert {0.0, 1.0, 1.25, 1.27} <= set(grid.tolist()) and grid.diff().max() < 0.1 + 1e-9
    assert len(solver.grid(torch.tensor([0.0, 1.0]))) == 11  # whatever the rounding of 0.1


@pytest.mark.parametrize(
    ("needs", "error", "match"),
    [
        (("value", "tiem"), ValueError, r"cost 'own' needs 'tiem', which no solve provides: did you mean time\?"),
        (
            ("gradient",),
            ValueError,
            "'gradient'.* choose among potential, value, time, divergence, acceleration, probe",
        ),
        ("value", TypeError, r"needs must be a tuple of names such as \('value', 'time'\), got 'value'"),
        ((1,), TypeError, r"must be a tuple of names"),
        (True, TypeError, r"must be a tuple of names.*got True"),
    ],
)
def test_a_need_that_nobody_meets_is_refused_before_the_solve(needs: object, error: type, match: str) -> None:
    def own(e: ff.fields.Evaluation) -> Tensor:
        raise AssertionError("evaluated")

    own.needs = needs  # pyright: ignore[reportFunctionMemberAccess]
    z0 = torch.randn(2, D).double()
    with pytest.raises(error, match=match):
        ff.LatentFlow(field())(z0, [0.0, 1.0], 0, costs={"own": own})
    with pytest.raises(error, match=match):  # nothing moves here, and the mistake is the same
        ff.LatentFlow(field())(z0, [0.0], 0, costs={"own": own})
