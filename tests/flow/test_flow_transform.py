"""Flows as transforms of torch.distributions."""

from __future__ import annotations

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
        flow.field.potential.w1.add_(0.3)  # pyright: ignore
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
        flow.field.potential.w1.add_(0.3)  # pyright: ignore
    after = transform.log_abs_det_jacobian(x, y)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, flow.transform(0.0, 1.0).log_abs_det_jacobian(x, y))


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


def test_to_the_start_itself_is_the_identity() -> None:
    flow, z = ff.LatentFlow(_Counting()), torch.randn(3, 2).double()
    same = flow.transform(0.5, 0.5)
    assert torch.equal(same(z), z) and torch.equal(same.inv(z), z)
    assert torch.equal(same.log_abs_det_jacobian(z, same(z)), torch.zeros(3).double())


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
    for t0, t1 in ((0.0, float("nan")), (float("inf"), 0.0)):
        with pytest.raises(ValueError, match=r"t[01] must be a finite time"):
            flow.transform(t0, t1)
