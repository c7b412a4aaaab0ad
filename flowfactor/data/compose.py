"""Several transformations at once, led by one amount."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor.data._warp import warp
from flowfactor.data.colours import shift_hue
from flowfactor.data.transforms import Amounts, Geometric, Hue, Transform, checked_call


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
        >>> from flowfactor.data import Rotate
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
        self.circle = _common_circle(self.parts)

    def __call__(self, images: Tensor, amounts: Amounts) -> Tensor:
        """Applies all parts at every progress: [B, C, H, W] and [S] to [B, S, C, H, W]."""
        amounts = checked_call(images, amounts)
        frames = self._moved(images, amounts)
        shift = self.shift(amounts)
        if shift is None:
            return frames
        # The shifts differ along S, not across images: one colour function a time, each over all images.
        shifted = [shift_hue(frames[:, s], degrees.item()) for s, degrees in enumerate(shift)]
        return torch.stack(shifted, dim=1)

    def tint(self, images: Tensor, amounts: Amounts, colour: Tensor, out: Tensor | None = None) -> Tensor:
        """Moves the grey images, shifts the colour and multiplies: [B, S, 3, H, W]."""
        amounts = checked_call(images, amounts)
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
            transform.matrices(_between(transform, start, end, amounts), height, width)
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


def _between(transform: Transform, start: float, end: float, progress: Tensor) -> Tensor:
    """The amounts at a progress from start to end, at the transformation's pace."""
    ends = torch.tensor([start, end], dtype=progress.dtype, device=progress.device)
    first, last = transform.coordinate(ends).tolist()
    return transform.amount(first + (last - first) * progress)


def _common_circle(parts: Sequence[tuple[Transform, float, float]]) -> float | None:
    """The progress after which all parts are where they were; None where one lies on a line, or they never meet."""
    rounds = [None if part.circle is None or a == b else part.circle / abs(b - a) for part, a, b in parts]
    longest = max((whole for whole in rounds if whole is not None), default=0.0)
    meet = [whole is not None and abs(longest / whole - round(longest / whole)) < 1e-9 for whole in rounds]
    return longest if all(meet) else None
