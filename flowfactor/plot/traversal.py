"""Traversals: what each flow of a model does to a picture."""

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
from flowfactor.models.inputs import rows_of
from flowfactor.models.protocols import Transforms
from flowfactor.plot.grid import (
    Layout,
    Picture,
    assemble,
    check_background,
    check_frames,
    enlarge,
    layout_of,
    to_pictures,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = (0.90, 0.33, 0.05)  # a vivid orange that stands out from white, black and the primaries


@dataclass(frozen=True)
class _Traversal:
    """Decoded pictures of a traversal, ``tiles [flows, images, times, h, w, 3]``, and what they show."""

    tiles: Picture
    times: tuple[float, ...]
    origin: int
    names: tuple[str, ...]

    def grid(self, pad: int, background: float, mark: bool) -> tuple[Picture, Layout]:
        flows, images, columns, height, width, _ = self.tiles.shape
        layout = layout_of(flows * images, columns, (height, width), pad, group=images)
        picture = assemble(self.tiles.reshape(-1, *self.tiles.shape[2:]), layout, background)
        if mark:
            draw_frame(picture, layout, self.origin, images)
        return picture, layout


def traverse(
    model: Transforms,
    x0: Tensor,
    *,
    context: Context | None = None,
    t: Tensor | Sequence[float] | None = None,
    at: float = 0.0,
    steps: int = 8,
    flows: Sequence[int | str] | None = None,
    flow_names: Sequence[str] | None = None,
    pad: int = 2,
    scale: int = 1,
    background: float = 1.0,
    mark: bool = True,
) -> Picture:
    """Follows every flow from a picture, forwards and backwards in time.

    Rows are flows, columns are times from the earliest to the latest. The column of the picture itself, which shows its
    reconstruction, stands in a thin frame. The model decodes in evaluation mode and is left in the mode it was in.

    Args:
        model: A `flowfactor.models.FlowFactorizedVAE`, or anything with ``num_flows`` and
            ``transform(x0, t, control)``.
        x0: A picture ``[C, H, W]`` in [0, 1], or several ``[B, C, H, W]``: then each flow has a row per picture.
        context: Features of all pictures ``[C]``, or of each ``[B, C]``, for a model that takes a context; or such a tensor
            for each name.
        t: Times of the columns in frames, strictly increasing, ``at`` among them.
        at: Time of ``x0``, in frames.
        steps: Where ``t`` is None: the columns are the ``steps`` frames before ``at``, ``at`` itself and as many after.
        flows: Which flows, by index or by name; all where None.
        flow_names: Names of all K flows, such as ``dataset.flow_names``.
        pad: Gap between pictures, in their pixels.
        scale: Each pixel of the whole becomes a square of this many pixels a side.
        background: Grey of the gaps, in [0, 1].
        mark: Whether to frame the column of ``x0``.

    Returns:
        The picture ``[rows, columns, 3]`` in [0, 1], float32.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, a time, a flow or a setting does not fit.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> fade = lambda x, t, k: x[:, None] * torch.exp(-(k[:, None] * (t - t[0])).abs())[..., None, None, None]
        >>> model = SimpleNamespace(num_flows=2, transform=fade)
        >>> traverse(model, torch.rand(3, 28, 28), steps=4).shape
        (62, 272, 3)
    """
    check_look(pad, scale, background, mark)
    found = _follow(model, x0, t, at, steps, 1, flows, flow_names, context)
    return enlarge(found.grid(pad, background, mark)[0], scale)


def traverse_figure(
    model: Transforms,
    x0: Tensor,
    *,
    context: Context | None = None,
    t: Tensor | Sequence[float] | None = None,
    at: float = 0.0,
    steps: int = 8,
    flows: Sequence[int | str] | None = None,
    flow_names: Sequence[str] | None = None,
    title: str | None = None,
    width: float = 9.0,
) -> Figure:
    """`traverse` as a figure, with the names of the flows and the times.

    Args:
        model: As for `traverse`.
        x0: As for `traverse`.
        context: As for `traverse`.
        t: As for `traverse`.
        at: As for `traverse`.
        steps: As for `traverse`.
        flows: As for `traverse`.
        flow_names: Names of all K flows, the labels of the rows; "flow 0" and so on where None.
        title: Title of the figure.
        width: Width of the figure in inches; its height follows from the pictures.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, a time or a flow does not fit.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> still = SimpleNamespace(num_flows=2, transform=lambda x, t, k: x[:, None].expand(-1, len(t), -1, -1, -1))
        >>> figure = traverse_figure(still, torch.rand(1, 8, 8), steps=2, flow_names=["scaling", "rotation"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['scaling', 'rotation']
    """
    figures = require("matplotlib.figure", extra="plot")
    if not width > 0:
        raise ValueError(f"width must be a positive number of inches, got {width!r}")
    found = _follow(model, x0, t, at, steps, 1, flows, flow_names, context)
    picture, layout = found.grid(pad=2, background=1.0, mark=True)

    images = found.tiles.shape[1]
    margin = 0.3 + 0.085 * max(map(len, found.names))  # inches: room for the longest name
    above, below = (0.4 if title else 0.05), 0.5
    inner = max(width - margin - 0.1, 0.5 * width)
    height = inner * layout.size[0] / layout.size[1]
    total = above + height + below
    figure = figures.Figure(figsize=(width, total))
    ax = figure.add_axes((1 - (inner + 0.1) / width, below / total, inner / width, height / total))
    ax.imshow(picture, interpolation="nearest", aspect="equal")
    middles = np.asarray(layout.tops) + layout.tile[0] / 2 - 0.5
    ax.set_yticks(middles.reshape(-1, images).mean(axis=1), labels=list(found.names))
    every = -(-len(found.times) * 34 // int(72 * inner))  # a label needs about 34 points
    shown = [j for j in range(len(found.times)) if (j - found.origin) % every == 0]
    labels = [f"{found.times[j]:g}".replace("-", "\u2212") for j in shown]
    ax.set_xticks([layout.lefts[j] + layout.tile[1] / 2 - 0.5 for j in shown], labels=labels)
    ax.get_xticklabels()[shown.index(found.origin)].set_color(MARK)
    ax.set_xlabel("time (frames)")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title)
    return figure


def traversal_frames(
    model: Transforms,
    x0: Tensor,
    *,
    context: Context | None = None,
    t: Tensor | Sequence[float] | None = None,
    at: float = 0.0,
    steps: int = 8,
    per_step: int = 2,
    flows: Sequence[int | str] | None = None,
    flow_names: Sequence[str] | None = None,
    pad: int = 2,
    scale: int = 1,
    background: float = 1.0,
) -> Picture:
    """The frames of an animation of every flow, side by side: forth to the end, back to the beginning, and home.

    The last frame is one step short of the first, so that the animation loops without a jump. Several pictures stand
    below each other, a row each.

    Args:
        model: As for `traverse`.
        x0: As for `traverse`.
        context: As for `traverse`.
        t: Times of the frames on the way from the earliest to the latest, strictly increasing, ``at`` among them.
        at: Time of ``x0``, in frames; where the animation begins.
        steps: Where ``t`` is None: how far to go in each direction, in frames.
        per_step: Where ``t`` is None: pictures shown in each unit of time.
        flows: As for `traverse`.
        flow_names: As for `traverse`; lets ``flows`` use names.
        pad: As for `traverse`.
        scale: As for `traverse`.
        background: As for `traverse`.

    Returns:
        Frames ``[2 (n - 1), H, W, 3]`` in [0, 1] for n times, float32; for `to_gif`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, a time, a flow or a setting does not fit.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> still = SimpleNamespace(num_flows=3, transform=lambda x, t, k: x[:, None].expand(-1, len(t), -1, -1, -1))
        >>> traversal_frames(still, torch.rand(1, 28, 28), steps=2).shape
        (16, 32, 92, 3)
    """
    check_look(pad, scale, background, mark=False)
    check_count("per_step", per_step)
    found = _follow(model, x0, t, at, steps, per_step, flows, flow_names, context)
    columns = found.tiles.transpose(1, 0, 2, 3, 4, 5)  # [images, flows, times, h, w, 3]
    images, flow_count, count, height, width, _ = columns.shape
    layout = layout_of(images, flow_count, (height, width), pad)
    pictures = [enlarge(assemble(columns[:, :, j], layout, background), scale) for j in range(count)]
    return np.stack([pictures[j] for j in _round_trip(count, found.origin)])


def _round_trip(count: int, origin: int) -> list[int]:
    """Indices from the origin up to the last, down to the first and up again to just before the origin."""
    order = [*range(origin, count), *range(count - 2, -1, -1), *range(1, origin)]
    return order[: max(2 * (count - 1), 1)]


def _follow(
    model: Transforms,
    x0: Tensor,
    t: Tensor | Sequence[float] | None,
    at: float,
    steps: int,
    per_step: int,
    flows: Sequence[int | str] | None,
    flow_names: Sequence[str] | None,
    context: Context | None,
) -> _Traversal:
    # A LatentFlow has both names too, but carries latent states: it cannot show pictures.
    fits = callable(getattr(model, "transform", None)) and isinstance(getattr(model, "num_flows", None), int)
    if not fits or isinstance(model, LatentFlow):
        raise TypeError(
            f"model must have num_flows and transform(x0, t, control), as a FlowFactorizedVAE has; "
            f"got {type(model).__name__}"
        )
    check_frames(x0, "x0", 4 if isinstance(x0, Tensor) and x0.ndim == 4 else 3)
    chosen, names = chosen_flows(flows, flow_names, model.num_flows)
    times, origin = columns_of(t, at, steps, per_step)
    batch = x0 if x0.ndim == 4 else x0.unsqueeze(0)
    starts = batch.repeat(len(chosen), 1, 1, 1)
    control = torch.tensor(chosen, device=x0.device).repeat_interleave(len(batch))
    also = {}
    if context is not None:
        rows = torch.arange(len(batch), device=x0.device).repeat(len(chosen))
        also["context"] = rows_of(context, rows)
    ticks = torch.tensor(times, dtype=x0.dtype, device=x0.device)
    with evaluating(model), torch.no_grad():
        frames = _transformed(model, starts, ticks[origin:], control, **also)
        if origin:
            before = _transformed(model, starts, ticks[: origin + 1].flip(0), control, **also)
            frames = torch.cat([before[:, 1:].flip(1), frames], dim=1)
    tiles = to_pictures(frames, "the model's frames", 5)
    tiles = tiles.reshape(len(chosen), len(batch), *tiles.shape[1:])
    return _Traversal(tiles, times, origin, names)


def _transformed(model: Transforms, x0: Tensor, t: Tensor, control: Tensor, **also: Any) -> Tensor:
    frames = model.transform(x0, t, control, **also)
    expected = (len(x0), len(t))
    if not isinstance(frames, Tensor) or frames.ndim != 5 or tuple(frames.shape[:2]) != expected:
        found = list(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
        raise ValueError(f"model.transform must return frames [{expected[0]}, {expected[1]}, C, H, W], got {found}")
    return frames


def chosen_flows(
    flows: Sequence[int | str] | None, names: Sequence[str] | None, count: int
) -> tuple[list[int], tuple[str, ...]]:
    """Flows by their indices, and their names, of such as are given by either; raises where there is no such flow."""
    if isinstance(names, str) or (names is not None and len(names) != count):
        raise ValueError(f"flow_names must name all {count} flows of the model, got {names!r}")
    labels = [f"flow {k}" for k in range(count)] if names is None else [str(name) for name in names]
    if flows is None:
        return list(range(count)), tuple(labels)
    if isinstance(flows, (int, str)) or not len(flows):
        raise ValueError(f"flows must be a non-empty list of flows, got {flows!r}; for a single one write [{flows!r}]")
    chosen = []
    for flow in flows:
        if isinstance(flow, str):
            if names is None or flow not in labels:
                known = "give flow_names to use names" if names is None else f"the names are {labels}"
                raise ValueError(f"there is no flow named {flow!r}; {known}")
            chosen.append(labels.index(flow))
        elif isinstance(flow, bool) or not hasattr(flow, "__index__"):
            raise TypeError(f"a flow must be an index or a name, got {flow!r}")
        elif not 0 <= int(flow) < count:
            raise ValueError(f"flow {int(flow)} does not exist: this model has flows 0 to {count - 1}")
        else:
            chosen.append(int(flow))
    return chosen, tuple(labels[k] for k in chosen)


def columns_of(
    t: Tensor | Sequence[float] | None, at: float, steps: int, per_step: int
) -> tuple[tuple[float, ...], int]:
    """The times of columns, and which of them is ``at``; raises where they do not increase, or none is."""
    if t is None:
        check_count("steps", steps)
        reach = steps * per_step
        times = [float(at) + i / per_step for i in range(-reach, reach + 1)]
        return tuple(times), reach
    try:
        values = torch.as_tensor(t, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"t must be a list of numbers, got {t!r}") from error
    if values.ndim != 1 or len(values) == 0 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"t must be a non-empty list of finite times, got {values.tolist()}")
    if not bool((values.diff() > 0).all()):
        raise ValueError(f"t must increase strictly, from the first column to the last; got {values.tolist()}")
    nearest = int((values - float(at)).abs().argmin())
    if abs(float(values[nearest]) - float(at)) > 1e-6 * max(1.0, abs(float(at))):
        raise ValueError(f"t must contain {float(at):g}, the time of x0 (argument at); got {values.tolist()}")
    return tuple(values.tolist()), nearest


def draw_frame(picture: Picture, layout: Layout, column: int, group: int) -> None:
    """Frames one column of tiles, group by group if there are groups, in the gaps: no tile loses a pixel."""
    group = group if group > 1 else len(layout.tops)
    gap = layout.lefts[0]
    thick = max(1, gap // 2)
    left, right = layout.lefts[column] - thick, layout.lefts[column] + layout.tile[1] + thick
    for first in range(0, len(layout.tops), group):
        top = layout.tops[first] - thick
        bottom = layout.tops[first + group - 1] + layout.tile[0] + thick
        for edge in (slice(top, top + thick), slice(bottom - thick, bottom)):
            picture[edge, left:right] = MARK
        for edge in (slice(left, left + thick), slice(right - thick, right)):
            picture[top:bottom, edge] = MARK


def check_look(pad: int, scale: int, background: float, mark: bool) -> None:
    """Checks how a grid of pictures shall look; raises ValueError."""
    check_count("pad", pad, 1 if mark else 0)  # the frame is drawn in the gap
    check_count("scale", scale)
    check_background(background)
