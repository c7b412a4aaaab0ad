"""A procedural room with one object: image sequences whose factors are known exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from flowfactor.data import raycast
from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_times
from flowfactor.data.colours import hue_to_rgb

SCENE_FACTORS: tuple[str, ...] = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
"""Factors of a scene, in the order of the last dimension of `render_scenes`' argument."""

_SATURATION = (0.6, 0.5, 0.85)  # of floor, wall and object
_LARGEST = 2.0  # a larger object would leave the room


def render_scenes(factors: Tensor, size: int = 64, *, supersampling: int = 3) -> Tensor:
    """Draws scenes of any factors, continuous ones included.

    The picture is linear in the colours of floor, wall and object: each is its colour times a shade that depends on
    shape, scale and orientation alone. The shades are cast once for every distinct triple of these among the scenes.

    Args:
        factors: Factors [*batch, 6] in the order of `SCENE_FACTORS`: the hues of floor, wall and object in degrees
            (modulo 360), the scale (above 0, up to 2), the shape (an index into `SCENE_SHAPES`: cube, cylinder,
            sphere, capsule, cone) and the orientation (degrees by which the camera stands to the right).
        size: Height and width in pixels.
        supersampling: Rays per pixel, along each of its sides.

    Returns:
        Pictures [*batch, 3, size, size], float32 in [0, 1], on the device of `factors`.

    Raises:
        ValueError: If a factor is out of its range, or a size is.

    Example:
        >>> factors = torch.tensor([[0.0, 200.0, 60.0, 1.0, 2.0, 15.0], [0.0, 200.0, 90.0, 1.0, 2.0, 15.0]])
        >>> render_scenes(factors, size=16).shape
        torch.Size([2, 3, 16, 16])
    """
    _check_sizes(size, supersampling)
    factors = torch.as_tensor(factors)
    if factors.ndim < 1 or factors.shape[-1] != len(SCENE_FACTORS) or not bool(factors.isfinite().all()):
        raise ValueError(
            f"factors must be finite and [*batch, {len(SCENE_FACTORS)}] ({', '.join(SCENE_FACTORS)}), "
            f"got {list(factors.shape)}"
        )
    flat = factors.reshape(-1, len(SCENE_FACTORS)).to("cpu", torch.float64)
    scale, shape = flat[:, 3], flat[:, 4]
    if not bool(((scale > 0) & (scale <= _LARGEST)).all()):
        raise ValueError(f"scale must lie in (0, {_LARGEST:g}], got {scale.min():g} to {scale.max():g}")
    if not bool(((shape == shape.round()) & (shape >= 0) & (shape < len(raycast.SCENE_SHAPES))).all()):
        raise ValueError(f"shape is an index from 0 to {len(raycast.SCENE_SHAPES) - 1}, got {shape.tolist()}")
    poses, which = flat[:, 3:].unique(dim=0, return_inverse=True)
    shades = cast_poses(poses, size, supersampling).reshape(len(poses), 3, size * size)
    pictures = torch.bmm(_paint(flat[:, :3]).mT, shades[which])
    return pictures.reshape(*factors.shape[:-1], 3, size, size).to(factors.device)


def cast_poses(poses: Tensor, size: int, supersampling: int = 3) -> Tensor:
    """Casts the shades of floor, wall and object for several poses.

    Args:
        poses: Poses [P, 3]: scale, index of the shape, orientation in degrees.
        size: Height and width in pixels.
        supersampling: Rays per pixel, along each of its sides.

    Returns:
        Shades [P, 3, size, size], float32, of floor, wall and object; their sum is in [0, 1].

    Example:
        >>> cast_poses(torch.tensor([[1.0, 0.0, 0.0]]), 8).shape
        torch.Size([1, 3, 8, 8])
    """
    shades = torch.empty(len(poses), 3, size, size)
    orientations, which = poses[:, 2].unique(return_inverse=True)
    with _one_thread():
        for turn, orientation in enumerate(orientations.tolist()):
            seen = raycast.view(orientation, size * supersampling)  # the empty room, shared by all objects in it
            for pose in (which == turn).nonzero().flatten().tolist():
                scale, shape = poses[pose, 0].item(), int(poses[pose, 1])
                rays = raycast.shade(raycast.SCENE_SHAPES[shape], scale, seen)
                shades[pose] = rays.reshape(3, size, supersampling, size, supersampling).mean((2, 4))
    return shades


