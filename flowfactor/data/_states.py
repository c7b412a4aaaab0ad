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
    images: Tensor,
    transforms: Sequence[Any],
    amounts: Sequence[Tensor],
    frames: int,
    colour: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Shows every image under all transformations at amounts of its own.

    Geometric maps are multiplied into one, in the order given; hue shifts follow, added up; any other transformation is
    applied after these, image by image, in the order given.

    Args:
        images: Images [B, C, H, W] in [0, 1].
        transforms: K transformations.
        amounts: Of each, its amounts [B, S], or [B, 1] where they hold; float64, on the CPU.
        frames: S.
        colour: RGB [3] to show grey images in, or None.
        out: Where to write; None for a tensor of its own.

    Returns:
        Frames [B, S, C, H, W], with three channels where a colour is given.
    """
    maps: Tensor | None = None
    shift: Tensor | None = None
    others: list[tuple[Any, Tensor]] = []
    for transform, amount in zip(transforms, amounts, strict=True):
        turned: Tensor | None = amount if isinstance(transform, Hue) else None
        if isinstance(transform, Geometric | Compose):
            own = transform.matrices(amount.flatten(), *images.shape[-2:])
            if own is not None:
                own = own.view(*amount.shape, 3, 3)
                maps = own if maps is None else maps @ own
        if isinstance(transform, Compose):
            turned = transform.shift(amount)
        if turned is not None:
            shift = turned if shift is None else shift + turned
        if not isinstance(transform, Geometric | Compose | Hue):
            others.append((transform, amount))
    moved = images[:, None] if maps is None else warp_each(images, maps)
    if others:
        seen = _coloured(moved, shift, colour).expand(-1, frames, -1, -1, -1)
        for transform, amount in others:
            seen = _one_by_one(transform, seen, amount)
        return seen.contiguous() if out is None else out.copy_(seen)
    seen = _coloured(moved, shift, colour, out)
    if out is None:
        return seen.expand(-1, frames, -1, -1, -1).contiguous()
    return out if seen is out else out.copy_(seen)


def _coloured(frames: Tensor, shift: Tensor | None, colour: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Colours frames [B, S or 1, C, H, W], and shifts their hues by [B, S or 1] degrees."""
    if colour is not None:
        if shift is None:
            shades = colour.view(1, 1, 3)
        else:
            shown = colour.double().cpu()[:, None, None]
            shades = shift_hue(shown, shift.flatten())[..., 0, 0].view(*shift.shape, 3)
        shades = shades.to(frames)[..., None, None]
        fits = out is not None and out.shape[1] == max(frames.shape[1], shades.shape[1])
        return torch.mul(frames, shades, out=out) if fits else frames * shades
    if shift is None or bool((shift == 0).all()):
        return frames
    return shift_each_hue(frames, shift)


def _one_by_one(transform: Any, frames: Tensor, amount: Tensor) -> Tensor:
    """A transformation that takes the same amounts for all images of a call, which these do not have."""
    made = []
    for images, own in zip(frames, amount, strict=True):
        if amount.shape[1] == 1:
            made.append(transform(images, own)[:, 0])
        else:
            made.append(
                torch.cat([transform(image[None], one[None])[:, 0] for image, one in zip(images, own, strict=True)])
            )
    return torch.stack(made)
