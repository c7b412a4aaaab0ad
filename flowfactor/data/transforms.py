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
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowfactor.data._warp import warp
from flowfactor.data.colours import shift_hue

Amounts: TypeAlias = Tensor | Sequence[float]


class Transform(ABC):
    """A deterministic transformation of images, indexed by an amount.

    Subclasses implement `__call__` and have a `name`, which names the flow that learns the transformation. Where sequences
    are to begin anywhere, they say where its amounts lie: on a `circle`, or on a line, in whose `coordinate` equal steps
    have equal effects.

    Attributes:
        name: Its name.
        circle: The amount that leads once round, to the same picture; None where amounts lie on a line.
    """

    name: str = "transformation"
    circle: float | None = None

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

    def coordinate(self, amounts: Tensor) -> Tensor:
        """Gives the coordinate of amounts in which the transformation moves at an even pace; by default the amount.

        Args:
            amounts: Amounts, any shape, floating point.

        Returns:
            Coordinates of the same shape.
        """
        return amounts

    def amount(self, coordinates: Tensor) -> Tensor:
        """Gives the amounts at coordinates: the inverse of `coordinate`."""
        return coordinates

    def composing(self) -> Transform:
        """Gives the transformation at the pace whose steps compose: a step has the same effect wherever it begins.

        Sequences that begin anywhere are made with it. By default the transformation is of that kind.
        """
        return self

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
        amounts = checked_call(images, amounts)
        return warp(images, self.matrices(amounts, *images.shape[-2:]))

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Moves the grey images [B, 1, H, W] and colours the result: [B, S, 3, H, W]."""
        return torch.mul(self(images, amounts), colour.to(images)[:, None, None], out=out)


class Scale(Geometric):
    """Scaling about the centre of the picture.

    The amount is the factor, above 0: 1 leaves the picture as it is, 2 shows everything twice as large.

    Args:
        pace: How factors grow from frame to frame: ``"linear"``, by equal differences, as the paper's; or ``"geometric"``,
            by equal ratios. Scalings one after another multiply their factors, so that a step is the same transformation
            wherever it begins only at the latter. None is linear, and geometric where sequences begin anywhere.

    Raises:
        ValueError: If there is no such pace.

    Example:
        >>> images = torch.rand(5, 1, 28, 28)
        >>> Scale()(images, [1.0, 1.4, 1.8]).shape
        torch.Size([5, 3, 1, 28, 28])
        >>> import flowfactor as ff
        >>> data = ff.data.TransformedImages(images, [(ff.data.Scale("geometric"), 1.0, 4.0)], steps=2)
        >>> data.transforms["scaling"][1]
        tensor([1., 2., 4.], dtype=torch.float64)
    """

    name = "scaling"

    def __init__(self, pace: Literal["linear", "geometric"] | None = None) -> None:
        if pace not in (None, "linear", "geometric"):
            raise ValueError(f"pace is 'linear' or 'geometric', got {pace!r}")
        self.pace = pace

    def coordinate(self, amounts: Tensor) -> Tensor:
        """Gives the factors, or at a geometric pace their logarithms."""
        return amounts.log() if self.pace == "geometric" else amounts

    def amount(self, coordinates: Tensor) -> Tensor:
        """Gives the factors at coordinates."""
        return coordinates.exp() if self.pace == "geometric" else coordinates

    def composing(self) -> Scale:
        """Gives the scaling at a geometric pace, unless another was asked for."""
        return self if self.pace is not None else Scale("geometric")

    def __repr__(self) -> str:
        return "Scale()" if self.pace is None else f"Scale(pace={self.pace!r})"

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
    circle = 360.0

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
    circle = 360.0

    def __call__(self, images: Tensor, amounts: Amounts) -> Tensor:
        """Shifts the hue of every image by every amount: [B, 3, H, W] and [S] to [B, S, 3, H, W]."""
        amounts = checked_call(images, amounts)
        return shift_hue(images, amounts.to(images))

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Shifts the colour and multiplies: [B, S, 3, H, W]."""
        colours = self.colours(checked_call(images, amounts), colour).to(images)
        return torch.mul(images.unsqueeze(1), colours[:, :, None, None], out=out)

    def colours(self, amounts: Tensor, colour: Tensor) -> Tensor:
        """Gives one colour [3] under every shift [S], as [S, 3]."""
        return _hues(tuple(colour.tolist()), tuple(amounts.tolist())).to(amounts)


@functools.lru_cache(maxsize=64)
def _hues(colour: tuple[float, ...], degrees: tuple[float, ...]) -> Tensor:
    """One colour under every shift, [S, 3]: the same in every batch, and never written to."""
    shown = torch.tensor(colour, dtype=torch.float64)[:, None, None]
    return shift_hue(shown, torch.tensor(degrees, dtype=torch.float64))[..., 0, 0]


def checked_call(images: Tensor, amounts: Amounts) -> Tensor:
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
