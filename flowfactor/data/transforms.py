r"""Transformations of images, each a family indexed by one amount.

A transformation is called as ``transform(images, amounts)`` with images [B, C, H, W] in [0, 1] and amounts [S] in the
transformation's own unit, and returns [B, S, C, H, W]: every image under every amount. All are deterministic.

The geometric ones share one rule. Each amount gives a homography that leads from a pixel of the result back to a point
of the image; the image is read there by bilinear interpolation, and is black outside its frame. Amounts are the same
for every image, so that a batch is one call of `torch.nn.functional.grid_sample` in which the images are channels.
Coordinates are pixels from the centre of the picture, x to the right and y down.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from flowfactor.data._warp import warp
from flowfactor.data.colours import shift_hue

Amounts: TypeAlias = Tensor | Sequence[float]


class Transform(ABC):
    """A deterministic transformation of images, indexed by an amount.

    Subclasses implement `__call__` and have a `name`, which names the flow that learns the transformation.
    """

    name: str = "transformation"

    @abstractmethod
    def __call__(self, images: Tensor, amounts: Amounts) -> Tensor:
        """Transforms every image by every amount.

        Args:
            images: Images [B, C, H, W], floating point, in [0, 1].
            amounts: Amounts [S] in the transformation's own unit.

        Returns:
            Transformed images [B, S, C, H, W] in [0, 1], of the images' dtype and device.

        Raises:
            ValueError: If the shapes are not these, or an amount is out of the transformation's range.
        """

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Transforms grey images shown in one colour, on as few channels as that takes.

        Args:
            images: Grey images [B, 1, H, W].
            amounts: Amounts [S].
            colour: RGB [3].
            out: Where to write the result; None for a tensor of its own.

        Returns:
            ``self(images * colour, amounts)``, [B, S, 3, H, W].
        """
        frames = self(images * colour.to(images)[:, None, None], amounts)
        return frames if out is None else out.copy_(frames)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Geometric(Transform):
    """A transformation that moves points of the picture: a homography for each amount."""

    @abstractmethod
    def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor:
        """Gives the maps from result to image.

        Args:
            amounts: Amounts [S], float64.
            height: Height of the pictures in pixels.
            width: Width of the pictures in pixels.

        Returns:
            Homographies [S, 3, 3], float64. Each takes (x, y, 1) of a point in the result to the point of the image
            that is seen there, in pixels from the centre, x to the right and y down.
        """

    def __call__(self, images: Tensor, amounts: Amounts) -> Tensor:
        """Transforms every image by every amount: [B, C, H, W] and [S] to [B, S, C, H, W]."""
        amounts = _checked(images, amounts)
        return warp(images, self.matrices(amounts, *images.shape[-2:]))

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Moves the grey images [B, 1, H, W] and colours the result: [B, S, 3, H, W]."""
        return torch.mul(self(images, amounts), colour.to(images)[:, None, None], out=out)


class Scale(Geometric):
    """Scaling about the centre of the picture.

    The amount is the factor, above 0: 1 leaves the picture as it is, 2 shows everything twice as large.

    Example:
        >>> images = torch.rand(5, 1, 28, 28)
        >>> Scale()(images, [1.0, 1.4, 1.8]).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    name = "scaling"

    def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor:
        """Gives diag(1 / factor, 1 / factor, 1)."""
        if bool((amounts <= 0).any()):
            raise ValueError(f"scale factors must be above 0, got {amounts.min().item():g}")
        one = torch.ones_like(amounts)
        return torch.diag_embed(torch.stack([1 / amounts, 1 / amounts, one], dim=-1))


class Rotate(Geometric):
    """Rotation about the centre of the picture.

    The amount is the angle in degrees, counter-clockwise as one looks at the picture.

    Example:
        >>> images = torch.rand(2, 1, 28, 28)
        >>> quarter = Rotate()(images, [90.0])[:, 0]
        >>> torch.allclose(quarter, torch.rot90(images, dims=(-2, -1)), atol=1e-5)
        True
    """

    name = "rotation"

    def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor:
        """Gives the rotations by minus the angle, in coordinates whose y points down."""
        angle = torch.deg2rad(amounts)
        zero, one = torch.zeros_like(angle), torch.ones_like(angle)
        return _matrices((angle.cos(), -angle.sin(), zero), (angle.sin(), angle.cos(), zero), (zero, zero, one))


