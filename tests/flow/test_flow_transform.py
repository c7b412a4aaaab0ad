"""Flows as transforms of torch.distributions."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution

import flowfactor as ff


class _Counting(ff.fields.Field):
    """A linear flow that counts the batches of solves by their first evaluation at the start time."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls = 0

    def flow_velocity(self, z: torch.Tensor, t: torch.Tensor, k: int) -> torch.Tensor:
        self.calls += 1
        return (0.5 + k) * z


def base(*batch: int) -> Independent:
    return Independent(Normal(torch.zeros(*batch, 2).double(), torch.ones(*batch, 2).double()), 1)


def test_caching_costs_one_solve() -> None:
    field = _Counting()
    flow = ff.LatentFlow(field, ff.Solver("rk4", step_size=0.5))
    one_solve = flow(torch.zeros(1, 2).double(), [0.0, 1.0], log_det=True).stats.nfe
    field.calls = 0
    q1 = flow.push(base(), 1.0)
    z = q1.rsample((5,))
    log_q = q1.log_prob(z)
    assert field.calls == one_solve
    q1.log_prob(z.clone())  # another tensor: solved again
    assert field.calls == 2 * one_solve
    torch.testing.assert_close(log_q, base().log_prob(z / torch.tensor(0.5).exp()) - 1.0, rtol=0, atol=1e-3)


def test_transforms_compose_and_invert() -> None:
    flow = ff.LatentFlow(
        ff.potentials.MLPPotential(2, 2, (8, 8), init_scale=2.0).double(), ff.Solver(rtol=1e-9, atol=1e-9)
    )
    steps = [flow.transform(0.0, 0.4, 1), flow.transform(0.4, 1.0, 1)]
    two, one = TransformedDistribution(base(), steps), TransformedDistribution(base(), [flow.transform(0.0, 1.0, 1)])
    z = torch.randn(6, 2).double()
    torch.testing.assert_close(two.log_prob(z), one.log_prob(z), rtol=0, atol=1e-6)
    T = flow.transform(0.0, 1.0, 1)
    torch.testing.assert_close(T.inv(T(z)), z, rtol=0, atol=1e-6)
    back = flow.transform(1.0, 0.0, 1)
    torch.testing.assert_close(back(T(z)), z, rtol=0, atol=1e-6)
    torch.testing.assert_close(T.inv.log_abs_det_jacobian(T(z), z), -T.log_abs_det_jacobian(z, T(z)), rtol=0, atol=1e-6)
    cached = flow.transform(0.0, 1.0, 1).with_cache()
    assert cached(z) is cached(z) and cached.with_cache() is cached


def test_a_distribution_pushed_nowhere_is_itself() -> None:
    q0 = base()
    assert ff.LatentFlow(_Counting()).push(q0, 0.5, t0=0.5) is q0


@pytest.mark.parametrize("inverse", [False, True])
def test_estimated_densities_come_from_the_generator_given(inverse: bool) -> None:
    flow = ff.LatentFlow(ff.fields.FreeField(2, init_scale=3.0).double(), ff.Solver("rk4"), divergence="hutchinson")
    z = torch.randn(6, 2).double()

    def log_prob(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if not inverse:
            return flow.push(base(), 1.0, generator=generator).log_prob(z)
        back = flow.transform(1.0, 0.0, generator=generator).inv.with_cache()
        return TransformedDistribution(base(), [back]).log_prob(z)

    state = torch.get_rng_state()
    assert torch.equal(log_prob(1), log_prob(1)) and not torch.equal(log_prob(1), log_prob(2))
    assert torch.equal(torch.get_rng_state(), state)
    kept = torch.Generator()
    assert flow.transform(0.0, 1.0, generator=kept).with_cache().generator is kept


@pytest.mark.parametrize("pushed", [False, True])
def test_nothing_that_has_changed_is_taken_from_the_last_solve(pushed: bool) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0).double(), ff.Solver("rk4"))
    x = torch.randn(4, 2).double()
    if pushed:
        density = flow.push(base(), 1.0).log_prob
    else:
        transform = flow.transform(0.0, 1.0)

        def density(x: torch.Tensor) -> torch.Tensor:
            return transform.log_abs_det_jacobian(x, transform(x))

    def fresh() -> torch.Tensor:
        made = flow.transform(0.0, 1.0)
        return flow.push(base(), 1.0).log_prob(x) if pushed else made.log_abs_det_jacobian(x, made(x))

    with torch.no_grad():
        density(x)
    assert density(x).requires_grad
    with torch.no_grad():
        flow.field.potential.w1.add_(0.3)
    torch.testing.assert_close(density(x), fresh())
    x.mul_(0.5)
    torch.testing.assert_close(density(x), fresh())
    for _ in range(2):  # a graph of its own each time
        density(x).sum().backward()


