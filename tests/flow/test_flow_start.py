"""Paths that begin inside of their times: against plain solves, matrix exponentials, and the path through the same state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import pairwise
from torch import Tensor

import flowfactor as ff
from flowfactor.control import Control

D, K, C, B = 3, 3, 2, 5
F64 = torch.float64
TIMES = (0.0, 0.4, 1.0, 1.7, 2.0)
COSTS = {"action": ff.regularizers.TransportCost(), "bend": ff.regularizers.Acceleration()}


def field(name: str) -> Any:
    how: dict[str, Any] = {"context": C, "generator": torch.Generator().manual_seed(1)}
    u = ff.potentials.MLPPotential(D, K, (9, 7), init_scale=0.5, **how)
    rest = ff.fields.SolenoidalField(D, K, 9, init_scale=0.5, **how)
    return {"gradient": u, "helmholtz": ff.fields.HelmholtzField(u, rest)}[name].to(F64)


def control(name: str) -> Control:
    g = torch.Generator().manual_seed(2)
    index, weights = torch.tensor([0, 1, 2, 0, 1]), torch.rand(B, K, generator=g, dtype=F64)
    pieces = [(-9.0, 0), (0.7, index), (1.0, 2), (1.3, 1)]
    return {"index": index, "weights": weights, "schedule": ff.Schedule(pieces)}[name]


SOLVERS = {
    "dopri5": ff.Solver("dopri5", rtol=1e-4, atol=1e-4),
    "bosh3": ff.Solver("bosh3", rtol=1e-2, atol=1e-2),
    "rk4": ff.Solver("rk4"),
    "general": ff.Solver("dopri5", rtol=1e-2, atol=1e-2, engine="general"),
}
AXES: dict[str, tuple[Any, ...]] = {
    "name": ("gradient", "helmholtz"),
    "acting": ("index", "weights", "schedule"),
    "solver": tuple(SOLVERS),
    "gradient": ("direct", "adjoint", "checkpoint"),
    "down": (False, True),
    "start": (0, 2, -1, -2),
}


def states(count: int = B) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(count, D, generator=g, dtype=F64), torch.randn(count, C, generator=g, dtype=F64)


def weighed(t: Tensor, z: Tensor, log_det: Tensor | None, costs: dict[str, Tensor]) -> Tensor:
    """A number to which every output adds in a way of its own."""
    assert log_det is not None
    w = (1 + t.detach()).reshape(len(t), -1).expand(log_det.shape)
    rest = log_det + sum(costs.values(), torch.zeros_like(log_det))
    return (z.sin() * w.unsqueeze(-1)).sum() + (w * rest).sum()


@pytest.mark.parametrize("case", pairwise(*map(len, AXES.values())), ids=lambda case: "-".join(map(str, case)))
def test_as_two_plain_solves(case: tuple[int, ...]) -> None:
    """The same numbers, gradients and evaluations as of the way ahead and the way back, solved one by one."""
    name, acting, solver, gradient, down, start = (v[i] for v, i in zip(AXES.values(), case, strict=True))
    flow = ff.LatentFlow(field(name), replace(SOLVERS[solver], gradient=gradient))
    t = torch.tensor(TIMES[::-1] if down else TIMES, dtype=F64)
    k, s = control(acting), start % len(t)
    (z, c), more = states(), {"log_det": True, "costs": COSTS}
    leaves = [z.requires_grad_(), c.requires_grad_(), *flow.parameters()]
    path = flow(z, t, k, start=start, context=c, **more)
    assert torch.equal(path.z[s], z)
    assert path.start == s
    found = torch.autograd.grad(weighed(t, path.z, path.log_det, path.costs), leaves)

    on, back = flow(z, t[s:], k, context=c, **more), flow(z, t[: s + 1].flip(0), k, context=c, **more)
    assert path.stats.nfe == on.stats.nfe + back.stats.nfe
    assert on.log_det is not None
    assert back.log_det is not None
    z_all = torch.cat([back.z.flip(0)[:-1], on.z])
    log_det = torch.cat([back.log_det.flip(0)[:-1], on.log_det])
    costs = {}
    for cost in COSTS:
        whole = torch.cat(
            [back.costs[cost].flip(0)[:-1] * -1, on.costs[cost]]
        )  # from the start on, by the sign of time
        costs[cost] = whole - whole[0]
    assert torch.equal(path.z, z_all)
    torch.testing.assert_close(path.log_det, log_det)
    torch.testing.assert_close(path.costs, costs)
    wanted = torch.autograd.grad(weighed(t, z_all, log_det, costs), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("start", [1, -1, 1.3, torch.tensor([0, 4, 2, -2, 1])], ids=["index", "last", "time", "each"])
def test_the_path_through_the_same_state(start: Any, down: bool) -> None:
    """From wherever on a path it begins, a solve finds that path; costs from its first time on, densities from the start."""
    flow = ff.LatentFlow(field("helmholtz"), ff.Solver("dopri5", rtol=1e-9, atol=1e-9))
    (z, c), k = states(), control("schedule")
    t = torch.tensor(TIMES[::-1] if down else TIMES, dtype=F64)
    path = flow(z, t, k, context=c, log_det=True, costs=COSTS)
    assert path.log_det is not None
    if isinstance(start, float):
        way = flow(z, [float(t[0]), start], k, context=c, log_det=True)
        assert way.log_det is not None
        at, before = way.z[-1], way.log_det[-1]
    else:
        i = torch.as_tensor(start) % len(t)
        at, before = path.z[i, torch.arange(B)], path.log_det[i, torch.arange(B)]
    found = flow(at, t, k, start=start, context=c, log_det=True, costs=COSTS)
    assert found.t.tolist() == t.tolist()
    assert (found.start is None) == isinstance(start, float)
    torch.testing.assert_close(found.z, path.z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_det, path.log_det - before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.costs, path.costs, rtol=1e-6, atol=1e-6)
    for cost in found.costs.values():
        assert torch.equal(cost[0], torch.zeros_like(cost[0]))
        assert bool((cost.diff(dim=0) > 0).all())


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("start", [2, 1.2, torch.tensor([3, 0, 2, 1, 4])], ids=["index", "time", "each"])
def test_of_a_linear_flow(start: Any, gradient: Any) -> None:
    """z_t = exp(S (t - s)) z_s, log-determinant tr S (t - s); gradients by autograd through the exponential."""
    g = torch.Generator().manual_seed(0)
    u = ff.potentials.QuadraticPotential(D, S=torch.randn(D, D, generator=g)).to(F64)
    flow = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-10, atol=1e-10, gradient=gradient))
    z, _ = states()
    t = torch.tensor(TIMES, dtype=F64)
    leaves = [z.requires_grad_(), *(p for p in u.parameters() if p.requires_grad)]
    path = flow(z, t, start=start, log_det=True)
    S = torch.func.hessian(u)(torch.zeros(D, dtype=F64), 0.0)
    b = torch.func.grad(u)(torch.zeros(D, dtype=F64), 0.0)
    each = [TIMES[int(i)] for i in torch.as_tensor(start).expand(B)] if not isinstance(start, float) else start
    since = (t.unsqueeze(1) - torch.tensor(each, dtype=F64)).expand(len(t), B)
    affine = torch.cat([torch.cat([S, b.unsqueeze(1)], 1), torch.zeros(1, D + 1, dtype=F64)])
    power = torch.matrix_exp(since[..., None, None] * affine)
    exact = (power @ torch.cat([z, torch.ones(B, 1, dtype=F64)], 1).unsqueeze(-1)).squeeze(-1)[..., :D]
    torch.testing.assert_close(path.z, exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(path.log_det, since * torch.trace(S), rtol=1e-6, atol=1e-7)
    found = torch.autograd.grad(weighed(t, path.z, path.log_det, {}), leaves, allow_unused=True)
    wanted = torch.autograd.grad(weighed(t, exact, since * torch.trace(S), {}), leaves, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("acting", ["index", "weights", "schedule"])
@pytest.mark.parametrize("own", [False, True])
def test_each_sample_from_a_start_of_its_own(acting: str, own: bool) -> None:
    """As the samples one by one; times may be their own as well, and may rest."""
    flow = ff.LatentFlow(field("helmholtz"), ff.Solver("dopri5", rtol=1e-7, atol=1e-7))
    (z, c), k, t = states(), control(acting), torch.tensor(TIMES, dtype=F64)
    if own:
        t = t.unsqueeze(1) * torch.tensor([1, -1, 0.5, 0.7, 0.0], dtype=F64) + torch.linspace(0, 1, B, dtype=F64)
        t[3:, 2] = t[2, 2]
    start = torch.tensor([2, 0, 3, 4, 1])
    path = flow(z, t, k, start=start, context=c, log_det=True, costs=COSTS)
    assert torch.equal(path.z[start, torch.arange(B)], z)
    for i, s in enumerate(start.tolist()):
        pieces = (
            [(m, p[i : i + 1] if isinstance(p, Tensor) else p) for m, p in zip(k.starts, k.controls, strict=True)]
            if isinstance(k, ff.Schedule)
            else []
        )
        of_one: Control = ff.Schedule(pieces) if isinstance(k, ff.Schedule) else k[i : i + 1]  # type: ignore[index]
        when = t[:, i : i + 1] if own else t
        alone = flow(z[i : i + 1], when, of_one, start=s, context=c[i : i + 1], log_det=True, costs=COSTS)
        assert path.log_det is not None
        torch.testing.assert_close(path.z[:, i : i + 1], alone.z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(path.log_det[:, i : i + 1], alone.log_det, rtol=1e-4, atol=1e-5)
        for name in COSTS:
            torch.testing.assert_close(path.costs[name][:, i : i + 1], alone.costs[name], rtol=1e-4, atol=1e-5)


def test_times_of_each_sample_from_one_start() -> None:
    flow = ff.LatentFlow(field("gradient"), ff.Solver("dopri5", rtol=1e-9, atol=1e-9))
    (z, c), grid = states(), torch.tensor(TIMES, dtype=F64)
    t = grid.unsqueeze(1) * torch.tensor([1, -1, 0.5, 0.7, 2.0], dtype=F64)
    path = flow(z, t, start=2, context=c, log_det=True)
    for i in range(B):
        alone = flow(z[i : i + 1], t[:, i], start=2, context=c[i : i + 1], log_det=True)
        torch.testing.assert_close(path.z[:, i : i + 1], alone.z, rtol=1e-4, atol=1e-5)


def test_times_have_their_gradients_both_ways() -> None:
    """The linear flow again: dz_t/dt = S z_t, and the start's time moves all others the other way."""
    u = ff.potentials.QuadraticPotential(1, S=torch.tensor([[0.5]])).to(F64)
    flow = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-10, atol=1e-10))
    t = torch.tensor([0.0, 1.0, 3.0], dtype=F64, requires_grad=True)
    flow(torch.ones(1, 1, dtype=F64), t, start=1).z.sum().backward()
    assert t.grad is not None
    ends = 0.5 * torch.exp(0.5 * (t.detach() - 1))
    torch.testing.assert_close(t.grad, torch.stack([ends[0], -ends[0] - ends[2], ends[2]]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("start", [2, torch.tensor([2, 2, 2, 2, 3])], ids=["index", "each"])
def test_both_ways_have_the_same_probe(start: Any) -> None:
    """With Rademacher probes drawn once a solve: of a linear flow, both slopes of the estimate are one number."""
    S = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.0, 0.2], [0.0, 0.2, -1.0]])
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(D, S=S).to(F64), divergence="hutchinson", probes=2)
    z, _ = states()
    path = flow(z, torch.tensor(TIMES), start=start, log_det=True, generator=torch.Generator().manual_seed(0))
    assert path.log_det is not None
    slopes = path.log_det.diff(dim=0) / torch.tensor(TIMES, dtype=F64).diff().unsqueeze(1)
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-4, atol=1e-5)
    assert not bool(torch.isclose(slopes[0], S.trace().to(F64)).all())  # estimates


