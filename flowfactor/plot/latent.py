"""Latent space in two dimensions: paths along a flow, and the potential that drives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.control import Control
from flowfactor.errors import require
from flowfactor.fields import Field
from flowfactor.latent_flow import LatentFlow
from flowfactor.potentials import Potential

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ARROWS = 13  # arrows along each axis


def trajectories(
    flow: LatentFlow,
    z0: Tensor,
    t: Tensor | Sequence[float],
    control: Control = 0,
    *,
    axes: tuple[int, int] | Tensor = (0, 1),
    at: Tensor | None = None,
    log_det: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Draws paths along a flow in two coordinates of latent space.

    Paths are coloured by time, or by how much the flow has expanded (red) or contracted (blue) the space around them. A
    white dot marks each start and a filled one each end. They are drawn from one time of ``t`` to the next by straight
    lines, so give many times for a smooth picture.

    Args:
        flow: The flow.
        z0: Starts ``[N, D]``.
        t: Times in frames, strictly monotone, ``[T]`` with T > 1.
        control: Which flow acts: an int, an index per start ``[N]``, weights or a schedule.
        axes: The two coordinates shown, the horizontal one first, or two orthonormal directions ``[2, D]`` to project onto.
        at: A point ``[D]`` that the positions along two directions count from, as in `potential_surface`; the origin where
            None. Coordinates are shown as they are.
        log_det: Whether to colour by ln |det dz_t/dz_0| instead of time.
        ax: Axes to draw on; a new figure where None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, a time, a flow or an axis does not fit.
        FlowSolveError: If the solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.MLPPotential(dim=8, num_flows=3))
        >>> figure = trajectories(flow, torch.randn(20, 8), torch.linspace(0, 4, 33), 1)
        >>> figure.axes[0].get_xlabel()
        '$z_{0}$'
    """
    if not isinstance(flow, LatentFlow):
        raise TypeError(f"flow must be a flowfactor.LatentFlow, got {type(flow).__name__}")
    if not isinstance(z0, Tensor) or z0.ndim != 2 or len(z0) == 0:
        found = list(z0.shape) if isinstance(z0, Tensor) else type(z0).__name__
        raise ValueError(f"z0 must be a tensor of starts [N, {flow.dim}], got {found}")
    plane, labels = _plane(axes, flow.dim, z0)
    origin = _origin(at, flow.dim, z0).to(plane)
    collections = require("matplotlib.collections", extra="plot")
    with torch.no_grad():
        path = flow(z0, t, control, log_det=log_det)
    if len(path.t) < 2:
        raise ValueError(f"t must hold at least two times to draw a path, got {path.t.tolist()}")
    z = path.z - origin if isinstance(axes, Tensor) else path.z
    points = _array(z @ plane.T)  # [T, N, 2]
    if log_det:
        assert path.log_det is not None  # it was asked for
        values = _array(path.log_det)
    else:
        values = np.repeat(_array(path.t)[:, None], points.shape[1], axis=1)

    ax = _new_axes() if ax is None else ax
    segments = np.stack([points[:-1], points[1:]], axis=2).reshape(-1, 2, 2)
    lines = collections.LineCollection(segments, linewidths=1.6, capstyle="round", zorder=2)
    lines.set_array(((values[:-1] + values[1:]) / 2).reshape(-1))
    if log_det:
        reach = max(float(np.abs(values).max()), 1e-6)
        lines.set(cmap="coolwarm", clim=(-reach, reach))
    else:
        lines.set(cmap="viridis", clim=(values.min(), values.max()))
    ax.add_collection(lines)
    ax.scatter(*points[0].T, s=16, facecolor="white", edgecolor="0.25", linewidth=0.9, zorder=3)
    ends = {"cmap": lines.get_cmap(), "norm": lines.norm}
    ax.scatter(*points[-1].T, s=22, c=values[-1], edgecolor="0.25", linewidth=0.6, zorder=4, **ends)
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    _dress(ax, labels)
    figure = _figure_of(ax)
    what = r"$\ln\,|\det\,\partial z_t/\partial z_{t_0}|$" if log_det else "time (frames)"
    _colour_bar(figure, lines, ax, what)
    return figure


