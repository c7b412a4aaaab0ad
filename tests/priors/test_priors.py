from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flowfactor.control import Schedule
from flowfactor.encoders import MLPEncoder
from flowfactor.priors import Diffusion, GaussianMixture, Prior, StandardNormal, VampPrior, build

BASES = ["standard", "mixture", "single", "vamp"]
F64 = torch.float64


def make_base(kind: str, dim: int = 2, dtype: torch.dtype = F64) -> Prior:
    generator = torch.Generator().manual_seed(1)
    if kind == "standard":
        return StandardNormal(dim).to(dtype)
    if kind == "mixture":
        prior = GaussianMixture(dim, 3, generator=generator).to(dtype)
        with torch.no_grad():
            prior.logits.copy_(torch.tensor([0.5, -0.3, 0.1]))
            prior.raw_scales.add_(0.5 * torch.randn(prior.raw_scales.shape, generator=generator))
        return prior
    if kind == "single":
        return GaussianMixture(dim, 1, generator=generator).to(dtype)
    encoder = MLPEncoder((1, 2, 2), dim, (8,)).to(dtype)
    return VampPrior(encoder, torch.rand(4, 1, 2, 2, generator=generator, dtype=dtype))


def moments(prior: Prior, t: float, control: object = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, means and variances at a time, straight from the components."""
    c = prior.base.components()
    added = prior.added_variance(t, control)
    return tuple(x.detach() for x in (c.log_weights.softmax(0), c.means, c.variances + added))


@pytest.mark.parametrize("t", [0.0, 1.5])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_integrates_to_one(dim: int, kind: str, t: float) -> None:
    prior = Diffusion(make_base(kind, dim), 2, init=(0.2, 0.7))
    axis = torch.linspace(-14, 14, 281, dtype=F64)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    for distribution in (prior.base.at(t), prior.at(t, 1)):
        total = distribution.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** dim
        assert total.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("control", [0, 1, torch.tensor([0.4, 1.5], dtype=F64)], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_the_heat_equation_holds(kind: str, control: int | torch.Tensor) -> None:
    dim, n = 3, 16
    prior = Diffusion(make_base(kind, dim), 2, init=(0.3, 0.8))
    z = torch.randn(n, dim, dtype=F64, requires_grad=True)
    t = (0.1 + torch.rand(n, dtype=F64)).requires_grad_()
    p = prior.at(t, control).log_prob(z).exp()
    dp_dt, gradient = torch.autograd.grad(p.sum(), (t, z), create_graph=True)
    laplacian = sum(torch.autograd.grad(gradient[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(dim))
    rates = prior.diffusivity
    rate = rates[control] if isinstance(control, int) else (control * rates).sum()
    assert dp_dt.abs().max() > 1e-4
    torch.testing.assert_close(dp_dt, rate * laplacian, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", BASES)
def test_log_prob_matches_the_full_covariance_formula(kind: str) -> None:
    prior = Diffusion(make_base(kind), 2, init=(0.3, 0.8))
    z = torch.randn(5, 2, dtype=F64)
    weights, means, variances = moments(prior, 1.3, 1)
    expected = torch.zeros(5, dtype=F64)
    for w, m, v in zip(weights, means, variances, strict=True):
        covariance, offset = torch.diag(v), z - m
        quadratic = (offset @ covariance.inverse() * offset).sum(-1)
        expected += w * torch.exp(-quadratic / 2) / torch.det(2 * math.pi * covariance).sqrt()
    torch.testing.assert_close(prior.at(1.3, 1).log_prob(z).exp().detach(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", BASES)
def test_at_time_zero_it_is_the_base(kind: str) -> None:
    base = make_base(kind)
    z = torch.randn(6, 2, dtype=F64)
    diffused = Diffusion(base, 3).at(0.0, 2)
    torch.testing.assert_close(diffused.log_prob(z), base.at(0.0).log_prob(z), rtol=0, atol=1e-14)
    torch.testing.assert_close(base.at(7.0, 2).log_prob(z), base.at(0.0).log_prob(z), rtol=0, atol=0)


@pytest.mark.parametrize("kind", BASES)
def test_each_sample_diffuses_at_its_own_rate_and_time(kind: str) -> None:
    prior = Diffusion(make_base(kind), 3, init=(0.1, 0.5, 2.0))
    k, t = torch.tensor([2, 0, 1, 2]), torch.tensor([0.5, 1.0, 3.0, 0.0], dtype=F64)
    z = torch.randn(4, 2, dtype=F64)
    together = prior.at(t, k).log_prob(z)
    apart = torch.stack([prior.at(t[i].item(), int(k[i])).log_prob(z[i]) for i in range(4)])
    torch.testing.assert_close(together, apart)
    one_hot = torch.nn.functional.one_hot(k, 3).to(F64)
    torch.testing.assert_close(prior.at(t, one_hot).log_prob(z), together)


def test_weights_superpose_the_rates() -> None:
    prior = Diffusion(StandardNormal(2).double(), 3, init=(0.1, 0.5, 2.0))
    weights = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=F64)
    expected = 2 * 1.5 * torch.tensor([0.1 + 1.0 + 1.0, -0.1 + 0.5, 0.1], dtype=F64)
    torch.testing.assert_close(prior.added_variance(1.5, weights), expected, rtol=1e-6, atol=0)


def test_a_schedule_integrates_its_pieces() -> None:
    prior = Diffusion(StandardNormal(2).double(), 3, init=(0.1, 0.5, 2.0))
    d0, d1, d2 = prior.diffusivity
    weights = torch.tensor([1.0, 0.0, 0.5], dtype=F64)
    schedule = Schedule([(-math.inf, 0), (2.0, 1), (3.5, weights)])
    expected = {
        0.0: 0 * d0,
        1.0: d0,
        2.0: 2 * d0,
        3.0: 2 * d0 + d1,
        5.0: 2 * d0 + 1.5 * d1 + 1.5 * (d0 + 0.5 * d2),
    }
    for t, value in expected.items():
        torch.testing.assert_close(prior.added_variance(t, schedule), 2 * value)
    t = torch.tensor(list(expected), dtype=F64)
    torch.testing.assert_close(prior.added_variance(t, schedule), 2 * torch.stack(list(expected.values())))
    whole = Schedule([(0.0, 1)])
    torch.testing.assert_close(prior.added_variance(t, whole), prior.added_variance(t, 1))


def test_a_schedule_per_sample() -> None:
    prior = Diffusion(StandardNormal(2).double(), 3, init=(0.1, 0.5, 2.0))
    d = prior.diffusivity
    schedule = Schedule([(-1.0, torch.tensor([0, 1])), (1.0, 2)])  # time before 0 does not count
    torch.testing.assert_close(prior.added_variance(4.0, schedule), 2 * (d[:2] + 3 * d[2]))
    t = torch.tensor([0.5, 4.0], dtype=F64)
    expected = 2 * torch.stack([0.5 * d[0], d[1] + 3 * d[2]])
    torch.testing.assert_close(prior.added_variance(t, schedule), expected)


@pytest.mark.parametrize("wrap", [lambda base: base, lambda base: Diffusion(base, 3)], ids=["static", "diffusion"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    ("t", "control", "batch"),
    [
        (1.0, 0, ()),
        (torch.tensor(1.0, dtype=F64), torch.tensor(2), ()),
        (torch.rand(4, dtype=F64), 0, (4,)),
        (1.0, torch.tensor([0, 1, 2]), (3,)),
        (torch.rand(4, 1, dtype=F64), torch.tensor([0, 1, 2]), (4, 3)),
        (torch.rand(5, dtype=F64), torch.rand(5, 3, dtype=F64), (5,)),
        (1.0, torch.rand(3, dtype=F64), ()),
        (torch.rand(2, dtype=F64), Schedule([(0.0, 0), (0.5, torch.tensor([1, 2]))]), (2,)),
        (0.2, Schedule([(0.0, 0), (0.5, torch.tensor([1, 2]))]), (2,)),
        (torch.rand(0, dtype=F64), 0, (0,)),
    ],
    ids=[
        "number",
        "scalar",
        "times",
        "indices",
        "grid",
        "weights",
        "shared",
        "schedule",
        "schedule-at-one-time",
        "empty",
    ],
)
def test_every_prior_keeps_the_contract(kind: str, wrap, t, control, batch: tuple[int, ...]) -> None:
    prior = wrap(make_base(kind))
    distribution = prior.at(t, control)
    assert (distribution.batch_shape, distribution.event_shape) == (batch, (2,))
    assert prior.dim == 2
    assert distribution.mean.shape == distribution.variance.shape == (*batch, 2)
    for shape in ((), (7,), (2, 3)):
        sample = distribution.sample(shape)
        assert sample.shape == (*shape, *batch, 2) and not sample.requires_grad and sample.dtype == F64
        assert distribution.log_prob(sample).shape == (*shape, *batch)
    if distribution.has_rsample:
        assert distribution.rsample((5,)).shape == (5, *batch, 2)
    assert distribution.expand((6, *batch)).sample().shape == (6, *batch, 2)


@pytest.mark.parametrize("kind", BASES)
def test_samples_follow_the_density(kind: str) -> None:
    prior = Diffusion(make_base(kind), 2, init=(0.3, 0.8))
    distribution = prior.at(torch.tensor([0.0, 1.7], dtype=F64), 1)
    samples = distribution.sample((20_000,))
    for i, t in enumerate((0.0, 1.7)):
        weights, means, variances = moments(prior, t, 1)
        for d in range(2):
            x = samples[:, i, d].sort().values
            cdf = (weights * torch.special.ndtr((x[:, None] - means[:, d]) / variances[:, d].sqrt())).sum(-1)
            steps = torch.arange(1, len(x) + 1, dtype=F64) / len(x)
            # Kolmogorov and Smirnov's statistic exceeds 1.95 with probability 0.001.
            assert (cdf - steps).abs().max().item() * math.sqrt(len(x)) < 1.95


@pytest.mark.parametrize("kind", BASES)
def test_diffusing_is_adding_noise(kind: str) -> None:
    prior = Diffusion(make_base(kind), 1, init=0.4)
    t, n = 2.5, 40_000
    noisy = prior.base.at(0.0).sample((n,)) + math.sqrt(2 * 0.4 * t) * torch.randn(n, 2, dtype=F64)
    exact = prior.at(t)
    torch.testing.assert_close(noisy.mean(0), exact.mean.detach(), rtol=0, atol=0.05)
    torch.testing.assert_close(noisy.var(0), exact.variance.detach(), rtol=0.04, atol=0)
    fourth = ((noisy - noisy.mean(0)) ** 4).mean(0)
    drawn = exact.sample((n,))
    torch.testing.assert_close(fourth, ((drawn - drawn.mean(0)) ** 4).mean(0), rtol=0.1, atol=0)


def test_mixture_moments_and_sampling_match_torchs_own() -> None:
    prior = make_base("mixture")
    ours = prior.at(0.0)
    c = prior.components()
    oracle = MixtureSameFamily(Categorical(logits=c.log_weights), Independent(Normal(c.means, c.variances.sqrt()), 1))
    z = torch.randn(9, 2, dtype=F64)
    torch.testing.assert_close(ours.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(ours.mean, oracle.mean)
    torch.testing.assert_close(ours.variance, oracle.variance)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_reach_every_parameter(kind: str) -> None:
    base = make_base(kind)
    prior = Diffusion(base, 3)
    z = torch.randn(32, 2, dtype=F64)
    prior.at(torch.rand(32, dtype=F64) * 8, torch.arange(32) % 3).log_prob(z).sum().backward()
    expected = {
        "standard": {"raw_diffusivity"},
        "vamp": {"raw_diffusivity", "base.raw_pseudo_inputs"},
    }.get(kind, {"raw_diffusivity", "base.logits", "base.means", "base.raw_scales"})
    assert {name for name, _ in prior.named_parameters()} == expected
    for name, parameter in prior.named_parameters():
        if (kind, name) == ("single", "base.logits"):
            continue  # the weight of a single component is 1
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().min() > 0, name
    if kind == "vamp":
        assert all(p.grad.abs().sum() > 0 for p in base.encoder.parameters())


def test_the_diffusivity_is_learned_from_near_zero() -> None:
    torch.manual_seed(3)
    prior = Diffusion(StandardNormal(4), 2)
    assert prior.diffusivity.tolist() == pytest.approx([0.01, 0.01])
    t, k = 4 * torch.rand(1000), torch.arange(1000) % 2
    true = torch.tensor([0.05, 0.6])
    z = torch.randn(1000, 4) * (1 + 2 * true[k] * t).sqrt()[:, None]
    optimizer = torch.optim.Adam(prior.parameters(), 0.05)
    for _ in range(150):
        loss = -prior.at(t, k).log_prob(z).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert prior.diffusivity.tolist() == pytest.approx(true.tolist(), rel=0.2)


def test_a_mixture_starts_near_the_standard_normal(generator: torch.Generator) -> None:
    prior = GaussianMixture(8, 200, spread=0.5, generator=generator)
    torch.testing.assert_close(prior.at(0.0).variance, torch.ones(8), rtol=0.2, atol=0)
    torch.testing.assert_close(prior.at(0.0).mean, torch.zeros(8), rtol=0, atol=0.2)
    torch.testing.assert_close(prior.scales, torch.full((200, 8), math.sqrt(0.5)))
    torch.testing.assert_close(prior.weights, torch.full((200,), 1 / 200))
    twin = GaussianMixture(8, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin.means, prior.means)


def test_vamp_is_the_mixture_of_its_posteriors() -> None:
    prior = make_base("vamp")
    posterior = prior.encoder(prior.pseudo_inputs)
    z = torch.randn(7, 2, dtype=F64)
    expected = posterior.log_prob(z[:, None]).logsumexp(-1) - math.log(4)
    torch.testing.assert_close(prior.at(3.0).log_prob(z), expected)


def test_pseudo_inputs_stay_in_the_unit_interval() -> None:
    frames = torch.tensor([0.0, 1.0, 0.25, 0.5]).reshape(1, 1, 2, 2)
    prior = VampPrior(MLPEncoder((1, 2, 2), 2, ()), frames)
    torch.testing.assert_close(prior.pseudo_inputs, frames.clamp(0.01, 0.99))
    with torch.no_grad():
        prior.raw_pseudo_inputs.mul_(1e4)
    assert prior.pseudo_inputs.min() >= 0 and prior.pseudo_inputs.max() <= 1
    noise = VampPrior(
        MLPEncoder((1, 2, 2), 2, ()), count=3, shape=(1, 2, 2), generator=torch.Generator().manual_seed(0)
    )
    twin = VampPrior(MLPEncoder((1, 2, 2), 2, ()), count=3, shape=(1, 2, 2), generator=torch.Generator().manual_seed(0))
    assert noise.pseudo_inputs.shape == (3, 1, 2, 2) and torch.equal(noise.pseudo_inputs, twin.pseudo_inputs)


def test_vamp_borrows_its_encoder() -> None:
    encoder = MLPEncoder((1, 2, 2), 2, ())
    prior = VampPrior(encoder, count=3, shape=(1, 2, 2))
    assert prior.encoder is encoder
    assert set(prior.state_dict()) == {"raw_pseudo_inputs"}
    model = torch.nn.ModuleDict({"encoder": encoder, "prior": prior})
    twin = copy.deepcopy(model)
    assert twin["prior"].encoder is twin["encoder"]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", BASES)
def test_dtype_follows_the_module(kind: str, dtype: torch.dtype) -> None:
    prior = Diffusion(make_base(kind, dtype=dtype), 2)
    distribution = prior.at(torch.rand(3, dtype=F64), 1)
    assert prior.diffusivity.dtype == dtype
    assert distribution.sample().dtype == distribution.log_prob(torch.zeros(2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", BASES)
def test_config_rebuilds_the_same_prior(kind: str) -> None:
    for prior in (make_base(kind), Diffusion(make_base(kind), 2, init=(0.1, 0.3))):
        config = json.loads(json.dumps(prior.config))
        encoder = getattr(getattr(prior, "base", prior), "encoder", None)
        twin = build(config, None if encoder is None else encoder.float())
        twin.double().load_state_dict(prior.state_dict())
        if encoder is not None:
            encoder.double()
        assert twin.config == prior.config
        z = torch.randn(3, 2, dtype=F64)
        torch.testing.assert_close(twin.at(1.0, 1).log_prob(z), prior.at(1.0, 1).log_prob(z))
