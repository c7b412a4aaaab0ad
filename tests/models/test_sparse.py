"""The unsupervised model: its bound, its warm-up, its controls, its files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Laplace

import flowfactor as ff
from flowfactor.encoders import SparseWeights
from flowfactor.models._sparse_parts import follow_unit
from flowfactor.models._split import SplitControlField

TIMES = torch.arange(5.0)


def build(**settings) -> ff.models.SparseTransformationVAE:
    torch.manual_seed(0)
    settings = {"solver": {"method": "euler", "step_size": 1.0}, **settings}
    return ff.models.build_sparse_vae((1, 8, 8), 2, 4, hidden=(8, 8), pair_encoder={"hidden": (8,)}, **settings)


def sequences(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 5, 1, 8, 8)


@pytest.mark.parametrize("control", ["single", "double"])
@pytest.mark.parametrize("slab", ["half_normal", "laplace"])
def test_every_parameter_learns(control: str, slab: str) -> None:
    model = build(control=control, slab=slab, warmup_steps=0, weights_prior={"learned": True})
    terms = model(sequences(), TIMES)
    assert all(value.isfinite() for value in terms.as_dict().values())
    terms.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("field", ["gradient", "free"])
def test_other_fields(field: str) -> None:
    model = build(field=field, warmup_steps=0)
    model(sequences(), TIMES).loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in learning)


@pytest.mark.parametrize("span", [None, 1, 3])
def test_the_warm_up_teaches_flows_and_spikes(span: int | None) -> None:
    model = build(warmup_steps=1, warmup_span=span)
    terms = model(sequences(), TIMES)
    assert all(value.isfinite() for value in terms.as_dict().values())
    terms.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == ["pair_encoder.slab_head.weight", "pair_encoder.slab_head.bias"]
    assert not model.warming_up and int(model.step) == 1


@pytest.mark.parametrize(("span", "tried"), [(None, 2), (1, 3)])
def test_the_warm_up_tries_all_flows_on_a_frame_and_trains_one(span: int | None, tried: int) -> None:
    """Over stretches, "no flow at all" is tried as well."""
    model = build(warmup_steps=1, warmup_span=span, frames_per_step=2)
    solved, decoded = [], []
    model.flow.register_forward_pre_hook(lambda _, given: solved.append((len(given[0]), torch.is_grad_enabled())))
    model.decoder.register_forward_pre_hook(lambda _, given: decoded.append(tuple(given[0].shape[:-1])))
    model(sequences(), TIMES)
    assert solved == [(12, False), (6, True)]
    assert decoded == [(1, tried, 6), (2, 6)]


def test_the_bound_is_what_its_terms_say() -> None:
    model = build(warmup_steps=0, kl_weight=0.5, factor_weight=2.0, hj_weight=3.0, start_weight=0.25)
    terms = model(sequences(), TIMES)
    weighted = -terms.reconstruction + 0.5 * terms.kl + 2 * terms.kl_factor + 3 * terms.hj + 0.25 * terms.start
    torch.testing.assert_close(terms.loss, weighted)
    torch.testing.assert_close(terms.bound, terms.reconstruction - terms.kl - terms.kl_factor)


def spread(draw) -> tuple[torch.Tensor, float]:
    """Mean of ten draws of a batch mean, and its standard error."""
    with torch.no_grad():
        means = torch.stack([draw() for _ in range(10)])
    return means.mean(), float(means.std()) / math.sqrt(10)


@pytest.mark.parametrize("control", ["single", "double"])
def test_importance_weights_tighten_the_bound(control: str) -> None:
    model = build(control=control).eval()
    frames, g = sequences(), torch.Generator().manual_seed(0)
    many_times = frames.repeat(60, 1, 1, 1, 1)
    elbo, error = spread(lambda: model(many_times, TIMES, generator=g).bound)
    one, other = spread(lambda: model.log_likelihood(many_times, TIMES, None, 1, generator=g).mean())
    many = model.log_likelihood(frames, TIMES, None, 256, generator=g).mean()
    assert float(elbo) == pytest.approx(float(one), abs=5 * (error + other))
    assert many.detach() > elbo + 5 * error


def test_fewer_frames_leave_the_bound_unbiased() -> None:
    model = build(warmup_steps=0, frames_per_step=2)
    frames, g = sequences().repeat(60, 1, 1, 1, 1), torch.Generator().manual_seed(0)
    some, error = spread(lambda: model(frames, TIMES, generator=g).reconstruction)
    model.frames_per_step = None
    every, other = spread(lambda: model(frames, TIMES, generator=g).reconstruction)
    assert float(some) == pytest.approx(float(every), abs=5 * (error + other))


def test_the_temperature_falls_and_is_saved(tmp_path: Path) -> None:
    model = build(warmup_steps=1, anneal_steps=4, temperature=(1.0, 0.25))
    seen = []
    for _ in range(7):
        seen.append(model.spike_temperature)
        model(sequences(), TIMES)
    assert seen == pytest.approx([1, 1, 0.25**0.25, 0.5, 0.25**0.75, 0.25, 0.25])
    model.save_pretrained(tmp_path)
    again = ff.models.SparseTransformationVAE.from_pretrained(tmp_path)
    assert again.spike_temperature == pytest.approx(0.25)
    model.eval()(sequences(), TIMES)
    assert int(model.step) == 7  # evaluation does not count


def test_units_follow_the_typical_strength() -> None:
    model = build(warmup_steps=0)
    with torch.no_grad():
        model.pair_encoder.slab_head.bias[0] += 2.0  # the median of flow 0's slab
        model.pair_encoder.spike_head.bias[1] = -8.0  # flow 1 hardly ever acts
    for _ in range(600):
        with torch.no_grad():
            q = model.pair_encoder(sequences())
            follow_unit(model.unit, q)
    assert float(model.unit[0, 0]) == pytest.approx(float(q.slab_strength[..., 0, 0].mean()), rel=0.01)
    assert float(model.unit[1, 0]) == 1.0
    q = model.infer_weights(sequences())
    strength = (q.strength / q.spike_probs.unsqueeze(-1))[..., 0, 0]
    assert float(strength.detach().mean()) == pytest.approx(1.0, rel=0.02)


def test_a_common_factor_of_the_slabs_is_for_the_field_to_learn() -> None:
    factor = torch.ones((), requires_grad=True)
    place = 0.5 + torch.rand(6, 4, 2, 1)
    q = SparseWeights(torch.randn(6, 4, 2), Laplace(place * factor, 0.05 * factor * torch.ones_like(place)))
    unit = torch.full((2, 1), 3.0)
    weights = q.in_units(follow_unit(unit, q)).mean
    (grad,) = torch.autograd.grad(weights.square().sum(), factor)
    assert abs(float(grad)) < 1e-4 * float(weights.detach().square().sum())
    torch.testing.assert_close(
        weights, q.in_units(torch.full((2, 1), 3.0)).mean
    )  # values are those of the running mean
    assert bool((unit != 3.0).all())


@pytest.mark.parametrize("control", ["single", "double"])
def test_an_index_is_a_flow_at_its_unit(control: str) -> None:
    model = build(control=control).eval()
    x0 = sequences()[:, 0]
    weights = torch.zeros(6, 4, 2, model.controls)
    weights[:, :, 1] = 1.0
    by_weights = model.transform(x0, TIMES, model.schedule(weights, TIMES))
    torch.testing.assert_close(model.transform(x0, TIMES, 1), by_weights)
    torch.testing.assert_close(model.transform(x0, TIMES, weights[:, 0, :, 0]), by_weights)


@pytest.mark.parametrize("control", ["single", "double"])
def test_weights_switch_at_the_frames(control: str) -> None:
    model = build(control=control).eval()
    z0 = torch.randn(3, 4)
    weights = torch.randn(3, 4, 2, model.controls)
    control_ = model.schedule(weights, TIMES)
    z = z0
    for s in range(4):
        w = weights[:, s].mT.flatten(1)
        z = model._flow_for(w)(z, TIMES[s : s + 2], w).z[-1]
    torch.testing.assert_close(model._flow_for(control_)(z0, TIMES, control_).z[-1], z)
    down = model.schedule(weights.flip(1), TIMES.flip(0))  # the same pieces, told backwards
    assert down.starts == control_.starts
    assert all(torch.equal(a, b) for a, b in zip(down.controls, control_.controls, strict=True))


def test_the_split_field_weighs_its_parts() -> None:
    def make() -> ff.potentials.Potential:
        return ff.potentials.MLPPotential(dim=4, num_flows=2, hidden=(8, 8))

    field = ff.fields.HelmholtzField(make(), make(), make())
    split = SplitControlField(field)
    z, t, a, b = torch.randn(5, 4), 0.3, torch.randn(5, 2), torch.randn(5, 2)
    gradient = field.irrotational(z, t, a)
    wanted = gradient + sum(part(z, t, b) for part in field.solenoidal)
    torch.testing.assert_close(split(z, t, torch.cat([a, b], -1)), wanted)
    torch.testing.assert_close(split(z, t, torch.cat([a, a], -1)), field(z, t, a))
    torch.testing.assert_close(split.divergence(z, t, torch.cat([a, b], -1)), field.irrotational.divergence(z, t, a))
    torch.testing.assert_close(split(z, t, 3), sum(part(z, t, 1) for part in field.solenoidal))
    turning = ff.fields.HelmholtzField(field.potential, *(part.potential for part in field.solenoidal), turning=[0])
    both = torch.cat([a, b], -1)
    kept = torch.stack([b[:, 0], torch.zeros(5)], -1)
    wanted = gradient + sum(part(z, t, kept) for part in turning.solenoidal)
    torch.testing.assert_close(SplitControlField(turning)(z, t, both), wanted)
    assert not SplitControlField(turning)(z, t, 3).any()  # flow 1 has no divergence-free part to weigh


@pytest.mark.parametrize("control", ["single", "double"])
@pytest.mark.parametrize("field", ["helmholtz", "gradient"])
def test_saved_and_loaded(tmp_path: Path, control: str, field: str) -> None:
    if control == "double" and field == "gradient":
        with pytest.raises(ValueError, match="take a HelmholtzField, or controls=1"):
            build(control=control, field=field)
        return
    model = build(control=control, field=field, slab="laplace", weights_prior={"persistence": 0.8}, warmup_span=2)
    model(sequences(), TIMES)
    model.unit.mul_(1.5)
    model.eval().save_pretrained(tmp_path)
    again = ff.models.SparseTransformationVAE.from_pretrained(tmp_path)
    frames = sequences()
    assert again.config() == model.config() and int(again.step) == 1
    torch.testing.assert_close(again.infer_weights(frames).mean, model.infer_weights(frames).mean)
    torch.testing.assert_close(again.transform(frames[:, 0], TIMES, 1), model.transform(frames[:, 0], TIMES, 1))
    with pytest.raises(ValueError, match="holds a SparseTransformationVAE"):
        ff.models.FlowFactorizedVAE.from_pretrained(tmp_path)


class OwnPairs(nn.Module):
    """A pair encoder of the user's own: reads the weights off the change of mean colour."""

    num_flows, controls, slab = 2, 1, "laplace"

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, frames: torch.Tensor) -> SparseWeights:
        change = frames.flatten(2).mean(-1).diff(dim=-1).unsqueeze(-1) * self.gain
        return SparseWeights(change, Laplace(change.unsqueeze(-1), 0.1))


