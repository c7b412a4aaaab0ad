from __future__ import annotations

import pytest
import torch

from flowfactor.control import Schedule
from flowfactor.encoders import MLPEncoder
from flowfactor.priors import Diffusion, GaussianMixture, StandardNormal, VampPrior, build

ENCODER = MLPEncoder((1, 2, 2), 2, ())


@pytest.fixture
def prior() -> Diffusion:
    return Diffusion(StandardNormal(2), 3, init=(0.1, 0.5, 2.0))


@pytest.mark.parametrize(
    ("t", "control", "message"),
    [
        (-0.5, 0, r"t must not be negative, got -0.5.*does not run backwards"),
        (torch.tensor([1.0, -2.0]), 0, r"got -2"),
        (float("nan"), 0, r"t must not be negative, got nan"),
        (1.0, 3, r"from 0 to 2"),
        (1.0, torch.tensor([0, -1]), r"from 0 to 2"),
        (1.0, torch.ones(2, 2), r"\[\*batch, 3\]"),
        (torch.rand(4), torch.zeros(3, dtype=torch.long), r"broadcast to one batch shape, got \[3\] and \[4\]"),
        (
            1.0,
            torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]]),
            r"negative diffusivity.*-1.5.*backwards.*0.1, 0.5, 2.0",
        ),
        (3.0, Schedule([(0.0, 0), (2.0, torch.tensor([-1.0, 0.0, 0.0]))]), r"negative diffusivity"),
        (3.0, Schedule([(1.0, 0)]), r"starts at t=1"),
    ],
)
def test_bad_times_and_controls(prior: Diffusion, t, control, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior.at(t, control)


def test_a_negative_rate_is_refused_only_where_it_acts(prior: Diffusion) -> None:
    schedule = Schedule([(0.0, 0), (2.0, torch.tensor([-1.0, 0.0, 0.0]))])
    assert prior.added_variance(2.0, schedule).item() == pytest.approx(0.4)


def test_rates_that_cancel_are_zero_not_negative() -> None:
    prior = Diffusion(StandardNormal(2), 3, init=0.1)
    first = torch.rand(500, 2)
    weights = torch.cat([first, -first.sum(-1, keepdim=True)], -1)
    assert ((weights * prior.diffusivity).sum(-1) < 0).any()  # rounding leaves some of them below 0
    added = prior.added_variance(5.0, weights)
    assert (added >= 0).all() and (added < 1e-5).all()


@pytest.mark.parametrize("control", ["first", 1.5, True, torch.tensor([True, False])], ids=str)
def test_what_is_no_control(prior: Diffusion, control) -> None:
    for candidate in (prior, prior.base):
        with pytest.raises(TypeError, match="control"):
            candidate.at(1.0, control)


def test_what_is_no_time(prior: Diffusion) -> None:
    for candidate in (prior, prior.base):
        with pytest.raises(TypeError, match="times must be real numbers"):
            candidate.at("noon")


def test_static_priors_check_shapes() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        StandardNormal(2).at(torch.rand(4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="one entry a flow"):
        StandardNormal(2).at(0.0, torch.tensor(0.5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StandardNormal(0), ValueError, r"dim must be at least 1, got 0"),
        (lambda: StandardNormal(2.0), TypeError, r"dim must be an integer, got 2.0"),
        (lambda: GaussianMixture(2, 0), ValueError, r"components must be at least 1"),
        (lambda: GaussianMixture(2, "3"), TypeError, r"components must be an integer"),
        (lambda: GaussianMixture(2, 3, spread=1.0), ValueError, r"spread must lie strictly between 0 and 1, got 1.0"),
        (lambda: Diffusion(torch.nn.Identity(), 2), TypeError, r"base must be a GaussianPrior.*got Identity"),
        (lambda: Diffusion(Diffusion(StandardNormal(2), 2), 2), TypeError, r"got Diffusion"),
        (lambda: Diffusion(StandardNormal(2), 0), ValueError, r"num_flows must be at least 1"),
        (lambda: Diffusion(StandardNormal(2), 2.0), TypeError, r"num_flows must be an integer"),
        (lambda: Diffusion(StandardNormal(2), 2, init=0.0), ValueError, r"init must be one positive number or 2"),
        (lambda: Diffusion(StandardNormal(2), 2, init=(0.1,)), ValueError, r"init must be one positive number or 2"),
        (lambda: Diffusion(StandardNormal(2), 1, init=float("inf")), ValueError, r"got inf"),
        (lambda: VampPrior(ENCODER), ValueError, r"either pseudo_inputs .* or both count and shape"),
        (lambda: VampPrior(ENCODER, count=3), ValueError, r"either pseudo_inputs"),
        (lambda: VampPrior(ENCODER, torch.rand(1, 1, 2, 2), count=3), ValueError, r"either pseudo_inputs"),
        (lambda: VampPrior(ENCODER, count=0, shape=(1, 2, 2)), ValueError, r"count must be at least 1"),
        (lambda: VampPrior(ENCODER, 255 * torch.ones(1, 1, 2, 2)), ValueError, r"in \[0, 1\], got 255 to 255"),
        (lambda: VampPrior(ENCODER, torch.rand(0, 1, 2, 2)), ValueError, r"M at least 1"),
        (lambda: VampPrior(ENCODER, torch.ones(1, 1, 2, 2).byte()), ValueError, r"must be floats.*uint8"),
        (lambda: VampPrior(ENCODER, torch.rand(1, 1, 3, 3)), ValueError, r"\[\*batch, 1, 2, 2\], got \[1, 1, 3, 3\]"),
        (lambda: VampPrior(torch.nn.Linear(4, 2), torch.rand(3, 4)), TypeError, r"Independent\(Normal"),
        (lambda: build({"name": "laplace"}), ValueError, r"unknown prior 'laplace'.*'vamp'"),
        (lambda: build({"name": "vamp", "count": 2, "shape": [1, 2, 2]}), ValueError, r"build\(config, encoder\)"),
    ],
)
def test_bad_arguments_are_named(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
