"""Room at rest: dimensions that the encoder does not write cost no divergence, and the bounds stay bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SIZES, small_run
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import flowfactor as ff
from flowfactor import objectives
from flowfactor.encoders import AugmentedEncoder, Gaussian, MLPDecoder, MLPEncoder
from flowfactor.priors import Augmented, Diffusion, GaussianMixture, StandardNormal, VampPrior
from flowfactor.training import load_run, train
from flowfactor.training.evaluation import _codes

SHAPE, K, D, A, SCALE = (1, 8, 8), 2, 4, 3, 0.05
F64 = torch.float64
PRIORS = ["normal", "mixture", "vamp", "diffusion", "diffusion-mixture"]


def vae(**settings: Any) -> ff.models.FlowFactorizedVAE:
    torch.manual_seed(0)
    settings = {"augment_dim": A, "field": "gradient", "hidden": (8, 8), **settings}
    return ff.models.build_vae(SHAPE, K, D, **settings)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 4, *SHAPE, generator=generator).to(dtype), torch.arange(4.0), torch.tensor([0, 0, 0, 1, 1, 1])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_room_a_model_is_what_it_was() -> None:
    bare, none = vae(augment_dim=0), vae(augment_dim=0, augment_scale=7.0)
    assert bare.config() == none.config() and type(bare.prior) is StandardNormal and bare.code_dim == D
    assert "augment" not in str(bare.config()) and not any("encoder.encoder" in name for name in bare.state_dict())
    torch.testing.assert_close(bare(*batch(), generator=seeded()).loss, none(*batch(), generator=seeded()).loss)


def test_the_encoder_leaves_the_room_at_rest_and_writes_the_rest() -> None:
    model = vae(augment_scale=0.1)
    q, codes = model.encode(batch()[0]), model.encoder.encoder(batch()[0])
    assert q.event_shape == (D + A,) and (model.code_dim, model.flow.dim, model.decoder.latent_dim) == (D, D + A, D + A)
    torch.testing.assert_close(q.mean, torch.cat([codes.mean, torch.zeros(6, 4, A)], -1), rtol=0, atol=0)
    torch.testing.assert_close(q.stddev, torch.cat([codes.stddev, torch.full((6, 4, A), 0.1)], -1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [SCALE, 0.1, 0.49, 2.0])  # squared in double precision, the third has another root
def test_the_divergence_of_the_room_is_exactly_nought(scale: float, dtype: torch.dtype) -> None:
    model = vae(augment_scale=scale).to(dtype)
    q, p = model.encode(batch(dtype)[0][:, 0]), model.prior.at(0.0)
    room = kl_divergence(q.base_dist, p.base_dist)[..., D:]
    assert room.shape == (6, A) and bool((room == 0).all())
    codes = kl_divergence(model.encoder.encoder(batch(dtype)[0][:, 0]), StandardNormal(D).to(dtype).at(0.0))
    torch.testing.assert_close(objectives.start_divergence(q, model.prior, q.mean, 0), codes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_room_cancels_in_every_sample(prior: str) -> None:
    model = vae(prior=prior).double()
    base: Any = model.prior.base.base if isinstance(model.prior, Diffusion) else model.prior.base
    frames = batch(F64)[0][:, 0]
    q = model.encode(frames)
    z0 = objectives.draw(q, (5,), seeded())
    ratio = q.log_prob(z0) - model.prior.at(0.0, 1).log_prob(z0)
    expected = model.encoder.encoder(frames).log_prob(z0[..., :D]) - base.at(0.0).log_prob(z0[..., :D])
    torch.testing.assert_close(ratio, expected, rtol=0, atol=1e-10)


class Linear:
    """A linear flow, encoder and decoder: all marginal densities of frames are normal."""

    def __init__(self, objective: str) -> None:
        g = torch.Generator().manual_seed(3)
        n, self.times, self.sigma, self.scale = 4, torch.tensor([0.0, 1.0, 2.0]), 0.8, 0.3
        S = 0.08 * torch.randn(n, n, generator=g, dtype=F64)
        # The flow widens, and the encoder is wide: q is never narrower than p, so that importance weights have a variance.
        self.S, self.b = (S + S.mT) / 2 + 0.15 * torch.eye(n, dtype=F64), 0.2 * torch.randn(n, generator=g, dtype=F64)
        field = ff.potentials.QuadraticPotential(n, 1, self.S, self.b)
        prior: Any = Augmented(StandardNormal(2), 2, self.scale)
        torch.manual_seed(4)
        encoder = MLPEncoder((1, 2, 2), 2, ())
        nn.init.constant_(encoder.std_head.bias, 1.0)
        self.model = ff.models.FlowFactorizedVAE(
            AugmentedEncoder(encoder, 2, self.scale),
            MLPDecoder(n, (1, 2, 2), (), likelihood=Gaussian(self.sigma, bounded=False)),
            ff.LatentFlow(field, ff.Solver("rk4", step_size=0.25)),
            Diffusion(prior, 1, 0.01) if objective == "marginal" else None,
            objective=objective,
        ).to(F64)
        self.frames = torch.rand(3, 3, 1, 2, 2, generator=g, dtype=F64)
        self.start = torch.tensor([1.0, 1.0, self.scale**2, self.scale**2], dtype=F64)

    def step(self, t: float) -> tuple[Tensor, Tensor]:
        """The flow's map over a time t: z_t = M z_0 + c."""
        whole = torch.zeros(5, 5, dtype=F64)
        whole[:4, :4], whole[:4, 4] = self.S, self.b
        made = torch.linalg.matrix_exp(t * whole)
        return made[:4, :4], made[:4, 4]

    def truth(self, objective: str) -> Tensor:
        """ln p(x_0..T), or the sum of ln p_t(x_t), of each sequence."""
        head: Any = self.model.decoder.body[-1]
        x, W, d = self.frames.flatten(2), head.weight.detach(), head.bias.detach()
        noise = self.sigma**2 * torch.eye(4, dtype=F64)
        if objective == "marginal":
            spread = [torch.diag(self.start + 2 * 0.01 * float(t)) for t in self.times]
            each = [MultivariateNormal(d, W @ P @ W.mT + noise) for P in spread]
            return sum(p.log_prob(x[:, s]) for s, p in enumerate(each))  # type: ignore[return-value]
        maps, shifts = zip(*(self.step(float(t)) for t in self.times), strict=True)
        G, c = torch.cat([W @ M for M in maps]), torch.cat([W @ shift + d for shift in shifts])
        covariance = G @ torch.diag(self.start) @ G.mT + self.sigma**2 * torch.eye(12, dtype=F64)
        return MultivariateNormal(c, covariance).log_prob(x.flatten(1))


