"""Traversals: the right flow at the right time in the right place."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowfactor as ff
from flowfactor import plot


class Brightness(nn.Module):
    """Encodes a picture by its brightness; flow k makes it grow at the constant rate ``rates[k]``."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        potential = ff.potentials.QuadraticPotential(
            1, len(rates), torch.zeros(len(rates), 1, 1), torch.tensor(rates)[:, None]
        )
        self.flow = ff.LatentFlow(potential, ff.Solver("euler"))
        self.dropout = nn.Dropout(0.5)
        self.starts: list[list[float]] = []

    @property
    def num_flows(self) -> int:
        return self.flow.num_flows

    def transform(self, x0: Tensor, t: Tensor, control: Tensor) -> Tensor:
        self.starts.append(t.tolist())
        path = self.flow(x0.mean((-3, -2, -1))[:, None], t, control)
        return self.dropout(path.z.movedim(0, 1)[..., None, None] * torch.ones(3, 4, 4))


RATES = [0.0, 0.05, -0.1]


@pytest.fixture
def model() -> Brightness:
    return Brightness(RATES)


def tiles(picture: np.ndarray, rows: list[int], columns: int, pad: int = 2) -> np.ndarray:
    return np.array([[picture[top + 1, pad + j * (4 + pad) + 1, 0] for j in range(columns)] for top in rows])


def test_rows_are_flows_and_columns_times_in_both_directions(model: Brightness) -> None:
    picture = plot.traverse(model, torch.full((3, 4, 4), 0.5), steps=4)
    assert picture.shape == (20, 2 + 9 * 6, 3)
    assert picture.dtype == np.float32
    expected = 0.5 + np.outer(RATES, np.arange(-4, 5))
    np.testing.assert_allclose(tiles(picture, [2, 8, 14], 9), expected, atol=1e-6)
    assert model.starts == [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4]]  # the picture's own time comes first, both ways


def test_the_default_goes_eight_steps_each_way(model: Brightness) -> None:
    assert plot.traverse(model, torch.full((3, 4, 4), 0.85), flows=[0]).shape == (8, 2 + 17 * 6, 3)


def test_times_may_be_uneven_and_start_anywhere(model: Brightness) -> None:
    picture = plot.traverse(model, torch.full((1, 4, 4), 0.5), t=[1, 2.5, 4.0], at=4, flows=[2])
    np.testing.assert_allclose(tiles(picture, [2], 3), [[0.8, 0.65, 0.5]], atol=1e-6)
    assert model.starts == [[4.0], [4.0, 2.5, 1.0]]


def test_several_pictures_stand_together_under_each_flow(model: Brightness) -> None:
    x0 = torch.tensor([0.4, 0.6])[:, None, None, None].expand(2, 3, 4, 4)
    picture = plot.traverse(model, x0, t=[-1, 0, 1], flows=[2, 1])
    assert picture.shape[0] == 2 + 4 * 4 + 2 + 6 + 2 + 2
    expected = [[0.5, 0.4, 0.3], [0.7, 0.6, 0.5], [0.35, 0.4, 0.45], [0.55, 0.6, 0.65]]
    np.testing.assert_allclose(tiles(picture, [2, 8, 18, 24], 3), expected, atol=1e-6)


def test_the_frame_marks_one_column_and_covers_no_tile(model: Brightness) -> None:
    x0 = torch.full((3, 4, 4), 0.5)
    marked, plain = plot.traverse(model, x0, steps=2), plot.traverse(model, x0, steps=2, mark=False)
    changed = (marked != plain).any(-1)
    left = 2 + 2 * 6
    assert changed.any()
    assert not changed[:, : left - 2].any()
    assert not changed[:, left + 6 :].any()
    assert not changed[2:18, left : left + 4].any()
    assert (changed[1:19, left - 1]).all()  # one unbroken frame from top to bottom


def test_scale_enlarges_the_whole(model: Brightness) -> None:
    x0 = torch.full((3, 4, 4), 0.5)
    small, large = plot.traverse(model, x0, steps=1), plot.traverse(model, x0, steps=1, scale=3)
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))


def test_the_model_is_used_in_evaluation_mode_and_left_as_it_was(model: Brightness) -> None:
    model.train()
    model.flow.eval()
    plot.traverse(model, torch.full((3, 4, 4), 0.5), steps=2)  # dropout would have doubled values or zeroed them
    assert (model.training, model.flow.training, model.dropout.training) == (True, False, True)