def test_a_pair_that_has_changed_is_solved_again() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0).double(), ff.Solver("rk4"))
    x, transform = torch.randn(4, 2).double(), flow.transform(0.0, 1.0)
    y = transform(x)
    before = flow.transform(0.0, 1.0).log_abs_det_jacobian(x, y)
    with torch.no_grad():
        flow.field.potential.w1.add_(0.3)
    after = transform.log_abs_det_jacobian(x, y)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, flow.transform(0.0, 1.0).log_abs_det_jacobian(x, y))


@pytest.mark.parametrize("change", ["data", "solver", "divergence", "time", "frozen"])
def test_a_pair_is_solved_again_whatever_has_changed(change: str) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0).double(), ff.Solver("rk4"))
    t = torch.tensor(1.0).double().requires_grad_()
    x, transform = torch.randn(4, 2).double(), flow.transform(0.0, t)
    if change == "frozen":
        flow.requires_grad_(False)
    y = transform(x)
    kept = flow.transform(0.0, 1.0).log_abs_det_jacobian(x, y).detach()
    if change == "data":
        parameter = flow.field.potential.w1
        parameter.data = parameter.data + 0.3
    elif change == "solver":
        flow.solver = ff.Solver("euler", step_size=0.5)
    elif change == "divergence":
        flow.divergence = "hutchinson"
    elif change == "time":
        with torch.no_grad():
            t.fill_(2.0)
    else:
        flow.requires_grad_(True)
    log_det = transform.log_abs_det_jacobian(x, y)
    if change == "frozen":
        log_det.sum().backward()
        assert all(p.grad is not None for p in flow.parameters())
    else:
        assert not torch.allclose(log_det, kept)


@pytest.mark.parametrize("change", ["fused", "data"])
def test_changes_that_leave_a_tensors_version_are_seen(change: str) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0), ff.Solver("rk4"))
    q1 = flow.push(Independent(Normal(torch.zeros(2), torch.ones(2)), 1), 1.0)
    q1.log_prob(torch.randn(5, 2)).sum().backward()
    step = torch.optim.SGD(flow.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        x = q1.sample((5,))
        if change == "fused":
            step.step()
        else:
            flow.field.potential.w1.data.mul_(1.5)
        found, expected = q1.log_prob(x), q1.log_prob(x.clone())
    torch.testing.assert_close(found, expected)


def test_a_sample_and_its_density_are_one_solve_in_inference_mode_too() -> None:
    field = _Counting()
    flow = ff.LatentFlow(field, ff.Solver("rk4"))
    with torch.inference_mode():
        q1 = flow.push(base(), 1.0)
        before = field.calls
        z = q1.rsample((4,))
        one = field.calls - before
        q1.log_prob(z)
        assert one > 0 and field.calls - before == one
        q1.log_prob(z.clone())
        assert field.calls - before == 2 * one


def test_values_base_and_control_broadcast_as_in_torch() -> None:
    tight = ff.Solver(rtol=1e-9, atol=1e-9)
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 3, (8, 8)).double(), tight)
    controls, x = torch.tensor([0, 2, 1, 0]), torch.randn(7, 1, 2).double()
    expected = torch.stack([flow.push(base(), 1.0, int(k)).log_prob(x[:, 0]) for k in controls], -1)
    torch.testing.assert_close(flow.push(base(), 1.0, controls).log_prob(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.push(base(4), 1.0, controls).log_prob(x), expected, rtol=1e-6, atol=1e-6)
    assert flow.push(base(4), 1.0, 1).log_prob(x).shape == (7, 4)
    each = flow.transform(0.0, 1.0, controls)
    y = each(x)
    assert y.shape == (7, 4, 2) and each.log_abs_det_jacobian(x, y).shape == (7, 4)
    torch.testing.assert_close(each.inv(y), x.expand(7, 4, 2), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"not broadcastable.*\[7, 3, 2\]"):
        flow.push(base(), 1.0, controls).log_prob(torch.zeros(7, 3, 2).double())
    still = torch.tensor(0.5).double().requires_grad_()
    for end in (0.5, still):  # a map to where it starts as well
        rest = flow.transform(0.5, end, controls)
        assert rest(x).shape == (7, 4, 2) and rest.log_abs_det_jacobian(x, rest(x)).shape == (7, 4)
    with pytest.raises(ValueError, match="control"):
        each(torch.zeros(7, 3, 2).double())


def test_inverses_have_graphs_of_their_own() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0).double(), ff.Solver("rk4"))
    y, transform = torch.randn(4, 2).double(), flow.transform(0.0, 1.0)
    for _ in range(2):
        transform.inv(y).sum().backward()
    twice = transform.inv(transform.inv(y))
    back = flow.transform(1.0, 0.0)
    torch.testing.assert_close(twice, back(back(y)))


