"""Metrics on cases whose value is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import flowfactor as ff


def _linear(matrix: torch.Tensor) -> ff.LatentFlow:
    return ff.LatentFlow(ff.fields.from_module(lambda z, t: z @ matrix.T, 2))


def test_straight_transport_has_no_gap_and_a_detour_has(generator: torch.Generator) -> None:
    z0 = torch.randn(200, 2, generator=generator)
    straight = ff.LatentFlow(ff.potentials.from_module(lambda z, t: 0.5 * z.square().sum(-1) / (1 + t), 2))
    assert float(ff.metrics.transport_gap(straight, z0, [0.0, 2.0])) == pytest.approx(1.0, abs=0.03)
    # The round cloud turned by a quarter needs almost no transport, yet every point travels a quarter circle.
    turning = _linear(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    assert float(ff.metrics.transport_gap(turning, z0, [0.0, math.pi / 2])) > 5


def test_the_gap_does_not_depend_on_units(generator: torch.Generator) -> None:
    z0 = torch.randn(100, 2, generator=generator)
    growing = _linear(torch.tensor([[0.5, 0.3], [0.0, -0.2]]))
    gaps = [float(ff.metrics.transport_gap(growing, scale * z0, [0.0, 1.0])) for scale in (0.1, 1.0, 10.0)]
    assert max(gaps) - min(gaps) < 0.02 * min(gaps)


def test_transport_gap_refuses_what_says_nothing() -> None:
    with pytest.raises(ValueError, match="cloud"):
        ff.metrics.transport_gap(_linear(torch.eye(2)), torch.zeros(1, 2), [0.0, 1.0])
    with pytest.raises(ValueError, match="nothing moves"):
        ff.metrics.transport_gap(_linear(torch.zeros(2, 2)), torch.randn(8, 2), [0.0, 1.0])


class _Fixed(nn.Module):
    """An encoder that knows the exact posterior of a linear Gaussian model: x = z + noise, z standard normal."""

    def forward(self, x):
        mean = x.flatten(-3).sum(-1, keepdim=True) / (1 + x[0].numel())
        return Independent(Normal(mean, torch.full_like(mean, (1 / (1 + x[0].numel())) ** 0.5)), 1)


class _Repeat(nn.Module):
    """A decoder that paints every pixel with the latent, under unit Gaussian noise."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = ff.encoders.Gaussian()

    def forward(self, z):
        return Independent(Normal(z[..., None, None].expand(*z.shape, 2, 2), 1.0), 3)

    def mean(self, z):
        return self(z).mean


def test_with_the_exact_posterior_every_bound_is_the_evidence() -> None:
    still = ff.LatentFlow(ff.fields.from_module(lambda z, t: torch.zeros_like(z), 1))
    model = ff.models.FlowFactorizedVAE(_Fixed(), _Repeat(), still)
    x = torch.rand(7, 1, 1, 2, 2)  # one frame: x ~ N(0, I + 1 1')
    covariance = torch.eye(4) + torch.ones(4, 4)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(4), covariance).log_prob(x.flatten(1))
    for samples in (1, 16):
        torch.testing.assert_close(model.log_likelihood(x, [0.0], 0, samples), evidence, atol=1e-4, rtol=1e-4)


def test_log_likelihood_averages_nats_per_frame_and_names_its_likelihood(seeded) -> None:
    data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
    model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8), likelihood="gaussian").eval()
    result = ff.metrics.log_likelihood(model, data, samples=4, generator=seeded(3))
    batch = data.batch(torch.arange(4), 0)
    with torch.no_grad():
        whole = model.log_likelihood(batch["frames"], batch["t"], batch["k"], 4, generator=seeded(3))
    assert result.per_frame == pytest.approx(float(whole.mean()) / 3, rel=1e-5)
    assert (result.likelihood, result.objective, result.count, result.samples) == ("gaussian", "path", 4, 4)


def _estimating(**settings) -> ff.models.FlowFactorizedVAE:
    """A model whose bound holds log-determinants, with estimated divergences."""
    settings |= {"objective": "marginal", "divergence": "hutchinson", "solver": {"method": "rk4", "step_size": 1.0}}
    return ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8), **settings).eval()


def _turns() -> ff.data.TransformedImages:
    turns = {"left": (ff.data.Rotate(), 0, 80), "right": (ff.data.Rotate(), 0, -80)}
    return ff.data.TransformedImages(torch.rand(4, 1, 8, 8), turns, steps=2)


@pytest.mark.parametrize("metric", [ff.metrics.log_likelihood, ff.metrics.paper_log_likelihood])
def test_likelihoods_take_the_exact_divergence(metric, monkeypatch: pytest.MonkeyPatch, seeded) -> None:
    model, data = _estimating(), _turns()
    found = metric(model, data, generator=seeded(3))
    assert model.flow.divergence == "hutchinson"
    model.flow.divergence = "exact"
    assert found == metric(model, data, generator=seeded(3))

    def broken(x: torch.Tensor) -> None:
        raise RuntimeError("broken")

    model.flow.divergence = "hutchinson"
    monkeypatch.setattr(model, "encode", broken)
    with pytest.raises(RuntimeError, match="broken"):
        metric(model, data)
    assert model.flow.divergence == "hutchinson"


@pytest.mark.parametrize("settings", [{}, {"supervision": "weak", "num_frames": 3}])
def test_evaluation_reports_the_bound_with_the_exact_divergence(settings: dict[str, object]) -> None:
    from flowfactor.training.evaluation import evaluate

    model, data = _estimating(**settings), _turns()
    found = evaluate(model, data, samples=2)["log_likelihood"]
    model.flow.divergence = "exact"
    assert found == evaluate(model, data, samples=2)["log_likelihood"]


@pytest.mark.parametrize("metric", [ff.metrics.equivariance_error, ff.metrics.log_likelihood])
def test_metrics_leave_every_module_in_the_mode_it_was_in(metric) -> None:
    model = _estimating().train()
    model.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    metric(model, _turns())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_with_other_flows_is_refused() -> None:
    data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
    model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
    for metric in (ff.metrics.equivariance_error, ff.metrics.log_likelihood):
        with pytest.raises(ValueError, match="2 flows"):
            metric(model, data)
    with pytest.raises(ValueError, match="limit"):
        ff.metrics.equivariance_error(
            ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8)), data, limit=0
        )