@pytest.mark.parametrize("objective", ["path", "marginal"])
def test_bounds_stay_below_the_truth_and_reach_it(objective: str) -> None:
    case = Linear(objective)
    truth, model = case.truth(objective), case.model.eval()
    with torch.no_grad():
        one = model.log_likelihood(case.frames.repeat(300, 1, 1, 1, 1), case.times, 0, 1, generator=seeded())
        many = model.log_likelihood(case.frames, case.times, 0, 100_000, generator=seeded(), chunk=100_000)
    assert one.mean() + 4 * one.std() / len(one) ** 0.5 < truth.mean()
    torch.testing.assert_close(many, truth, rtol=0, atol=0.06)


@pytest.mark.parametrize("objective", ["path", "marginal"])
def test_the_bound_is_that_of_a_computation_by_hand(objective: str) -> None:
    model = vae(objective=objective, prior="diffusion", solver={"method": "rk4", "step_size": 0.5}).double().eval()
    frames, t, k = batch(F64)
    with torch.no_grad():
        terms = model(frames, t, k, generator=seeded())
        code = model.encoder.encoder(frames[:, 0])
        noise = torch.randn(6, D + A, generator=seeded(), dtype=F64)
        x, y = code.mean + code.stddev * noise[:, :D], SCALE * noise[:, D:]
        path = model.flow(torch.cat([x, y], -1), t, k, log_det=True)
        assert (path.z[-1, :, D:] - y).abs().max() > 0.01  # the flow writes the room
        log_p = torch.stack([model.decoder(path.z[s]).log_prob(frames[:, s]) for s in range(4)]).sum(0)
        kl = kl_divergence(code, StandardNormal(D).double().at(0.0))
        if objective == "marginal":
            rate = model.prior.diffusivity[k]
            log_q0 = code.log_prob(x) + torch.distributions.Normal(0.0, SCALE).log_prob(y).sum(-1)
            start = torch.tensor([1.0] * D + [SCALE**2] * A, dtype=F64)
            width = (start + 2 * rate[:, None] * t[:, None, None]).sqrt()
            log_pt = torch.distributions.Normal(torch.zeros_like(width), width).log_prob(path.z).sum(-1)
            kl = (log_q0 - path.log_det - log_pt).sum(0)
    torch.testing.assert_close(terms.bound, (log_p - kl).mean())


