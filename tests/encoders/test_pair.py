"""Sparse weights, and the encoder of pairs of frames that infers them."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributions import Laplace, LogNormal, Normal

from flowfactor.encoders import PairEncoder, SparseWeights

F64 = torch.float64


def weights(kind: type = Laplace, unit: torch.Tensor | None = None) -> SparseWeights:
    logits = torch.tensor([[1.5, -0.5], [0.3, -2.0]], dtype=F64)
    place = torch.tensor([[[0.9], [-0.2]], [[0.0], [1.1]]], dtype=F64)
    return SparseWeights(logits, kind(place, 0.4 * torch.ones_like(place)), unit)


@pytest.mark.parametrize("kind", [Laplace, LogNormal])
@pytest.mark.parametrize("unit", [None, torch.tensor([[2.0], [0.5]], dtype=F64)], ids=["plain", "unit"])
def test_moments_are_those_of_draws(kind: type, unit: torch.Tensor | None, generator: torch.Generator) -> None:
    q = weights(kind, unit)
    drawn = q.sample((100_000,), generator=generator)
    assert set(drawn.spikes.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.spikes.mean(0), q.spike_probs, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.weights.mean(0), q.mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(drawn.weights.abs().mean(0), q.strength, atol=0.02, rtol=0.02)
    torch.testing.assert_close(drawn.slab.median(0).values, q.slab.icdf(torch.tensor(0.5)), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("hard", [True, False])
def test_gradients_reach_the_spikes(hard: bool, generator: torch.Generator) -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    q = SparseWeights(logits, LogNormal(torch.zeros(1, 2, 1), 0.1))
    drawn = q.rsample((20_000,), temperature=0.5, hard=hard, generator=generator)
    # The first flow should act and the second should not.
    (drawn.weights[..., 1, 0] - drawn.weights[..., 0, 0]).mean().backward()
    assert logits.grad is not None
    # The exact gradient is -+ E[w] p (1 - p) = -+ 1/4; the relaxed one is close to it.
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25]]), atol=0.05, rtol=0)


def test_a_cold_relaxation_is_hard(generator: torch.Generator) -> None:
    q = weights()
    warm = q.rsample((1000,), temperature=1.0, hard=False, generator=generator).spikes
    cold = q.rsample((1000,), temperature=0.01, hard=False, generator=generator).spikes
    middle = [float(((b > 0.1) & (b < 0.9)).double().mean()) for b in (warm, cold)]
    assert middle[0] > 0.5 and middle[1] < 0.05


def test_log_prob_counts_acting_slabs_only() -> None:
    q = weights()
    drawn = q.sample()._replace(spikes=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64))
    p = q.spike_probs
    wanted = torch.stack([p[0, 0], 1 - p[0, 1], 1 - p[1, 0], 1 - p[1, 1]]).log().sum()
    wanted = wanted + q.slab.log_prob(drawn.slab)[0, 0, 0]
    torch.testing.assert_close(q.log_prob(drawn), wanted)


def test_the_dominating_flow() -> None:
    logits = torch.tensor([[[-6.0, 6.0], [-6.0, 6.0]], [[6.0, -6.0], [6.0, 6.0]], [[-60.0, -60.0], [-60.0, -60.0]]])
    place = torch.ones(3, 2, 2, 1)
    factor = SparseWeights(logits, Laplace(place, 0.1 * place)).factor()
    assert factor.probs[0, 1] > 0.98 and factor.probs[1, 0] == pytest.approx(2 / 3, abs=0.01)
    torch.testing.assert_close(factor.probs[2], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("slab", ["half_normal", "laplace"])
@pytest.mark.parametrize("controls", [1, 2])
def test_pairs_of_any_batch(slab: str, controls: int) -> None:
    encoder = PairEncoder(3, 2, (8, 12), controls=controls, slab=slab, hidden=(16,))
    frames = torch.rand(2, 4, 6, 2, 8, 12)
    q = encoder(frames)
    assert q.batch_shape == (2, 4) and q.event_shape == (5, 3, controls)
    torch.testing.assert_close(encoder(frames[1, 2]).mean, q.mean[1, 2])
    torch.testing.assert_close(encoder(frames[:, :, 2:4]).mean.squeeze(2), q.mean[:, :, 2])  # only the pair counts
    assert isinstance(q.slab, Laplace if slab == "laplace" else LogNormal)
    strengths = q.slab.mean.detach()
    assert float((strengths - 1).abs().max()) < 0.05  # an untrained slab is about 1, whatever the frames
    again = PairEncoder(**json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(frames).spike_logits, q.spike_logits)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_first_layer_sees_a_frame_and_its_change(kernel_size: int) -> None:
    encoder = PairEncoder(3, channels=1, image_size=8, kernel_size=kernel_size).double()
    frames = torch.rand(2, 4, 1, 8, 8, dtype=torch.float64)
    cut = encoder.body[0](frames.flatten(0, 1)).unflatten(0, (2, 4))
    pairs = torch.cat([cut[:, :-1], cut[:, 1:] - cut[:, :-1]], 2).flatten(0, 1)
    logits = encoder.spike_head(encoder.body[1:](pairs)).unflatten(0, (2, 3))
    torch.testing.assert_close(encoder(frames).spike_logits, 8 * torch.tanh(logits / 8))


def test_every_parameter_learns() -> None:
    encoder = PairEncoder(2, 1, 8, hidden=(8,))
    q = encoder(torch.rand(4, 3, 1, 8, 8))
    drawn = q.rsample(temperature=0.5)
    (drawn.weights.square().sum() + q.log_prob(drawn).sum()).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_extreme_frames_stay_finite() -> None:
    encoder = PairEncoder(2, 1, 8)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(100)
    q = encoder(torch.rand(4, 3, 1, 8, 8))
    logits = q.spike_logits.detach()
    assert logits.isfinite().all() and logits.abs().max() <= 8
    assert q.slab.scale.min() > 0 and q.rsample(temperature=0.1).weights.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_flows": 0}, ValueError, "num_flows must be at least 1"),
        ({"num_flows": 2.0}, TypeError, "num_flows must be an integer"),
        ({"controls": 3}, ValueError, "1 \\(single\\) or 2"),
        ({"slab": "gauss"}, ValueError, "unknown slab 'gauss'"),
        ({"image_size": 10}, ValueError, "divisible by 4"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
    ],
)
def test_bad_sizes(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PairEncoder(**({"num_flows": 2, "channels": 1, "image_size": 8} | arguments))


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.rand(4, 1, 1, 8, 8), ValueError, "at least two frames"),
        (torch.rand(1, 8, 8), ValueError, "at least two frames"),
        (torch.rand(4, 3, 2, 8, 8), ValueError, "must have the shape"),
        (torch.zeros(4, 3, 1, 8, 8, dtype=torch.uint8), TypeError, "divide|floating point"),
        (torch.rand(4, 3, 1, 8, 8, dtype=F64), TypeError, "float64"),
    ],
)
def test_bad_frames(frames: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PairEncoder(2, 1, 8)(frames)


def test_bad_weights() -> None:
    logits, slab = torch.zeros(3, 2), Laplace(torch.zeros(3, 2, 1), 1.0)
    with pytest.raises(TypeError, match="Laplace or LogNormal"):
        SparseWeights(logits, Normal(torch.zeros(3, 2, 1), 1.0))
    with pytest.raises(ValueError, match=r"\[\*batch, T, K, C\]"):
        SparseWeights(logits[0], slab)
    with pytest.raises(ValueError, match="unit must have shape"):
        SparseWeights(logits, slab, torch.ones(2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        SparseWeights(logits, slab).rsample(temperature=0.0)