def test_flows_by_name(model: Brightness) -> None:
    names = ["still", "brighter", "darker"]
    x0 = torch.full((3, 4, 4), 0.5)
    named = plot.traverse(model, x0, steps=2, flows=["darker", 1], flow_names=names)
    assert np.array_equal(named, plot.traverse(model, x0, steps=2, flows=[2, 1]))
    with pytest.raises(ValueError, match="still"):
        plot.traverse(model, x0, flows=["louder"], flow_names=names)
    with pytest.raises(ValueError, match="flow_names"):
        plot.traverse(model, x0, flows=["darker"])
    with pytest.raises(ValueError, match="all 3 flows"):
        plot.traverse(model, x0, flow_names=names[:2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t": [1.0, 2.0]}, ValueError, "must contain 0"),
        ({"t": [0.0, 0.0]}, ValueError, "increase strictly"),
        ({"t": [0.0, float("nan")]}, ValueError, "finite"),
        ({"t": []}, ValueError, "non-empty"),
        ({"t": "soon"}, TypeError, "numbers"),
        ({"steps": 0}, ValueError, "steps"),
        ({"flows": [3]}, ValueError, "flows 0 to 2"),
        ({"flows": [True]}, TypeError, "index or a name"),
        ({"flows": []}, ValueError, "non-empty"),
        ({"flows": 1}, ValueError, r"\[1\]"),
        ({"pad": 0}, ValueError, "pad"),
    ],
)
def test_bad_options_are_refused_before_any_work(model: Brightness, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        plot.traverse(model, torch.full((3, 4, 4), 0.5), **options)
    assert not model.starts


def test_bad_models_and_pictures_are_refused(model: Brightness) -> None:
    x0 = torch.full((3, 4, 4), 0.5)
    with pytest.raises(TypeError, match="num_flows"):
        plot.traverse(model.flow, x0)
    with pytest.raises(TypeError, match="uint8"):
        plot.traverse(model, x0.byte())
    with pytest.raises(ValueError, match=r"\[C, H, W\]"):
        plot.traverse(model, x0[0])
    model.transform = lambda x0, t, control: torch.zeros(1, 2)
    with pytest.raises(ValueError, match="must return frames"):
        plot.traverse(model, x0)


def test_the_figure_names_flows_and_times(model: Brightness) -> None:
    names = ["still", "brighter", "darker"]
    x0 = torch.full((2, 3, 4, 4), 0.5)
    figure = plot.traverse_figure(model, x0, t=[-1.5, 0, 1], flow_names=names, flows=[1, 2], title="Flows")
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["brighter", "darker"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["\u22121.5", "0", "1"]
    assert ax.get_title() == "Flows"
    assert ax.get_xticks().tolist() == [3.5, 9.5, 15.5]  # the middle of each 4-pixel tile
    assert np.array_equal(ax.images[0].get_array(), plot.traverse(model, x0, t=[-1.5, 0, 1], flows=[1, 2]))


def test_a_crowded_figure_drops_labels_but_never_the_pictures_own(model: Brightness) -> None:
    figure = plot.traverse_figure(model, torch.full((3, 4, 4), 0.5), t=torch.linspace(-4, 4, 65), flows=[1], width=5)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "0" in labels
    assert 3 <= len(labels) <= 12


def test_the_animation_goes_forth_and_back_and_loops_without_a_jump(model: Brightness) -> None:
    frames = plot.traversal_frames(model, torch.full((3, 4, 4), 0.5), steps=2, per_step=2, flows=[1, 2])
    assert frames.shape == (16, 8, 14, 3)
    times = [0, 0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2, -1.5, -1, -0.5]
    np.testing.assert_allclose(frames[:, 3, 3, 0], 0.5 + 0.05 * np.array(times), atol=1e-6)
    np.testing.assert_allclose(frames[:, 3, 9, 0], 0.5 - 0.1 * np.array(times), atol=1e-6)


@pytest.mark.parametrize("at", [0.0, 1.0, 2.0])
def test_the_animation_starts_at_the_picture_wherever_it_lies(model: Brightness, at: float) -> None:
    frames = plot.traversal_frames(model, torch.full((3, 4, 4), 0.5), t=[0.0, 1.0, 2.0], at=at, flows=[1])
    shown = frames[:, 3, 3, 0]
    assert len(shown) == 4
    assert shown[0] == pytest.approx(0.5)
    np.testing.assert_allclose(np.abs(np.diff(np.append(shown, shown[0]))), 0.05, atol=1e-6)


def test_one_time_is_one_frame(model: Brightness) -> None:
    assert len(plot.traversal_frames(model, torch.full((3, 4, 4), 0.5), t=[0.0])) == 1


def test_a_real_model_can_be_traversed() -> None:
    from flowfactor.models import build_vae

    model = build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8)).train()
    x0 = torch.rand(2, 1, 8, 8)
    picture = plot.traverse(model, x0, steps=2, flows=[1])
    with torch.no_grad():
        expected = model.eval().transform(x0, torch.tensor([0.0, -1.0, -2.0]), 1)
    np.testing.assert_allclose(picture[12:20, 2:10, 0], expected[1, 2, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(picture[2:10, 22:30, 0], expected[0, 0, 0].numpy(), atol=1e-5)


def test_importing_needs_neither_matplotlib_nor_pillow() -> None:
    code = "import sys, flowfactor.plot; assert not {'matplotlib', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
