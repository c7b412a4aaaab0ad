"""Limits draw at random: the first elements of a grid of factors are near-copies of one scene."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import flowfactor as ff
from flowfactor.metrics import composition_error, equivariance_error, log_likelihood, match_flows
from flowfactor.metrics.draw import draw_elements


class Still(nn.Module):
    """Leaves a picture as it is."""

    def __init__(self, flows: int) -> None:
        super().__init__()
        self.num_flows = flows

    def transform(self, x0: torch.Tensor, t: Any, control: Any = 0) -> torch.Tensor:
        return x0.unsqueeze(1).expand(-1, len(t), *x0.shape[1:])


@pytest.fixture(scope="module")
def grid() -> ff.data.SequenceDataset:
    """A grid of scenes as Scenes makes them: the last factor varies fastest."""
    brightness = torch.linspace(0, 1, 20)[:, None].expand(20, 40)
    copies = torch.linspace(0, 0.02, 40).expand(20, 40)
    images = (brightness + copies).clamp(max=1).reshape(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    square = torch.zeros(1, 1, 12, 12)
    square[..., 3:9, 4:10] = 1
    flows = {"turn": (ff.data.Rotate(), 0, 60), "grow": (ff.data.Scale(), 1, 1.5)}
    return ff.data.TransformedImages((images * square).contiguous(), flows, steps=2)


def test_a_limit_stands_for_the_whole_of_a_grid(grid: ff.data.SequenceDataset) -> None:
    model = Still(2)
    whole = equivariance_error(model, grid)
    inside = 0
    for seed in range(5):
        some = equivariance_error(model, grid, limit=100, seed=seed)
        assert bool(((some.mean - whole.mean).abs() < 4 * some.standard_error).all())
        inside += int(((some.low <= whole.mean) & (whole.mean <= some.high)).sum())
    assert inside >= 7
    first = equivariance_error(model, grid.subset(list(range(100))))
    assert bool((first.high < whole.low / 2).all())  # what the first hundred would say


def test_a_limit_takes_scenes_from_all_over_their_grid() -> None:
    data = ff.data.Scenes("test", size=16)
    whole = equivariance_error(Still(data.num_flows), data.subset(draw_elements(len(data), 400, seed=9)))
    some = equivariance_error(Still(data.num_flows), data, limit=60)
    assert bool(((some.mean - whole.mean).abs() < 4 * some.standard_error).all())


def test_figures_say_how_they_were_drawn(grid: ff.data.SequenceDataset) -> None:
    model = Still(2)
    figures = equivariance_error(model, grid, limit=50, seed=3).as_dict()
    assert (figures["limit"], figures["seed"], figures["count"]) == (50, 3, 50)
    assert equivariance_error(model, grid, limit=50, seed=3).as_dict() == figures
    assert equivariance_error(model, grid, limit=50, seed=4).as_dict()["mean"] != figures["mean"]
    assert equivariance_error(model, grid).as_dict()["limit"] is None
    vae = ff.models.build_vae((1, 12, 12), 2, 4, hidden=(8, 8))
    assert log_likelihood(vae, grid, samples=1, limit=5, seed=2).as_dict()["seed"] == 2
    weak = ff.models.build_vae((1, 12, 12), 2, 4, hidden=(8, 8), supervision="weak", num_frames=3)
    assert match_flows(weak, grid, limit=7, seed=2).as_dict()["limit"] == 7
    flows = {"turn": (ff.data.Rotate(), 0, 60), "grow": (ff.data.Scale(), 1, 1.5)}
    combined = ff.data.CombinedImages(torch.rand(30, 1, 12, 12), flows, steps=2)
    assert composition_error(model, combined, limit=9, seed=5).as_dict()["seed"] == 5


def test_every_flow_sees_the_same_images(grid: ff.data.SequenceDataset) -> None:
    from flowfactor.metrics.equivariance import every_flow

    def firsts(k: int) -> torch.Tensor:
        found: Iterator[tuple[int, dict[str, Any]]] = every_flow(grid, 30, 8, 1)
        return torch.cat([batch["frames"][:, 0] for flow, batch in found if flow == k])

    assert torch.equal(firsts(0), firsts(1))


def test_a_draw_depends_on_its_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = draw_elements(1000, 20, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one, draw_elements(1000, 20, seed=7))
    assert not torch.equal(one, draw_elements(1000, 20, seed=8))
    assert len(one.unique()) == 20
    assert set(one.tolist()) <= set(draw_elements(1000, 60, seed=7).tolist())
    with pytest.raises(ValueError, match="limit must be at least 1"):
        draw_elements(10, 0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        draw_elements(10, 5, seed=1.5)  # type: ignore[arg-type]