def test_a_pair_encoder_of_ones_own(tmp_path: Path) -> None:
    whole = build(slab="laplace")
    model = ff.models.SparseTransformationVAE(whole.encoder, whole.decoder, whole.flow, OwnPairs(), warmup_steps=0)
    model(sequences(), TIMES).loss.backward()
    assert model.pair_encoder.gain.grad is not None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"user's own.*pair_encoder="):
        ff.models.SparseTransformationVAE.from_pretrained(tmp_path)
    again = ff.models.SparseTransformationVAE.from_pretrained(tmp_path, pair_encoder=OwnPairs())
    assert again.config() == model.config()


def test_draws_follow_the_generator() -> None:
    model, frames = build().eval(), sequences()
    with torch.no_grad():
        losses = [float(model(frames, TIMES, generator=torch.Generator().manual_seed(s)).loss) for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": (1.0, 0.0)}, ValueError, "temperature must be two positive"),
        ({"temperature": 0.5}, ValueError, "temperature must be two positive"),
        ({"warmup_temperature": (1.0,)}, ValueError, "warmup_temperature must be two positive"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0"),
        ({"anneal_steps": 1.5}, TypeError, "anneal_steps must be an integer"),
        ({"warmup_span": 0}, ValueError, "warmup_span must be at least 1"),
        ({"warmup_span": 1.0}, TypeError, "warmup_span must be an integer"),
        ({"kl_weight": -1.0}, ValueError, "kl_weight must be a finite number"),
        ({"factor_weight": float("nan")}, ValueError, "factor_weight must be a finite number"),
        ({"force": "gravity"}, ValueError, "force must be"),
        ({"control": "triple"}, ValueError, 'control must be "single" or "double"'),
        ({"slab": "cauchy"}, ValueError, "unknown slab"),
        ({"weights_prior": {"slab": "laplace"}}, ValueError, "a laplace slab"),
        ({"weights_prior": {"num_flows": 3}}, ValueError, "weights_prior has 3 flows"),
        ({"weights_prior": 0.5}, TypeError, "weights_prior must be a SpikeAndSlab"),
    ],
)
def test_bad_settings(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**settings)


