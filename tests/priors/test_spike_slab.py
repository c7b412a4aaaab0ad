"""The prior of sparse weights: its chain, its slabs, and divergences from it."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch.distributions import Bernoulli, HalfNormal, Laplace, LogNormal, kl_divergence

from flowfactor.encoders import SparseSample, SparseWeights
from flowfactor.priors import SpikeAndSlab

F64 = torch.float64


def posterior(slab: str, batch: int = 3, steps: int = 4, flows: int = 2, controls: int = 2) -> SparseWeights:
    place = torch.randn(batch, steps, flows, controls, dtype=F64)
    scale = 0.1 + torch.rand(batch, steps, flows, controls, dtype=F64)
    kind = Laplace if slab == "laplace" else LogNormal
    return SparseWeights(2 * torch.randn(batch, steps, flows, dtype=F64), kind(place, 0.5 * scale))


def prior(slab: str = "half_normal", flows: int = 2, **settings) -> SpikeAndSlab:
    defaults = {"initial": 0.2, "persistence": 0.9, "onset": 0.05, "scale": 1.3}
    return SpikeAndSlab(flows, slab=slab, **(defaults | settings)).to(F64)


@pytest.mark.parametrize("slab", ["half_normal", "laplace"])
def test_divergence_against_monte_carlo(slab: str) -> None:
    q, p = posterior(slab), prior(slab)
    drawn = q.sample((40_000,))
    ratio = q.log_prob(drawn) - p.log_prob(drawn)
    error = ratio.std(0) / 200
    assert (error < 0.1).all()
    assert ((ratio.mean(0) - p.kl(q)).abs() < 5 * error).all()


def test_spike_divergence_by_enumeration() -> None:
    q, p = posterior("laplace", batch=2, steps=3, flows=1), prior("laplace", flows=1)
    total = torch.zeros(2, dtype=F64)
    pi = q.spike_probs.squeeze(-1)
    for bits in itertools.product([0.0, 1.0], repeat=3):
        b = torch.tensor(bits, dtype=F64)
        log_q = Bernoulli(pi).log_prob(b).sum(-1)
        log_p = math.log(0.2 if bits[0] else 0.8)
        for before, now in itertools.pairwise(bits):
            on = 0.9 if before else 0.05
            log_p += math.log(on if now else 1 - on)
        total += log_q.exp() * (log_q - log_p)
    slabs = (q.spike_probs.unsqueeze(-1) * p.slab_kl(q.slab)).sum((-3, -2, -1))
    torch.testing.assert_close(p.kl(q), total + slabs, rtol=1e-6, atol=1e-8)


def test_laplace_divergence_is_torchs() -> None:
    q, p = posterior("laplace"), prior("laplace")
    wanted = kl_divergence(q.slab, Laplace(torch.zeros((), dtype=F64), torch.tensor(1.3, dtype=F64)))
    torch.testing.assert_close(p.slab_kl(q.slab), wanted)


def test_half_normal_divergence_by_quadrature() -> None:
    q = LogNormal(torch.tensor([-0.5, 0.0, 0.7], dtype=F64), torch.tensor([0.1, 0.4, 0.9], dtype=F64))
    x = torch.linspace(-12, 12, 40_001, dtype=F64).unsqueeze(-1)  # of ln w
    w = x.exp()
    log_q = q.log_prob(w)
    integrand = log_q.exp() * (log_q - HalfNormal(torch.tensor(1.3, dtype=F64)).log_prob(w)) * w
    torch.testing.assert_close(prior().slab_kl(q), torch.trapezoid(integrand, x, dim=0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("slab", ["half_normal", "laplace"])
def test_divergence_is_zero_of_itself_and_positive_elsewhere(slab: str) -> None:
    assert (prior(slab).kl(posterior(slab, batch=50)) > 0).all()
    p = prior("laplace", initial=0.3, persistence=0.3, onset=0.3)  # no memory: the posterior can be the prior
    logits = torch.full((1, 5, 2), math.log(3 / 7), dtype=F64)
    zero = torch.zeros(1, 5, 2, 1, dtype=F64)
    assert float(p.kl(SparseWeights(logits, Laplace(zero, zero + 1.3)))) == pytest.approx(0, abs=1e-6)


def test_marginals_are_those_of_the_chain(generator: torch.Generator) -> None:
    p = prior(initial=0.7, persistence=0.8, onset=0.3)
    b = p.sample((50_000,), steps=6, generator=generator).spikes
    torch.testing.assert_close(p.marginals(6), b.mean(0), atol=0.01, rtol=0)
    stays = b[:, 1:][b[:, :-1] == 1].mean()
    begins = b[:, 1:][b[:, :-1] == 0].mean()
    assert (float(stays), float(begins)) == (pytest.approx(0.8, abs=0.01), pytest.approx(0.3, abs=0.01))


def test_without_an_onset_the_rate_is_stationary() -> None:
    p = SpikeAndSlab(3, initial=0.25, persistence=0.9)
    torch.testing.assert_close(p.marginals(30), torch.full((30, 3), 0.25))


@pytest.mark.parametrize(("slab", "spread"), [("half_normal", 1.0), ("laplace", math.sqrt(2))])
def test_slabs_have_their_distribution(slab: str, spread: float, generator: torch.Generator) -> None:
    w = prior(slab, scale=0.5).sample((40_000,), steps=1, generator=generator).slab
    assert float(w.square().mean().sqrt()) == pytest.approx(0.5 * spread, rel=0.02)
    assert bool((w < 0).any()) == (slab == "laplace")
    assert (float(w.mean().abs()) < 0.02) == (slab == "laplace")


def test_gradients_reach_everything() -> None:
    q = posterior("half_normal")
    leaves = [x.detach().requires_grad_() for x in (q.spike_logits, q.slab.loc, q.slab.scale)]
    p = prior(learned=True)
    p.kl(SparseWeights(leaves[0], LogNormal(*leaves[1:]))).sum().backward()
    assert all(x.grad is not None and (x.grad != 0).all() for x in (*leaves, p.logits))
    assert [x for x in prior().parameters() if x.requires_grad] == []


def test_gradients_are_right() -> None:
    q = posterior("half_normal", batch=1, steps=2)
    inputs = [x.detach().requires_grad_() for x in (q.spike_logits, q.slab.loc, q.slab.scale)]
    p = prior()
    assert torch.autograd.gradcheck(lambda a, m, s: p.kl(SparseWeights(a, LogNormal(m, s))), inputs)


def test_config_rebuilds() -> None:
    p = SpikeAndSlab(4, initial=0.2, persistence=0.7, slab="laplace", scale=2.0, learned=True)
    again = SpikeAndSlab(**json.loads(json.dumps(p.config)))
    assert again.config == p.config
    torch.testing.assert_close(again.marginals(5), p.marginals(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_flows": 0}, "at least 1"),
        ({"initial": 0.0}, "initial must be a probability"),
        ({"persistence": 1.0}, "persistence must be a probability"),
        ({"persistence": float("nan")}, "persistence must be a probability"),
        ({"onset": True}, "onset must be a probability"),
        ({"initial": 0.9, "persistence": 0.1}, "raise persistence"),
        ({"slab": "cauchy"}, "unknown slab 'cauchy'"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeAndSlab(**({"num_flows": 2} | settings))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="num_flows must be an integer"):
        SpikeAndSlab(2.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        prior().sample(steps=0)
    with pytest.raises(TypeError, match="steps must be an integer"):
        prior().marginals(2.0)
    with pytest.raises(ValueError, match="has 2 flows and the weights 3"):
        prior().kl(posterior("half_normal", flows=3))
    with pytest.raises(ValueError, match='make the encoder with slab="half_normal"'):
        prior().kl(posterior("laplace"))
    b = torch.zeros(4, 3, dtype=F64)
    with pytest.raises(ValueError, match="has 2 flows and the weights 3"):
        prior().log_prob(SparseSample(b, b.unsqueeze(-1), b.unsqueeze(-1)))