@pytest.mark.parametrize("mode", ["adjoint", "checkpoint"])
def test_every_gradient_mode_writes_the_room_alike(mode: str) -> None:
    found = []
    for gradient in ("direct", mode):
        solver = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8, "gradient": gradient}
        model = vae(solver=solver, objective="marginal", prior="diffusion").double()
        model(*batch(F64), generator=seeded()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None and bool(gradient.any()), name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("prior", PRIORS)
def test_saved_and_loaded_with_its_room(tmp_path: Path, prior: str) -> None:
    model = vae(prior=prior, augment_scale=0.2).eval()
    model.save_pretrained(tmp_path)
    again = ff.models.load_pretrained(tmp_path)
    frames, t, k = batch()
    assert again.config() == model.config() and again.code_dim == D
    assert again.encoder.at_rest == again.prior.at_rest == (A, 0.2)
    torch.testing.assert_close(again.transform(frames[:, 0], t, k), model.transform(frames[:, 0], t, k), rtol=0, atol=0)
    made = [m(frames, t, k, generator=seeded()).bound for m in (model, again)]
    torch.testing.assert_close(*made, rtol=0, atol=0)
    if prior == "vamp":
        assert isinstance(again.prior.base, VampPrior) and again.prior.base.encoder is again.encoder.encoder


@pytest.mark.parametrize("estimator", ["balanced", "gumbel", "enumerate"])
def test_weakly_supervised_models_have_room(estimator: str) -> None:
    model = vae(supervision="weak", num_frames=4, estimator=estimator)
    frames, t, _ = batch()
    model(frames, t).loss.backward()
    head: Any = model.decoder
    assert any(bool(p.grad.any()) for p in head.parameters() if p.grad is not None)
    assert model.eval().log_likelihood(frames, t, samples=2).shape == (6,)


@pytest.mark.parametrize("control", ["single", "double"])
def test_sparse_models_have_room(tmp_path: Path, control: str) -> None:
    torch.manual_seed(0)
    model = ff.models.build_sparse_vae(SHAPE, K, D, augment_dim=A, control=control, hidden=(8, 8))
    frames, t, _ = batch()
    model(frames, t).loss.backward()
    again = ff.models.load_pretrained(model.eval().save_pretrained(tmp_path))
    assert (again.code_dim, again.flow.dim) == (D, D + A)
    made = [m.log_likelihood(frames, t, samples=3, generator=seeded()) for m in (model, again)]
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_what_has_no_room_refuses_it_by_name() -> None:
    for name in ff.models.baselines.build.BASELINES:
        with pytest.raises(ValueError, match=rf"{name} has no setting augment_dim"):
            ff.models.build_model(name, SHAPE, K, 6, augment_dim=2)
    plain, roomy = MLPEncoder(SHAPE, D, (8,)), AugmentedEncoder(MLPEncoder(SHAPE, D, (8,)), A)
    flow = ff.LatentFlow(ff.potentials.MLPPotential(D + A, K, (8, 8)))
    decoder = MLPDecoder(D + A, SHAPE, (8,))
    for prior in (StandardNormal(D + A), Augmented(StandardNormal(D), A, 0.1), Augmented(StandardNormal(D + 1), A - 1)):
        with pytest.raises(ValueError, match=r"the encoder leaves at rest 3 at scale 0\.05, and the prior .*build_vae"):
            ff.models.FlowFactorizedVAE(roomy, decoder, flow, prior)
    with pytest.raises(ValueError, match=r"at rest none, and the prior 3 at scale 0\.05"):
        ff.models.FlowFactorizedVAE(MLPEncoder(SHAPE, D + A, (8,)), decoder, flow, Augmented(StandardNormal(D), A))
    assert ff.models.FlowFactorizedVAE(roomy, decoder, flow, VampPrior(roomy, count=2, shape=SHAPE)).code_dim == D
    assert ff.models.FlowFactorizedVAE(roomy, decoder, flow).prior.at_rest == (A, SCALE)
    with pytest.raises(ValueError, match="latents of size 4 and the flow of size 7"):
        ff.models.FlowFactorizedVAE(plain, decoder, flow)


class Joint(MLPEncoder):
    def forward(self, x: Tensor) -> Any:
        q = super().forward(x)
        return MultivariateNormal(q.mean, torch.diag_embed(q.variance))


def test_settings_of_the_room_that_do_not_fit_are_refused() -> None:
    for count, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="augment_dim must be"):
            vae(augment_dim=count)
    for scale in (0.0, -0.1, float("inf"), "narrow", True):
        with pytest.raises(ValueError, match="scale of dimensions at rest must be a finite number above 0"):
            vae(augment_scale=scale)
    with pytest.raises(ValueError, match="beside the prior's name: augment_dim=A"):
        vae(prior="augmented")
    with pytest.raises(TypeError, match=r"got Diffusion; one that diffuses .* Diffusion\(Augmented\(base"):
        Augmented(Diffusion(StandardNormal(2), 1), 1)
    with pytest.raises(TypeError, match="must say the size of its codes as latent_dim; got Flatten"):
        AugmentedEncoder(nn.Flatten(), 1)
    with pytest.raises(TypeError, match="got MultivariateNormal from Joint: leave augment_dim at 0"):
        AugmentedEncoder(Joint(SHAPE, D, (8,)), 1)(torch.rand(2, *SHAPE))


