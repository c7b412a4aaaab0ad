"""Sequences in which transformations combine and switch, with the truth about what acts when."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data._drawn import FramesOfDraws
from flowfactor.data._states import shown
from flowfactor.data.base import Batch
from flowfactor.data.checks import check_range, to_unit
from flowfactor.data.colours import Colour
from flowfactor.data.compose import Compose
from flowfactor.data.factors import FactorSequences
from flowfactor.data.mixing import COMBINED_MODES, CombinedSequences, Modes
from flowfactor.data.starts import Direction, Start, amount_of, coordinate_of, first_states, uniforms
from flowfactor.data.transformed import TransformedImages, TransformRange
from flowfactor.data.transforms import Geometric, Hue

if TYPE_CHECKING:
    from typing_extensions import Self


class CombinedImages(FramesOfDraws, CombinedSequences):
    """Anyone's images, each under transformations that act together or one after another.

    Modelled on `TransformedImages`. Every transformation has a progress, which is 0 in the first frame and grows by
    ``weights[s, k]`` from frame s to s + 1; its amount is the one that `TransformedImages` would show at that many
    steps (in between, on the straight line). A frame shows the image under all transformations at their amounts,
    geometric ones in the order given, with the picture interpolated once; hue shifts follow. So a sequence in which
    transformation k alone acts, at strength 1, is the one of `TransformedImages`, provided that the others leave the
    image as it is at their start.

    What acts in a sequence is drawn once, from `seed`. Where it begins is, with ``start="any"``, a random state of all
    transformations, as in `TransformedImages`: such that those that act stay in their ranges, and by its index always the
    same. Backwards the weights stand in the order of the frames that are handed over, so that ``weights[s]`` act, against
    their sense, between frames s and s + 1.

    Args:
        images: [N, H, W] or [N, C, H, W], as in `TransformedImages`.
        transforms: As in `TransformedImages`; each a `Geometric` one, a `Hue` or a `Compose`.
        steps: Number T of steps: a sequence has T + 1 frames.
        modes: Which of `COMBINED_MODES` occur, in equal shares, or a mapping from modes to shares.
        strength: Range of the weights of what acts, drawn uniformly for each sequence and transformation; above 0, up
            to 1.
        seed: Seed of all draws.
        colour: Shows grey images in this colour, as in `TransformedImages`.
        labels: Labels of the images [N], kept as `labels` for the user's own purposes.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.
        start: ``"first"`` or ``"any"``, as in `TransformedImages`.
        direction: ``"forward"``, ``"both"`` or ``"backward"``, likewise.
        ranges: Ranges of amounts for ``start="any"``, likewise.

    Attributes:
        images: The images [N, C, H, W].
        labels: The labels, or None.
        transforms: Names to pairs (transform, amounts [T+1]).

    Raises:
        ValueError: If an argument is not as described.
        TypeError: If a transformation is of another kind.

    Example:
        >>> import flowfactor as ff
        >>> images = torch.randint(256, (90, 28, 28), dtype=torch.uint8)
        >>> data = CombinedImages(images, ff.data.paper_transforms(8), steps=8, colour="red", modes=("switch",))
        >>> item = data[0]
        >>> item["frames"].shape, item["weights"].shape
        (torch.Size([9, 3, 28, 28]), torch.Size([8, 3]))
        >>> active = item["weights"] > 0
        >>> active.sum(-1).tolist(), active.any(0).sum().item()
        ([1, 1, 1, 1, 1, 1, 1, 1], 2)
    """

    def __init__(
        self,
        images: Tensor | np.ndarray[Any, Any],
        transforms: Mapping[str, TransformRange] | Sequence[TransformRange],
        steps: int = 8,
        *,
        modes: Modes = COMBINED_MODES,
        strength: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
        colour: Colour | None = None,
        labels: Tensor | np.ndarray[Any, Any] | Sequence[int] | None = None,
        t: Tensor | Sequence[float] | None = None,
        start: Literal["first", "any"] = "first",
        direction: Literal["forward", "both", "backward"] = "forward",
        ranges: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        running = {"start": start, "direction": direction, "ranges": ranges}
        plain = TransformedImages(images, transforms, steps, colour=colour, labels=labels, t=t, **running)
        self._take(plain, modes, strength, seed)

    @classmethod
    def of(
        cls,
        plain: TransformedImages,
        *,
        modes: Modes = COMBINED_MODES,
        strength: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
    ) -> Self:
        """Has the transformations of a data set combine: the same images, begun and run as they are there.

        Args:
            plain: The data set.
            modes: As above.
            strength: As above.
            seed: As above.

        Returns:
            The combined data set.

        Raises:
            ValueError: As above.
            TypeError: If a transformation is of another kind.

        Example:
            >>> import flowfactor as ff
            >>> flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
            >>> plain = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), flows, steps=4, start="any")
            >>> CombinedImages.of(plain, modes=("superpose",)).begins
            'any'
        """
        made = cls.__new__(cls)
        made._take(plain, modes, strength, seed)
        return made

    def _take(self, plain: TransformedImages, modes: Modes, strength: tuple[float, float], seed: int) -> None:
        self.plain = plain
        self.images, self.colour, self.labels = plain.images, plain.colour, plain.labels
        self.image_shape, self.t = plain.image_shape, plain.t
        self.transforms, self.flow_names = plain.transforms, plain.flow_names
        self.begins, self.runs, self.ways = plain.begins, plain.runs, plain.ways
        self._elements = plain._elements
        for name, (transform, _) in self.transforms.items():
            if not isinstance(transform, Geometric | Hue | Compose):
                raise TypeError(
                    f"transformation {name!r} is {transform!r}, but only geometric transformations, Hue and Compose "
                    "can be combined"
                )
        self._draw(len(self.images), modes, strength, seed, ())
        check_range(self._frames(torch.tensor([0]), torch.tensor([-1]))["frames"], "the frames of combined images")

    _tensors = ("t", "images", "colour", "weights")

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        self._elements = self._elements[indices]
        self.images = self.images[indices]
        self.labels = None if self.labels is None else self.labels[indices]

    def running(self, *, start: Start | None = None, direction: Direction | None = None) -> Self:
        """Gives the same sequences, begun elsewhere or run another way; see `SequenceDataset.running`."""
        begun = self
        if start not in (None, self.begins):
            begun = copy.copy(self)
            plain = self.plain.running(start=start)
            begun.begins, begun.ways, begun.transforms = plain.begins, plain.ways, plain.transforms
        return super(CombinedImages, begun).running(direction=direction)

    def _marks(self, indices: Tensor) -> list[Tensor]:
        return [torch.tensor([[way.low, way.high, way.step] for way in self.ways]).double()] if self.ways else []

    def _substance(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        draw, weights = self._draws, self.weights[indices]
        places = self._places(weights, uniforms(draw.seed, self._elements[indices], self.num_flows))
        if draw.is_backward:
            weights, places = weights.flip(1), places.flip(1)
        return {"frames": self._shown(to_unit(self.images[indices]), places), "weights": weights}

    def _places(self, weights: Tensor, drawn: Tensor | None) -> Tensor:
        """The amounts of all transformations [B, T+1, K] under weights, from the first ones or from drawn starts."""
        progress = weights.double().cpu().cumsum(1)
        progress = torch.cat([torch.zeros_like(progress[:, :1]), progress], 1)
        transforms = self.transforms.values()
        if not self.ways or drawn is None:
            parts = [_interpolated(*pair, progress[..., flow]) for flow, pair in enumerate(transforms)]
            return torch.stack(parts, -1)
        way = progress * torch.tensor([way.step for way in self.ways], dtype=torch.float64)
        places = first_states(self.ways, drawn, way[:, -1]).unsqueeze(1) + way
        return torch.stack([amount_of(one, places[..., flow]) for flow, (one, _) in enumerate(transforms)], -1)

    def _shown(self, images: Tensor, amounts: Tensor) -> Tensor:
        transforms = [transform for transform, _ in self.transforms.values()]
        return shown(images, transforms, amounts, self.colour)

    def transform(self, images: Tensor, weights: Tensor) -> Tensor:
        """Transforms images by weights of one's own, from the first amounts: the truth to compare a composed flow with.

        Args:
            images: Images [B, C, H, W] in [0, 1], of this data set's number of channels before it is coloured.
            weights: Weights [B, T, K], from 0 to 1.

        Returns:
            Frames [B, T+1, *image_shape].

        Raises:
            ValueError: If the shapes are not these, or a weight is outside [0, 1].
        """
        expected = (len(images), self.num_steps, self.num_flows)
        if images.ndim != 4 or images.shape[1:] != self.images.shape[1:] or weights.shape != expected:
            raise ValueError(
                f"expected images [B, {', '.join(map(str, self.images.shape[1:]))}] and weights [B, {expected[1]}, "
                f"{expected[2]}], got {list(images.shape)} and {list(weights.shape)}"
            )
        if weights.numel() and not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(f"weights must lie in [0, 1], got {weights.min():g} to {weights.max():g}")
        return self._shown(images, self._places(weights, None))


class CombinedScenes(CombinedSequences):
    """Scenes in which several factors move, at once or one after another, and all others hold exactly.

    As `CombinedImages`, for any grid of factors: `Scenes`, `Shapes3D` and the other readers. A factor that acts moves
    by one state from frame to frame (by its stride, in data sets that have one), so its weight is 1. Each of N
    sequences has a scene of its own, drawn from the split of `data`; no frame leaves that split.

    Args:
        data: The scenes, and which of their factors move (`flow_names`).
        count: Number N of sequences.
        modes: Which of `COMBINED_MODES` occur, in equal shares, or a mapping from modes to shares.
        seed: Seed of all draws.

    Attributes:
        data: The scenes.

    Raises:
        ValueError: If an argument is not as described.
        TypeError: If `data` is not a grid of factors.

    Example:
        >>> import flowfactor as ff
        >>> scenes = ff.data.Scenes("test", size=8, steps=4, hues=5, scales=5, orientations=3)
        >>> data = CombinedScenes(scenes, 30, modes={"superpose": 2, "switch": 1})
        >>> item = data[0]
        >>> item["frames"].shape, item["weights"].shape, item["factors"].shape
        (torch.Size([5, 3, 8, 8]), torch.Size([4, 4]), torch.Size([5, 6]))
        >>> data.mode.bincount().tolist()
        [20, 10]
    """

    def __init__(
        self, data: FactorSequences, count: int = 10000, *, modes: Modes = COMBINED_MODES, seed: int = 0
    ) -> None:
        if not isinstance(data, FactorSequences):
            raise TypeError(f"data must be Scenes or another grid of factors, got {type(data).__name__}")
        check_count("count", count)
        self.data = data
        self.image_shape, self.t, self.flow_names = data.image_shape, data.t, data.flow_names
        self.runs = data.runs
        self._draw(count, modes, (1.0, 1.0), seed, data.apart)
        # A generator of its own, so that another mixture of modes has the same scenes.
        generator = torch.Generator().manual_seed(seed + 1)
        self.scenes = torch.randint(len(data), (count,), generator=generator)

    @classmethod
    def of(cls, data: FactorSequences, *, modes: Modes = COMBINED_MODES, seed: int = 0) -> Self:
        """Has factors of scenes combine: one sequence for each scene of the data, in their order.

        Args:
            data: As above.
            modes: As above.
            seed: As above.

        Returns:
            The combined data set.

        Raises:
            ValueError: As above.
            TypeError: As above.

        Example:
            >>> import flowfactor as ff
            >>> scenes = ff.data.Scenes("test", size=8, steps=4, hues=5, scales=5, orientations=3).subset([3, 8])
            >>> len(CombinedScenes.of(scenes, modes=("superpose",)))
            2
        """
        made = cls(data, len(data), modes=modes, seed=seed)
        made.scenes = torch.arange(len(data))
        return made

    _tensors = ("t", "weights")

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        self.scenes = self.scenes[indices]

    def to(self, device: torch.device | str) -> Self:
        """Gives the same data set with its data on another device, where batches are then made."""
        moved = super().to(device)
        moved.data = self.data.to(device)
        return moved

    def weighted(self, weights: Tensor) -> Self:
        """Gives the same scenes under weights of one's own, which are 0 or 1; see `CombinedSequences.weighted`."""
        made = super().weighted(weights)
        if not bool(((weights == 0) | (weights == 1)).all()):
            raise ValueError(
                f"a factor moves by one state or rests: weights must be 0 or 1, got {weights.unique().tolist()}"
            )
        acting = (made.weights > 0).any(1)
        for pair in self.data.apart:
            if bool(acting[:, list(pair)].all(1).any()):
                names = " and ".join(self.flow_names[k] for k in pair)
                raise ValueError(f"{names} cannot both move in a sequence without leaving the split: leave one out")
        return made

    def _substance(self, indices: Tensor) -> Tensor:
        return self.data._substance(self.scenes[indices])

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        weights = self.weights[indices]
        states = self.data.walk(self.scenes[indices], weights.cpu() > 0)
        return {**self.data._pictures(states), "weights": weights}


def _interpolated(transform: Any, amounts: Tensor, progress: Tensor) -> Tensor:
    """Gives the amounts after so many steps, in between on the straight line of its coordinate."""
    places = coordinate_of(transform, amounts.to(progress))
    below = progress.floor().long().clamp(0, len(places) - 2)
    share = progress - below
    # A mean, not a start and a way, so that whole steps give exactly the amounts of the frames.
    return amount_of(transform, places[below] * (1 - share) + places[below + 1] * share)