def potential_surface(
    potential: Potential | Field | LatentFlow,
    t: float,
    control: Control = 0,
    *,
    extent: float | tuple[float, float, float, float],
    axes: tuple[int, int] | Tensor = (0, 1),
    at: Tensor | None = None,
    resolution: int = 60,
    kind: str = "contour",
    ax: Axes | None = None,
) -> Figure:
    """Draws a potential on a plane of latent space, with arrows along its gradient.

    Args:
        potential: The potential, or a field or flow that has one.
        t: Time in frames.
        control: Which flow acts: an int, weights ``[K]`` or a schedule.
        extent: The part of the plane that is shown: ``(left, right, bottom, top)``, or r for (-r, r, -r, r).
        axes: The two coordinates that span the plane, the horizontal one first, or two orthonormal directions ``[2, D]``.
        at: A point ``[D]`` of the plane; the origin where None. Along two coordinates, its own values of them do not
            matter; along two directions, ``extent`` counts from it.
        resolution: Points along each axis at which the potential is evaluated.
        kind: ``"contour"`` for a map with contour lines, ``"surface"`` for a relief over the arrows.
        ax: Axes to draw on (three-dimensional ones for a surface); a new figure where None.

    Returns:
        The figure. Arrows show the gradient's component in the plane; their lengths are to scale within a figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, a flow, an axis or a setting does not fit.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.MLPPotential(dim=8, num_flows=3)
        >>> figure = potential_surface(u, 0.5, 2, extent=3.0, resolution=20)
        >>> figure.axes[0].get_ylabel()
        '$z_{1}$'
    """
    function = _potential_of(potential)
    if kind not in ("contour", "surface"):
        raise ValueError(f'kind must be "contour" or "surface", got {kind!r}')
    check_count("resolution", resolution, 2)
    left, right, bottom, top = _box(extent)
    like = next(function.parameters(), torch.zeros(())).detach()
    origin = _origin(at, function.dim, like)
    plane, labels = _plane(axes, function.dim, origin)
    if not isinstance(axes, Tensor):
        origin = origin - (origin @ plane.T) @ plane  # the coordinates themselves take the place of the point's

    def evaluate(count: int, inset: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        x = torch.linspace(left + inset * (right - left), right - inset * (right - left), count).to(origin)
        y = torch.linspace(bottom + inset * (top - bottom), top - inset * (top - bottom), count).to(origin)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [count, count, 2]
        with torch.no_grad():
            found = function.derivatives(origin + grid @ plane, float(t), control)
        assert found.value is not None and found.gradient is not None
        return _array(x), _array(y), _array(found.value), _array(found.gradient @ plane.T)

    x, y, value, _ = evaluate(resolution, 0.0)
    if not np.isfinite(value).all():
        raise ValueError(f"the potential is NaN or infinite somewhere in extent {(left, right, bottom, top)}")
    arrows = evaluate(_ARROWS, 0.5 / _ARROWS)
    if kind == "surface":
        ax = _new_axes(projection="3d") if ax is None else ax
        _draw_relief(ax, (x, y, value), arrows, labels)
        return _figure_of(ax)
    ax = _new_axes() if ax is None else ax
    _draw_map(ax, (x, y, value), arrows, labels)
    return _figure_of(ax)


def _draw_map(ax: Any, surface: tuple[NDArray, ...], arrows: tuple[NDArray, ...], labels: tuple[str, str]) -> None:
    x, y, value = surface
    levels = _levels(value, 18)
    filled = ax.contourf(x, y, value, levels=levels, cmap="viridis", zorder=0)
    ax.contour(x, y, value, levels=levels, colors="white", linewidths=0.4, alpha=0.5, linestyles="solid", zorder=1)
    along_x, along_y, _, gradient = arrows
    ax.quiver(
        *np.meshgrid(along_x, along_y), *np.moveaxis(_scaled(gradient, along_x, along_y), -1, 0), angles="xy",
        scale_units="xy", scale=1, pivot="mid", color="white", edgecolor="0.15", linewidth=0.4, width=0.0055, zorder=2,
    )  # fmt: skip
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
    _dress(ax, labels, grid=False)
    _colour_bar(_figure_of(ax), filled, ax, "$u(z, t)$")


def _draw_relief(ax: Any, surface: tuple[NDArray, ...], arrows: tuple[NDArray, ...], labels: tuple[str, str]) -> None:
    if getattr(ax, "name", None) != "3d":
        raise ValueError('kind="surface" needs three-dimensional axes: figure.add_subplot(projection="3d")')
    x, y, value = surface
    low, high = float(value.min()), float(value.max())
    height = high - low if high > low else 1.0
    floor = low - 0.45 * height
    mesh = np.meshgrid(x, y)
    ax.plot_surface(
        *mesh, value, cmap="viridis", rcount=len(y), ccount=len(x), linewidth=0, antialiased=True, alpha=0.95
    )
    ax.contour(
        *mesh, value, levels=_levels(value, 12), zdir="z", offset=floor, cmap="viridis", linewidths=0.8, alpha=0.7
    )
    along_x, along_y, _, gradient = arrows
    step = _scaled(gradient, along_x, along_y)
    start_x, start_y = np.meshgrid(along_x, along_y)
    start_x, start_y = start_x - step[..., 0] / 2, start_y - step[..., 1] / 2
    flat = np.zeros_like(start_x)
    ax.quiver(
        start_x, start_y, flat + floor, step[..., 0], step[..., 1], flat, color="0.25", linewidth=0.9,
        arrow_length_ratio=0.35,
    )  # fmt: skip
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), zlim=(floor, high), zlabel="$u(z, t)$")
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.view_init(elev=28, azim=-58)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis._axinfo["grid"].update(color="0.9", linewidth=0.6)
    ax.tick_params(labelsize=8, colors="0.3")


