"""Latent space: the lines are the solver's paths, the colours and arrows those of known potentials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

import flowfactor as ff
from flowfactor import plot


@pytest.fixture
def saddle() -> ff.potentials.QuadraticPotential:
    """u_0 = (2 z_0^2 - z_2^2) / 2 and u_1 = 3 z_1 in three dimensions."""
    S = torch.zeros(2, 3, 3)
    S[0] = torch.diag(torch.tensor([2.0, 0.0, -1.0]))
    b = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    return ff.potentials.QuadraticPotential(3, 2, S, b)


def lines_of(figure: Figure) -> LineCollection:
    return next(c for c in figure.axes[0].collections if isinstance(c, LineCollection))


def arrows_of(figure: Figure) -> Quiver:
    return next(c for c in figure.axes[0].collections if isinstance(c, Quiver))


def test_paths_follow_the_exact_solution_coloured_by_time(saddle) -> None:
    z0, t = torch.tensor([[1.0, 5.0, 2.0], [-1.0, 5.0, 0.5]]), torch.tensor([0.0, 0.5, 1.0])
    figure = plot.trajectories(ff.LatentFlow(saddle), z0, t, 0, axes=(0, 2))
    segments = np.array(lines_of(figure).get_segments())  # [2 steps x 2 starts, ends, 2]
    rates, times = np.array([2.0, -1.0]), np.array([0, 0.5, 1])
    exact = z0[:, [0, 2]].numpy() * np.exp(rates * times[:, None])[:, None, :]
    np.testing.assert_allclose(segments, np.stack([exact[:-1], exact[1:]], 2).reshape(-1, 2, 2), atol=1e-3)
    assert lines_of(figure).get_array().tolist() == [0.25, 0.25, 0.75, 0.75]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("$z_{0}$", "$z_{2}$")


def test_paths_coloured_by_log_determinant(saddle) -> None:
    figure = plot.trajectories(ff.LatentFlow(saddle), torch.ones(1, 3), [0.0, 1.0, 2.0], log_det=True)
    np.testing.assert_allclose(lines_of(figure).get_array(), [0.5, 1.5], atol=1e-4)  # trace 2 - 1
    assert lines_of(figure).get_clim() == pytest.approx((-2.0, 2.0), abs=1e-4)


def test_each_start_may_follow_its_own_flow_into_a_projection(saddle) -> None:
    s = math.sqrt(0.5)
    directions = torch.tensor([[s, s, 0.0], [0.0, 0.0, 1.0]])
    z0 = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    figure = plot.trajectories(ff.LatentFlow(saddle), z0, [0.0, 1.0], torch.tensor([0, 1]), axes=directions)
    ends = np.array(lines_of(figure).get_segments())[:, 1]
    np.testing.assert_allclose(ends, [[s * math.exp(2), 0.0], [3 * s, 1.0]], atol=1e-3)


def test_paths_and_surfaces_along_directions_count_from_the_same_point(saddle) -> None:
    flow, at, directions = ff.LatentFlow(saddle), torch.tensor([0.5, 1.0, 2.0]), torch.eye(3)[[2, 0]]
    z0 = torch.tensor([[1.0, 5.0, 2.25]])
    figure = plot.trajectories(flow, z0, [0.0, 1.0], axes=directions, at=at)
    np.testing.assert_allclose(np.array(lines_of(figure).get_segments())[0, 0], [0.25, 0.5], atol=1e-6)
    arrows = arrows_of(plot.potential_surface(flow, 0.0, 0, extent=1, axes=directions, at=at, resolution=3))
    across = arrows.get_offsets() + np.array([2.0, 0.5])  # the gradient's zero lies at -at
    np.testing.assert_allclose(arrows.U * 2 * across[:, 1], -arrows.V * across[:, 0], atol=1e-6)
    plain = plot.trajectories(flow, z0, [0.0, 1.0], axes=(2, 0), at=at)
    np.testing.assert_allclose(np.array(lines_of(plain).get_segments())[0, 0], [2.25, 1.0], atol=1e-6)
    with pytest.raises(ValueError, match=r"at must be a tensor \[3\]"):
        plot.trajectories(flow, z0, [0.0, 1.0], axes=directions, at=torch.zeros(2))


def test_pictures_go_onto_given_axes(saddle) -> None:
    figure = Figure()
    ax = figure.subplots(1, 2)
    assert plot.trajectories(ff.LatentFlow(saddle), torch.ones(1, 3), [0.0, 1.0], ax=ax[0]) is figure
    assert plot.potential_surface(saddle, 0.0, extent=1.0, resolution=5, ax=ax[1]) is figure
    assert ax[0].collections
    assert ax[1].collections


def test_arrows_point_along_the_gradient_in_the_plane(saddle) -> None:
    figure = plot.potential_surface(saddle, 0.0, 0, extent=(-2, 2, -1, 1), axes=(0, 2), resolution=9)
    arrows = arrows_of(figure)
    gradient = arrows.get_offsets() * np.array([2.0, -1.0])
    shown = np.stack([arrows.U, arrows.V], -1)
    scale = (shown * gradient).sum() / (gradient**2).sum()
    assert scale > 0
    np.testing.assert_allclose(shown, scale * gradient, atol=1e-6)
    assert figure.axes[0].get_xlim() == pytest.approx((-2, 2))
    assert figure.axes[0].get_ylim() == pytest.approx((-1, 1))


@pytest.mark.parametrize("kind", ["contour", "surface"])
def test_the_values_are_those_of_the_plane_through_the_point(saddle, kind: str, monkeypatch) -> None:
    seen = []
    derivatives = type(saddle).derivatives

    def spy(self, z, t, control):
        seen.append((z, t, control, derivatives(self, z, t, control)))
        return seen[-1][-1]

    monkeypatch.setattr(type(saddle), "derivatives", spy)
    at = torch.tensor([9.0, 9.0, 4.0])
    figure = plot.potential_surface(
        ff.LatentFlow(saddle), 2.0, 0, extent=1, axes=(0, 1), at=at, resolution=3, kind=kind
    )
    z, t, control, found = seen[0]
    expected = torch.tensor([[x, y, 4.0] for y in (-1, 0, 1) for x in (-1, 0, 1)]).reshape(3, 3, 3)
    assert torch.equal(z, expected)
    assert (t, control) == (2.0, 0)
    assert torch.allclose(found.value, z[..., 0] ** 2 - 8)
    assert (figure.axes[0].name == "3d") is (kind == "surface")
    figure.canvas.draw()


def test_along_directions_the_extent_counts_from_the_point(saddle) -> None:
    directions = torch.eye(3)[[1, 2]]
    figure = plot.potential_surface(
        saddle, 0.0, 0, extent=1, axes=directions, at=torch.tensor([0.0, 0.0, 10.0]), resolution=3
    )
    assert (arrows_of(figure).V < 0).all()  # z_2 is about 10 throughout, and du/dz_2 = -z_2


def test_a_constant_potential_can_be_drawn(saddle) -> None:
    flat = plot.potential_surface(saddle, 0.0, torch.zeros(2), extent=1, resolution=4)
    filled = next(c for c in flat.axes[0].collections if isinstance(c, QuadContourSet))
    assert (filled.zmin, filled.zmax) == (0, 0) and filled.levels[0] < 0 < filled.levels[-1]
    assert not arrows_of(flat).U.any() and not arrows_of(flat).V.any()
    relief = plot.potential_surface(saddle, 0.0, torch.zeros(2), extent=1, kind="surface", resolution=4)
    assert relief.axes[0].get_zlim() == pytest.approx((-0.45, 0.0))  # the arrows' floor below, the constant on top
    for figure in (flat, relief):
        figure.canvas.draw()


def test_weights_superpose_the_potentials_that_are_drawn(saddle) -> None:
    figure = plot.potential_surface(saddle, 0.0, torch.tensor([0.5, 2.0]), extent=1, resolution=4)
    arrows = arrows_of(figure)
    assert (arrows.V > 0).all()  # 2 du_1/dz_1 = 6
    np.testing.assert_allclose(arrows.U / arrows.V, arrows.get_offsets()[:, 0] / 6, atol=1e-6)  # 0.5 du_0/dz_0 = z_0


def test_double_precision_is_followed(saddle, monkeypatch) -> None:
    double, seen, derivatives = saddle.double(), [], type(saddle).derivatives

    def spy(self, z, t, control):
        seen.append(z.dtype)
        return derivatives(self, z, t, control)

    monkeypatch.setattr(type(saddle), "derivatives", spy)
    plot.potential_surface(double, 0.0, extent=1, resolution=4)
    assert set(seen) == {torch.float64}
    flow = ff.LatentFlow(double, ff.Solver(rtol=1e-11, atol=1e-11))
    figure = plot.trajectories(flow, torch.ones(1, 3).double(), [0.0, 1.0])
    end = np.array(lines_of(figure).get_segments())[0, 1]
    np.testing.assert_allclose(end, [math.exp(2), 1.0], rtol=1e-9)  # single precision keeps no such digits


def test_no_gradients_are_left_and_pyplot_is_not_touched(saddle) -> None:
    import sys

    plot.trajectories(ff.LatentFlow(saddle), torch.ones(1, 3, requires_grad=True), [0.0, 1.0])
    plot.potential_surface(saddle, 0.0, extent=1, resolution=4)
    assert all(p.grad is None for p in saddle.parameters())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_trajectories_refuse_bad_input(saddle) -> None:
    flow, z0 = ff.LatentFlow(saddle), torch.ones(2, 3)
    with pytest.raises(TypeError, match="LatentFlow"):
        plot.trajectories(saddle, z0, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        plot.trajectories(flow, z0[0], [0.0, 1.0])
    with pytest.raises(ValueError, match="at least two"):
        plot.trajectories(flow, z0, [0.0])
    for axes in [(0, 3), (0, 0), (0,), (0, 1.0), 1, (-1, 0)]:
        with pytest.raises(ValueError, match="from 0 to 2"):
            plot.trajectories(flow, z0, [0.0, 1.0], axes=axes)
    with pytest.raises(ValueError, match="orthonormal"):
        plot.trajectories(flow, z0, [0.0, 1.0], axes=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        plot.trajectories(flow, z0, [0.0, 1.0], axes=torch.eye(3))


def test_potential_surface_refuses_bad_input(saddle) -> None:
    for extent in [0.0, -1, (1, -1, 0, 1), (0, 1, 2), (0, 1, 0, math.inf)]:
        with pytest.raises(ValueError, match="extent"):
            plot.potential_surface(saddle, 0.0, extent=extent)
    with pytest.raises(TypeError, match="extent"):
        plot.potential_surface(saddle, 0.0, extent="wide")
    with pytest.raises(ValueError, match="kind"):
        plot.potential_surface(saddle, 0.0, extent=1, kind="heat")
    with pytest.raises(ValueError, match="resolution"):
        plot.potential_surface(saddle, 0.0, extent=1, resolution=1)
    with pytest.raises(ValueError, match=r"at must be a tensor \[3\]"):
        plot.potential_surface(saddle, 0.0, extent=1, at=torch.zeros(2))
    with pytest.raises(TypeError, match="Potential"):
        plot.potential_surface(ff.fields.FreeField(3), 0.0, extent=1)
    with pytest.raises(ValueError, match="three-dimensional"):
        plot.potential_surface(saddle, 0.0, extent=1, kind="surface", ax=Figure().add_subplot())
