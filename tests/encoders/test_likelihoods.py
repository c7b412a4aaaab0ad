from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

from flowfactor.encoders import Bernoulli, Gaussian, Likelihood, MLPDecoder


def test_bernoulli_matches_the_formula_in_numpy() -> None:
    raw, frames = torch.randn(4, 3, 5, 6, dtype=torch.float64), torch.rand(4, 3, 5, 6, dtype=torch.float64)
    mean = 1 / (1 + np.exp(-raw.numpy()))
    x = frames.numpy()
    expected = (x * np.log(mean) + (1 - x) * np.log1p(-mean)).sum((1, 2, 3))
    np.testing.assert_allclose(Bernoulli()(raw).log_prob(frames).numpy(), expected, rtol=1e-12)


def test_bernoulli_is_a_probability_on_binary_pixels() -> None:
    distribution = Bernoulli()(torch.randn(1, 2, 2, dtype=torch.float64))
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4).reshape(16, 1, 2, 2)
    assert distribution.log_prob(every).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("logit", [-1e4, -200.0, 200.0, 1e4])
def test_bernoulli_is_stable_for_saturated_pixels(logit: float) -> None:
    raw = torch.full((1, 2, 2), logit, requires_grad=True)
    for value, expected in ((0.0, -4 * max(logit, 0.0)), (1.0, 4 * min(logit, 0.0))):
        log_prob = Bernoulli()(raw).log_prob(torch.full((1, 2, 2), value))
        assert log_prob.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(log_prob, raw)
        assert torch.isfinite(gradient).all()


def test_bernoulli_mean_and_samples() -> None:
    raw = torch.randn(2, 1, 4, 4)
    distribution = Bernoulli()(raw)
    torch.testing.assert_close(distribution.mean, torch.sigmoid(raw))
    torch.testing.assert_close(Bernoulli().mean(raw), torch.sigmoid(raw))
    samples = distribution.sample((4000,))
    assert set(samples.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(samples.mean(0), torch.sigmoid(raw), atol=0.05, rtol=0)
    assert distribution.expand((3, 2)).log_prob(torch.rand(2, 1, 4, 4)).shape == (3, 2)


@pytest.mark.parametrize("bad", [255.0, -0.1, float("nan")])
def test_bernoulli_refuses_frames_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"frames must lie in \[0, 1\] .* got values from"):
        Bernoulli()(torch.zeros(2, 1, 4, 4)).log_prob(torch.full((2, 1, 4, 4), bad))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0, 300.0])
def test_gaussian_matches_torch(scale: float, learned: bool) -> None:
    raw, frames = torch.randn(4, 3, 5, 6, dtype=torch.float64), torch.rand(4, 3, 5, 6, dtype=torch.float64)
    oracle = Independent(Normal(torch.sigmoid(raw), torch.full_like(raw, scale)), 3)
    likelihood = Gaussian(scale, learned=learned).double()
    assert likelihood.scale.item() == pytest.approx(scale, rel=1e-5)
    rtol = 1e-4 if learned else 1e-12  # a learned scale was born in single precision
    torch.testing.assert_close(likelihood(raw).log_prob(frames), oracle.log_prob(frames), rtol=rtol, atol=1e-9)
    torch.testing.assert_close(likelihood(raw).mean, torch.sigmoid(raw))


def test_gaussian_has_the_right_constant() -> None:
    raw = torch.zeros(3, 28, 28, dtype=torch.float64)
    best = Gaussian(1.0)(raw).log_prob(torch.sigmoid(raw)).item()
    assert best == pytest.approx(-0.5 * 3 * 28 * 28 * math.log(2 * math.pi), abs=1e-9)
    assert best == pytest.approx(-2161.34, abs=0.01)
    narrow = Gaussian(0.1)(raw).log_prob(torch.sigmoid(raw)).item()
    assert narrow - best == pytest.approx(2352 * math.log(10), abs=1e-6)


def test_gaussian_density_integrates_to_one() -> None:
    grid = torch.linspace(-6, 7, 4001, dtype=torch.float64)
    distribution = Gaussian(0.5)(torch.zeros(1, 1, 1, dtype=torch.float64))
    density = distribution.log_prob(grid.reshape(-1, 1, 1, 1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-9)


def test_gaussian_learns_the_scale_of_the_noise() -> None:
    likelihood = Gaussian(1.0, learned=True)
    raw, noise = torch.zeros(64, 1, 8, 8), 0.2 * torch.randn(64, 1, 8, 8)
    optimizer = torch.optim.Adam(likelihood.parameters(), 0.05)
    for _ in range(200):
        loss = -likelihood(raw).log_prob(0.5 + noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert likelihood.scale.item() == pytest.approx(noise.square().mean().sqrt().item(), rel=0.02)


def test_a_learned_scale_stays_finite_on_noiseless_frames() -> None:
    likelihood = Gaussian(1.0, learned=True)
    with torch.no_grad():
        likelihood.raw_scale.fill_(-1e4)
    log_prob = likelihood(torch.zeros(2, 1, 8, 8)).log_prob(torch.full((2, 1, 8, 8), 0.5))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all() and torch.isfinite(likelihood.raw_scale.grad)


def test_unbounded_gaussian_is_for_any_real_vector() -> None:
    decoder = MLPDecoder(4, 6, likelihood=Gaussian(1.0, bounded=False))
    z = 50 * torch.randn(32, 4)
    assert decoder.mean(z).abs().max() > 1
    torch.testing.assert_close(decoder.mean(z), decoder(z).mean)


def test_names_and_configs() -> None:
    assert (Bernoulli().name, Gaussian().name) == ("bernoulli", "gaussian")
    for likelihood in (Bernoulli(), Gaussian(), Gaussian(0.25, learned=True, bounded=False)):
        config = json.loads(json.dumps(likelihood.config))
        assert Likelihood.build(config).config == likelihood.config
        assert Likelihood.build(likelihood) is likelihood
    assert isinstance(Likelihood.build(None), Bernoulli)
    assert list(Gaussian().parameters()) == [] and len(list(Gaussian(learned=True).parameters())) == 1


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale must be above 0\.0"):
        Gaussian(scale)
    with pytest.raises(ValueError, match=r"scale must be above 0.001 .* when learned"):
        Gaussian(0.001, learned=True)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()], ids=lambda item: item.name)
def test_frames_of_another_shape_are_refused_not_broadcast(likelihood: Likelihood) -> None:
    distribution = likelihood(torch.zeros(2, 3, 4, 4))
    for shape in ((2, 1, 4, 4), (2, 3, 4, 1), (4, 4)):
        with pytest.raises(ValueError, match=r"event shape \[3, 4, 4\], got"):
            distribution.log_prob(torch.rand(shape))
    assert distribution.log_prob(torch.rand(5, 1, 3, 4, 4)).shape == (5, 2)
