"""A procedural room with one object: image sequences whose factors are known exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data import raycast
from flowfactor.data.base import Batch
from flowfactor.data.factors import FactorSequences, checked_names
from flowfactor.data.render import (
    SCENE_FACTORS,
    VIEW_DEFAULTS,
    VIEW_FACTORS,
    cast_poses,
    check_sizes,
    paint,
    render_scenes,
)
from flowfactor.data.starts import check_start

_HUES = tuple(name for name in SCENE_FACTORS if name.endswith("hue"))
_COLOURS = (*_HUES, "light_intensity")  # factors that need no other shade
_MIDDLES = {  # middle and half the range of a factor of light or camera that has several states
    "light_intensity": (0.7, 0.3),
    "light_turn": (0.0, 60.0),
    "light_height": (6.0, 2.5),
    "camera_height": (3.4, 1.2),
    "camera_distance": (7.0, 1.5),
}
_MOST_GIBIBYTES = 8  # of shades


class Scenes(FactorSequences):
    """Sequences of a room with an object, in which one factor moves and all others hold exactly.

    A procedural counterpart of Shapes3D that needs no download. A scene has the six factors of `SCENE_FACTORS`, each
    with a number of equally spaced states: hues go round the circle, the scale goes from 0.75 to 1.25, the orientation
    from -30 to 30 degrees. On request it also has some of the factors of light and camera (`VIEW_FACTORS`), and is then
    a counterpart of Falcor3D and Isaac3D: the intensity of the light from 0.4 to 1, its turn round the vertical axis
    from -60 to 60 degrees, its height from 3.5 to 8.5 metres, the camera's height from 2.2 to 4.6 and its distance from
    5.5 to 8.5.

    A sequence lets factor k run over T + 1 neighbouring states. A hue starts at the scene's own state and goes round
    the circle, with at most one turn, so that no frame comes twice; the others start at the scene's own state or, where
    too few follow, at the last from which T steps fit (with the default of 8 scales and T = 7, always the smallest).

    The test split holds out combinations of the factors that no sequence moves (by default, pairs of shape and
    orientation), or edges of two moved factors where nearly all move; see `FactorSequences`. No frame of one split is
    in the other.

    An index names a scene, with the moved factors running fastest; the factor that moves, k, is drawn per epoch (see
    `SequenceDataset`). Geometry is cast when the data set is made, once for every combination of scale, shape,
    orientation, lamp and camera that occurs; a batch is then one product with colours.

    Args:
        split: ``"train"``, ``"test"`` or ``"all"``.
        size: Height and width in pixels.
        steps: Number T of steps; a sequence has T + 1 frames.
        vary: Names of the K factors that move, in the order of k: of `SCENE_FACTORS` or `VIEW_FACTORS`.
        shapes: Names of the shapes that occur.
        hues: Number of states of each hue; by default 10, or T + 1 if that is more.
        scales: Number of states of the scale; by default 8, or T + 1 if that is more.
        orientations: Number of states of the orientation; by default 15, or T + 1 if that is more.
        views: Numbers of states of the factors of light and camera that scenes have. One that is in `vary` and not
            here has T + 1; one that is in neither is no factor.
        held_out: Share of the scenes that the test split holds out.
        supersampling: Rays per pixel, along each of its sides.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.
        direction: ``"forward"``, ``"backward"``, or ``"both"``: half of the batches of an epoch run backwards.

    Attributes:
        factor_names: `SCENE_FACTORS`, and after them those of `VIEW_FACTORS` that scenes have.
        values: The values of each factor's states, in that order.

    Raises:
        ValueError: If an argument is wrong, a moved factor has fewer than T + 1 states, nothing can be held out, or
            there are too many combinations to cast.

    Example:
        >>> data = Scenes("test", size=16, orientations=5, shapes=("cube", "sphere"), steps=7)
        >>> data.flow_names
        ('floor_hue', 'wall_hue', 'object_hue', 'scale')
        >>> sequence = data[0, 3]
        >>> sequence["frames"].shape, sequence["factors"].shape
        (torch.Size([8, 3, 16, 16]), torch.Size([8, 6]))
        >>> sequence["factors"][[0, -1], 3]
        tensor([0.7500, 1.2500])

        Light and camera, with the object as it is:

        >>> lamps = Scenes(size=16, steps=2, vary=("light_turn", "camera_height"), shapes=("cone",), scales=1)
        >>> lamps.factor_names[6:], lamps[0, 1]["factors"][:, -1]
        (('light_turn', 'camera_height'), tensor([2.2000, 3.4000, 4.6000]))
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
        views: Mapping[str, int] | None = None,
        held_out: float = 0.2,
        supersampling: int = 3,
        t: Tensor | Sequence[float] | None = None,
        direction: Literal["forward", "both", "backward"] = "forward",
    ) -> None:
        check_sizes(size, supersampling)
        check_start("first", direction)
        self.runs = direction
        names = checked_names(shapes, raycast.SCENE_SHAPES, "shapes")
        varied = checked_names(vary, SCENE_FACTORS + VIEW_FACTORS, "vary")
        at_least = steps + 1 if isinstance(steps, int) else 1  # what steps may be is checked below
        counts = {
            "hues": max(10, at_least) if hues is None else hues,
            "scales": max(8, at_least) if scales is None else scales,
            "orientations": max(15, at_least) if orientations is None else orientations,
        }
        extra = _checked_views(views, varied, at_least)
        values = _values(counts, [raycast.SCENE_SHAPES.index(name) for name in names], extra)
        self._lay_out(
            SCENE_FACTORS + tuple(extra),
            values,
            vary=varied,
            steps=steps,
            split=split,
            held_out=held_out,
            t=t,
            cyclic=_HUES,
        )
        self.image_shape = (3, size, size)
        self._cast(size, supersampling)

    _tensors = ("t", "_shades")

    def render(self, factors: Tensor, *, supersampling: int = 3) -> Tensor:
        """Draws scenes of any factors in this data set's size: `render_scenes`.

        Args:
            factors: Factors [*batch, F] in the order of `factor_names`, any continuous values.
            supersampling: Rays per pixel, along each of its sides.

        Returns:
            Pictures [*batch, 3, H, W].
        """
        if factors.shape[-1] == len(self.factor_names) > len(SCENE_FACTORS):
            full = torch.tensor(VIEW_DEFAULTS).to(factors).repeat(*factors.shape[:-1], 1)
            for place, name in enumerate(self.factor_names[len(SCENE_FACTORS) :], len(SCENE_FACTORS)):
                full[..., VIEW_FACTORS.index(name)] = factors[..., place]
            factors = torch.cat([factors[..., : len(SCENE_FACTORS)], full], -1)
        return render_scenes(factors, self.image_shape[-1], supersampling=supersampling)

    def _substance(self, indices: Tensor) -> Tensor:
        # Pictures are rendered, each device by its own rounding; what they show is exact.
        return self.factors(self.states(indices, indices % self.num_flows)).mul(1e6).round().long()

    def images_at(self, states: Tensor) -> Tensor:
        """Gives the pictures [*batch, 3, H, W] of scenes of this split, from their states [*batch, F]."""
        flat = states.reshape(-1, states.shape[-1]).cpu()
        where, colours = self._ingredients(flat)
        pictures = torch.bmm(colours.mT.contiguous(), self._shades.index_select(0, where))
        return pictures.view(*states.shape[:-1], *self.image_shape)

    def _cast(self, size: int, supersampling: int) -> None:
        """Casts the shades of every pose that occurs, and notes where each is."""
        self._posed = [f for f, name in enumerate(self.factor_names) if name not in _COLOURS]
        self._check_memory(size)
        poses = self._reached(self._posed)
        self._where = torch.full([len(self.values[f]) for f in self._posed], -1)
        self._where[tuple(poses.unbind(-1))] = torch.arange(len(poses))
        values = torch.tensor((1.0, 0.0, 0.0, *VIEW_DEFAULTS[1:]), dtype=torch.float64).repeat(len(poses), 1)
        columns = ("scale", "shape", "orientation", *VIEW_FACTORS[1:])
        for place, factor in enumerate(self._posed):
            values[:, columns.index(self.factor_names[factor])] = self.values[factor][poses[:, place]]
        self._shades = cast_poses(values, size, supersampling).reshape(len(poses), 3, size * size)

    def _check_memory(self, size: int) -> None:
        """Says that there are too many poses before they are made."""
        listed, crossed = (
            math.prod(len(self.values[f]) for f in factors if f in self._posed)
            for factors in (self._listed, self._crossed)
        )
        count = min(listed, len(self._combinations)) * crossed
        gibibytes = count * 12 * size * size / 2**30
        if gibibytes > _MOST_GIBIBYTES:
            names = ", ".join(self.factor_names[f] for f in self._posed if len(self.values[f]) > 1)
            raise ValueError(
                f"up to {count:,} combinations of {names} would have to be cast and kept, {gibibytes:.0f} GiB: "
                "give these fewer states, or take a smaller size"
            )

    def _ingredients(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Gives where the shades of states [*batch, F] are [*batch], and the colours [*batch, 3, 3] (part, RGB)."""
        factors = self.factors(states)
        where = self._where[tuple(states[..., self._posed].unbind(-1))]
        intensity = None
        if "light_intensity" in self.factor_names:
            intensity = factors[..., self.factor_names.index("light_intensity")]
        return where.to(self._shades.device), paint(factors[..., :3], intensity).to(self._shades.device)

    def _pictures(self, states: Tensor) -> Batch:
        where, colour = self._ingredients(states)
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
                colours = rearrange(colour[part], "b t part rgb -> b (t rgb) part").contiguous()
                shades = self._shades.index_select(0, where[part, 0])
            else:
                colours = rearrange(colour[part], "b t part rgb -> (b t) rgb part").contiguous()
                shades = self._shades.index_select(0, where[part].flatten())
            torch.bmm(colours, shades, out=pictures[part].view(*colours.shape[:2], pixels))
        return {"frames": pictures.view(batch, frames, *self.image_shape), "factors": self.factors(states).float()}


def _checked_views(views: Mapping[str, int] | None, vary: Sequence[str], at_least: int) -> dict[str, int]:
    """Gives the numbers of states of the factors of light and camera that scenes have, in the order of the names."""
    given = dict(views or {})
    unknown = set(given) - set(VIEW_FACTORS)
    if unknown:
        raise ValueError(f"views names {', '.join(sorted(unknown))}, expected some of {', '.join(VIEW_FACTORS)}")
    for name, count in given.items():
        check_count(name, count)
    return {name: given.get(name, at_least) for name in VIEW_FACTORS if name in given or name in vary}


def _values(counts: dict[str, int], shapes: list[int], views: dict[str, int]) -> tuple[Tensor, ...]:
    for name, count in counts.items():
        check_count(name, count)
    hue = torch.arange(counts["hues"], dtype=torch.float64) * 360 / counts["hues"]
    scale, turn = _spread(1.0, 0.25, counts["scales"]), _spread(0.0, 30.0, counts["orientations"])
    usual = dict(zip(VIEW_FACTORS, VIEW_DEFAULTS, strict=True))
    extra = [
        _spread(*_MIDDLES[name], count) if count > 1 else torch.tensor([usual[name]], dtype=torch.float64)
        for name, count in views.items()
    ]
    return hue, hue, hue, scale, torch.tensor(shapes, dtype=torch.float64), turn, *extra


def _spread(middle: float, half: float, count: int) -> Tensor:
    """Gives equally spaced states on both sides of the middle; a single one is the middle."""
    ends = (middle - half, middle + half) if count > 1 else (middle, middle)
    return torch.linspace(*ends, count, dtype=torch.float64)
