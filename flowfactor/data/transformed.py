"""Sequences made from single images: anyone's pictures under anyone's transformations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data._drawn import FramesOfDraws
from flowfactor.data._states import shown
from flowfactor.data.arrays import as_tensor, looks_channels_last, pictures_tensor
from flowfactor.data.base import Batch
from flowfactor.data.checks import check_range, check_times, to_unit
from flowfactor.data.colours import Colour
from flowfactor.data.colours import colour as to_rgb
from flowfactor.data.starts import (
    Direction,
    Draw,
    Start,
    Way,
    amount_of,
    check_start,
    checked_ranges,
    coordinate_of,
    first_states,
    pace_of,
    uniforms,
    way_of,
)
from flowfactor.data.transforms import Transform

if TYPE_CHECKING:
    from typing_extensions import Self

Warper: TypeAlias = Callable[[Tensor, Tensor], Tensor]
TransformRange: TypeAlias = tuple[Warper, float, float] | tuple[Warper, Sequence[float] | Tensor]


class TransformedImages(FramesOfDraws):
    """Anyone's images, each under one of several transformations.

    Images are kept as they come (bytes stay bytes) and a batch is made when it is asked for, all images of one
    transformation in one call, so that the frames of an epoch never lie in memory.

    The length is the number N of images. ``data[i]`` is image i under transformation ``i % K``; ``data[i, k]`` under k.
    `batches` and `loader` pair images and transformations anew in every epoch.

    With ``start="first"`` every sequence begins at the first amount of the transformation that acts, and none of the others
    does anything: a flow is then learned from one state alone. With ``start="any"`` a sequence begins at a random state of
    all transformations, one of which moves at its usual pace (its whole way in T frames) while the others hold:

    - Rotations and hues begin anywhere on their circle (`Transform.circle`).
    - Other transformations begin in a range, uniformly in their `Transform.coordinate`, and so that the one that acts stays
      in it. The range of geometric ones goes from their start as far to one side as to the other: 1/1.8 to 1.8 for a
      scaling from 1 to 1.8. That of any other kind has to be given.
    - Scaling goes by equal ratios, not by equal differences, unless its pace is given: see `Scale`.

    All geometric ones are one map, in the order given, through which the image is read once; hue shifts follow, added up,
    and after them what is neither, image by image. States are drawn for each image by a hash of its number, of the epoch
    and its seed; by index they are the same for ever, as test sets are.

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
        start: ``"first"`` or ``"any"``.
        direction: ``"forward"``, ``"backward"``, or ``"both"``: half of the batches of an epoch run backwards, from the last
            frame to the first. Their times fall, from 0 to -T where a sequence may begin anywhere, else from T to 0.
        ranges: Ranges (low, high) of the amounts of transformations, by name, for ``start="any"``; also one with a circle
            then stays in its range.

    Attributes:
        images: The images [N, C, H, W].
        transforms: Names to pairs (transform, amounts [T+1]).
        labels: The labels, or None.
        ways: Where each transformation begins and how fast it goes, with ``start="any"``; else empty.
        within: The steps in which all transformations stay in their ranges, where sequences are `longer`; else 0.

    Raises:
        ValueError: If the images or the amounts are not as described, or a transformation does not suit the images, or has
            no range to begin in.
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
        >>> anywhere = TransformedImages(images, flows, colour="red", start="any", direction="both")
        >>> [batch["t"][-1].item() for batch in anywhere.batches(30, generator=torch.Generator().manual_seed(0))]
        [8.0, -8.0, 8.0]
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
        start: Start = "first",
        direction: Direction = "forward",
        ranges: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        check_start(start, direction)
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
        self.runs = direction
        self._elements = torch.arange(len(self.images))
        self._given = dict(transforms) if isinstance(transforms, Mapping) else list(transforms)
        self._begin(start, ranges)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    _tensors = ("t", "images", "colour")
    within: int = 0

    def _begin(self, start: Start, ranges: Mapping[str, Sequence[float]] | None) -> None:
        """Has sequences begin at the first amounts, or anywhere."""
        self.begins = start
        within = self.within or self.num_steps
        self.transforms = _checked_transforms(self._given, within, composing=start == "any")
        self.flow_names = tuple(self.transforms)
        self.ranges = checked_ranges(ranges, self.flow_names)
        if self.ranges and start == "first":
            raise ValueError("ranges are what sequences begin in with start='any', and these have start='first'")
        self.ways: tuple[Way, ...] = ()
        if start == "any":
            self._given = dict(self.transforms)  # at their pace they stay, wherever they begin
            self.ways = tuple(way_of(name, *pair, self.ranges.get(name)) for name, pair in self.transforms.items())
        for name, (transform, amounts) in self.transforms.items() if self.num_steps > within else ():
            places = coordinate_of(transform, amounts)
            way = places[0] + pace_of(name, places, amounts) * torch.arange(len(self.t))
            self.transforms[name] = transform, amount_of(transform, way)
        for name in self.flow_names:
            self._try(name)

    def running(self, *, start: Start | None = None, direction: Direction | None = None) -> Self:
        """Gives the same images, begun elsewhere or run another way; see `SequenceDataset.running`."""
        begun = self
        if start not in (None, self.begins):
            check_start(start, self.runs)
            begun = copy.copy(self)
            begun._begin(start, None)
        return super(TransformedImages, begun).running(direction=direction)

    def longer(self, steps: int) -> Self:
        """Gives the same sequences, going on at the same pace: past the range of a transformation, where it has one.

        Their first frames are those of the shorter ones, in either direction: what is needed to measure how far flows carry
        that were trained on these.

        Args:
            steps: Number of steps, at least as many as there are.

        Returns:
            A data set of the same class.

        Raises:
            ValueError: If there are fewer steps than there are, or the amounts or times are not at one pace.

        Example:
            >>> import flowfactor as ff
            >>> data = TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=4, start="any")
            >>> whole = data.longer(12)
            >>> torch.equal(whole.batch([2])["frames"][:, :5], data.batch([2])["frames"]), whole.num_steps
            (True, 12)
        """
        check_count("steps", steps, self.num_steps)
        part = copy.copy(self)
        part.t = self.t[0] + (self.t[1] - self.t[0]) * torch.arange(steps + 1).to(self.t)
        if not torch.allclose(part.t[: len(self.t)], self.t):
            raise ValueError(f"longer sequences go on at the times' pace, but the times {self.t.tolist()} have none")
        part.within = self.within or self.num_steps
        part._beyond = float(part.t[-1] - part.t[part.within])
        part._begin(self.begins, self.ranges)
        return part

    def _select(self, indices: Tensor) -> None:
        self._elements = self._elements[indices]
        self.images = self.images[indices]
        self.labels = None if self.labels is None else self.labels[indices]

    def _substance(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def _marks(self, indices: Tensor) -> list[Tensor]:
        return [torch.tensor([[way.low, way.high, way.step] for way in self.ways]).double()] if self.ways else []

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        draw = self._draws
        frames = self.images.new_empty((len(indices), len(self.t), *self.image_shape), dtype=torch.float32)
        images = to_unit(self.images[indices])
        if self.ways:
            transforms = [transform for transform, _ in self.transforms.values()]
            drawn = uniforms(draw.seed, self._elements[indices], self.num_flows)
            shown(images, transforms, self._amounts(k, drawn, draw.is_backward), self.colour, frames)
            return {"frames": frames}
        for flow in k.unique().tolist():
            where = (k == flow).nonzero().flatten()
            first, last = int(where[0]), int(where[-1])
            is_run = last - first + 1 == len(where)  # as in batches sorted by k: no gather, no scatter
            rows = slice(first, last + 1) if is_run else where
            out = frames[rows] if is_run else None
            made = self._apply(self.flow_names[flow], images[rows], out, draw.is_backward)
            if not is_run:
                frames[rows] = made
        return {"frames": frames}

    def _amounts(self, k: Tensor, drawn: Tensor, is_backward: bool) -> Tensor:
        """The amounts [B, T+1, K] of sequences from anywhere, by the numbers [B, K] that their starts are drawn by."""
        within, passed = self.within or self.num_steps, torch.arange(len(self.t), dtype=torch.float64)
        steps = torch.tensor([way.step for way in self.ways], dtype=torch.float64)
        acting = steps * (k.cpu()[:, None] == torch.arange(self.num_flows))
        first = first_states(self.ways, drawn, acting * within)
        places = first[:, None] + acting[:, None] * (within - passed if is_backward else passed)[:, None]
        parts = zip(self.transforms.values(), places.unbind(-1), strict=True)
        return torch.stack([amount_of(transform, place) for (transform, _), place in parts], -1)

    def _backwards(self, transform: Warper, amounts: Tensor) -> Tensor:
        """The first amounts from the last frame to the first, and on to before it where sequences are longer."""
        if self.within in (0, self.num_steps):
            return amounts.flip(0)
        places = coordinate_of(transform, amounts)
        return amount_of(transform, places[0] + (places[1] - places[0]) * (self.within - torch.arange(len(places))))

    def amounts(self, indices: Tensor | Sequence[int], k: int, draw: Draw | None = None) -> Tensor:
        """Gives the amounts at which transformations show images in each frame.

        Args:
            indices: Images [B].
            k: The transformation that acts.
            draw: As for `batch`.

        Returns:
            Amounts [B, T+1, K], float64; NaN where a transformation is not there at all, as with ``start="first"`` all but
            the one that acts.

        Raises:
            ValueError: If an index or k is out of range.

        Example:
            >>> import flowfactor as ff
            >>> flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
            >>> data = TransformedImages(torch.rand(4, 1, 8, 8), flows, steps=4, start="any")
            >>> way = data.amounts([0, 1], 0)
            >>> way.shape, (way[:, -1] - way[:, 0])[:, 0].tolist()
            (torch.Size([2, 5, 2]), [40.0, 40.0])
        """
        indices = self._indices(indices)
        self._resolve(indices, k, None)
        draw = draw or Draw(is_backward=self.runs == "backward")
        shape = (len(indices), len(self.t), self.num_flows)
        if not self.ways:
            found = torch.full(shape, math.nan, dtype=torch.float64)
            own = self.transforms[self.flow_names[k]][1]
            found[..., k] = self._backwards(self.transforms[self.flow_names[k]][0], own) if draw.is_backward else own
            return found
        drawn = uniforms(draw.seed, self._elements[indices], self.num_flows)
        return self._amounts(torch.full(shape[:1], k), drawn, draw.is_backward)

    def _apply(self, name: str, images: Tensor, out: Tensor | None = None, is_backward: bool = False) -> Tensor:
        transform, amounts = self.transforms[name]
        if is_backward:
            amounts = self._backwards(transform, amounts)
        if self.colour is not None and isinstance(transform, Transform):
            return transform.tint(images, amounts, self.colour, out)
        frames = transform(images if self.colour is None else images * self.colour[:, None, None], amounts)
        return frames if out is None else out.copy_(frames)

    def _try(self, name: str) -> None:
        """Makes one sequence, so that what does not fit is reported here and not in the middle of a training."""
        images = to_unit(self.images[:1])
        if self.ways:  # at both ends of all ranges
            ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(-1, self.num_flows)
            amounts = self._amounts(torch.full((2,), self.flow_names.index(name)), ends, False)
            transforms = [transform for transform, _ in self.transforms.values()]
            frames = shown(images.expand(2, -1, -1, -1), transforms, amounts, self.colour)
            frames = frames.flatten(0, 1).unsqueeze(0)[:, : len(self.t)]
        else:
            frames = self._apply(name, images)
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
    transforms: Mapping[str, TransformRange] | Sequence[TransformRange], steps: int, *, composing: bool = False
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
        own = part[0].composing() if composing and isinstance(part[0], Transform) else part[0]
        if len(part) == 3:
            ends = coordinate_of(own, torch.tensor([part[1], part[2]], dtype=torch.float64)).tolist()
            if not all(map(math.isfinite, ends)):
                raise ValueError(f"transformation {name!r} cannot go from {part[1]} to {part[2]} by {own!r}")
            amounts = amount_of(own, torch.linspace(ends[0], ends[1], steps + 1, dtype=torch.float64))
        else:
            amounts = torch.as_tensor(part[1], dtype=torch.float64)
        if amounts.shape != (steps + 1,) or not bool(amounts.isfinite().all()):
            raise ValueError(
                f"transformation {name!r} needs {steps + 1} finite amounts for {steps} steps, got {amounts.tolist()}"
            )
        checked[name] = (own, amounts)
    return checked
