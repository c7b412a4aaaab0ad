"""Bringing frames to one size, number of channels and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowfactor._checks import check_count
from flowfactor.data.readers.pictures import parse_colour

FITS: tuple[str, ...] = ("pad", "crop", "resize")
"""Ways of bringing a picture to a size."""

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Look:
    """What frames are to look like.

    Attributes:
        size: (height, width), or None to leave them.
        fit: How they come to the size: ``"pad"``, ``"crop"`` or ``"resize"``.
        background: Colour (r, g, b) of what is padded, and behind transparent parts.
        channels: 1 or 3, or None: grey if all are grey.
    """

    size: tuple[int, int] | None = None
    fit: str = "resize"
    background: tuple[int, int, int] = (0, 0, 0)
    channels: int | None = None

    @classmethod
    def checked(cls, size: Any, fit: Any, background: Any, channels: Any) -> Look:
        """Checks a user's settings.

        Raises:
            TypeError: If a size is no integer.
            ValueError: If a setting is none of those it can be.

        Example:
            >>> Look.checked(64, "pad", "white", None).size
            (64, 64)
        """
        if size is not None:
            sides = (
                tuple(size) if isinstance(size, (Sequence, torch.Size)) and not isinstance(size, str) else (size,) * 2
            )
            if len(sides) != 2:
                raise ValueError(f"size is one number or (height, width), got {size!r}")
            size = tuple(check_count("size", side, note="pixels of the height and width") for side in sides)
        if fit not in FITS:
            raise ValueError(f"fit is one of {', '.join(FITS)}, got {fit!r}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels is 1 (grey) or 3 (colour), or left out, got {channels!r}")
        return cls(size, fit, parse_colour(background), channels)

    @property
    def is_grey(self) -> bool:
        """Whether the background is grey."""
        return len(set(self.background)) == 1

    def fitted(self, frames: Tensor, what: str) -> Tensor:
        """Brings frames [n, C, H, W] to the size.

        Args:
            frames: uint8, or floating point in [0, 1].
            what: What they are called in the message.

        Returns:
            Frames [n, C, *size] of the same type.

        Raises:
            ValueError: If they are too large to pad or too small to crop, or grey on a coloured background.

        Example:
            >>> Look(size=(4, 4), fit="pad").fitted(torch.ones(1, 1, 2, 3), "frames")[0, 0].sum(1).tolist()
            [0.0, 3.0, 3.0, 0.0]
        """
        own = (frames.shape[-2], frames.shape[-1])
        if self.size is None or own == self.size:
            return frames
        if self.fit == "resize":
            return _resized(frames, self.size)
        top, left = (self.size[0] - own[0]) // 2, (self.size[1] - own[1]) // 2
        if self.fit == "pad":
            if top < 0 or left < 0:
                raise ValueError(
                    f"{what} has {own[1]} x {own[0]} pixels, more than size={list(self.size)} (height, width) to pad "
                    "to: take a larger size, or fit='crop' or 'resize'"
                )
            canvas = self._canvas(frames, what)
            canvas[..., top : top + own[0], left : left + own[1]] = frames
            return canvas
        if own[0] < self.size[0] or own[1] < self.size[1]:
            raise ValueError(
                f"{what} has {own[1]} x {own[0]} pixels, fewer than size={list(self.size)} (height, width) to crop: "
                "take a smaller size, or fit='pad' or 'resize'"
            )
        top, left = (own[0] - self.size[0]) // 2, (own[1] - self.size[1]) // 2
        return frames[..., top : top + self.size[0], left : left + self.size[1]]

    def _canvas(self, frames: Tensor, what: str) -> Tensor:
        count, channels = frames.shape[:2]
        if channels != 3 and not self.is_grey:
            raise ValueError(
                f"{what} has {channels} channels, and background={list(self.background)} is a colour: give channels=3, or "
                "a grey background"
            )
        colour = torch.tensor(self.background if channels == 3 else self.background[:1], device=frames.device)
        colour = colour.to(frames.dtype) if frames.dtype == torch.uint8 else (colour / 255).to(frames.dtype)
        return colour[:, None, None].expand(count, channels, *(self.size or frames.shape[2:])).clone()


def _resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    made = interpolate(frames.float(), size, mode="bilinear", antialias=True)
    if frames.dtype == torch.uint8:
        return made.round_().clamp_(0, 255).to(torch.uint8)
    return made.clamp_(0, 1).to(frames.dtype)


def with_channels(frames: Tensor, channels: int, what: str) -> Tensor:
    """Makes grey of colour, or three equal channels of grey.

    Args:
        frames: Frames [n, C, H, W].
        channels: Channels that they are to have.
        what: What they are called in the message.

    Returns:
        Frames [n, channels, H, W].

    Raises:
        ValueError: If there is no such way.

    Example:
        >>> with_channels(torch.zeros(2, 3, 4, 4), 1, "frames").shape
        torch.Size([2, 1, 4, 4])
    """
    own = frames.shape[1]
    if own == channels:
        return frames
    if own == 1 and channels == 3:
        return frames.expand(-1, 3, -1, -1)
    if own == 3 and channels == 1:
        grey = (frames.float() * torch.tensor(_LUMA, device=frames.device)[:, None, None]).sum(1, keepdim=True)
        return grey.round().to(torch.uint8) if frames.dtype == torch.uint8 else grey.clamp(0, 1).to(frames.dtype)
    raise ValueError(f"{what} has {own} channels, expected {channels}: all sequences must have as many")
