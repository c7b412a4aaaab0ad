"""Flows backwards, in pairs and in threes: on the same elements as alone, against figures that are put together by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfactor as ff
from flowfactor.control import Schedule, times, travelled
from flowfactor.data import CombinedImages, CombinedScenes, Hue, TransformedImages
from flowfactor.metrics import combining_errors, composition_error
from flowfactor.metrics.draw import draw_elements

STEPS = 4
PACES = torch.tensor([20.0, -35.0, 25.0])  # degrees of hue at each step


class Turns(nn.Module):
    """Turns the hue as its flows do, at ``sense`` times the time that is asked for; remembers what it was asked."""

    def __init__(self, sense: float = 1.0, flows: int = 3) -> None:
        super().__init__()
        self.sense = nn.Parameter(torch.tensor(sense))
        self.num_flows, self.asked = flows, []

    def transform(self, x0: Tensor, t: Any, control: Any = 0) -> Tensor:
        self.asked.append((x0, control))
        way = travelled(control, times(t, x0), len(x0), self.num_flows) @ PACES[: self.num_flows]
        turned = [[ff.data.shift_hue(x, float(d * self.sense)) for x, d in zip(x0, row, strict=True)] for row in way]
        return torch.stack([torch.stack(row) for row in turned], 1)


def data_of(flows: int = 3, steps: int = STEPS, **settings: Any) -> TransformedImages:
    pictures = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    paces = zip("abc"[:flows], PACES, strict=False)
    return TransformedImages(
        pictures, {name: (Hue(), 0.0, steps * float(pace)) for name, pace in paces}, steps, **settings
    )


@pytest.mark.parametrize("start", ["first", "any"])
def test_a_model_that_knows_the_truth_has_no_error(start: Any) -> None:
    found = combining_errors(Turns(), data_of(start=start, direction="both"), limit=5)
    for mode, size in {"superpose": 2, "switch": 2, "together": 3}.items():
        assert all(name.count("+") == size - 1 for name in found[mode]["error"])
        assert max(found[mode]["error"].values()) < 1e-3 < 1 < min(found[mode]["doing_nothing"].values())
    assert list(found["superpose"]["error"]) == ["a+b", "a+c", "b+c"] and list(found["together"]["error"]) == ["a+b+c"]


def test_three_at_once_are_what_composition_error_says_of_the_same_elements() -> None:
    model, data = Turns(0.9), data_of(start="any")
    found = combining_errors(model, data, limit=5, seed=2)
    rows = draw_elements(12, 5, 2)
    alone = ff.metrics.equivariance_error(model, data, limit=5, seed=2).mean
    weights = torch.zeros(STEPS, 3)
    for name, flows in {"together": (0, 1, 2), "superpose": (1, 2)}.items():
        weights.zero_()[:, list(flows)] = 1
        expected = composition_error(model, CombinedImages.of(data.subset(rows)).weighted(weights))
        made, key = found[name], "+".join("abc"[k] for k in flows)
        assert made["error"][key] == pytest.approx(float(expected), rel=1e-5)
        assert made["over_singles"][key] == pytest.approx(float(expected) / float(alone[list(flows)].mean()), rel=1e-5)
        assert (made["low"][key], made["high"][key]) == pytest.approx(
            (expected.error.low, expected.error.high), rel=1e-4
        )


def test_all_are_measured_on_the_same_elements() -> None:
    model, data = Turns(), data_of()
    combining_errors(model, data, limit=4)
    forward = [x0 for x0, _ in model.asked if torch.equal(x0, model.asked[0][0])]
    assert len(model.asked) == 3 + 3 + 3 + 3 + 1  # single, backward, superposed, switched, three at once
    assert len(forward) == 3 + 3 + 3 + 1 and len(forward[0]) == 4
    torch.testing.assert_close(forward[0], data.images[draw_elements(12, 4)])


def test_a_pair_switches_once_in_either_order() -> None:
    model = Turns()
    combining_errors(model, data_of(steps=6), limit=12)
    schedules = [control for _, control in model.asked if isinstance(control, Schedule)]
    assert len(schedules) == 3
    acting = torch.stack([schedules[0].at(s + 0.5) for s in range(6)], 1)  # [12, 6, 3]
    assert torch.equal(acting.sum(2), torch.ones(12, 6)) and not acting[..., 2].any()
    assert torch.equal(acting[..., 0].diff(dim=1).abs().sum(1), torch.ones(12))
    assert 0 < acting[:, 0, 0].sum() < 12 and len(acting[..., 0].sum(1).unique()) > 2


def test_what_cannot_be_had_says_why() -> None:
    two = combining_errors(Turns(flows=2), data_of(2), limit=3)
    assert two["together"] == {
        "missing": "this takes 3 transformations that combine in a sequence, and the data have no such 3 among a, b"
    }
    one = combining_errors(Turns(flows=1), data_of(1), limit=3)
    assert "error" in one["backward"] and "no such 2 among a" in one["superpose"]["missing"]
    brief = combining_errors(Turns(), data_of(steps=1), limit=3)
    assert "error" in brief["superpose"] and "at least 2 steps" in brief["switch"]["missing"]
    other = combining_errors(Turns(flows=2), data_of(), limit=3)
    assert all(
        "2 flows" in other[name]["missing"] for name in ("single", "backward", "superpose", "switch", "together")
    )
    with pytest.raises(ValueError, match="limit must be at least 1"):
        combining_errors(Turns(), data_of(), limit=0)


def test_a_single_sequence_has_no_interval() -> None:
    found = combining_errors(Turns(0.9), data_of(), limit=1)
    for name, key in {"single": "a", "switch": "a+b"}.items():
        assert found[name]["error"][key] > 0 and found[name]["low"][key] is found[name]["high"][key] is None


def test_scenes_that_leave_their_split_are_left_out() -> None:
    grid = {"hues": 4, "scales": 5, "orientations": 6, "vary": ff.data.SCENE_FACTORS}
    data = ff.data.Scenes("test", size=8, supersampling=1, steps=2, **grid)
    model = ff.models.build_vae((3, 8, 8), 6, 4, hidden=(8, 8))
    found, (away,) = combining_errors(model, data, limit=2), data.apart
    away = {data.flow_names[k] for k in away}
    for mode, count in {"superpose": 15 - 1, "switch": 15 - 1, "together": 20 - 4}.items():
        assert len(found[mode]["error"]) == count
        assert not any(away <= {*name.split("+")} for name in found[mode]["error"])
    few = data.subset([1, 5, 7])
    combined = CombinedScenes.of(few, modes=("single",)).weighted(torch.eye(6)[:1].expand(2, 6))
    torch.testing.assert_close(combined.batch(range(3))["frames"], few.batch(range(3), 0)["frames"])