def test_a_frozen_flow_gives_the_score_of_its_samples() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8)).double(), ff.Solver("rk4")).requires_grad_(False)
    q1 = flow.push(base(), 1.0)
    z = q1.rsample((3,)).requires_grad_()
    (score,) = torch.autograd.grad(q1.log_prob(z).sum(), z)
    again = z.detach().clone().requires_grad_()
    torch.testing.assert_close(score, torch.autograd.grad(flow.push(base(), 1.0).log_prob(again).sum(), again)[0])


def test_a_solve_is_kept_no_longer_than_its_states() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8)).double(), ff.Solver("rk4"))
    transform, x = flow.transform(0.0, 1.0), torch.randn(4, 2).double().requires_grad_()
    start = weakref.ref(x)
    y = transform(x)
    del x, y
    gc.collect()
    assert start() is None


def test_densities_in_inference_mode() -> None:
    flow = ff.LatentFlow(_Counting(), ff.Solver("rk4"))
    x = torch.randn(4, 2).double()
    with torch.inference_mode():
        q1 = flow.push(base(), 1.0)
        z = q1.rsample((4,))
        first = q1.log_prob(z)
        torch.testing.assert_close(q1.log_prob(x), flow.push(base(), 1.0).log_prob(x))
        z.mul_(2.0)
        assert not torch.allclose(q1.log_prob(z), first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_distributions_are_copied_after_a_sample(copied) -> None:
    q1 = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8)).double(), ff.Solver("rk4")).push(base(), 1.0)
    z = q1.rsample((3,)).detach()
    torch.testing.assert_close(copied(q1).log_prob(z), q1.log_prob(z))


def test_densities_have_gradients_in_time() -> None:
    flow = ff.LatentFlow(
        ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0).double(), ff.Solver("rk4", step_size=0.05)
    )
    x = torch.randn(4, 2).double()

    def total(t: torch.Tensor | float) -> torch.Tensor:
        return flow.push(base(), t).log_prob(x).sum()

    t = torch.tensor(0.98).double().requires_grad_()  # not a multiple of the step: its neighbours take as many
    total(t).backward()
    assert t.grad is not None
    slope = (total(0.98 + 1e-5) - total(0.98 - 1e-5)) / 2e-5
    torch.testing.assert_close(t.grad, slope.detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one time, got a tensor of shape"):
        flow.push(base(), torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_identity_has_gradients_in_time(inverse: bool) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8), init_scale=2.0).double(), ff.Solver("rk4"))
    x = torch.randn(4, 2).double()

    def total(t: torch.Tensor | float) -> torch.Tensor:
        if inverse:
            return flow.push(base(), t).log_prob(x).sum()
        transform = flow.transform(0.5, t)
        y = transform(x)
        return (y**2).sum() + transform.log_abs_det_jacobian(x, y).sum()

    start = 0.0 if inverse else 0.5
    t = torch.tensor([start]).double().requires_grad_()
    (slope,) = torch.autograd.grad(total(t), t)
    expected = (total(start + 1e-5) - total(start - 1e-5)) / 2e-5
    torch.testing.assert_close(slope[0], expected.detach(), rtol=1e-5, atol=1e-5)


def test_times_keep_their_gradients_where_the_transform_is_made_without() -> None:
    flow, t = ff.LatentFlow(_Counting(), ff.Solver("rk4")), torch.tensor([1.0]).double().requires_grad_()
    with torch.no_grad():
        q1 = flow.push(base(), t)
    assert q1.log_prob(torch.randn(3, 2).double()).requires_grad


def test_to_the_start_itself_is_the_identity() -> None:
    flow, z = ff.LatentFlow(_Counting()), torch.randn(3, 2).double()
    same = flow.transform(0.5, 0.5)
    assert torch.equal(same(z), z) and torch.equal(same.inv(z), z)
    assert torch.equal(same.log_abs_det_jacobian(z, same(z)), torch.zeros(3).double())
    huge = torch.full((1, 2), 1e308, dtype=torch.float64)
    assert torch.equal(same.log_abs_det_jacobian(huge, huge), torch.zeros(1).double())
    k = torch.tensor([0, 1, 0])  # a loop over frame times has one batch shape
    assert [flow.push(base(), t, k).batch_shape for t in (0.0, 1.0)] == [(3,), (3,)]


