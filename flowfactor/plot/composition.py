"""Two flows at once: a picture carried by one across and by the other down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor._evaluating import evaluating
from flowfactor.context import Context
from flowfactor.errors import require
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.protocols import MovesImages
from flowfactor.plot.grid import Layout, Picture, assemble, check_frames, enlarge, layout_of, to_pictures
from flowfactor.plot.traversal import MARK, check_look, chosen_flows, columns_of, draw_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Way:
    """One direction of a grid: flow k at these times, of which ``origin`` is that of the picture."""

    flow: int
    name: str
    times: tuple[float, ...]
    origin: int


def traverse_grid(
    model: MovesImages,
    x0: Tensor,
    flows: Sequence[int | str] = (0, 1),
    *,
    context: Context | None = None,
    t: Tensor | Sequence[float] | None = None,
    s: Tensor | Sequence[float] | None = None,
    at: float = 0.0,
    steps: int = 4,
    flow_names: Sequence[str] | None = None,
    pad: int = 2,
    scale: int = 1,
    background: float = 1.0,
    mark: bool = True,
) -> Picture:
    r"""Carries a picture by one flow across and then by another down: $\mathrm{decode}(\phi^j_s \phi^i_t z_0)$.

    Rows are times of the second flow, columns times of the first, from the earliest to the latest; the reconstruction of
    the picture stands in a thin frame. Both flows run from ``at`` on, forwards and backwards. Where they do what they were
    trained to, a row looks like the first row under the second transformation, and nothing falls apart in the corners.

    Args:
        model: A `flowfactor.models.FlowFactorizedVAE`, or anything with ``num_flows``, ``encode``, ``decode`` and latent
            paths (``path(z0, t, control)``, or a `flowfactor.LatentFlow` ``flow``).
        x0: A picture ``[C, H, W]`` in [0, 1].
        flows: Two different flows, by index or by name: the one across and the one down.
        context: Features of the picture ``[C]``, for a model that takes a context; or such a tensor for each name.
        t: Times of the columns in frames, strictly increasing, ``at`` among them.
        s: Times of the rows, likewise; those of the columns where None.
        at: Time of ``x0``, in frames.
        steps: Where ``t`` is None: the ``steps`` frames before ``at``, ``at`` itself and as many after.
        flow_names: Names of all K flows, such as ``dataset.flow_names``.
        pad: Gap between pictures, in their pixels.
        scale: Each pixel of the whole becomes a square of this many pixels a side.
        background: Grey of the gaps, in [0, 1].
        mark: Whether to frame the reconstruction of ``x0``.

    Returns:
        The picture ``[rows, columns, 3]`` in [0, 1], float32; `save` writes it as PNG.

    Raises:
        TypeError: If an argument has the wrong type, or the model has no latent paths.
        ValueError: If a shape, a time, a flow or a setting does not fit.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae((1, 28, 28), num_flows=3, latent_dim=4, hidden=(8, 8))
        >>> traverse_grid(model, torch.rand(1, 28, 28), (0, 2), t=[-1, 0, 1, 2], s=[0, 1]).shape
        (62, 122, 3)
    """
    check_look(pad, scale, background, mark)
    across, down = _ways(model, flows, flow_names, t, s, at, steps)
    tiles = _composed(model, x0, across, down, (1.0,), context)[0]
    return enlarge(_grid(tiles, across, down, pad, background, mark)[0], scale)


def traverse_grid_figure(
    model: MovesImages,
    x0: Tensor,
    flows: Sequence[int | str] = (0, 1),
    *,
    context: Context | None = None,
    t: Tensor | Sequence[float] | None = None,
    s: Tensor | Sequence[float] | None = None,
    at: float = 0.0,
    steps: int = 4,
    flow_names: Sequence[str] | None = None,
    title: str | None = None,
    width: float = 7.0,
) -> Figure:
    """`traverse_grid` as a figure, with the names of both flows and the times.

    Args:
        model: As for `traverse_grid`.
        x0: As for `traverse_grid`.
        flows: As for `traverse_grid`.
        context: As for `traverse_grid`.
        t: As for `traverse_grid`.
        s: As for `traverse_grid`.
        at: As for `traverse_grid`.
        steps: As for `traverse_grid`.
        flow_names: Names of all K flows, the labels of the axes; "flow 0" and so on where None.
        title: Title of the figure.
        width: Width of the figure in inches; its height follows from the pictures.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: As `traverse_grid`.
        ValueError: As `traverse_grid`.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
        >>> figure = traverse_grid_figure(model, torch.rand(1, 8, 8), steps=1, flow_names=["turn", "grow"])
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('turn (frames)', 'grow (frames)')
    """
    figures = require("matplotlib.figure", extra="plot")
    if not width > 0:
        raise ValueError(f"width must be a positive number of inches, got {width!r}")
    across, down = _ways(model, flows, flow_names, t, s, at, steps)
    tiles = _composed(model, x0, across, down, (1.0,), context)[0]
    picture, layout = _grid(tiles, across, down, 2, 1.0, True)
    left, right, above, below = 0.75, 0.1, (0.4 if title else 0.1), 0.55  # inches
    inner = max(width - left - right, 0.5 * width)
    height = inner * layout.size[0] / layout.size[1]
    total = above + height + below
    figure = figures.Figure(figsize=(width, total))
    ax = figure.add_axes((1 - (inner + right) / width, below / total, inner / width, height / total))
    ax.imshow(picture, interpolation="nearest", aspect="equal")
    for way, edges, axis, inches in ((across, layout.lefts, ax.xaxis, inner), (down, layout.tops, ax.yaxis, height)):
        every = -(-len(way.times) * 34 // max(int(72 * inches), 34))  # a label needs about 34 points
        shown = [n for n in range(len(way.times)) if (n - way.origin) % every == 0]
        half = layout.tile[axis is ax.xaxis] / 2 - 0.5
        axis.set_ticks(
            [edges[n] + half for n in shown], labels=[f"{way.times[n]:g}".replace("-", "\u2212") for n in shown]
        )
        axis.get_ticklabels()[shown.index(way.origin)].set_color(MARK)
    ax.set_xlabel(f"{across.name} (frames)")
    ax.set_ylabel(f"{down.name} (frames)")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title)
    return figure


def grid_frames(
    model: MovesImages,
    x0: Tensor,
    flows: Sequence[int | str] = (0, 1),
    *,
    context: Context | None = None,
    t: Tensor | Sequence[float] | None = None,
    s: Tensor | Sequence[float] | None = None,
    at: float = 0.0,
    steps: int = 4,
    frames: int = 12,
    flow_names: Sequence[str] | None = None,
    pad: int = 2,
    scale: int = 1,
    background: float = 1.0,
) -> Picture:
    """The frames of an animation of a grid: every picture of it leaves the start for its place, and returns.

    A share r of the way, a place shows what both flows make of the picture in the share r of their times there.

    Args:
        model: As for `traverse_grid`.
        x0: As for `traverse_grid`.
        flows: As for `traverse_grid`.
        context: As for `traverse_grid`.
        t: As for `traverse_grid`.
        s: As for `traverse_grid`.
        at: As for `traverse_grid`.
        steps: As for `traverse_grid`.
        frames: Frames from the start to the places; as many lead back.
        flow_names: As for `traverse_grid`; lets ``flows`` use names.
        pad: As for `traverse_grid`.
        scale: As for `traverse_grid`.
        background: As for `traverse_grid`.

    Returns:
        Frames ``[2 frames, H, W, 3]`` in [0, 1], float32; for `to_gif`. The last is one short of the first, so that the
        animation loops without a jump.

    Raises:
        TypeError: As `traverse_grid`.
        ValueError: As `traverse_grid`.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
        >>> grid_frames(model, torch.rand(1, 8, 8), steps=1, frames=3).shape
        (6, 32, 32, 3)
    """
    check_look(pad, scale, background, mark=True)
    check_count("frames", frames)
    across, down = _ways(model, flows, flow_names, t, s, at, steps)
    shares = [n / frames for n in range(frames + 1)]
    tiles = _composed(model, x0, across, down, shares, context)
    grids = [enlarge(_grid(one, across, down, pad, background, True)[0], scale) for one in tiles]
    return np.stack([*grids, *grids[-2:0:-1]])


def _ways(
    model: Any,
    flows: Sequence[int | str],
    flow_names: Sequence[str] | None,
    t: Tensor | Sequence[float] | None,
    s: Tensor | Sequence[float] | None,
    at: float,
    steps: int,
) -> tuple[_Way, _Way]:
    """Checks a model and what of it is asked for: the way across and the way down."""
    moves = callable(getattr(model, "path", None)) or isinstance(getattr(model, "flow", None), LatentFlow)
    parts = [name for name in ("encode", "decode") if not callable(getattr(model, name, None))]
    parts += [] if moves else ["path or flow"]
    if parts:
        raise TypeError(
            f"a grid of two flows is made of latents: model needs encode, decode and path(z0, t, control) or a LatentFlow "
            f"as its flow, as a FlowFactorizedVAE has; a {type(model).__name__} has no {', no '.join(parts)}"
        )
    chosen, names = chosen_flows(flows, flow_names, model.num_flows)
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        raise ValueError(f"a grid is of two different flows, the one across and the one down; got {list(flows)}")
    ways = [columns_of(given, at, steps, 1) for given in (t, t if s is None else s)]
    across, down = (_Way(k, name, *way) for k, name, way in zip(chosen, names, ways, strict=True))
    return across, down


def _composed(
    model: Any, x0: Tensor, across: _Way, down: _Way, shares: Sequence[float], context: Context | None
) -> list[Picture]:
    """Tiles ``[rows, columns, h, w, 3]`` of the grid for each share of the times."""
    check_frames(x0, "x0", 3)
    also = {} if context is None else {"context": context}
    made = []
    with evaluating(model), torch.no_grad():
        z0 = model.encode(x0.unsqueeze(0)).mean
        for share in shares:
            states = _both_ways(model, z0, across, share, also).flatten(0, 1)
            states = _both_ways(model, states, down, share, also)
            made.append(to_pictures(model.decode(states), "the model's frames", 5))
    return made


def _both_ways(model: Any, z: Tensor, way: _Way, share: float, also: dict[str, Any]) -> Tensor:
    """States ``[T, B, D]`` at a share of the times of a way, from states ``[B, D]`` at its origin."""
    ticks = torch.tensor(way.times, dtype=z.dtype, device=z.device)
    if share == 0:
        return z.expand(len(ticks), *z.shape)
    ticks = ticks[way.origin] + share * (ticks - ticks[way.origin])

    def follow(t: Tensor) -> Tensor:
        if callable(getattr(model, "path", None)):
            return model.path(z, t, way.flow, **also)
        return model.flow(z, t, way.flow, **also).z

    before, after = ticks[: way.origin + 1].flip(0), ticks[way.origin :]
    states = follow(after) if len(after) > 1 else z.unsqueeze(0)
    return states if way.origin == 0 else torch.cat([follow(before)[1:].flip(0), states])


def _grid(tiles: Picture, across: _Way, down: _Way, pad: int, background: float, mark: bool) -> tuple[Picture, Layout]:
    layout = layout_of(*tiles.shape[:2], tiles.shape[2:4], pad)  # type: ignore[arg-type]
    picture = assemble(tiles, layout, background)
    if mark:
        draw_frame(
            picture, Layout((layout.tops[down.origin],), layout.lefts, layout.tile, layout.size), across.origin, 1
        )
    return picture, layout