def _levels(value: NDArray, count: int) -> NDArray:
    low, high = float(value.min()), float(value.max())
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):  # a constant potential still needs levels that increase
        low, high = low - 0.5, high + 0.5
    ticker = require("matplotlib.ticker", extra="plot")
    return ticker.MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)


def _scaled(gradient: NDArray, x: NDArray, y: NDArray) -> NDArray:
    """Scales arrows so that the longest just spans the gap between two of them."""
    longest = float(np.hypot(gradient[..., 0], gradient[..., 1]).max())
    return gradient * (0.95 * min(x[1] - x[0], y[1] - y[0]) / longest) if longest > 0 else gradient


def _potential_of(potential: object) -> Potential:
    field = potential.field if isinstance(potential, LatentFlow) else potential
    found = field.potential if isinstance(field, Field) and field.has_potential else field
    if not isinstance(found, Potential):
        raise TypeError(
            f"potential must be a flowfactor Potential, or a field or flow that has one; got {type(found).__name__}"
        )
    return found


def _box(extent: float | tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    try:
        sides = [float(side) for side in extent] if isinstance(extent, Sequence) else [float(extent)]
    except (TypeError, ValueError) as error:
        raise TypeError(f"extent must be (left, right, bottom, top) or a number, got {extent!r}") from error
    if len(sides) == 1:
        sides = [-sides[0], sides[0]] * 2
    if len(sides) != 4 or not all(map(math.isfinite, sides)) or not (sides[0] < sides[1] and sides[2] < sides[3]):
        raise ValueError(
            f"extent must be (left, right, bottom, top) in that order or a positive number, got {extent!r}"
        )
    return sides[0], sides[1], sides[2], sides[3]


def _origin(at: Tensor | None, dim: int, like: Tensor) -> Tensor:
    if at is None:
        return like.new_zeros(dim)
    if not isinstance(at, Tensor) or tuple(at.shape) != (dim,):
        found = list(at.shape) if isinstance(at, Tensor) else type(at).__name__
        raise ValueError(f"at must be a tensor [{dim}], a point of latent space; got {found}")
    return at.detach()


def _plane(axes: tuple[int, int] | Tensor, dim: int, like: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Two orthonormal directions [2, D] and their labels."""
    if isinstance(axes, Tensor):
        plane = axes.detach().to(like)
        if tuple(plane.shape) != (2, dim):
            raise ValueError(
                f"axes must be two coordinates or two directions [2, {dim}], got shape {list(plane.shape)}"
            )
        if not torch.allclose(plane @ plane.T, torch.eye(2).to(like), atol=1e-3):
            raise ValueError(
                "the two directions in axes must be orthonormal; torch.linalg.qr(directions.T).Q.T makes them so"
            )
        return plane, ("first direction", "second direction")
    chosen = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in chosen)
    if len(chosen) != 2 or not whole or len(set(chosen)) != 2 or not all(0 <= i < dim for i in chosen):
        raise ValueError(f"axes must be two different coordinates from 0 to {dim - 1}, got {axes!r}")
    plane = torch.eye(dim).to(like)[list(chosen)]
    return plane, (f"$z_{{{chosen[0]}}}$", f"$z_{{{chosen[1]}}}$")


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()


def _new_axes(**options: str) -> Axes:
    figures = require("matplotlib.figure", extra="plot")
    figure = figures.Figure(figsize=(5.6, 4.6), layout="constrained")
    return figure.add_subplot(**options)


def _figure_of(ax: Any) -> Figure:
    return ax.get_figure(root=True)


def _dress(ax: Any, labels: tuple[str, str], grid: bool = True) -> None:
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    if grid:
        ax.grid(color="0.92", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.6")
    ax.tick_params(color="0.6", labelcolor="0.25")


def _colour_bar(figure: Any, mappable: Any, ax: Any, label: str) -> None:
    bar = figure.colorbar(mappable, ax=ax, label=label, fraction=0.05, pad=0.03)
    bar.locator = require("matplotlib.ticker", extra="plot").MaxNLocator(6)
    bar.update_ticks()
    bar.outline.set_visible(False)
    bar.ax.tick_params(color="0.6", labelcolor="0.25")
