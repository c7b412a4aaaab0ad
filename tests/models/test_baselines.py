"""What each baseline has for itself, against known values."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from baseline_cases import batch, make, seeded
from torch.distributions import Independent, Laplace, Normal, kl_divergence

import flowfactor as ff
from flowfactor.models import BetaVAE, FactorVAE
from flowfactor.models.baselines.factor_vae import permute_coordinates
from flowfactor.models.baselines.slow_vae import transition_divergence

# VAE and beta-VAE


def test_the_vae_is_the_sum_of_its_frames() -> None:
    model = make("vae").eval()
    frames, t, _ = batch()
    q = model.encode(frames)
    kl = kl_divergence(q, Independent(Normal(torch.zeros(4), torch.ones(4)), 1)).sum(1).mean()
    terms = model(frames, t, generator=seeded())
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.loss, terms.kl - terms.reconstruction)
    torch.testing.assert_close(terms.bound, terms.reconstruction - terms.kl)
    one = sum(model.log_likelihood(frames[:, [i]], t[[i]], samples=256, generator=seeded(i)) for i in range(5))
    torch.testing.assert_close(model.log_likelihood(frames, t, samples=256, generator=seeded(9)), one, atol=0.2, rtol=0)


def test_a_few_frames_estimate_the_bound_without_bias() -> None:
    model = make("vae", frames_per_step=2)
    frames, t, _ = batch()
    generator = seeded()
    with torch.no_grad():
        few = torch.stack([model(frames, t, generator=generator).kl for _ in range(400)])
        whole = model.eval()(frames, t, generator=generator).kl
    assert float(few.mean()) == pytest.approx(float(whole), abs=4 * float(few.std()) / 20)
    assert few.std() > 0


def test_beta_scales_the_divergence_alone() -> None:
    frames, t, _ = batch()
    terms = []
    for beta in (1.0, 4.0):
        model = make("beta-vae", beta=beta)
        assert isinstance(model, BetaVAE)
        terms.append(model(frames, t, generator=seeded()))
    torch.testing.assert_close(terms[1].loss - terms[0].loss, 3 * terms[0].kl)
    torch.testing.assert_close(terms[1].bound, terms[0].bound)
    torch.testing.assert_close(make("vae")(frames, t, generator=seeded()).loss, terms[0].loss)
    assert BetaVAE.__init__.__kwdefaults__["beta"] > 1


# FactorVAE


def test_the_discriminator_finds_the_total_correlation() -> None:
    """Normal pairs with correlation r: TC = -ln(1 - r^2) / 2, here 0.83 nats; independent ones have none."""
    found = {}
    for r in (0.0, 0.9):
        model = make("factor-vae", latent_dim=2, hidden=(32, 32))
        assert isinstance(model, FactorVAE)
        optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        mix = torch.linalg.cholesky(torch.tensor([[1.0, r], [r, 1.0]])).T
        generator = seeded()
        for _ in range(400):
            codes, others = (torch.randn(256, 2, generator=generator) @ mix for _ in range(2))
            optimizer.zero_grad()
            model.discriminator_loss(codes, others, generator).backward()
            optimizer.step()
            schedule.step()
        found[r] = float(model.total_correlation(torch.randn(20_000, 2, generator=generator) @ mix))
    assert found[0.0] == pytest.approx(0.0, abs=0.05)
    assert found[0.9] == pytest.approx(-0.5 * math.log(1 - 0.81), abs=0.12)


def test_permuting_keeps_the_marginals_and_breaks_the_dependence() -> None:
    x = torch.randn(5000, 1)
    permuted = permute_coordinates(torch.cat([x, x], 1), seeded())
    assert torch.equal(permuted[:, 0].sort().values, x[:, 0].sort().values)
    assert abs(float(torch.corrcoef(permuted.T)[0, 1])) < 0.06


def test_each_player_gets_the_gradient_of_its_own_loss() -> None:
    frames, t, _ = batch()
    gamma = 7.0
    model = make("factor-vae", gamma=gamma, hidden=(16,))
    terms = model(frames, t, generator=seeded())
    own = list(model.discriminator.parameters())
    theirs = [p for group in model.parameter_groups()[:1] for p in group["params"]]
    assert len(own) + len(theirs) == len(list(model.parameters()))
    vae = terms.kl - terms.reconstruction + gamma * frames.shape[1] * terms.total_correlation
    torch.testing.assert_close(terms.loss, vae + terms.discriminator)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, theirs + own, retain_graph=True),
        torch.autograd.grad(vae, theirs, retain_graph=True)
        + torch.autograd.grad(terms.discriminator, own, retain_graph=True),
    )
    assert torch.autograd.grad(vae, own, allow_unused=True, retain_graph=True) == (None,) * len(own)
    assert torch.autograd.grad(terms.discriminator, theirs, allow_unused=True) == (None,) * len(theirs)
    with pytest.raises(ValueError, match="2 sequences"):
        model(frames[:1], t, 0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_one_optimiser_trains_both_players(tmp_path: Path) -> None:
    """The steps of the training are those of two separate Adams."""
    data = ff.data.TransformedImages(
        torch.rand(8, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 10), "grow": (ff.data.Scale(), 1, 1.2)}, steps=2
    )
    models = [make("factor-vae", hidden=(16,)) for _ in range(2)]
    schedule = ff_training().LearningRateSchedule(steps=4, kind="constant")
    module = ff_training().FlowModule(models[0], schedule, learning_rate=1e-3, betas=(0.8, 0.99))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=ff_training().SequenceData(data, 4))

    vae, discriminator = (group["params"] for group in models[1].parameter_groups())
    optimizers = torch.optim.Adam(vae, 1e-3, (0.8, 0.99)), torch.optim.Adam(discriminator, 1e-3, (0.5, 0.9))
    generator = seeded()
    loader = ff.data.SequenceLoader(data, 4, seed=0)
    for item in [item for _ in range(2) for item in loader][:4]:
        terms = models[1](item["frames"], item["t"], item["k"], generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        terms.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def ff_training():
    import flowfactor.training as training

    return training


# SlowVAE


@pytest.mark.parametrize("rate", [0.5, 6.0])
def test_the_transition_divergence_is_that_of_monte_carlo(rate: float) -> None:
    generator = seeded()
    mean = torch.randn(3, 2, 4, generator=generator)
    std = torch.rand(3, 2, 4, generator=generator) + 0.05
    q = Independent(Normal(mean, std), 1)
    exact = transition_divergence(q, rate, slice(1, None), slice(None, -1))
    z = mean + std * torch.randn(40_000, 3, 2, 4, generator=generator)
    log_q = Normal(mean, std).log_prob(z)[:, 1:]
    sampled = (log_q - Laplace(z[:, :-1], 1 / rate).log_prob(z[:, 1:])).sum(-1)
    error = sampled.std(0) / 200
    assert exact.shape == (2, 2)
    assert bool(((exact - sampled.mean(0)).abs() < 5 * error).all())
    assert bool((exact > 0).all())


def test_the_transition_divergence_is_least_near_the_frame_before() -> None:
    at = torch.linspace(-1, 1, 21)
    q = Independent(Normal(torch.stack([torch.zeros(21), at]).unsqueeze(-1), torch.full((2, 21, 1), 0.1)), 1)
    values = transition_divergence(q, 6.0, slice(1, None), slice(None, -1))[0]
    assert int(values.argmin()) == 10
    torch.testing.assert_close(values, values.flip(0))
    assert float(values[-1] - values[-2]) == pytest.approx(0.6, abs=1e-3)  # linear far out, with the rate as slope


def test_slow_weights_scale_their_divergences() -> None:
    frames, t, _ = batch()
    terms = [
        make("slow-vae", beta=b, gamma=g).eval()(frames, t, generator=seeded()) for b, g in ((1, 1), (1, 3), (2, 1))
    ]
    transition, normal = (terms[1].loss - terms[0].loss) / 2, terms[2].loss - terms[0].loss
    torch.testing.assert_close(transition + normal, terms[0].kl)
    torch.testing.assert_close(terms[0].loss, -terms[0].bound)
    assert transition > 0 and normal > 0


def test_on_a_pair_training_averages_both_orders_of_the_chain() -> None:
    model = make("slow-vae")
    frames, t, _ = batch(1)
    training = model.train()(frames, t, generator=seeded()).loss
    there, back = (model.eval()(f, t, generator=seeded()) for f in (frames, frames.flip(1)))
    orders = 0.5 * ((there.loss + there.reconstruction) + (back.loss + back.reconstruction))
    # Its draw is consumed after the choice of the frames, hence the reconstruction of its own.
    reconstruction = model.train()(frames, t, generator=seeded()).reconstruction
    torch.testing.assert_close(training + reconstruction, orders)
    with pytest.raises(ValueError, match="2 frames"):
        model(frames[:, :1], t[:1], 0)
    with pytest.raises(ValueError, match="frames_per_step"):
        make("slow-vae", frames_per_step=1)


# All


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vea", {}, "unknown baseline"),
        ("vae", {"gamma": 1.0}, "no setting gamma"),
        ("beta-vae", {"beta": -1.0}, "beta"),
        ("factor-vae", {"gamma": float("nan")}, "gamma"),
        ("factor-vae", {"hidden": (0,)}, "hidden"),
        ("slow-vae", {"rate": 0.0}, "rate"),
        ("po-flow", {"wave_weight": -1.0}, "wave_weight"),
        ("po-flow", {"potential": "cubic"}, "potential"),
        ("vae", {"frames_per_step": 0}, "frames_per_step"),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **settings)


@pytest.mark.parametrize(
    "name", ["vae", "slow-vae", "topographic-vae", "po-flow", "paper-code", "factor-vae", "beta-vae"]
)
def test_a_little_training_lowers_the_loss(name: str) -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[:, :, 2:6, 3:5] = torch.tensor([0.4, 0.6, 0.8, 1.0])[:, None, None, None]
    data = ff.data.TransformedImages(
        images, {"turn": (ff.data.Rotate(), 0, 80), "grow": (ff.data.Scale(), 1, 1.8)}, steps=3
    )
    made = data.batch([0, 1, 2, 3, 0, 1, 2, 3], torch.tensor([0] * 4 + [1] * 4))
    model = make(name, latent_dim=8, **({"hidden": (32, 32)} if name == "factor-vae" else {}))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bounds = []
    for _ in range(30):
        terms = model(made["frames"], made["t"], made["k"], generator=None)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        bounds.append(terms.reconstruction.item())
    assert sum(bounds[-5:]) > sum(bounds[:5]) + 25
