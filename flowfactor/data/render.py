"""Drawing scenes of any factors: the casting of poses, and their colours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data import raycast
from flowfactor.data.colours import hue_to_rgb

SCENE_FACTORS: tuple[str, ...] = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
"""Factors of a scene, in the order of the last dimension of `render_scenes`' argument."""

VIEW_FACTORS: tuple[str, ...] = (
    "light_intensity",
    "light_turn",
    "light_height",
    "camera_height",
    "camera_distance",
)
"""Factors of light and camera, which follow those of `SCENE_FACTORS` where a scene has them."""

VIEW_DEFAULTS: tuple[float, ...] = (1.0, 0.0, raycast.LAMP[1], raycast.CAMERA[1], raycast.CAMERA[0])
"""The values of `VIEW_FACTORS` in a scene that does not have them."""

_SATURATION = (0.6, 0.5, 0.85)  # of floor, wall and object
_LARGEST = 2.0  # a larger object would leave the room
# Beyond these the lamp would be inside the object or the camera would look past the room's walls.
_RANGES = {
    "light_intensity": (0.0, 1.0),
    "light_turn": (-360.0, 360.0),
    "light_height": (0.5, 20.0),
    "camera_height": (0.5, 8.0),
    "camera_distance": (4.0, 9.0),
}


def render_scenes(factors: Tensor, size: int = 64, *, supersampling: int = 3) -> Tensor:
    """Draws scenes of any factors, continuous ones included.

    The picture is linear in the colours of floor, wall and object: each is its colour times a shade that depends on
    shape, scale, orientation, lamp and camera alone. The shades are cast once for every distinct combination of these
    among the scenes.

    Args:
        factors: Factors [*batch, 6] in the order of `SCENE_FACTORS`: the hues of floor, wall and object in degrees
            (modulo 360), the scale (above 0, up to 2), the shape (an index into `SCENE_SHAPES`: cube, cylinder,
            sphere, capsule, cone) and the orientation (degrees by which the camera stands to the right). Or
            [*batch, 11], then `VIEW_FACTORS`: the intensity of the light (0 to 1, relative to the usual),
            the degrees by which the lamp is turned to the right round the vertical axis, the lamp's height (0.5 to 20
            metres; usually 6), the camera's height (0.5 to 8; usually 3.4) and its distance from the axis (4 to 9;
            usually 7).
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
    check_sizes(size, supersampling)
    factors = torch.as_tensor(factors)
    every = SCENE_FACTORS + VIEW_FACTORS
    known = (len(SCENE_FACTORS), len(every))
    if factors.ndim < 1 or factors.shape[-1] not in known or not bool(factors.isfinite().all()):
        raise ValueError(
            f"factors must be finite and [*batch, {known[0]}] ({', '.join(SCENE_FACTORS)}) or [*batch, {known[1]}] "
            f"(with {', '.join(VIEW_FACTORS)}), got {list(factors.shape)}"
        )
    flat = factors.reshape(-1, factors.shape[-1]).to("cpu", torch.float64)
    _check_factors(flat)
    if flat.shape[-1] == known[0]:
        flat = torch.cat([flat, torch.tensor(VIEW_DEFAULTS, dtype=torch.float64).expand(len(flat), -1)], -1)
    # Everything but the hues and the intensity of the light is a matter of geometry.
    poses, which = torch.cat([flat[:, 3:6], flat[:, 7:]], -1).unique(dim=0, return_inverse=True)
    shades = cast_poses(poses, size, supersampling).reshape(len(poses), 3, size * size)
    pictures = torch.bmm(paint(flat[:, :3], flat[:, 6]).mT, shades[which])
    return pictures.reshape(*factors.shape[:-1], 3, size, size).to(factors.device)


def cast_poses(poses: Tensor, size: int, supersampling: int = 3) -> Tensor:
    """Casts the shades of floor, wall and object for several poses.

    Args:
        poses: Poses [P, 3]: scale, index of the shape, orientation in degrees. Or [P, 7], with the turn and the height
            of the lamp and the height and the distance of the camera after them.
        size: Height and width in pixels.
        supersampling: Rays per pixel, along each of its sides.

    Returns:
        Shades [P, 3, size, size], float32, of floor, wall and object; their sum is in [0, 1].

    Example:
        >>> cast_poses(torch.tensor([[1.0, 0.0, 0.0]]), 8).shape
        torch.Size([1, 3, 8, 8])
    """
    if poses.shape[-1] == 3:
        poses = torch.cat([poses, torch.tensor(VIEW_DEFAULTS[1:]).to(poses).expand(len(poses), -1)], -1)
    shades = torch.empty(len(poses), 3, size, size, dtype=torch.float32)
    cameras, which_camera = poses[:, [2, 5, 6]].unique(dim=0, return_inverse=True)
    lamps, which_lamp = poses[:, 3:5].unique(dim=0, return_inverse=True)
    with _one_thread():
        for camera, (orientation, height, distance) in enumerate(cameras.tolist()):
            room = raycast.view(orientation, size * supersampling, (distance, height))
            for lamp, (turn, above) in enumerate(lamps.tolist()):
                mine = ((which_camera == camera) & (which_lamp == lamp)).nonzero().flatten().tolist()
                if not mine:
                    continue
                seen = raycast.light(room, _lamp(turn, above))  # the empty room, shared by all objects in it
                for pose in mine:
                    scale, shape = poses[pose, 0].item(), int(poses[pose, 1])
                    rays = raycast.shade(raycast.SCENE_SHAPES[shape], scale, seen)
                    shades[pose] = rays.reshape(3, size, supersampling, size, supersampling).mean((2, 4))
    return shades


def paint(hues: Tensor, intensity: Tensor | None = None) -> Tensor:
    """Gives the colours of floor, wall and object.

    Args:
        hues: Hues [*batch, 3] in degrees.
        intensity: Intensity of the light [*batch]; None is 1.

    Returns:
        Colours [*batch, 3, 3] (part, RGB), float32.
    """
    return hue_to_rgb(hues, torch.tensor(_SATURATION), 1.0 if intensity is None else intensity[..., None]).float()


def check_sizes(size: int, supersampling: int) -> None:
    """Checks the size of pictures and the number of rays per pixel.

    Args:
        size: Height and width in pixels.
        supersampling: Rays per pixel, along each of its sides.

    Raises:
        TypeError: If one is no integer.
        ValueError: If it is below 1.
    """
    for name, number in (("size", size), ("supersampling", supersampling)):
        check_count(name, number)


def _check_factors(factors: Tensor) -> None:
    scale, shape = factors[:, 3], factors[:, 4]
    if not bool(((scale > 0) & (scale <= _LARGEST)).all()):
        raise ValueError(f"scale must lie in (0, {_LARGEST:g}], got {scale.min():g} to {scale.max():g}")
    if not bool(((shape == shape.round()) & (shape >= 0) & (shape < len(raycast.SCENE_SHAPES))).all()):
        raise ValueError(f"shape is an index from 0 to {len(raycast.SCENE_SHAPES) - 1}, got {shape.tolist()}")
    for name, column in zip(VIEW_FACTORS, factors[:, len(SCENE_FACTORS) :].unbind(-1), strict=False):
        low, high = _RANGES[name]
        if not bool(((column >= low) & (column <= high)).all()):
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {column.min():g} to {column.max():g}")


def _lamp(turn: float, height: float) -> tuple[float, float, float]:
    """Gives the place of the lamp, turned to the right round the vertical axis (a camera's right, at orientation 0)."""
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    x, _, z = raycast.LAMP
    return cos * x + sin * z, height, cos * z - sin * x


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
