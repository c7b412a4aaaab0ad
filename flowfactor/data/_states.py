"""Images shown in states of several transformations at once: one warp, and one pass of colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowfactor.data._warp import warp_each
from flowfactor.data.colours import shift_each_hue, shift_hue
from flowfactor.data.compose import Compose
from flowfactor.data.transforms import Geometric, Hue


def shown(
    images: Tensor, transforms: Sequence[Any], amounts: Tensor, colour: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Shows every image under all transformations at amounts of its own.

    Geometric maps are multiplied into one, in the order given; hue shifts follow, added up; any other transformation is
    applied after these, image by image, in the order given.

    Args:
        images: Images [B, C, H, W] in [0, 1].
        transforms: K transformations.
        amounts: Amounts [B, S, K]; float64, on the CPU.
        colour: RGB [3] to show grey images in, or None.
        out: Where to write; None for a tensor of its own.

    Returns:
        Frames [B, S, C, H, W], with three channels where a colour is given.
    """
    batch, frames = amounts.shape[:2]
    maps, shift = _maps(transforms, amounts, images.shape[-2:]), _shift(transforms, amounts)
    if out is None:
        channels = images.shape[1] if colour is None else 3
        out = images.new_empty(batch, frames, channels, *images.shape[-2:])
    shades = None if colour is None else _shades(colour, shift).to(images)[..., None, None]
    # Those that keep their place, as those whose hue alone turns, are read through one map for all frames.
    still = torch.ones(batch, dtype=torch.bool) if maps is None else (maps == maps[:, :1]).flatten(1).all(1)
    for is_still in (True, False):
        rows = _rows(still == is_still)
        if rows is None:
            continue
        mine, place = images[rows], None if maps is None else maps[rows]
        moved = mine[:, None] if place is None else warp_each(mine, place[:, :1] if is_still else place)
        turned = moved if shades is not None or shift is None else shift_each_hue(moved, shift[rows])
        if shades is None:
            out[rows] = turned
        elif isinstance(rows, slice) and not images.requires_grad:
            torch.mul(moved, shades[rows], out=out[rows])
        else:
            out[rows] = moved * shades[rows]
    for flow, transform in enumerate(transforms):
        if not isinstance(transform, Geometric | Compose | Hue):
            out.copy_(_one_by_one(transform, out, amounts[..., flow]))
    return out


def _rows(which: Tensor) -> slice | Tensor | None:
    """The rows of a mask: a slice where they stand together, None where there are none."""
    rows = which.nonzero().flatten()
    if not len(rows):
        return None
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _maps(transforms: Sequence[Any], amounts: Tensor, size: Sequence[int]) -> Tensor | None:
    """The homographies [B, S, 3, 3] of all geometric transformations together, or None if there are none."""
    whole: Tensor | None = None
    for flow, transform in enumerate(transforms):
        if isinstance(transform, Geometric | Compose):
            own = transform.matrices(amounts[..., flow].flatten(), *size)
            whole = whole if own is None else own if whole is None else whole @ own
    return None if whole is None else whole.view(*amounts.shape[:2], 3, 3)


def _shift(transforms: Sequence[Any], amounts: Tensor) -> Tensor | None:
    """The hue shifts [B, S] of all transformations together, in degrees, or None if there are none."""
    parts = []
    for flow, transform in enumerate(transforms):
        own = amounts[..., flow]
        parts += [own] if isinstance(transform, Hue) else []
        turned = transform.shift(own) if isinstance(transform, Compose) else None
        parts += [] if turned is None else [turned]
    return sum(parts[1:], parts[0]) if parts else None


def _shades(colour: Tensor, shift: Tensor | None) -> Tensor:
    """A colour under hue shifts [B, S]: [B, S, 3]; or as it is, [1, 1, 3]."""
    if shift is None:
        return colour.view(1, 1, 3)
    shown = colour.double().cpu()[:, None, None]
    return shift_hue(shown, shift.flatten())[..., 0, 0].view(*shift.shape, 3)


def _one_by_one(transform: Any, frames: Tensor, amount: Tensor) -> Tensor:
    """A transformation that takes the same amounts for all images of a call, which these do not have."""
    made = []
    for images, own in zip(frames, amount, strict=True):
        if bool((own == own[0]).all()):
            made.append(transform(images, own[:1])[:, 0])
        else:
            made.append(
                torch.cat([transform(image[None], one[None])[:, 0] for image, one in zip(images, own, strict=True)])
            )
    return torch.stack(made) if made else frames