def test_a_control_may_be_larger_than_the_base() -> None:
    flow = ff.LatentFlow(_Counting(), ff.Solver(rtol=1e-9, atol=1e-9))
    q1 = flow.push(base(), 1.0, torch.tensor([0, 1]))
    assert q1.batch_shape == (2,) and q1.rsample((3,)).shape == (3, 2, 2)
    z = torch.randn(2, 2).double()
    torch.testing.assert_close(q1.log_prob(z)[1], flow.push(base(), 1.0, 1).log_prob(z[1]))


def test_equality_and_constraints() -> None:
    flow = ff.LatentFlow(_Counting())
    assert flow.transform(0.0, 1.0, 1) == flow.transform(0.0, 1.0, 1)
    assert flow.transform(0.0, 1.0, 1) != flow.transform(0.0, 1.0, 0)
    assert flow.transform(0.0, 1.0) != flow.transform(0.0, 2.0) != "a string"
    T = flow.transform(0.0, 1.0)
    assert T.bijective and T.domain.event_dim == T.codomain.event_dim == 1


def test_batched_bases_and_controls() -> None:
    flow = ff.LatentFlow(_Counting(), ff.Solver(rtol=1e-9, atol=1e-9))
    k = torch.tensor([0, 1, 0])
    q1 = flow.push(base(3), 1.0, k)
    z = q1.rsample((4,))
    assert z.shape == (4, 3, 2) and q1.log_prob(z).shape == (4, 3)
    rate = torch.tensor([0.5, 1.5, 0.5]).double()
    expected = base(3).log_prob(z / rate.exp().unsqueeze(-1)) - 2 * rate
    torch.testing.assert_close(q1.log_prob(z), expected, rtol=0, atol=1e-6)
    plain = flow.push(Normal(torch.zeros(3, 2).double(), torch.ones(3, 2).double()), 1.0, k)
    torch.testing.assert_close(plain.log_prob(z), expected, rtol=0, atol=1e-6)


def test_reparametrised_samples_carry_gradients() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 1, (8, 8)).double())
    mean = torch.zeros(2).double().requires_grad_()
    q1 = flow.push(Normal(mean, torch.ones(2).double()), 1.0)
    z = q1.rsample((3,))
    (q1.log_prob(z).sum() + z.sum()).backward()
    assert mean.grad is not None and bool(mean.grad.abs().sum() > 0)
    assert all(p.grad is not None for p in flow.parameters())


def test_bad_arguments_are_named() -> None:
    flow = ff.LatentFlow(_Counting())
    with pytest.raises(TypeError, match="Distribution"):
        flow.push(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"event shape \[2\]"):
        flow.push(Independent(Normal(torch.zeros(3), torch.ones(3)), 1), 1.0)
    with pytest.raises(ValueError, match="event shape"):
        flow.push(Normal(0.0, 1.0), 1.0)
    with pytest.raises(ValueError, match=r"batch shape \[2\] does not fit q0 of batch shape \[3\]"):
        flow.push(base(3), 1.0, torch.tensor([0, 1]))
    for t0, t1 in ((0.0, float("nan")), (float("inf"), 0.0)):
        with pytest.raises(ValueError, match=r"t[01] must be a finite time"):
            flow.transform(t0, t1)


@pytest.mark.parametrize("what", ["weights", "index", "a schedule's weights", "a learned switching time", "context"])
def test_a_kept_solve_sees_what_changes_beside_the_parameters(what: str) -> None:
    """Written in place between a sample and its density, control, context and switching times count as they are now."""
    torch.manual_seed(0)
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2, 2, (6, 6), init_scale=2.0, context=1))
    weights, index, moment, context = torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), torch.tensor(0.5), torch.ones(4, 1)
    control = {
        "weights": weights,
        "index": index,
        "a schedule's weights": ff.Schedule([(0.0, 0), (0.5, weights)]),
        "a learned switching time": ff.Schedule([(0.0, 0), (moment.requires_grad_(), 1)]),
        "context": 0,
    }[what]
    base = Independent(Normal(torch.zeros(4, 2), 1.0), 1)
    q = flow.push(base, 1.0, control, context=context)
    x = q.sample()
    with torch.no_grad():
        if what == "index":
            index.copy_(1 - index)
        else:
            {"context": context, "a learned switching time": moment}.get(what, weights).mul_(0.3)
        torch.testing.assert_close(q.log_prob(x), flow.push(base, 1.0, control, context=context).log_prob(x.clone()))