def test_one_time_and_no_samples() -> None:
    flow = ff.LatentFlow(field("gradient"))
    z, c = states()
    assert torch.equal(flow(z, [3.0], start=-1, context=c).z[0], z)
    assert torch.equal(flow(z, [3.0], start=3.0, context=c).z[0], z)
    for start in (1, 0.5, torch.zeros(0, dtype=torch.long)):
        path = flow(z[:0], [0.0, 1.0, 2.0], start=start, context=c[:0], log_det=True, costs=COSTS)
        assert path.z.shape == (3, 0, D)


def test_a_time_of_the_list_is_its_index() -> None:
    """Also as single precision writes it: nothing is solved from 0.3 to 0.30000001."""
    flow, z = ff.LatentFlow(ff.potentials.MLPPotential(2), ff.Solver("euler")), torch.ones(1, 2)
    t = torch.linspace(0, 1, 11)
    path = flow(z, t, start=0.3)
    assert path.start == 3
    assert path.stats.nfe == 10
    assert torch.equal(path.z, flow(z, t, start=torch.tensor(3)).z)
    assert torch.equal(path.z, flow(z, t, start=torch.tensor([3])).z)


@pytest.mark.parametrize(
    ("start", "error", "match"),
    [
        (3, ValueError, r"start=3 is no index into 3 times; to begin at a time give a float, start=3\.0"),
        (-4, ValueError, "no index into 3 times"),
        (2.5, ValueError, r"start=2\.5 lies outside of the times from 0 to 2"),
        (-0.5, ValueError, "lies outside"),
        (float("nan"), ValueError, "lies outside"),
        (True, TypeError, "must be an index into t"),
        ("first", TypeError, "got 'first'"),
        (None, TypeError, "got None"),
        (torch.tensor([0, 3]), ValueError, "from 0 to 3, and there are 3 times"),
        (torch.tensor([0, 1, 2]), ValueError, r"one index a sample, shape \[2\], got \[3\]"),
        (torch.tensor([0.0, 1.0]), TypeError, r"tensor of torch\.float32, shape \[2\]"),
        (torch.tensor([True, False]), TypeError, "an index into t"),
        (torch.tensor(0.5, requires_grad=True), TypeError, "gradient is not to be had"),
    ],
)
def test_refused(start: Any, error: type[Exception], match: str) -> None:
    def v(z: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("the field was asked before its input was checked")

    with pytest.raises(error, match=match):
        ff.LatentFlow(ff.fields.from_module(v, 2))(torch.ones(2, 2), [0.0, 1.0, 2.0], start=start)


def test_refused_beside_others() -> None:
    flow, z = ff.LatentFlow(ff.potentials.MLPPotential(2, num_flows=3)), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"start=0.5 is a time, and each sample has times of its own"):
        flow(z, torch.arange(3.0).unsqueeze(1).expand(3, 4), start=0.5)
    with pytest.raises(ValueError, match=r"does not fit a batch that needs \[4\]"):
        flow(z, [0.0, 1.0, 2.0], torch.zeros(2, 4, dtype=torch.long), start=torch.tensor([0, 1, 2, 1]))