def test_own_priors_have_room_if_they_are_gaussian() -> None:
    class Wide(ff.priors.GaussianPrior):
        def components(self) -> ff.priors.Components:
            return ff.priors.Components(torch.zeros(1), torch.zeros(1, self.dim), torch.full((1, self.dim), 4.0))

    class Strange(ff.priors.Prior):
        pass

    ff.register_prior("wide-of-room")(Wide)
    ff.register_prior("strange-of-room")(Strange)
    try:
        assert vae(prior="wide-of-room").prior.at(0.0).stddev.tolist() == pytest.approx([2.0] * D + [SCALE] * A)
        with pytest.raises(
            TypeError, match=r"got Strange; a prior of your own is one where it derives from GaussianPrior"
        ):
            vae(prior="strange-of-room")
    finally:
        for name in ("wide-of-room", "strange-of-room"):
            ff.registry._KNOWN["prior"].pop(name)


def test_components_keep_the_room_apart_from_the_base() -> None:
    base = GaussianMixture(2, 3)
    made = Augmented(base, 2, 0.5).components()
    torch.testing.assert_close(made.means, torch.cat([base.means, torch.zeros(3, 2)], -1))
    torch.testing.assert_close(made.variances, torch.cat([base.scales.square(), torch.full((3, 2), 0.25)], -1))


def turning() -> ff.data.TransformedImages:
    flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
    return ff.data.TransformedImages(torch.rand(5, *SHAPE, generator=seeded()), flows, steps=2)


@torch.no_grad()
def test_latent_metrics_look_at_codes_alone() -> None:
    model, data = vae().eval(), turning()
    error = ff.metrics.latent_equivariance_error(model, data).mean
    for k in range(K):
        frames = data.batch(torch.arange(5), k)["frames"]
        codes = model.encoder.encoder(frames).mean
        path = model.path(model.encode(frames[:, 0]).mean, data.t, k).movedim(0, 1)
        assert path[..., D:].abs().max() > 0.01
        missed, moved = (codes - path[..., :D]).norm(dim=-1), (codes - codes[:, :1]).norm(dim=-1)
        assert float(error[k]) == pytest.approx(float(missed.sum() / moved.sum()), rel=1e-5)
    with pytest.raises(ValueError, match=r"room at rest .*take log_likelihood"):
        ff.metrics.paper_log_likelihood(model, data)
    assert ff.metrics.log_likelihood(model, data, samples=2).per_frame < 0


def test_a_single_dimension_is_searched_among_codes() -> None:
    class Brightens:
        """Dimension 1 makes a picture brighter, dimension 0 does nothing."""

        code_dim = 1

        def encode(self, x: Tensor) -> Any:
            return torch.distributions.Normal(torch.zeros(*x.shape[:-3], 2), 1.0)

        def decode(self, z: Tensor) -> Tensor:
            return z[..., 1, None, None, None].expand(*z.shape[:-1], *SHAPE)

    model, frames = Brightens(), torch.linspace(0, 1, 3).view(1, 3, 1, 1, 1).expand(2, 3, *SHAPE)
    assert ff.metrics.best_traversal(model, frames, torch.arange(3)).dimension == 0
    model.code_dim = 2
    assert ff.metrics.best_traversal(model, frames, torch.arange(3)).dimension == 1


def test_disentanglement_is_measured_on_codes() -> None:
    scenes = ff.data.Scenes("test", size=8, supersampling=1, steps=2, hues=4, scales=4, orientations=4)
    model = ff.models.build_vae(scenes.image_shape, scenes.num_flows, D, augment_dim=A, hidden=(8, 8))
    assert _codes(model, scenes, 20, 0)[0].shape == (20, D)


@pytest.mark.parametrize("method", ["ours", "sta"])
def test_a_run_with_room(tmp_path: Path, method: str) -> None:
    pytest.importorskip("sklearn")
    result = train(small_run(tmp_path, {**SIZES, "augment_dim": 2, "augment_scale": 0.1}, method))
    model, _ = load_run(tmp_path)
    assert model.encoder.at_rest == model.prior.at_rest == (2, 0.1) and model.flow.dim == SIZES["latent_dim"] + 2
    assert "missing" not in str(result["log_likelihood"]), result