class Scenes(SequenceDataset):
    """Sequences of a room with an object, in which one factor moves and all others hold exactly.

    A procedural counterpart of Shapes3D that needs no download. A scene has the six factors of `SCENE_FACTORS`, each
    with a number of equally spaced states: hues go round the circle, the scale goes from 0.75 to 1.25, the orientation
    from -30 to 30 degrees. A sequence lets factor k run over T + 1 neighbouring states. A hue starts at the scene's own
    state and goes round the circle, with at most one turn, so that no frame comes twice; scale, orientation and shape
    start at the scene's own state or, where too few follow, at the last from which T steps fit (with the default of 8
    scales and T = 7, always the smallest).

    The test split holds out combinations of the factors that no sequence moves (by default, pairs of shape and
    orientation), chosen by a hash: no frame of one split is in the other, however its sequences are drawn.

    An index names a scene, with the moved factors running fastest; the factor that moves, k, is drawn per epoch (see
    `SequenceDataset`). Geometry is cast when the data set is made; a batch is then one product with colours.

    Args:
        split: ``"train"``, ``"test"`` or ``"all"``.
        size: Height and width in pixels.
        steps: Number T of steps; a sequence has T + 1 frames.
        vary: Names of the K factors that move, in the order of k.
        shapes: Names of the shapes that occur.
        hues: Number of states of each hue; by default 10, or T + 1 if that is more.
        scales: Number of states of the scale; by default 8, or T + 1 if that is more.
        orientations: Number of states of the orientation; by default 15, or T + 1 if that is more.
        held_out: Share of the combinations that the test split holds out.
        supersampling: Rays per pixel, along each of its sides.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Attributes:
        values: The values of each factor's states, in the order of `SCENE_FACTORS`.

    Raises:
        ValueError: If an argument is wrong, a moved factor has fewer than T + 1 states, or nothing can be held out.

    Example:
        >>> data = Scenes("test", size=16, orientations=5, shapes=("cube", "sphere"), steps=7)
        >>> data.flow_names
        ('floor_hue', 'wall_hue', 'object_hue', 'scale')
        >>> sequence = data[0, 3]
        >>> sequence["frames"].shape, sequence["factors"].shape
        (torch.Size([8, 3, 16, 16]), torch.Size([8, 6]))
        >>> sequence["factors"][[0, -1], 3]
        tensor([0.7500, 1.2500])
    """

    def __init__(
        self,
        split: Literal["train", "test", "all"] = "train",
        *,
        size: int = 64,
        steps: int = 7,
        vary: Sequence[str] = ("floor_hue", "wall_hue", "object_hue", "scale"),
        shapes: Sequence[str] = raycast.SCENE_SHAPES,
        hues: int | None = None,
        scales: int | None = None,
        orientations: int | None = None,
        held_out: float = 0.2,
        supersampling: int = 3,
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        if split not in ("train", "test", "all"):
            raise ValueError(f"split is 'train', 'test' or 'all', got {split!r}")
        _check_sizes(size, supersampling)
        self.t = check_times(t, steps)
        self.split, self.image_shape = split, (3, size, size)
        self.flow_names = _checked_names(vary, SCENE_FACTORS, "vary")
        names = _checked_names(shapes, raycast.SCENE_SHAPES, "shapes")
        at_least = steps + 1
        hues = max(10, at_least) if hues is None else hues
        scales = max(8, at_least) if scales is None else scales
        orientations = max(15, at_least) if orientations is None else orientations
        self.values = _values(hues, scales, [raycast.SCENE_SHAPES.index(name) for name in names], orientations)
        self._moved = [SCENE_FACTORS.index(name) for name in self.flow_names]
        for factor in self._moved:
            if len(self.values[factor]) < at_least:
                raise ValueError(
                    f"{SCENE_FACTORS[factor]} has {len(self.values[factor])} states, but a sequence of {steps} steps "
                    f"runs over {at_least}: give it more states, or take fewer steps"
                )
        self._held = [factor for factor in range(len(SCENE_FACTORS)) if factor not in self._moved]
        self._combinations = _combinations([len(self.values[f]) for f in self._held], split, held_out)
        self._subset: Tensor | None = None
        self._cast(size, supersampling)

    def __len__(self) -> int:
        """Number of scenes."""
        if self._subset is not None:
            return len(self._subset)
        return len(self._combinations) * math.prod(len(self.values[f]) for f in self._moved)

    _tensors = ("t", "_shades")

    def _select(self, indices: Tensor) -> None:
        self._subset = indices if self._subset is None else self._subset[indices]

    def states(self, indices: Tensor, k: Tensor) -> Tensor:
        """Gives the states of the factors in sequences, as integers.

        Args:
            indices: Scenes [B].
            k: Factors that move [B].

        Returns:
            States [B, T+1, 6]; `values` turns them into factors.
        """
        indices = indices if self._subset is None else self._subset[indices]
        moved = [len(self.values[f]) for f in self._moved]
        scene = torch.empty(len(indices), len(SCENE_FACTORS), dtype=torch.long)
        scene[:, self._held] = self._combinations[indices // math.prod(moved)]
        scene[:, self._moved] = torch.stack(torch.unravel_index(indices % math.prod(moved), moved), -1)
        states = scene[:, None].repeat(1, len(self.t), 1)
        frames = torch.arange(len(self.t))
        for flow, factor in enumerate(self._moved):
            count, mine = len(self.values[factor]), k == flow
            start = scene[mine, factor]
            if SCENE_FACTORS[factor].endswith("hue"):
                states[mine, :, factor] = (start[:, None] + frames) % count
            else:
                states[mine, :, factor] = start.clamp(max=count - len(frames))[:, None] + frames
        return states

    def render(self, factors: Tensor, *, supersampling: int = 3) -> Tensor:
        """Draws scenes of any factors in this data set's size: `render_scenes`.

        Args:
            factors: Factors [*batch, 6], any continuous values.
            supersampling: Rays per pixel, along each of its sides.

        Returns:
            Pictures [*batch, 3, H, W].
        """
        return render_scenes(factors, self.image_shape[-1], supersampling=supersampling)

    def _cast(self, size: int, supersampling: int) -> None:
        """Casts the shades of every pose that occurs, and notes where each is."""
        held = torch.zeros(len(self._combinations), len(SCENE_FACTORS), dtype=torch.long)
        held[:, self._held] = self._combinations
        ranges = [torch.arange(len(self.values[f])) if f in self._moved else torch.zeros(1).long() for f in (3, 4, 5)]
        moves = torch.cartesian_prod(*ranges)
        # Each of the three is either held, and moves by 0 alone, or moves, and is 0 in `held`.
        poses = (held[:, None, 3:] + moves).reshape(-1, 3).unique(dim=0)
        self._where = torch.full([len(self.values[f]) for f in (3, 4, 5)], -1)
        self._where[tuple(poses.unbind(-1))] = torch.arange(len(poses))
        values = torch.stack([self.values[f][poses[:, f - 3]] for f in (3, 4, 5)], -1)
        self._shades = cast_poses(values, size, supersampling).reshape(len(poses), 3, size * size)

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        states = self.states(indices, k)
        factors = torch.stack([value[states[..., f]] for f, value in enumerate(self.values)], -1)
        where = self._where[tuple(states[..., 3:].unbind(-1))].to(self._shades.device)
        paint = _paint(factors[..., :3]).to(self._shades.device)
        still = (where == where[:, :1]).all(1).cpu()
        batch, frames, pixels = *where.shape, self._shades.shape[-1]
        pictures = self._shades.new_empty(batch, frames, 3, pixels)
        # Runs of one kind are made whole: a batch sorted by k has few, and every call that starts threads costs.
        kinds, counts = still.unique_consecutive(return_counts=True)
        start = 0
        for colours_only, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            start += count
            if colours_only:  # one shade serves all frames of a sequence
                colours = rearrange(paint[part], "b t part rgb -> b (t rgb) part").contiguous()
                shades = self._shades.index_select(0, where[part, 0])
            else:
                colours = rearrange(paint[part], "b t part rgb -> (b t) rgb part").contiguous()
                shades = self._shades.index_select(0, where[part].flatten())
            torch.bmm(colours, shades, out=pictures[part].view(*colours.shape[:2], pixels))
        return {"frames": pictures.view(batch, frames, *self.image_shape), "factors": factors.float()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread for a while.

    A cast is tens of thousands of operations, each so small that it gains little by a second thread; but each waits for
    it, and on a machine that has other work, such as other workers, that makes the whole many times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _paint(hues: Tensor) -> Tensor:
    """Gives the colours [*batch, 3, 3] (part, RGB) of floor, wall and object for their hues [*batch, 3] in degrees."""
    return hue_to_rgb(hues, torch.tensor(_SATURATION)).float()


def _values(hues: int, scales: int, shapes: list[int], orientations: int) -> tuple[Tensor, ...]:
    for name, count in (("hues", hues), ("scales", scales), ("orientations", orientations)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
    hue = torch.arange(hues, dtype=torch.float64) * 360 / hues
    scale, turn = _spread(1.0, 0.25, scales), _spread(0.0, 30.0, orientations)
    return hue, hue, hue, scale, torch.tensor(shapes, dtype=torch.float64), turn


def _spread(middle: float, half: float, count: int) -> Tensor:
    """Gives equally spaced states on both sides of the middle; a single one is the middle."""
    ends = (middle - half, middle + half) if count > 1 else (middle, middle)
    return torch.linspace(*ends, count, dtype=torch.float64)


def _combinations(counts: list[int], split: str, held_out: float) -> Tensor:
    """Gives the combinations [n, held] of the held factors' states in a split."""
    every = torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, len(counts)) if counts else torch.zeros(1, 0)
    every = every.long()
    if split == "all":
        return every
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a share between 0 and 1, got {held_out!r}")
    if len(every) < 2:
        raise ValueError("every factor moves, so no combination can be held out: use split='all', or let fewer move")
    # The combinations with the smallest hash: the share is exact, and the choice random to look at but always the same.
    ranked = sorted(range(len(every)), key=_hash)
    number = min(max(round(held_out * len(every)), 1), len(every) - 1)
    chosen = ranked[:number] if split == "test" else ranked[number:]
    return every[sorted(chosen)]


def _hash(value: int) -> int:
    """Mixes the bits of an integer (Knuth's multiplicative hashing, twice, modulo 2^64)."""
    for _ in range(2):
        value = (value + 1) * 0x9E3779B97F4A7C15 % 2**64
        value ^= value >> 29
    return value


def _checked_names(given: Sequence[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"{what} must be distinct names out of {', '.join(known)}, got {given!r}")
    return names


def _check_sizes(size: int, supersampling: int) -> None:
    for name, number in (("size", size), ("supersampling", supersampling)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
