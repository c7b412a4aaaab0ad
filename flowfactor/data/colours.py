"""Colours: hues to RGB, exact hue shifts, and colours given by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Colour: TypeAlias = str | Sequence[float] | Tensor

_NAMED = {
    "red": (1.0, 0.0, 0.0),
    "yellow": (1.0, 1.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "blue": (0.0, 0.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
    "white": (1.0, 1.0, 1.0),
}


def colour(value: Colour) -> Tensor:
    """Turns a colour as a person writes it into RGB.

    Args:
        value: A name (red, yellow, green, cyan, blue, magenta or white), a string ``"#rrggbb"``, or three numbers
            in [0, 1].

    Returns:
        A float32 tensor [3] in [0, 1].

    Raises:
        ValueError: If the name is unknown, or the numbers are not three numbers in [0, 1].

    Example:
        >>> colour("red")
        tensor([1., 0., 0.])
        >>> colour("#00ff00")
        tensor([0., 1., 0.])
    """
    if isinstance(value, str):
        if value.lower() in _NAMED:
            return torch.tensor(_NAMED[value.lower()])
        try:
            if len(value) != 7 or value[0] != "#":
                raise ValueError
            return torch.tensor(list(bytes.fromhex(value[1:]))) / 255
        except ValueError:
            names = ", ".join(_NAMED)
            raise ValueError(f"unknown colour {value!r}: give one of {names}, '#rrggbb' or three numbers") from None
    rgb = torch.as_tensor(value, dtype=torch.float32).detach()
    if rgb.shape != (3,) or not bool(((rgb >= 0) & (rgb <= 1)).all()):
        raise ValueError(f"a colour is three numbers in [0, 1] (red, green, blue), got {value!r}")
    return rgb


def hue_to_rgb(hue: Tensor | float, saturation: Tensor | float = 1.0, value: Tensor | float = 1.0) -> Tensor:
    """Converts HSV colours to RGB.

    Each channel is ``V - V S max(0, min(k, 4 - k, 1))`` with ``k = (n + H / 60) mod 6`` and n = 5, 3, 1 for red, green
    and blue: the closed form of the hexcone of Smith, *Color gamut transform pairs* (1978).

    Args:
        hue: Hue in degrees, any shape [*batch]; it is taken modulo 360. 0 is red, 120 green, 240 blue.
        saturation: Saturation in [0, 1]; it broadcasts against `hue`.
        value: Value (brightness) in [0, 1]; it broadcasts against `hue`.

    Returns:
        RGB [*batch, 3], of the dtype of `hue` (float32 for a number or an integer tensor).

    Example:
        >>> hue_to_rgb(torch.tensor([0.0, 60.0, 240.0]))
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [0., 0., 1.]])
    """
    hue = _floating(hue)
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=hue.dtype, device=hue.device)
    saturation = torch.as_tensor(saturation, dtype=hue.dtype, device=hue.device)[..., None]
    value = torch.as_tensor(value, dtype=hue.dtype, device=hue.device)[..., None]
    return value - value * saturation * _notch(offsets + hue[..., None] / 60)


def shift_hue(images: Tensor, degrees: Tensor | float) -> Tensor:
    """Turns the hue of RGB images round the colour circle, holding HSV saturation and value exactly.

    The shift commutes with brightness: for a grey image g in one colour c, ``shift_hue(g * c) = g * shift_hue(c)``.
    Pixels without a hue (black, grey, white) stay as they are.

    Args:
        images: RGB images [*batch, 3, H, W], floating point, in [0, 1].
        degrees: Shift in degrees. A number or a scalar tensor gives [*batch, 3, H, W]; a tensor [S] gives
            [*batch, S, 3, H, W].

    Returns:
        The images with their hue shifted.

    Raises:
        ValueError: If `images` do not have three channels, or `degrees` has more than one dimension.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
        >>> shift_hue(red, 120.0).flatten()
        tensor([0., 1., 0.])
    """
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"a hue shift needs RGB images [*, 3, H, W], got {list(images.shape)}")
    degrees = torch.as_tensor(degrees, dtype=images.dtype, device=images.device)
    if degrees.ndim > 1:
        raise ValueError(f"degrees is a number or a tensor [S], got {list(degrees.shape)}")
    return _shifted(images, degrees.reshape(*degrees.shape, 1, 1), one_to_many=degrees.ndim == 1)


def shift_each_hue(images: Tensor, degrees: Tensor) -> Tensor:
    """Turns the hue of every image by its own shift; otherwise `shift_hue`.

    Args:
        images: RGB images [*batch, 3, H, W], floating point, in [0, 1].
        degrees: Shifts [*batch] in degrees.

    Returns:
        The images [*batch, 3, H, W] with their hues shifted.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(2, 3, 1, 1)
        >>> shift_each_hue(red, torch.tensor([0.0, 120.0]))[..., 0, 0]
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    return _shifted(images, degrees.to(images)[..., None, None], one_to_many=False)


def _shifted(images: Tensor, degrees: Tensor, *, one_to_many: bool) -> Tensor:
    """Shifts hues [*batch, 3, H, W] by degrees that broadcast to [*batch, H, W], or all by each of [S, 1, 1]."""
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    chroma = value - images.amin(-3)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))  # a grey pixel has chroma 0 and keeps its value
    sextant = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    if one_to_many:
        sextant, value, chroma = sextant.unsqueeze(-3), value.unsqueeze(-3), chroma.unsqueeze(-3)
    channels = [value - chroma * _notch(sextant + degrees / 60 + n) for n in (5, 3, 1)]
    return torch.stack(channels, dim=-3).clamp_(0, 1)


def _notch(k: Tensor) -> Tensor:
    """How far a channel lies below the brightest one, as a share of the chroma, at k sixths of a turn."""
    k = k.remainder(6)
    return torch.minimum(k, 4 - k).clamp(0, 1)


def _floating(value: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)
