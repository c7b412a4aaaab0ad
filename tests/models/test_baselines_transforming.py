"""What the baselines that transform have for themselves, against known values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from baseline_cases import batch, make, seeded
from torch.distributions import Independent, Normal, kl_divergence

import flowfactor as ff
from flowfactor.models import PoFlow, TopographicVAE
from flowfactor.models.baselines.paper_code import softmax_divergence
from flowfactor.models.baselines.po_flow import wave_residual
from flowfactor.models.baselines.topographic_vae import roll

# TopographicVAE


def test_topographic_latents_are_student_t() -> None:
    """With mu = 0, sqrt(n) s of n terms is Student-t with n degrees of freedom: variance n / (n - 2)."""
    model = make("topographic-vae", latent_dim=8, window=2, spread=0, shift=0.0, capsule_dim=4)
    assert isinstance(model, TopographicVAE)
    generator = seeded()
    z, u = (torch.randn(5, 40_000, 8, generator=generator) for _ in range(2))
    rolled = torch.arange(5.0)[:, None, None].expand(5, 40_000, 2)
    with torch.no_grad():
        s = model.latents(z, u, rolled)[2] * math.sqrt(5)  # the middle frame, whose window holds 5 frames
    assert float(s.mean()) == pytest.approx(0, abs=0.01)
    assert float(s.var()) == pytest.approx(5 / 3, abs=0.05)
    quantile = float(s.abs().flatten()[:200_000].quantile(0.95))
    assert quantile == pytest.approx(2.571, abs=0.03)  # the two-sided 5% point of t with 5 degrees of freedom
    torch.testing.assert_close(
        model.latents(z + 1, u, rolled) * math.sqrt(5), model.latents(z, u, rolled) * math.sqrt(5)
        + math.sqrt(5) * model.latents(torch.ones_like(z), u, rolled), rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_latents_that_roll_share_their_scales() -> None:
    """If u rolls by one place a frame, so does s: the window then adds up the same numbers at every frame."""
    model = make("topographic-vae", latent_dim=8, window=1, spread=1, capsule_dim=8)
    z0, u0 = torch.randn(2, 8, generator=seeded()), torch.randn(2, 8, generator=seeded(1))
    z, u = (torch.stack([x.roll(i, -1) for i in range(4)]) for x in (z0, u0))
    with torch.no_grad():
        s = model.latents(z, u, torch.arange(4.0)[:, None, None].expand(4, 2, 1))
        for i in range(4):
            torch.testing.assert_close(s[i], s[0].roll(i, -1))
        still = model.latents(z, u, torch.zeros(4, 2, 1))
        expected = sum(u0.square().roll(e, -1) for e in (-1, 0, 1)) * 3
        torch.testing.assert_close(s[0], (z0 + model.mu) / (expected + 1e-6).sqrt())
    assert not torch.allclose(still, s)


def test_capsules_roll_by_whole_and_broken_amounts() -> None:
    x = torch.randn(3, 2, 5)
    for amount in (-7, -1, 0, 2, 5):
        torch.testing.assert_close(roll(x, torch.full((3, 2), float(amount))), x.roll(amount, -1))
    torch.testing.assert_close(roll(x, torch.full((3, 2), 0.25)), 0.75 * x + 0.25 * x.roll(1, -1))
    each = roll(x, torch.tensor([[0.0, 1.0]]).expand(3, 2))
    torch.testing.assert_close(each, torch.stack([x[:, 0], x[:, 1].roll(1, -1)], 1))


def test_transforming_rolls_the_capsules_of_the_acting_flow() -> None:
    model = make("topographic-vae", latent_dim=8, supervised=True).eval()
    assert model.capsule_dim == 4
    frames, _, k = batch()
    s = model.encode(frames[:, 0]).mean.unflatten(-1, (2, 4))
    made = model.transform(frames[:, 0], [0, 3], k)[:, 1]
    expected = torch.stack(
        [s[i].clone().index_copy(0, k[i : i + 1], s[i, k[i] : k[i] + 1].roll(3, -1)) for i in range(6)]
    )
    torch.testing.assert_close(made, model.decode(expected.flatten(1)))
    switched = model.transform(frames[:, 0], [0, 3], ff.Schedule([(0.0, 0), (1.0, 1)]))[:, 1]
    both = torch.stack([s[:, 0].roll(1, -1), s[:, 1].roll(2, -1)], 1)
    torch.testing.assert_close(switched, model.decode(both.flatten(1)))
    back = model.transform(frames[:, 0], [0, -1], 0)[:, 1]
    torch.testing.assert_close(back, model.decode(torch.stack([s[:, 0].roll(-1, -1), s[:, 1]], 1).flatten(1)))
    unsupervised = make("topographic-vae", latent_dim=8).eval()
    torch.testing.assert_close(
        unsupervised.transform(frames[:, 0], [0, 3], 0), unsupervised.transform(frames[:, 0], [0, 3], 1)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capsule_dim": 3}, "divide"),
        ({"capsule_dim": 4, "spread": 2}, "spread"),
        ({"window": -1}, "window"),
        ({"capsule_dim": 8, "supervised": True}, "dealt out"),
    ],
)
def test_wrong_capsules_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("topographic-vae", latent_dim=8, **settings)


# PoFlow


class PlaneWave(ff.potentials.Potential):
    """sin(n.z - |n| c t): solves the wave equation with speed c."""

    def __init__(self, dim: int, speed: float) -> None:
        super().__init__(dim, 2)
        self.speed = speed

    def flow_potential(self, z, t, k):
        direction = torch.arange(1.0, z.shape[-1] + 1) * (k + 1)
        return torch.sin(z @ direction - direction.norm() * self.speed * t)


def test_a_wave_has_no_residual() -> None:
    wave = PlaneWave(3, 0.7)
    z, t, k = torch.randn(6, 3), torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1])
    right, wrong = (wave_residual(wave, z, t, k, torch.full((2,), c)) for c in (0.7, 1.0))
    torch.testing.assert_close(right, torch.zeros(6), atol=1e-3, rtol=0)
    # The other speed leaves (0.7^2 - 1) times the Laplacian.
    lap = wave.derivatives(z, t, k, laplacian="exact").laplacian
    torch.testing.assert_close(wrong, (0.49 - 1) * lap, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("potential", ["paper", "mlp"])
def test_the_wave_residual_is_that_of_finite_differences(potential: str) -> None:
    u = make("po-flow", potential=potential).potential.double()
    z, t, k = torch.randn(4, 4).double(), torch.rand(4).double() * 3, torch.tensor([0, 1, 1, 0])
    e = 1e-4
    with torch.no_grad():
        u_tt = (u(z, t + e, k) - 2 * u(z, t, k) + u(z, t - e, k)) / e**2
        lap = sum((u(z + e * d, t, k) - 2 * u(z, t, k) + u(z - e * d, t, k)) / e**2 for d in torch.eye(4).double())
    speed = torch.tensor([0.5, 2.0]).double()
    torch.testing.assert_close(wave_residual(u, z, t, k, speed), u_tt - speed[k].square() * lap, atol=1e-5, rtol=1e-3)


def test_po_flow_takes_one_gradient_step_a_frame() -> None:
    model = make("po-flow").eval()
    assert isinstance(model, PoFlow)
    frames, t, k = batch()
    z = model.encode(frames[:, 0]).mean
    made = model.transform(frames[:, 0], t, k)
    for i in range(4):
        z = z + model.potential.derivatives(z, float(i), k).gradient
        torch.testing.assert_close(made[:, i + 1], model.decode(z))


def test_po_flow_loss_adds_up() -> None:
    frames, t, k = batch()
    weights = {"wave_weight": 0.0, "jacobian_weight": 0.0, "match_weight": 0.0}
    names = {"wave_weight": "wave", "jacobian_weight": "variation", "match_weight": "match"}
    base = make("po-flow", **weights)(frames, t, k, generator=seeded())
    for weight, name in names.items():
        terms = make("po-flow", **(weights | {weight: 2.0}))(frames, t, k, generator=seeded())
        extra = getattr(terms, name) + (terms.start if name == "wave" else 0)
        torch.testing.assert_close(
            terms.loss - base.loss, (-2 if name == "variation" else 2) * extra, rtol=1e-3, atol=1e-4
        )
    with pytest.raises(TypeError, match="one flow a sequence"):
        make("po-flow")(frames, t, torch.ones(6, 2))
    with pytest.raises(ValueError, match="2 frames"):
        make("po-flow")(frames[:, :1], t[:1], k)


# The paper's code


def test_the_papers_code_step_by_step() -> None:
    """The quirks, written out by automatic differentiation for a batch of one transformation, as the code has them."""
    model = make("paper-code")
    frames, t, _ = batch(3)
    with torch.no_grad():
        model.prior_scale.copy_(torch.rand(2, 32) + 0.5)
    terms = model(frames, t, 1, generator=seeded())
    q = model.encode(frames[:, 0])
    z = q.mean + q.stddev * torch.randn(6, 4, generator=seeded())
    rho_t, rho = Normal(q.mean, q.stddev).log_prob(z), Normal(0.0, 1.0).log_prob(z)
    hj = density = reconstruction = 0.0
    reconstruction = model.decoder(z).log_prob(frames[:, 0]).mean()
    for step in (1, 2, 3):
        z = z.detach().requires_grad_()
        time = torch.tensor(float(step), requires_grad=True)
        u = model.potential(z, time.expand(6), 1)
        (u_t,) = torch.autograd.grad(u.sum(), time, create_graph=True)  # summed over the batch
        (u_z,) = torch.autograd.grad(u.sum(), z, create_graph=True)
        (u_zz,) = torch.autograd.grad(u_z.sum(), z, retain_graph=True)  # the Hessian times ones
        if step == 1:
            at_rest = model.potential.derivatives(z, 0.0, 1).gradient.square().mean()
            start = at_rest + model.force(z, 0.0, 1).square().mean()
        hj = hj + (u_t + 0.5 * u_z.square().mean() + model.force(z, float(step), 1).square()).square().mean()
        spread = 1.0 if step == 1 else 1 / (model.prior_scale[1, step - 1].square() + 1e-5)
        rho_t, rho = rho_t - (1 + u_zz).abs().log(), rho - torch.as_tensor(1 + spread).log()
        p, r = rho.exp().softmax(-1), rho_t.exp().softmax(-1)
        density = density + (p * (p / r).log()).sum(-1).mean()
        z = z + u_z
        reconstruction = reconstruction + model.decoder(z).log_prob(frames[:, step]).mean()
    for found, expected in (
        (terms.hj, hj), (terms.start, start), (terms.density, density), (terms.reconstruction, reconstruction),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.loss, terms.kl - reconstruction + density + hj + start, rtol=1e-4, atol=1e-4)


def test_means_over_the_batch_are_those_of_each_transformation() -> None:
    model = make("paper-code").eval()
    frames, t, k = batch(1)
    with torch.no_grad():
        z = torch.randn(6, 4)
        q = Independent(Normal(torch.zeros(6, 4), torch.ones(6, 4)), 1)
        half = Independent(Normal(torch.zeros(3, 4), torch.ones(3, 4)), 1)
        whole = model._steps(q, z, k, 1)
        parts = [model._steps(half, z[k == i], k[k == i], 1) for i in range(2)]
    for both, one, two in list(zip(whole, *parts, strict=True))[1:]:
        torch.testing.assert_close(both, (one + two) / 2)
    with pytest.raises(ValueError, match="unit steps"):
        model(frames, t * 0.5, k)
    with pytest.raises(ValueError, match="max_steps"):
        make("paper-code", max_steps=1)(*batch(2))


def test_the_priors_gradient_is_never_zeroed() -> None:
    model = make("paper-code")
    frames, t, k = batch(2)
    gradients = []
    for seed in (0, 1):
        model.zero_grad()
        total = model.scale_gradient.clone()
        model(frames, t, k, generator=seeded(seed)).loss.backward()
        gradients.append(model.prior_scale.grad.clone())
        torch.testing.assert_close(gradients[-1], model.scale_gradient)
    fresh = make("paper-code")
    fresh(frames, t, k, generator=seeded(1)).loss.backward()
    torch.testing.assert_close(gradients[1], gradients[0] + fresh.prior_scale.grad)
    torch.testing.assert_close(total, gradients[0])


def test_the_codes_divergence_is_a_softmax_over_coordinates() -> None:
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(softmax_divergence(a, a), torch.zeros(5), atol=1e-6, rtol=0)
    p, r = (torch.distributions.Categorical(logits=x.exp()) for x in (b, a))
    torch.testing.assert_close(softmax_divergence(a, b), kl_divergence(p, r))


def test_a_part_of_ones_own_has_to_be_handed_over(tmp_path: Path) -> None:
    parts = make("po-flow")
    model = PoFlow(parts.encoder, parts.decoder, PlaneWave(4, 1.0)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="potential=") as error:
        PoFlow.from_pretrained(tmp_path)
    assert "user's own" in str(error.value)
    again = PoFlow.from_pretrained(tmp_path, potential=PlaneWave(4, 1.0))
    frames, t, k = batch()
    torch.testing.assert_close(again.transform(frames[:, 0], t, k), model.transform(frames[:, 0], t, k))
    with pytest.raises(ValueError, match="no parts"):
        PoFlow.from_pretrained(tmp_path, prior=None)
    with pytest.raises(ValueError, match="size"):
        PoFlow(parts.encoder, parts.decoder, PlaneWave(3, 1.0))


def test_long_sequences_do_not_bring_a_capsule_round() -> None:
    for places, frames, speed in ((4, 9, 4 / 9), (8, 5, 1.0), (8, None, 1.0)):
        model = make("topographic-vae", latent_dim=16, capsule_dim=places, num_frames=frames)
        rolled = model._rolled(0, torch.arange(9.0), 1)
        torch.testing.assert_close(rolled[:, 0, 0], speed * torch.arange(9.0))


def test_the_mean_of_a_wide_posterior_has_the_scale_of_its_draws() -> None:
    model = make("topographic-vae", latent_dim=8)
    q = model.encode(torch.rand(3, 1, 8, 8))
    draws = q.rsample((4000,))
    assert draws.shape == (4000, 3, 8) and q.batch_shape == (3,) and q.event_shape == (8,)
    assert bool((draws.median(0).values / q.mean - 1).abs().max() < 0.5)