class Translate(Geometric):
    """Translation along a fixed direction.

    The amount counts steps of (x, y) pixels: with the default of one pixel to the right it is the shift in pixels.

    Args:
        x: Pixels to the right per unit of the amount.
        y: Pixels down per unit of the amount.

    Example:
        >>> image = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> Translate()(image, [0.0, 1.0, 1.5]).squeeze()
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """

    name = "translation"

    def __init__(self, x: float = 1.0, y: float = 0.0) -> None:
        self.x, self.y = float(x), float(y)

    def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor:
        """Gives the translations back."""
        zero, one = torch.zeros_like(amounts), torch.ones_like(amounts)
        return _matrices((one, zero, -amounts * self.x), (zero, one, -amounts * self.y), (zero, zero, one))

    def __repr__(self) -> str:
        return f"Translate(x={self.x:g}, y={self.y:g})"


class Perspective(Geometric):
    """The picture turned about an axis in its plane, seen by a pinhole camera.

    The amount is the angle of the turn in degrees, between -90 and 90. A positive angle about the vertical axis takes
    the right edge away from the camera; about the horizontal axis, the top edge.

    Args:
        axis: ``"vertical"`` or ``"horizontal"``.
        distance: Distance from the camera to the centre of the picture, in halves of its longer side, above 1. Less
            is a stronger perspective. At angle 0 the picture is seen as it is, whatever the distance.

    Example:
        >>> Perspective("horizontal")(torch.rand(2, 3, 32, 32), [0.0, 30.0]).shape
        torch.Size([2, 2, 3, 32, 32])
    """

    name = "perspective"

    def __init__(self, axis: str = "vertical", distance: float = 3.0) -> None:
        if axis not in ("vertical", "horizontal"):
            raise ValueError(f"axis is 'vertical' or 'horizontal', got {axis!r}")
        if not distance > 1:
            raise ValueError(f"distance must be above 1 (halves of the longer side), got {distance!r}")
        self.axis, self.distance = axis, float(distance)

    def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor:
        """Gives the homographies: a point s along the picture at angle a is seen at d s cos(a) / (d + s sin(a))."""
        if bool((amounts.abs() >= 90).any()):
            raise ValueError(
                "perspective angles must lie between -90 and 90 degrees, where the picture is seen edge on"
            )
        angle = torch.deg2rad(amounts)
        zero, one = torch.zeros_like(angle), torch.ones_like(angle)
        cos, slope = angle.cos(), angle.sin() / (self.distance * max(height, width) / 2)
        if self.axis == "vertical":
            return _matrices((one, zero, zero), (zero, cos, zero), (-slope, zero, cos))
        return _matrices((cos, zero, zero), (zero, one, zero), (zero, slope, cos))

    def __repr__(self) -> str:
        return f"Perspective(axis={self.axis!r}, distance={self.distance:g})"


