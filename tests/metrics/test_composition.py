"""Composition and extrapolation against models whose errors are known."""

from __future__ import annotations

import json

import pytest
import torch

import flowfactor as ff

ROW = 4 * 0.05  # L1 norm of what a flow does in one frame


def _weights(steps: int = 4) -> torch.Tensor:
    """Two flows alone, together, one after the other, both and then one, and neither."""
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    rows = [[one] * steps, [one + two] * steps, [one, two, two, two], [one + two] + [two] * 3, [0 * one] * steps]
    return torch.stack([torch.stack(row) for row in rows])


def test_a_perfect_model_composes_without_error(pixel_model, brightened) -> None:
    weights = _weights()
    batch = {"frames": brightened(weights), "t": torch.arange(5), "weights": weights}
    result = ff.metrics.composition_error(pixel_model(), [batch])
    assert result.error.value == pytest.approx(0, abs=1e-4) and result.error.count == 5
    assert set(result.by_kind) == {"single", "superpose", "switch", "both", "still"}
    steps = torch.arange(1, 5).sum().item()
    assert result.doing_nothing_by_kind["single"] == pytest.approx(ROW * steps, rel=1e-4)
    assert result.doing_nothing_by_kind["superpose"] == pytest.approx(2 * ROW * steps, rel=1e-4)
    assert result.doing_nothing_by_kind["switch"] == pytest.approx(ROW * steps, rel=1e-4)
    assert result.doing_nothing_by_kind["still"] == 0


def test_flows_of_twice_the_speed_err_by_the_whole_way(pixel_model, brightened) -> None:
    weights = _weights()
    batch = {"frames": brightened(weights), "t": torch.arange(5), "weights": weights}
    result = ff.metrics.composition_error(pixel_model(speed=2.0), [batch, batch])
    assert result.error.value == pytest.approx(result.doing_nothing, rel=1e-4)
    torch.testing.assert_close(result.curve.mean, result.curve.doing_nothing, rtol=1e-4, atol=1e-5)
    totals = torch.tensor([10.0, 20.0, 10.0, 14.0, 0.0]).repeat(2) * ROW
    assert result.error.value == pytest.approx(float(totals.mean()), rel=1e-4)
    half = 1.959964 * float(totals.std() / 10**0.5)
    assert result.error.high - result.error.value == pytest.approx(half, rel=1e-3)
    assert json.loads(json.dumps(result.as_dict()))["by_kind"]["single"]["count"] == 2


def test_flows_numbered_otherwise_are_put_in_order(pixel_model, brightened) -> None:
    weights = _weights()
    swapped = {"frames": brightened(weights.flip(-1)), "t": torch.arange(5), "weights": weights}
    model = pixel_model()
    assert float(ff.metrics.composition_error(model, [swapped])) > 0.5
    assert float(ff.metrics.composition_error(model, [swapped], order=torch.tensor([1, 0]))) < 1e-3

    def reverse(batch):
        return ff.data.weights_schedule(batch["weights"].flip(-1), batch["t"])

    assert float(ff.metrics.composition_error(model, [swapped], control=reverse)) < 1e-3


def test_constant_weights_are_no_schedule() -> None:
    from flowfactor.metrics.composition import as_control

    weights, t = _weights(), torch.arange(5.0)
    assert torch.equal(as_control(weights[:2], t), weights[:2, 0])
    schedule = as_control(weights, 2 * t)
    assert isinstance(schedule, ff.Schedule) and schedule.starts == (0.0, 2.0)


def test_composition_on_a_data_set_of_images(pixel_model) -> None:
    flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
    data = ff.data.CombinedImages(torch.rand(9, 1, 4, 4), flows, steps=2)
    result = ff.metrics.composition_error(pixel_model(speed=0.0), data, batch_size=4)
    assert result.error.value == pytest.approx(result.doing_nothing, rel=1e-4) and result.error.count == 9
    assert ff.metrics.composition_error(pixel_model(), data, limit=5).error.count == 5


def test_the_curve_of_a_flow_that_is_too_fast_grows_with_time(pixel_model, brightened) -> None:
    frames = brightened(torch.tensor([1.0, 0.0]).expand(7, 8, 2))
    curve = ff.metrics.extrapolation_error(pixel_model(speed=1.5), frames, torch.arange(9), 0, trained_until=4)
    torch.testing.assert_close(curve.mean, 0.5 * ROW * torch.arange(1.0, 9.0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(curve.doing_nothing, ROW * torch.arange(1.0, 9.0), rtol=1e-3, atol=1e-5)
    assert curve.beyond.tolist() == [False] * 4 + [True] * 4 and curve.count == 7
    assert bool((curve.low <= curve.mean).all() and (curve.mean <= curve.high).all())
    assert json.loads(json.dumps(curve.as_dict()))["beyond"][-1] is True


def test_extrapolation_takes_every_control_and_batches_them(pixel_model, brightened) -> None:
    k = torch.arange(7) % 2
    weights = torch.nn.functional.one_hot(k, 2).float()
    frames, t = brightened(weights[:, None].expand(7, 3, 2)), torch.arange(4)
    schedule = ff.Schedule([(0.0, k), (2.0, weights)])
    for control in (k, weights, schedule):
        curve = ff.metrics.extrapolation_error(pixel_model(), frames, t, control, batch_size=3)
        assert float(curve.mean.max()) < 1e-4 and bool(curve.beyond.all())
    undone = ff.metrics.extrapolation_error(pixel_model(), frames.flip(1), t.flip(0), weights)
    assert undone.t.tolist() == [2.0, 1.0, 0.0] and float(undone.mean.max()) < 1e-4


def test_bad_input_is_refused(pixel_model, brightened) -> None:
    weights = _weights()
    batch = {"frames": brightened(weights), "t": torch.arange(5), "weights": weights}
    model = pixel_model()
    error = ff.metrics.composition_error
    with pytest.raises(ValueError, match="weights is missing"):
        error(model, [{"frames": batch["frames"], "t": batch["t"]}])
    with pytest.raises(ValueError, match=r"\[5, 4, K\]"):
        error(model, [{**batch, "weights": weights[:, :3]}])
    with pytest.raises(ValueError, match="3 flows"):
        error(pixel_model(3), [batch])
    with pytest.raises(TypeError, match="iterable of batches"):
        error(model, batch)
    with pytest.raises(ValueError, match="strictly"):
        error(model, [{**batch, "t": torch.tensor([0, 1, 3, 2, 4])}])
    with pytest.raises(ValueError, match="no sequences"):
        error(model, [])
    with pytest.raises(ValueError, match="once"):
        error(model, [batch], order=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="same times"):
        error(model, [batch, {**batch, "t": 2 * torch.arange(5)}])
    with pytest.raises(ValueError, match="limit"):
        error(model, [batch], limit=0)
    with pytest.raises(ValueError, match="confidence"):
        error(model, [batch], confidence=95)
    with pytest.raises(ValueError, match="two frames"):
        ff.metrics.extrapolation_error(model, batch["frames"][:, :1], [0.0])
    with pytest.raises(ValueError, match="one entry a sequence"):
        ff.metrics.extrapolation_error(model, batch["frames"], batch["t"], torch.tensor([0, 1]))
