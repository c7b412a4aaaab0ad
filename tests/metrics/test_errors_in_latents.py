"""Equivariance in latent space, the intervals of the older metrics, and the paper's protocol."""

from __future__ import annotations

import json
import math

import pytest
import torch

import flowfactor as ff


def _data(brightened) -> ff.data.Sequences:
    k = torch.arange(10) % 2
    weights = torch.nn.functional.one_hot(k, 2).float()[:, None].expand(10, 4, 2)
    return ff.data.Sequences(brightened(weights), k)


@pytest.mark.parametrize(("speed", "known"), [(1.0, 0.0), (0.0, 1.0), (1.5, 0.5), (2.0, 1.0)])
def test_latent_errors_are_relative_to_the_way_of_the_true_codes(pixel_model, brightened, speed, known) -> None:
    error = ff.metrics.latent_equivariance_error(pixel_model(speed=speed), _data(brightened), batch_size=3)
    assert error.mean.tolist() == pytest.approx([known, known], abs=1e-4)
    assert error.doing_nothing.tolist() == [1, 1] and error.count == 5


def test_latent_errors_do_not_depend_on_the_scale_of_the_latents(pixel_model, brightened) -> None:
    data, model = _data(brightened), pixel_model(speed=0.7)

    class Scaled:
        num_flows = 2

        def encode(self, x):
            q = model.encode(x)
            return torch.distributions.Independent(torch.distributions.Normal(100 * q.mean, q.stddev), 1)

        def path(self, z0, t, control):
            return 100 * model.flow(z0 / 100, t, control).z

    one, two = (ff.metrics.latent_equivariance_error(m, data) for m in (model, Scaled()))
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-5)


def test_the_standard_error_of_the_latent_ratio_is_its_spread() -> None:
    """Against the spread of the ratio over many data sets."""

    class Noisy:
        num_flows = 1

        def encode(self, x):
            return torch.distributions.Independent(torch.distributions.Normal(x.flatten(-3), 1.0), 1)

        def path(self, z0, t, control):
            return z0.expand(len(t), *z0.shape) + torch.rand(len(t), len(z0), 1)

    def measure():
        frames = torch.rand(30, 3, 1, 2, 2)
        return ff.metrics.latent_equivariance_error(Noisy(), ff.data.Sequences(frames, [0] * 30))

    measured = [measure() for _ in range(120)]
    spread = float(torch.stack([m.mean for m in measured]).std())
    claimed = float(torch.stack([m.standard_error for m in measured]).mean())
    assert claimed == pytest.approx(spread, rel=0.25)


def test_models_without_a_latent_flow_and_codes_that_rest_are_refused(pixel_model, brightened) -> None:
    data = _data(brightened)

    class Flowless:
        num_flows = 2
        encode = staticmethod(pixel_model().encode)

    assert issubclass(ff.metrics.NoLatentFlowError, TypeError)
    with pytest.raises(ff.metrics.NoLatentFlowError, match="no latent flow"):
        ff.metrics.latent_equivariance_error(Flowless(), data)
    with pytest.raises(ValueError, match="3 flows"):
        ff.metrics.latent_equivariance_error(pixel_model(3), data)
    still = ff.data.Sequences(torch.rand(4, 1, 1, 4, 4).expand(4, 3, 1, 4, 4), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="do not move"):
        ff.metrics.latent_equivariance_error(pixel_model(), still)


def test_a_benchmark_notes_missing_flows_and_no_other_wrong_types() -> None:
    from flowfactor.training.evaluation import _tried

    def raising(error: Exception):
        def work() -> dict[str, object]:
            raise error

        return work

    assert _tried(1, raising(ff.metrics.NoLatentFlowError("no flow"))) == {"missing": "no flow"}
    with pytest.raises(TypeError, match="a bug"):
        _tried(1, raising(TypeError("a bug")))


def test_intervals_of_means_are_normal_ones(pixel_model, brightened) -> None:
    error = ff.metrics.equivariance_error(pixel_model(speed=0.3), _data(brightened))
    torch.testing.assert_close(error.high - error.mean, 1.959964 * error.standard_error)
    assert {"low", "high", "count"} <= set(error.as_dict())
    bound = ff.metrics.log_likelihood(pixel_model(), _data(brightened), samples=2)
    assert bound.high - bound.per_frame == pytest.approx(1.959964 * bound.standard_error, rel=1e-3)
    assert bound.low < bound.per_frame < bound.high and bound.as_dict()["low"] == bound.low


def test_the_papers_protocol_is_its_formula_and_exceeds_every_bound(pixel_model, brightened) -> None:
    data = _data(brightened)
    model = pixel_model()
    value = ff.metrics.paper_log_likelihood(model, data, generator=torch.Generator().manual_seed(0))
    assert (value.objective, value.likelihood, value.samples, value.count) == ("paper-protocol", "gaussian", 1, 10)
    # Constant velocities keep densities: the ratio is that of q(z_0|x_0), 16 pixels of scale 0.01, and the prior at z_t.
    frames = torch.stack([data.batch([i], int(i % 2))["frames"][0] for i in range(10)])
    entropy = 8 * (1 + math.log(2 * math.pi * 0.01**2))
    prior = -0.5 * (frames[:, 1:].flatten(2).square().sum(2) + 16 * 0.01**2) - 8 * math.log(2 * math.pi)
    pixel = -8 * math.log(2 * math.pi) - 8 * 0.01**2
    assert value.per_frame == pytest.approx(pixel - entropy - float(prior.mean()), abs=3.0)
    assert value.per_frame > -8 * math.log(2 * math.pi)  # more than any decoder of unit variance can reach
    bound = ff.metrics.log_likelihood(model, data, samples=4)
    assert value.per_frame > bound.per_frame
    json.dumps(value.as_dict())


def test_the_papers_protocol_of_models_without_transformation_keeps_the_latent(pixel_model, brightened, seeded) -> None:
    data = _data(brightened)
    still = pixel_model(speed=0.0)

    class Resting:
        num_flows, has_transformation = 2, False
        encode, decode, prior = staticmethod(still.encode), staticmethod(still.decode), still.prior

    one, two = (ff.metrics.paper_log_likelihood(m, data, generator=seeded(0)) for m in (still, Resting()))
    assert one.per_frame == pytest.approx(two.per_frame, rel=1e-5)

    class Lost:
        num_flows = 2

    with pytest.raises(TypeError, match="no flow and prior"):
        ff.metrics.paper_log_likelihood(Lost(), data)
    with pytest.raises(ValueError, match="3 flows"):
        ff.metrics.paper_log_likelihood(pixel_model(3), data)