class Hue(Transform):
    """Hue shift of RGB pictures; saturation and value stay exactly as they are.

    The amount is the shift in degrees: 120 takes red to green, green to blue and blue to red.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(Hue()(images, [120.0])[:, 0], images.roll(1, dims=1), atol=1e-5)
        True
    """

    name = "hue"

    def __call__(self, images: Tensor, amounts: Amounts) -> Tensor:
        """Shifts the hue of every image by every amount: [B, 3, H, W] and [S] to [B, S, 3, H, W]."""
        amounts = _checked(images, amounts)
        return shift_hue(images, amounts.to(images))

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Shifts the colour and multiplies: [B, S, 3, H, W]."""
        colours = self.colours(_checked(images, amounts), colour).to(images)
        return torch.mul(images.unsqueeze(1), colours[:, :, None, None], out=out)

    def colours(self, amounts: Tensor, colour: Tensor) -> Tensor:
        """Gives one colour [3] under every shift [S], as [S, 3]."""
        return _hues(tuple(colour.tolist()), tuple(amounts.tolist())).to(amounts)


@functools.lru_cache(maxsize=64)
def _hues(colour: tuple[float, ...], degrees: tuple[float, ...]) -> Tensor:
    """One colour under every shift, [S, 3]: the same in every batch, and never written to."""
    shown = torch.tensor(colour, dtype=torch.float64)[:, None, None]
    return shift_hue(shown, torch.tensor(degrees, dtype=torch.float64))[..., 0, 0]


class Compose(Transform):
    """Several transformations at once, led by one amount.

    The amount is the progress: at 0 every part is at its start, at 1 at its end, and in between (or beyond) on the
    straight line through both. Geometric parts are multiplied into one homography, applied in the order given, so that
    the picture is interpolated once however many there are; hue shifts follow.

    Args:
        *parts: Triples (transformation, start, end), the transformation being geometric or a `Hue`.
        name: Name of the whole; by default the parts' names joined by ``+``.

    Raises:
        ValueError: If there is no part.
        TypeError: If a part is not such a triple.

    Example:
        >>> both = Compose((Rotate(), 0.0, 80.0), (Hue(), 0.0, 160.0))
        >>> both.name
        'rotation+hue'
        >>> both(torch.rand(2, 3, 28, 28), torch.linspace(0, 1, 9)).shape
        torch.Size([2, 9, 3, 28, 28])
    """

    def __init__(self, *parts: tuple[Transform, float, float], name: str | None = None) -> None:
        if not parts:
            raise ValueError("Compose needs at least one part: (transformation, start, end)")
        for part in parts:
            if not (isinstance(part, tuple) and len(part) == 3 and isinstance(part[0], Geometric | Hue)):
                raise TypeError(
                    f"a part is (transformation, start, end) with a geometric transformation or Hue, got {part!r}"
                )
        self.parts = tuple((transform, float(start), float(end)) for transform, start, end in parts)
        self.name = name or "+".join(transform.name for transform, _, _ in parts)

    def __call__(self, images: Tensor, amounts: Amounts) -> Tensor:
        """Applies all parts at every progress: [B, C, H, W] and [S] to [B, S, C, H, W]."""
        amounts = _checked(images, amounts)
        frames = self._moved(images, amounts)
        shift = self.shift(amounts)
        if shift is None:
            return frames
        # The shifts differ along S, not across images: one colour function a time, each over all images.
        shifted = [shift_hue(frames[:, s], degrees.item()) for s, degrees in enumerate(shift)]
        return torch.stack(shifted, dim=1)

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Moves the grey images, shifts the colour and multiplies: [B, S, 3, H, W]."""
        amounts = _checked(images, amounts)
        shift = self.shift(amounts)
        colours = colour.to(images).expand(len(amounts), 3) if shift is None else Hue().colours(shift, colour)
        return torch.mul(self._moved(images, amounts), colours.to(images)[:, :, None, None], out=out)

    def _moved(self, images: Tensor, amounts: Tensor) -> Tensor:
        whole = self.matrices(amounts, *images.shape[-2:])
        if whole is None:
            return images.unsqueeze(1).expand(-1, len(amounts), -1, -1, -1)
        return warp(images, whole)

    def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor | None:
        """Gives the homographies [S, 3, 3] of all geometric parts together, or None if there are none.

        Args:
            amounts: Progress [S], float64.
            height: Height of the pictures in pixels.
            width: Width of the pictures in pixels.

        Returns:
            Homographies as `Geometric.matrices` gives them.
        """
        maps = [
            transform.matrices(start + (end - start) * amounts, height, width)
            for transform, start, end in self.parts
            if isinstance(transform, Geometric)
        ]
        # Back from the result: the last transformation is undone first.
        return functools.reduce(torch.matmul, maps) if maps else None

    def shift(self, amounts: Tensor) -> Tensor | None:
        """Gives the hue shift [S] in degrees of all hue parts together, or None if there are none.

        Args:
            amounts: Progress [S], float64.

        Returns:
            The shifts.
        """
        shifts = [start + (end - start) * amounts for transform, start, end in self.parts if isinstance(transform, Hue)]
        return torch.stack(shifts).sum(0) if shifts else None

    def __repr__(self) -> str:
        return f"Compose({', '.join(f'({t!r}, {a:g}, {b:g})' for t, a, b in self.parts)})"


def _checked(images: Tensor, amounts: Amounts) -> Tensor:
    """Checks the arguments of a transformation and returns the amounts as float64, on the images' device."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        what = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating-point tensor [B, C, H, W], got {what}")
    amounts = torch.as_tensor(amounts, dtype=torch.float64, device=images.device)
    if amounts.ndim != 1 or not bool(amounts.isfinite().all()):
        raise ValueError(f"amounts must be finite numbers [S], got {amounts.tolist()}")
    return amounts


def _matrices(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
