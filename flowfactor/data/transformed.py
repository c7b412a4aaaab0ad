"""Sequences made from single images: anyone's pictures under anyone's transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowfactor.data.arrays import as_tensor, looks_channels_last, pictures_tensor
from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_range, check_times, to_unit
from flowfactor.data.colours import Colour
from flowfactor.data.colours import colour as to_rgb
from flowfactor.data.transforms import Transform

Warper: TypeAlias = Callable[[Tensor, Tensor], Tensor]
TransformRange: TypeAlias = tuple[Warper, float, float] | tuple[Warper, Sequence[float] | Tensor]


class TransformedImages(SequenceDataset):
    """Anyone's images, each under one of several transformations.

    Images are kept as they come (bytes stay bytes) and a batch is made when it is asked for, all images of one
    transformation in one call, so that the frames of an epoch never lie in memory.

    The length is the number N of images. ``data[i]`` is image i under transformation ``i % K``; ``data[i, k]`` under k.
    `batches` and `loader` pair images and transformations anew in every epoch.

    Args:
        images: [N, H, W] or [N, C, H, W], a tensor or an array: uint8, or floating point in [0, 1].
        transforms: The transformations by name, or a list of them (named by their ``name``), each as
            ``(transform, start, end)``, whose amounts go from start to end in equal steps, or as
            ``(transform, amounts)`` with T + 1 amounts. A transform is a `Transform`, or any function
            ``f(images [B, C, H, W], amounts [S]) -> [B, S, C, H, W]``.
        steps: Number T of steps: a sequence has T + 1 frames.
        colour: Shows grey images in this colour: a name, ``"#rrggbb"`` or three numbers in [0, 1]. None leaves the
            images as they are.
        labels: Labels of the images [N], kept as `labels` for the user's own purposes.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Attributes:
        images: The images [N, C, H, W].
        transforms: Names to pairs (transform, amounts [T+1]).
        labels: The labels, or None.

    Raises:
        ValueError: If the images or the amounts are not as described, or a transformation does not suit the images.
        TypeError: If a transformation is not a pair or triple as described.

    Example:
        >>> import flowfactor as ff
        >>> images = torch.randint(256, (100, 28, 28), dtype=torch.uint8)
        >>> flows = [(ff.data.Scale(), 1.0, 1.8), (ff.data.Hue(), 0.0, 160.0)]
        >>> data = TransformedImages(images, flows, steps=8, colour="red")
        >>> data.flow_names, data.num_steps, data.image_shape
        (('scaling', 'hue'), 8, (3, 28, 28))
        >>> data[5]["frames"].shape, data[5]["k"]
        (torch.Size([9, 3, 28, 28]), 1)
    """

    def __init__(
        self,
        images: Tensor | np.ndarray[Any, Any],
        transforms: Mapping[str, TransformRange] | Sequence[TransformRange],
        steps: int = 8,
        *,
        colour: Colour | None = None,
        labels: Tensor | np.ndarray[Any, Any] | Sequence[int] | None = None,
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        self.images = _checked_images(images)
        channels, height, width = self.images.shape[1:]
        self.colour = None if colour is None else to_rgb(colour).to(self.images.device)
        if self.colour is not None and channels != 1:
            raise ValueError(f"colour= shows grey images in a colour, but these have {channels} channels")
        self.image_shape = (3 if self.colour is not None else channels, height, width)
        self.t = check_times(t, steps, self.images.device)
        self.labels = None if labels is None else as_tensor(labels)
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"there are {len(self.images)} images but {len(self.labels)} labels")
        self.transforms = _checked_transforms(transforms, self.num_steps)
        self.flow_names = tuple(self.transforms)
        for name in self.flow_names:
            self._try(name)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    _tensors = ("t", "images", "colour")

    def _select(self, indices: Tensor) -> None:
        self.images = self.images[indices]
        self.labels = None if self.labels is None else self.labels[indices]

    def _substance(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        frames = self.images.new_empty((len(indices), len(self.t), *self.image_shape), dtype=torch.float32)
        images = to_unit(self.images[indices])
        for flow in k.unique().tolist():
            where = (k == flow).nonzero().flatten()
            first, last = int(where[0]), int(where[-1])
            name = self.flow_names[flow]
            if last - first + 1 == len(where):  # a run, as in batches sorted by k: no gather, no scatter
                self._apply(name, images[first : last + 1], out=frames[first : last + 1])
            else:
                frames[where] = self._apply(name, images[where])
        return {"frames": frames}

    def _apply(self, name: str, images: Tensor, out: Tensor | None = None) -> Tensor:
        transform, amounts = self.transforms[name]
        if self.colour is not None and isinstance(transform, Transform):
            return transform.tint(images, amounts, self.colour, out)
        frames = transform(images if self.colour is None else images * self.colour[:, None, None], amounts)
        return frames if out is None else out.copy_(frames)

    def _try(self, name: str) -> None:
        """Makes one sequence, so that what does not fit is reported here and not in the middle of a training."""
        frames = self._apply(name, to_unit(self.images[:1]))
        expected = (1, len(self.t), *self.image_shape)
        if frames.shape != expected:
            raise ValueError(f"transformation {name!r} gave frames {list(frames.shape)}, expected {list(expected)}")
        check_range(frames, f"the frames of transformation {name!r}")


def _checked_images(images: Tensor | np.ndarray[Any, Any]) -> Tensor:
    tensor = pictures_tensor(images if isinstance(images, (Tensor, np.ndarray)) else torch.as_tensor(images))
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    if tensor.ndim != 4 or not tensor.numel():
        raise ValueError(f"images must be [N, H, W] or [N, C, H, W] with at least one, got {list(tensor.shape)}")
    if looks_channels_last(tuple(tensor.shape), ("n", "c", "h", "w")):
        raise ValueError(
            f"images {list(tensor.shape)} look channels-last, expected [N, C, H, W]: permute them by (0, 3, 1, 2)"
        )
    check_range(tensor, "images")
    return tensor


def _checked_transforms(
    transforms: Mapping[str, TransformRange] | Sequence[TransformRange], steps: int
) -> dict[str, tuple[Warper, Tensor]]:
    if isinstance(transforms, Mapping):
        named = list(transforms.items())
    else:
        named = [(getattr(part[0], "name", ""), part) if isinstance(part, tuple) else ("", part) for part in transforms]
    if not named:
        raise ValueError("transforms is empty: give at least one (transform, start, end)")
    checked: dict[str, tuple[Warper, Tensor]] = {}
    for name, part in named:
        if not (isinstance(part, tuple) and len(part) in (2, 3) and callable(part[0])):
            raise TypeError(f"a transformation is (transform, start, end) or (transform, amounts), got {part!r}")
        if not name or name in checked:
            problem = f"two transformations are named {name!r}" if name else f"{part[0]!r} has no name"
            raise ValueError(f"{problem}: give a mapping from names to transformations")
        if len(part) == 3:
            amounts = torch.linspace(float(part[1]), float(part[2]), steps + 1, dtype=torch.float64)
        else:
            amounts = torch.as_tensor(part[1], dtype=torch.float64)
        if amounts.shape != (steps + 1,) or not bool(amounts.isfinite().all()):
            raise ValueError(
                f"transformation {name!r} needs {steps + 1} finite amounts for {steps} steps, got {amounts.tolist()}"
            )
        checked[name] = (part[0], amounts)
    return checked
