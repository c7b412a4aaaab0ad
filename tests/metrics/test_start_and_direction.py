"""Errors from any start and backwards: a model that knows the truth has none, one that runs the wrong way has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfactor as ff
from flowfactor.control import Schedule, as_weights, resolve, times
from flowfactor.data import CombinedImages, Hue, TransformedImages

STEPS = 4
PACES = torch.tensor([20.0, -35.0])  # degrees of hue at each step, of two flows


class Turns(nn.Module):
    """Turns the hue of what it is shown as its flows do, at ``sense`` times the time that is asked for."""

    num_flows = 2

    def __init__(self, sense: float = 1.0) -> None:
        super().__init__()
        self.sense = nn.Parameter(torch.tensor(sense))

    def transform(self, x0: Tensor, t: Any, control: Any = 0) -> Tensor:
        t = times(t, x0)
        pieces = control if isinstance(control, Schedule) else Schedule([(float(t.min()), control)])
        turned = torch.zeros(len(t), len(x0))
        bounds = [*pieces.moments[1:], torch.inf]
        for begin, end, piece in zip(pieces.moments, bounds, pieces.controls, strict=True):
            weights = as_weights(resolve(piece, x0.shape[:1], 2, dtype=x0.dtype, device=x0.device), x0.shape[:1], 2, x0)
            low, high = torch.as_tensor(begin).to(t), torch.as_tensor(end).to(t)
            turned += (t.clamp(low, high) - t[0].clamp(low, high))[:, None] * (weights @ PACES)
        frames = [ff.data.shift_hue(x0, 0.0).mul(0) for _ in t]
        for s, degrees in enumerate(turned.detach() * float(self.sense)):
            frames[s] = torch.stack([ff.data.shift_hue(x, d) for x, d in zip(x0, degrees, strict=True)])
        return torch.stack(frames, 1)


@pytest.fixture
def data() -> TransformedImages:
    pictures = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    flows = {name: (Hue(), 0.0, STEPS * float(pace)) for name, pace in zip("ab", PACES, strict=True)}
    return TransformedImages(pictures, flows, STEPS)


@pytest.mark.parametrize("start", ["first", "any"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_single_flows(data: TransformedImages, start: Any, direction: Any) -> None:
    settings = {"start": start, "direction": direction}
    assert ff.metrics.equivariance_error(Turns(), data, **settings).mean.max() < 1e-3
    wrong = ff.metrics.equivariance_error(Turns(-1.0), data, **settings)
    assert bool((wrong.mean > wrong.doing_nothing).all())
    assert wrong.doing_nothing.min() > 10


@pytest.mark.parametrize("start", ["first", "any"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_combined_flows(data: TransformedImages, start: Any, direction: Any) -> None:
    combined = CombinedImages.of(data)
    settings = {"start": start, "direction": direction}
    found = ff.metrics.composition_error(Turns(), combined, **settings)
    assert sorted(found.by_kind) == ["single", "superpose", "switch"]
    assert float(found) < 1e-3
    assert float(ff.metrics.composition_error(Turns(-1.0), combined, **settings)) > found.doing_nothing > 10


@pytest.mark.parametrize("start", ["first", "any"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_beyond_the_end(data: TransformedImages, start: Any, direction: Any) -> None:
    settings = {"start": start, "direction": direction}
    curve = ff.metrics.extrapolation_error(Turns(), data.longer(10), k=1, limit=5, **settings)
    assert curve.mean.max() < 1e-3
    assert curve.count == 5
    assert curve.beyond.tolist() == [False] * 4 + [True] * 6
    first = {("first", "forward"): 1, ("first", "backward"): 3, ("any", "forward"): 1, ("any", "backward"): -1}
    assert curve.t[0] == first[start, direction]
    assert curve.t[-1] == curve.t[0] + (9 if direction == "forward" else -9)


@pytest.mark.parametrize("start", ["first", "any"])
def test_longer_sequences_begin_as_the_shorter_ones(data: TransformedImages, start: Any) -> None:
    for direction in ("forward", "backward"):
        short = data.running(start=start, direction=direction)
        whole = short.longer(9)
        for k in (0, 1):
            one, other = short.batch([3, 4], k), whole.batch([3, 4], k)
            torch.testing.assert_close(other["frames"][:, :5], one["frames"], atol=1e-6, rtol=0)
            assert torch.equal(other["t"][:5], one["t"])
            amounts = whole.amounts([3], k)[0, :, k]
            step = float(PACES[k]) * (1 if direction == "forward" else -1)
            torch.testing.assert_close(amounts.diff(), torch.full((9,), step, dtype=torch.float64))
        again, other = whole.longer(11).running(start="first"), data.running(direction=direction).longer(11)
        assert torch.equal(again.batch([1], 0)["frames"], other.batch([1], 0)["frames"])
    with pytest.raises(ValueError, match="steps must be at least 4"):
        data.longer(3)


def test_past_the_range_scaling_goes_on() -> None:
    flows = {"grow": (ff.data.Scale(), 1.0, 1.8)}
    data = TransformedImages(torch.rand(30, 1, 6, 6), flows, 8, start="any")
    factors = data.longer(16).amounts(range(30), 0)[..., 0]
    torch.testing.assert_close(factors[:, :9], data.amounts(range(30), 0)[..., 0])
    assert factors[:, 8].max() <= 1.8 < factors[:, 16].min() * 1.8
    assert factors[:, 16].max() > 1.8


def test_what_cannot_be_had_is_refused_by_name(data: TransformedImages) -> None:
    films = ff.data.Sequences(torch.rand(4, 5, 3, 5, 5), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="sequences of Sequences begin where the data say"):
        ff.metrics.equivariance_error(Turns(), films, start="any")
    with pytest.raises(ValueError, match="equivariance_error is of one direction"):
        ff.metrics.equivariance_error(Turns(), data, direction="both")
    batch = CombinedImages.of(data).batch([0])
    with pytest.raises(ValueError, match=r"composition_error takes .* for a data set alone"):
        ff.metrics.composition_error(Turns(), [batch], direction="backward")
    with pytest.raises(ValueError, match=r"extrapolation_error takes .* for a data set alone"):
        ff.metrics.extrapolation_error(Turns(), batch["frames"], batch["t"], start="any")
    with pytest.raises(ValueError, match="leave t and context out"):
        ff.metrics.extrapolation_error(Turns(), data, batch["t"])


def test_scenes_run_backwards() -> None:
    grid = {"hues": 4, "scales": 4, "orientations": 4, "vary": ("wall_hue", "scale")}
    scenes = ff.data.Scenes("test", size=8, supersampling=1, steps=3, **grid)
    model = ff.models.build_vae((3, 8, 8), 2, 4, hidden=(8, 8))
    back = ff.metrics.equivariance_error(model, scenes, direction="backward", limit=5)
    frames = scenes.batch(range(len(scenes)), 1)["frames"]
    whole = ff.metrics.equivariance_error(model, scenes, direction="backward")
    expected = (frames[:, :-1] - frames[:, -1:]).abs().flatten(1).sum(1).mean()
    torch.testing.assert_close(whole.doing_nothing[1], expected)
    assert back.count == 5


def test_the_summary_of_combinations(data: TransformedImages) -> None:
    found = ff.metrics.combining_errors(Turns(), data.running(start="any", direction="both"), limit=4)
    assert (found["start"], found["count"]) == ("any", 4)
    assert set(found["backward"]["error"]) == set(found["untouched"]["error"]) == {"a", "b"}
    for mode in ("superpose", "switch"):
        assert list(found[mode]["error"]) == ["a+b"]
        assert found[mode]["error"]["a+b"] < 1e-3 < 1 < found[mode]["doing_nothing"]["a+b"]
    wrong = ff.metrics.combining_errors(Turns(0.9), data, limit=12)
    own = wrong["single"]["error"]
    superposed = wrong["superpose"]
    assert superposed["over_singles"]["a+b"] == pytest.approx(superposed["error"]["a+b"] * 2 / (own["a"] + own["b"]))
    assert "untouched" not in wrong
    films = ff.data.Sequences(torch.rand(4, 5, 3, 5, 5), torch.tensor([0, 1, 0, 1]))
    told = ff.metrics.combining_errors(Turns(), films, limit=4)
    assert "error" in told["backward"]
    assert "Sequences cannot tell what several transformations" in told["superpose"]["missing"]
