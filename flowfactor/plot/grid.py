"""Grids of pictures as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowfactor._checks import check_count

Picture = NDArray[np.float32]

#: How far outside [0, 1] values may lie and still be clipped rather than refused.
_SLACK = 0.5


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a grid lie, in pixels.

    Attributes:
        tops: Top edge of each row.
        lefts: Left edge of each column.
        tile: Height and width of a tile.
        size: Height and width of the grid.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    tile: tuple[int, int]
    size: tuple[int, int]


def layout_of(rows: int, columns: int, tile: tuple[int, int], pad: int, group: int = 1) -> Layout:
    """Lays out a grid whose rows stand in groups, with a wider gap between two groups.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        tile: Height and width of a tile, in pixels.
        pad: Gap between tiles and round the grid, in pixels.
        group: Number of rows in a group.

    Returns:
        The layout.

    Example:
        >>> layout_of(2, 3, (28, 28), pad=2).size
        (62, 92)
    """
    wide = 3 * pad if group > 1 else pad
    tops, top = [], pad
    for row in range(rows):
        if row:
            top += tile[0] + (wide if row % group == 0 else pad)
        tops.append(top)
    lefts = [pad + column * (tile[1] + pad) for column in range(columns)]
    size = (tops[-1] + tile[0] + pad, lefts[-1] + tile[1] + pad)
    return Layout(tuple(tops), tuple(lefts), tile, size)


def assemble(tiles: Picture, layout: Layout, background: float) -> Picture:
    """Puts tiles [rows, columns, h, w, 3] into one picture [H, W, 3]."""
    picture = np.full((*layout.size, 3), background, dtype=np.float32)
    height, width = layout.tile
    for i, top in enumerate(layout.tops):
        for j, left in enumerate(layout.lefts):
            picture[top : top + height, left : left + width] = tiles[i, j]
    return picture


def to_pictures(frames: object, what: str, ndim: int) -> Picture:
    """Turns frames [..., C, H, W] into colour pictures [..., H, W, 3] in [0, 1].

    Args:
        frames: Floats in [0, 1] with C = 1 or 3; small overshoot is clipped.
        what: What they are called in messages.
        ndim: Expected number of dimensions.

    Returns:
        The pictures, on the CPU.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If their shape or range is wrong.

    Example:
        >>> import torch
        >>> to_pictures(torch.zeros(5, 1, 28, 28), "frames", 4).shape
        (5, 28, 28, 3)
    """
    check_frames(frames, what, ndim)
    assert isinstance(frames, Tensor)  # what the line above has just checked
    values = np.moveaxis(frames.detach().float().cpu().numpy(), -3, -1)
    values = checked_range(values, what)
    if values.shape[-1] == 1:
        values = np.repeat(values, 3, axis=-1)
    return values


def check_frames(frames: object, what: str, ndim: int) -> None:
    """Checks that ``frames`` is a floating-point tensor of ``ndim`` dimensions that ends in [C, H, W], C = 1 or 3."""
    shape = {3: "[C, H, W]", 4: "[B, C, H, W]", 5: "[N, T, C, H, W]"}[ndim]
    if not isinstance(frames, Tensor):
        raise TypeError(f"{what} must be a tensor {shape}, got {type(frames).__name__}")
    if not frames.is_floating_point():
        raise TypeError(f"{what} must be floats in [0, 1], got {frames.dtype}; convert bytes with .float() / 255")
    if frames.ndim != ndim or frames.shape[-3] not in (1, 3) or frames.numel() == 0:
        raise ValueError(f"{what} must have shape {shape} with C = 1 or 3 and nothing empty, got {list(frames.shape)}")


def checked_range(values: NDArray[np.floating], what: str) -> Picture:
    """Clips values to [0, 1], and refuses those that cannot have been meant to lie there."""
    if not np.isfinite(values).all():
        raise ValueError(f"{what} hold NaN or infinity; every value must lie in [0, 1]")
    low, high = float(values.min()), float(values.max())
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(
            f"{what} must lie in [0, 1], but range from {low:g} to {high:g}; rescale them (bytes: divide by 255)"
        )
    return np.clip(values, 0, 1).astype(np.float32)


def enlarge(pictures: NDArray, scale: int) -> NDArray:
    """Makes every pixel of [..., H, W, 3] a square of ``scale`` pixels a side."""
    return pictures if scale == 1 else pictures.repeat(scale, axis=-3).repeat(scale, axis=-2)


def check_background(background: float) -> None:
    """Checks that a shade of grey lies in [0, 1]."""
    if not 0 <= background <= 1:
        raise ValueError(f"background must be a grey in [0, 1], got {background!r}")


def strips(frames: Tensor, *others: Tensor, pad: int = 2, scale: int = 1, background: float = 1.0) -> Picture:
    """Sequences as strips, one frame after the other, each above its counterparts.

    Args:
        frames: Sequences ``[N, T, C, H, W]`` in [0, 1]; C is 1 or 3.
        *others: More of the same N, T, H and W, for example reconstructions. Strip i of each stands below strip i of
            the one before, and a wider gap separates the samples.
        pad: Gap between pictures, in their pixels.
        scale: Each pixel of the whole becomes a square of this many pixels a side.
        background: Grey of the gaps, in [0, 1].

    Returns:
        The picture ``[rows, columns, 3]`` in [0, 1], float32.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If shapes, values or settings do not fit.

    Example:
        >>> import torch
        >>> data, reconstructions = torch.rand(4, 9, 3, 28, 28), torch.rand(4, 9, 3, 28, 28)
        >>> strips(data, reconstructions).shape
        (254, 272, 3)
    """
    check_count("pad", pad, 0)
    check_count("scale", scale)
    check_background(background)
    sets = []
    for i, one in enumerate((frames, *others)):
        what = "frames" if i == 0 else f"frames (argument {i + 1})"
        sets.append(to_pictures(one, what, 5))
        if sets[-1].shape != sets[0].shape:
            raise ValueError(
                f"all sequences must have the same N, T, H and W; argument {i + 1} has shape {list(one.shape)} and the "
                f"first {list(frames.shape)}"
            )
    tiles = np.stack(sets, axis=1).reshape(-1, *sets[0].shape[1:])
    rows, columns, height, width, _ = tiles.shape
    layout = layout_of(rows, columns, (height, width), pad, group=len(sets))
    return enlarge(assemble(tiles, layout, background), scale)
