"""Grids of two flows: the right flow, for the right time, in the right place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import flowfactor as ff
from flowfactor import plot

RATES = [0.02, 0.0, 1.0]  # flows 0 and 1 add, flow 2 scales, so that orders matter
H = 4


class Bright(nn.Module):
    """Encodes a picture by its brightness z; z' = 0.02, z' = 0 and z' = z ln 2 / 10."""

    num_flows = 3

    def __init__(self) -> None:
        super().__init__()
        grow = torch.log(torch.tensor(2.0)) / 10
        parts = [lambda z, t: torch.full_like(z, 0.02), lambda z, t: torch.zeros_like(z), lambda z, t: grow * z]
        self.flow = ff.LatentFlow(ff.fields.from_module(parts, 1), ff.Solver(rtol=1e-7, atol=1e-7))
        self.dropout = nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Independent:
        mean = x.mean((-3, -2, -1)).unsqueeze(-1)
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.dropout(z[..., None, None] * torch.ones(3, H, H))


def tiles_of(picture: np.ndarray, rows: int, columns: int, pad: int = 2) -> np.ndarray:
    places = [[(pad + r * (H + pad), pad + c * (H + pad)) for c in range(columns)] for r in range(rows)]
    return np.array([[picture[y : y + H, x : x + H].mean() for x, y in ((c, r) for r, c in row)] for row in places])


def test_every_place_shows_both_flows_in_their_order() -> None:
    model, x0 = Bright().train(), torch.full((3, H, H), 0.2)
    t, s = [-2.0, 0.0, 1.0, 5.0], [-10.0, 0.0, 10.0]
    picture = plot.traverse_grid(model, x0, (0, 2), t=t, s=s)
    known = (0.2 + 0.02 * np.array(t)) * np.array([0.5, 1, 2])[:, None]
    np.testing.assert_allclose(tiles_of(picture, 3, 4), known, atol=1e-4)
    turned = plot.traverse_grid(model, x0, (2, 0), t=s, s=t)
    np.testing.assert_allclose(
        tiles_of(turned, 4, 3), 0.2 * np.array([0.5, 1, 2]) + 0.02 * np.array(t)[:, None], atol=1e-4
    )
    assert model.training and model.dropout.training


def test_times_count_from_that_of_the_picture() -> None:
    model, x0 = Bright(), torch.full((3, H, H), 0.2)
    found = plot.traverse_grid(model, x0, (0, 2), at=3.0, steps=2)
    np.testing.assert_array_equal(found, plot.traverse_grid(model, x0, (0, 2), t=range(1, 6), s=range(1, 6), at=3.0))
    np.testing.assert_allclose(found, plot.traverse_grid(model, x0, (0, 2), steps=2), atol=1e-6)


def test_the_start_stands_in_a_frame() -> None:
    model, x0 = Bright(), torch.full((3, H, H), 0.2)
    marked, plain = (plot.traverse_grid(model, x0, (0, 2), t=[-1, 0, 1], s=[0, 1], mark=mark) for mark in (True, False))
    changed = np.argwhere((marked != plain).any(-1))
    left, top = 2 + (H + 2), 2
    assert changed.min(0).tolist() == [top - 1, left - 1] and changed.max(0).tolist() == [top + H, left + H]


def test_the_animation_leaves_the_start_and_returns() -> None:
    model, x0 = Bright(), torch.full((3, H, H), 0.2)
    also = {"t": [-2.0, 0.0, 4.0], "s": [0.0, 10.0]}
    frames = plot.grid_frames(model, x0, (0, 2), frames=4, **also)
    assert len(frames) == 8
    np.testing.assert_allclose(tiles_of(frames[0], 2, 3), 0.2, atol=1e-6)
    np.testing.assert_allclose(frames[4], plot.traverse_grid(model, x0, (0, 2), **also), atol=1e-6)
    known = (0.2 + 0.02 * np.array([-1.0, 0, 2])) * np.array([1, 2**0.5])[:, None]
    np.testing.assert_allclose(tiles_of(frames[2], 2, 3), known, atol=1e-4)
    np.testing.assert_array_equal(frames[3], frames[5])


def test_the_figure_names_flows_and_times() -> None:
    pytest.importorskip("matplotlib")
    names = ["dim", "rest", "grow"]
    figure = plot.traverse_grid_figure(Bright(), torch.full((3, H, H), 0.2), ("dim", "grow"), t=[-1, 0, 2], s=[0, 5],
                                       flow_names=names, title="both")  # fmt: skip
    ax = figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("dim (frames)", "grow (frames)", "both")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["\u22121", "0", "2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "5"]


@pytest.mark.parametrize("kind", ["vae", "sparse", "double"])
def test_models_are_drawn_with_their_contexts(kind: str) -> None:
    more = {"control": "double"} if kind == "double" else {}
    build = ff.models.build_vae if kind == "vae" else ff.models.build_sparse_vae
    model = build((1, 8, 8), 2, 4, hidden=(8, 8), context=2, **more)
    x0 = torch.rand(1, 8, 8)
    pictures = [
        plot.traverse_grid(model, x0, t=[0, 8], s=[-1, 0], context=c) for c in (5 * torch.ones(2), -5 * torch.ones(2))
    ]
    assert pictures[0].shape == (22, 22, 3) and not np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"flows": (1, 1)}, ValueError, "two different flows"),
        ({"flows": (0, 1, 2)}, ValueError, "two different flows"),
        ({"flows": (0, 3)}, ValueError, "flow 3 does not exist"),
        ({"flows": (0, "grow")}, ValueError, "no flow named 'grow'"),
        ({"s": [1.0, 2.0]}, ValueError, "t must contain 0"),
        ({"x0": torch.rand(2, 3, H, H)}, ValueError, "C, H, W"),
        ({"pad": 0}, ValueError, "pad"),
        ({"model": ff.LatentFlow(ff.fields.FreeField(2, 2))}, TypeError, "a LatentFlow has no encode, no decode"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict, error: type[Exception], match: str) -> None:
    given = {"model": Bright(), "x0": torch.rand(3, H, H), "flows": (0, 2), **change}
    for draw in (plot.traverse_grid, plot.grid_frames):
        with pytest.raises(error, match=match):
            draw(given.pop("model"), given.pop("x0"), given.pop("flows"), **given)
        given = {"model": Bright(), "x0": torch.rand(3, H, H), "flows": (0, 2), **change}
