"""The flow of one frame's code against the code of another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Distribution, Gamma, Independent, MultivariateNormal, Normal, kl_divergence

import flowfactor as ff
from flowfactor.regularizers import LatentEquivariance


def normal(mean: Any, std: Any) -> Independent:
    return Independent(Normal(torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(std, dtype=torch.float64)), 1)


def linear_flow() -> tuple[ff.LatentFlow, torch.Tensor]:
    """The flow of dz/dt = A z in two dimensions, which turns and contracts, and A."""
    a = torch.tensor([[-0.4, 1.0], [-0.7, -0.1]], dtype=torch.float64)
    field = ff.fields.from_module(lambda z, t: z @ a.mT, dim=2)
    return ff.LatentFlow(field, ff.Solver("dopri5", rtol=1e-9, atol=1e-9)), a


def test_it_is_the_squared_distance_from_the_mean() -> None:
    z, q = torch.rand(3, 4, 5, dtype=torch.float64), normal(torch.rand(3, 4, 5), torch.ones(3, 4, 5))
    expected = ((z - q.mean) ** 2).sum(-1)
    torch.testing.assert_close(LatentEquivariance()(z, q), expected)
    torch.testing.assert_close(LatentEquivariance()(z, q.mean), expected)
    coded = LatentEquivariance()(z, q, code_dim=3)
    torch.testing.assert_close(coded, ((z - q.mean) ** 2)[..., :3].sum(-1))
    assert bool((coded < expected).all())


def test_it_vanishes_where_encoding_and_transforming_commute_and_reaches_both() -> None:
    flow, a = linear_flow()
    code = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)  # of the first frame
    end = flow(code, [0.0, 1.5]).z[-1]
    other = (torch.linalg.matrix_exp(1.5 * a) @ code[0].detach()).unsqueeze(0).requires_grad_()
    assert float(LatentEquivariance()(end, other).sum().detach()) < 1e-12
    error = LatentEquivariance()(end, other + 0.5)
    torch.testing.assert_close(error, torch.full_like(error, 0.5))  # 2 (1/2)^2
    by_start, by_other = torch.autograd.grad(error.sum(), (code, other))
    torch.testing.assert_close(by_other, torch.ones_like(by_other))
    torch.testing.assert_close(by_start, -(torch.linalg.matrix_exp(1.5 * a).mT @ by_other[0]).unsqueeze(0))


@pytest.mark.parametrize("known", [True, False])
def test_the_divergence_of_a_pushed_normal(known: bool) -> None:
    """Against the closed form between normals; without the log-determinant it is left out."""
    flow, a = linear_flow()
    count = 40_000
    start = normal([[1.0, 2.0]], [[0.3, 0.8]]).expand((count,))
    other = normal([[1.2, -0.5]], [[0.9, 0.7]]).expand((count,))
    torch.manual_seed(0)
    path = flow(start.sample(), [0.0, 1.5], log_det=True)
    assert path.log_det is not None
    m = torch.linalg.matrix_exp(1.5 * a)
    covariance = m @ torch.diag(torch.tensor([0.3, 0.8], dtype=torch.float64) ** 2) @ m.mT
    pushed = MultivariateNormal(m @ start.mean[0], covariance)
    exact = kl_divergence(pushed, MultivariateNormal(other.mean[0], torch.diag(other.stddev[0] ** 2)))
    found = LatentEquivariance(distributions=True)(path.z[-1], other, start, path.log_det[-1] if known else None)
    expected = exact if known else exact + 1.5 * torch.trace(a)
    standard_error = float(found.std()) / count**0.5
    assert abs(float(found.mean() - expected)) < 4 * standard_error
    assert abs(1.5 * float(torch.trace(a))) > 20 * standard_error  # so that the two cases differ


def test_the_divergence_of_the_coded_dimensions() -> None:
    wide, narrow = normal([[0.0, 1.0, 5.0]], [[1.0, 2.0, 0.1]]), normal([[0.0, 1.0]], [[1.0, 2.0]])
    z = torch.tensor([[0.5, -1.0, 3.0]], dtype=torch.float64)
    cost = LatentEquivariance(distributions=True)
    torch.testing.assert_close(cost(z, wide, wide, code_dim=2), cost(z[:, :2], narrow, narrow))
    assert not torch.allclose(cost(z, wide, wide), cost(z, wide, wide, code_dim=2))


def test_noise_costs_nothing_as_a_divergence_where_both_have_the_same() -> None:
    torch.manual_seed(0)
    q = normal(torch.zeros(1, 3), torch.tensor([[0.1, 1.0, 2.0]])).expand((20_000,))
    z = q.sample()
    divergence, distance = LatentEquivariance(distributions=True)(z, q, q), LatentEquivariance()(z, q)
    assert abs(float(divergence.mean())) < 0.05
    assert abs(float(distance.mean()) - 5.01) < 0.3  # the trace of the covariance


def test_what_does_not_fit_is_refused() -> None:
    z, q = torch.zeros(2, 3, dtype=torch.float64), normal(torch.zeros(2, 3), torch.ones(2, 3))
    positive: Distribution = Independent(Gamma(torch.ones(2, 3), torch.ones(2, 3)), 1)
    divergence = LatentEquivariance(distributions=True)
    with pytest.raises(ValueError, match=r"states \[2, 2\] and the posterior \[2, 3\]"):
        LatentEquivariance()(z[:, :2], q)
    with pytest.raises(ValueError, match="have no effect on a distance"):
        LatentEquivariance()(z, q, start=q)
    with pytest.raises(ValueError, match="needs start"):
        divergence(z, q)
    with pytest.raises(TypeError, match="not its mean alone"):
        divergence(z, z, q)
    with pytest.raises(ValueError, match="leave one of the two away"):
        divergence(z, q, q, torch.zeros(2), code_dim=2)
    with pytest.raises(TypeError, match=r"Independent\(Normal"):
        divergence(z, positive, positive, code_dim=2)
    with pytest.raises(TypeError, match="distributions must be True or False"):
        LatentEquivariance(1)  # pyright: ignore[reportArgumentType]
