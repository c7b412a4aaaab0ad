"""`LatentFlow.density`: the density of data that a flow carries to a base."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Normal

import flowfactor as ff

BASE = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


def curved() -> ff.LatentFlow:
    return ff.LatentFlow(ff.potentials.MLPPotential(2, 2, hidden=(8, 8), init_scale=0.5))


def test_the_density_is_that_of_a_linear_flow() -> None:
    S = torch.tensor([[0.5, 0.2], [0.2, -0.3]])
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=S))
    p = flow.density(BASE, 2.0, t0=0.5)
    back = torch.linalg.matrix_exp(-1.5 * S)
    x = torch.randn(20, 2)
    expected = torch.distributions.MultivariateNormal(torch.zeros(2), back @ back.mT)
    torch.testing.assert_close(p.log_prob(x), expected.log_prob(x), atol=1e-3, rtol=1e-3)


def test_it_is_the_base_at_the_end_of_a_path_and_its_log_determinant() -> None:
    flow, x = curved(), torch.randn(10, 2)
    k = torch.arange(10) % 2
    path = flow(x, [0.0, 1.0], k, log_det=True, costs={"action": ff.regularizers.TransportCost()})
    assert path.log_det is not None
    torch.testing.assert_close(flow.density(BASE, 1.0, k).log_prob(x), BASE.log_prob(path.z[-1]) + path.log_det[-1])


def test_push_goes_the_other_way() -> None:
    flow, x = curved(), torch.randn(10, 2)
    assert not torch.allclose(flow.density(BASE).log_prob(x), flow.push(BASE, 1.0).log_prob(x), atol=1e-2)
    torch.testing.assert_close(flow.density(BASE, 1.0).log_prob(x), flow.push(BASE, 0.0, t0=1.0).log_prob(x))


def test_samples_are_of_the_density_and_their_gradients_reach_the_flow() -> None:
    flow = curved()
    p = flow.density(BASE)
    x = p.rsample((400,))
    there = flow(x, [0.0, 1.0]).z[-1].detach()
    assert float((there.mean(0)).norm()) < 0.2
    assert float((there.std(0) - 1).abs().max()) < 0.2
    p.log_prob(x.detach()).mean().backward()
    assert all(w.grad is not None for w in flow.parameters())
    assert ff.metrics.mass_on_grid(p, [-9, -9], [9, 9], points=121).value == pytest.approx(1, abs=1e-3)
    inside = (
        (p.sample((4000,)).abs().amax(-1) < 1).double().mean()
    )  # a box that holds some of the mass: the share of samples
    assert ff.metrics.mass_on_grid(p, [-1, -1], [1, 1]).value == pytest.approx(float(inside), abs=0.04)


def test_a_base_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="base must be a torch Distribution, got Tensor"):
        curved().density(torch.zeros(2))  # type: ignore[arg-type]
