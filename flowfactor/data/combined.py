"""Sequences in which transformations combine and switch, with the truth about what acts when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.control import Schedule
from flowfactor.data._warp import warp_each
from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_range, to_unit
from flowfactor.data.colours import Colour, shift_each_hue
from flowfactor.data.compose import Compose
from flowfactor.data.factors import FactorSequences
from flowfactor.data.transformed import TransformedImages, TransformRange
from flowfactor.data.transforms import Geometric, Hue

if TYPE_CHECKING:
    from typing_extensions import Self

COMBINED_MODES: tuple[str, ...] = ("single", "superpose", "switch")
"""How transformations act in a sequence of `CombinedImages` or `CombinedScenes`: one all along; two at once, all along;
one up to some frame and another from there."""

Modes = Sequence[str] | Mapping[str, float]


class CombinedSequences(SequenceDataset):
    """What data sets of combined and switching sequences share; see `CombinedImages` and `CombinedScenes`.

    An item has ``"frames"`` [T+1, C, H, W], ``"t"`` [T+1] and ``"weights"`` [T, K], float32: how strongly
    transformation k acts between frames s and s + 1, where 1 is its usual pace and 0 is not at all. So ``weights > 0``
    is the truth about which transformations are active, and `weights_schedule` makes a control of it. No single k
    names such a sequence: its ``"k"`` is -1.

    Attributes:
        weights: The weights of all sequences [N, T, K].
        modes: Names of the modes that occur.
        mode: The mode of each sequence [N], an index into `modes`.
    """

    weights: Tensor
    modes: tuple[str, ...]
    mode: Tensor

    @property
    def fixed_k(self) -> Tensor:
        """The transformation of every sequence [N]: -1, for there is not one."""
        return torch.full((len(self),), -1)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.weights)

    def _select(self, indices: Tensor) -> None:
        self.weights, self.mode = self.weights[indices], self.mode[indices]

    def plan(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        stratified: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> list[tuple[Any, ...]]:
        """Draws one epoch; `stratified` changes nothing, for the sequences have no k to stratify by."""
        del stratified
        return super().plan(batch_size, generator=generator, stratified=False, shuffle=shuffle, drop_last=drop_last)

    def _draw(self, count: int, modes: Modes, strength: tuple[float, float], seed: int, never: Sequence[Any]) -> None:
        """Draws modes, transformations, switches and strengths of all sequences."""
        generator = torch.Generator().manual_seed(seed)
        shares = _checked_modes(modes)
        self.modes = tuple(shares)
        low, high = _checked_strength(strength)
        flows, steps = self.num_flows, self.num_steps
        pairs = [pair for pair in combinations(range(flows), 2) if set(pair) not in [set(p) for p in never]]
        if not pairs and set(self.modes) != {"single"}:
            raise ValueError(f"{' and '.join(self.modes)} need two transformations that combine: use modes=('single',)")
        if "switch" in shares and steps < 2:
            raise ValueError("a switch midway needs at least 2 steps, got 1")
        counts = _counts(list(shares.values()), count)
        mode = torch.arange(len(shares)).repeat_interleave(counts)
        self.mode = mode[torch.randperm(count, generator=generator)]
        self.weights = torch.zeros(count, steps, flows)
        for index, name in enumerate(self.modes):
            mine = (self.mode == index).nonzero().flatten()
            strengths = low + (high - low) * torch.rand(len(mine), 2, generator=generator)
            if name == "single":
                first, second = torch.randint(flows, (len(mine),), generator=generator), None
            else:
                drawn = torch.tensor(pairs)[torch.randint(len(pairs), (len(mine),), generator=generator)]
                swapped = torch.rand(len(mine), 1, generator=generator) < 0.5
                first, second = torch.where(swapped, drawn.flip(1), drawn).unbind(1)
            first_until = torch.full((len(mine),), steps)
            second_from = torch.zeros(len(mine), dtype=torch.long)
            if name == "switch":
                first_until = second_from = torch.randint(1, steps, (len(mine),), generator=generator)
            step = torch.arange(steps)
            self._act(mine, first, strengths[:, 0], step < first_until[:, None])
            if second is not None:
                self._act(mine, second, strengths[:, 1], step >= second_from[:, None])

    def _act(self, sequences: Tensor, flow: Tensor, strength: Tensor, when: Tensor) -> None:
        """Sets the weights of one flow in each of some sequences, at the steps when [n, T] it acts."""
        step = torch.arange(self.num_steps)
        self.weights[sequences[:, None], step, flow[:, None]] += strength[:, None] * when


class CombinedImages(CombinedSequences):
    """Anyone's images, each under transformations that act together or one after another.

    Modelled on `TransformedImages`. Every transformation has a progress, which is 0 in the first frame and grows by
    ``weights[s, k]`` from frame s to s + 1; its amount is the one that `TransformedImages` would show at that many
    steps (in between, on the straight line). A frame shows the image under all transformations at their amounts,
    geometric ones in the order given, with the picture interpolated once; hue shifts follow. So a sequence in which
    transformation k alone acts, at strength 1, is the one of `TransformedImages`, provided that the others leave the
    image as it is at their start.

    What acts in a sequence is drawn once, from `seed`: sequence n is always the same.

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
    ) -> None:
        plain = TransformedImages(images, transforms, steps, colour=colour, labels=labels, t=t)
        self.images, self.colour, self.labels = plain.images, plain.colour, plain.labels
        self.image_shape, self.t = plain.image_shape, plain.t
        self.transforms, self.flow_names = plain.transforms, plain.flow_names
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
        self.images = self.images[indices]
        self.labels = None if self.labels is None else self.labels[indices]

    def _substance(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        weights = self.weights[indices]
        images = to_unit(self.images[indices])
        return {"frames": self.transform(images, weights), "weights": weights}

    def transform(self, images: Tensor, weights: Tensor) -> Tensor:
        """Transforms images by weights of one's own: the truth to compare a composed flow with.

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
        progress = weights.double().cumsum(1)
        progress = torch.cat([torch.zeros_like(progress[:, :1]), progress], 1)
        batch, frames = progress.shape[:2]
        maps: Tensor | None = None
        shift = progress.new_zeros(batch * frames)
        for flow, (transform, amounts) in enumerate(self.transforms.values()):
            amount = _interpolated(amounts, progress[..., flow]).flatten()
            if isinstance(transform, Geometric | Compose):
                own = transform.matrices(amount, *images.shape[-2:])
                if own is not None:
                    maps = own if maps is None else maps @ own
            if isinstance(transform, Hue):
                shift = shift + amount
            elif isinstance(transform, Compose):
                turned = transform.shift(amount)
                shift = shift if turned is None else shift + turned
        if maps is None:
            moved = images[:, None].expand(-1, frames, -1, -1, -1)
        else:
            moved = warp_each(images, maps.view(batch, frames, 3, 3))
        return self._coloured(moved, shift.view(batch, frames))

    def _coloured(self, frames: Tensor, shift: Tensor) -> Tensor:
        """Colours frames [B, T+1, C, H, W], and shifts their hues by [B, T+1] degrees."""
        if self.colour is not None:
            colours = Hue().colours(shift.flatten(), self.colour).view(*shift.shape, 3)
            return frames * colours.to(frames)[..., None, None]
        if bool((shift == 0).all()):
            return frames.clone()
        return shift_each_hue(frames, shift)


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
        self._draw(count, modes, (1.0, 1.0), seed, data.apart)
        # A generator of its own, so that another mixture of modes has the same scenes.
        generator = torch.Generator().manual_seed(seed + 1)
        self.scenes = torch.randint(len(data), (count,), generator=generator)

    _tensors = ("t", "weights")

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        self.scenes = self.scenes[indices]

    def to(self, device: torch.device | str) -> Self:
        """Gives the same data set with its data on another device, where batches are then made."""
        moved = super().to(device)
        moved.data = self.data.to(device)
        return moved

    def _substance(self, indices: Tensor) -> Tensor:
        return self.data._substance(self.scenes[indices])

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        weights = self.weights[indices]
        states = self.data.walk(self.scenes[indices], weights.cpu() > 0)
        return {**self.data._pictures(states), "weights": weights}


def weights_schedule(weights: Tensor, t: Tensor | Sequence[float] | None = None) -> Schedule:
    """Makes the control under which a flow does what weights say.

    Args:
        weights: Weights [T, K] of one sequence, or [B, T, K] of a batch.
        t: Times of the frames [T+1]; by default 0, 1, ..., T.

    Returns:
        A `flowfactor.Schedule` with weights [K] or [B, K], with a piece for each run of frames in which they stay the
        same. The last piece goes on after the last frame.

    Raises:
        ValueError: If the shapes are not these.

    Example:
        >>> weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> weights_schedule(weights)
        Schedule([(0.0, tensor([1., 0.])), (2.0, tensor([0., 1.]))])
    """
    if weights.ndim not in (2, 3) or not weights.shape[-2] or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating point [T, K] or [B, T, K], got {weights.dtype} {list(weights.shape)}"
        )
    steps = weights.unbind(-2)
    times = list(range(len(steps) + 1)) if t is None else torch.as_tensor(t).tolist()
    if len(times) != len(steps) + 1:
        raise ValueError(f"weights of {len(steps)} steps need {len(steps) + 1} times, got {len(times)}")
    changed = [s for s, now in enumerate(steps) if s == 0 or not torch.equal(now, steps[s - 1])]
    return Schedule([(times[s], steps[s]) for s in changed])


def _interpolated(amounts: Tensor, progress: Tensor) -> Tensor:
    """Gives the amounts after so many steps, in between on the straight line."""
    amounts = amounts.to(progress)
    below = progress.floor().long().clamp(0, len(amounts) - 2)
    share = progress - below
    # A mean, not a start and a way, so that whole steps give exactly the amounts of the frames.
    return amounts[below] * (1 - share) + amounts[below + 1] * share


def _checked_modes(modes: Modes) -> dict[str, float]:
    given = (modes,) if isinstance(modes, str) else modes
    shares = {name: float(modes[name]) if isinstance(modes, Mapping) else 1.0 for name in given}
    if not shares or len(shares) < len(given) or not set(shares) <= set(COMBINED_MODES):
        raise ValueError(f"modes must be distinct names out of {', '.join(COMBINED_MODES)}, got {modes!r}")
    if not all(0 < share < float("inf") for share in shares.values()):
        raise ValueError(f"shares of modes must be finite and above 0, got {modes!r}")
    return shares


def _checked_strength(strength: tuple[float, float]) -> tuple[float, float]:
    if not (isinstance(strength, Sequence) and len(strength) == 2 and 0 < strength[0] <= strength[1] <= 1):
        raise ValueError(f"strength is a range (low, high) with 0 < low <= high <= 1, got {strength!r}")
    return float(strength[0]), float(strength[1])


def _counts(shares: list[float], total: int) -> Tensor:
    """Divides a number by shares, as evenly as whole numbers allow."""
    ends = (torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares) * total).round().long()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.long))