def test_bad_parts() -> None:
    whole = build()
    parts = {"encoder": whole.encoder, "decoder": whole.decoder, "flow": whole.flow, "pair_encoder": whole.pair_encoder}
    cases = [
        ({"flow": whole.flow.field}, TypeError, "must be a flowfactor.LatentFlow"),
        ({"pair_encoder": nn.Linear(1, 1)}, TypeError, "num_flows and controls"),
        ({"pair_encoder": ff.encoders.PairEncoder(3, 1, 8)}, ValueError, "pair_encoder has 3 flows and the flow 2"),
        ({"encoder": ff.encoders.ConvEncoder(5, 1, 8)}, ValueError, "encoder has latents of size 5"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            ff.models.SparseTransformationVAE(**(parts | change))


@pytest.mark.parametrize(
    ("frames", "t", "error", "message"),
    [
        (torch.zeros(2, 5, 1, 8, 8, dtype=torch.uint8), TIMES, TypeError, "float tensor"),
        (torch.rand(2, 5, 3, 8, 8), TIMES, ValueError, r"\[B, T\+1, 1, 8, 8\]"),
        (torch.rand(2, 5, 1, 8, 8), TIMES[:4], ValueError, "one time a frame"),
        (torch.rand(2, 1, 1, 8, 8), TIMES[:1], ValueError, "at least two frames"),
    ],
)
def test_bad_frames(frames: torch.Tensor, t: torch.Tensor, error: type[Exception], message: str) -> None:
    for call in (build(), lambda x, t: build().log_likelihood(x, t, None, 1)):
        with pytest.raises(error, match=message):
            call(frames, t)


def test_bad_arguments() -> None:
    model = build()
    with pytest.raises(ValueError, match="samples must be at least 1"):
        model.log_likelihood(sequences(), TIMES, None, 0)
    with pytest.raises(ValueError, match="weights must be"):
        model.schedule(torch.ones(6, 3, 2, 1), TIMES)
    with pytest.raises(ValueError, match="at least two frames"):
        model.infer_weights(sequences()[:, :1])


def blobs(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright spot on 8 x 8 pixels that moves right, or down, by half a pixel a frame; which of the two is k."""
    k = torch.randint(2, (count,), generator=generator)
    start = 1.5 + 2 * torch.rand(count, 2, generator=generator)
    step = torch.nn.functional.one_hot(k, 2) * 0.8
    centre = start[:, None] + step[:, None] * torch.arange(5.0)[:, None]
    axis = torch.arange(8.0)
    gauss = torch.exp(-((axis - centre.unsqueeze(-1)) ** 2) / 2)
    return (gauss[:, :, 0, None, :] * gauss[:, :, 1, :, None]).unsqueeze(2), k


def test_it_finds_the_transformations() -> None:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = ff.models.build_sparse_vae(
        (1, 8, 8), 2, 6, hidden=(16, 16), pair_encoder={"hidden": (32,)}, decoder={"hidden": (32,)},
        warmup_steps=100, anneal_steps=100, warmup_temperature=(3.0, 0.3), likelihood={"name": "gaussian", "scale": 0.2},
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.99))
    for _ in range(250):
        terms = model(blobs(48, g)[0], TIMES, generator=g)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    model.eval()
    frames, k = blobs(200, g)
    with torch.no_grad():
        q = model.infer_weights(frames)
        found = model.infer_factor(frames).probs.argmax(-1)
        accuracy, flows = max(
            (float((torch.tensor(p)[k] == found).float().mean()), p) for p in itertools.permutations(range(2))
        )
        moved = model.transform(frames[:, 0], TIMES, torch.tensor(flows)[k])
    assert accuracy > 0.95
    assert 0.4 < float(q.spike_probs.mean()) < 0.6  # one of two acts, neither all nor none
    left, still = (moved - frames).abs().sum(), (frames[:, :1] - frames).abs().sum()
    assert left < 0.5 * still
