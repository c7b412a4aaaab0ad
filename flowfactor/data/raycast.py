"""A small analytic ray caster: one object on the floor of a room, lit by one lamp.

Everything is measured in metres: x to the right, y up, z towards a camera of orientation 0. The floor is y = 0, the
walls are the planes x = +-3 and z = +-3, and the object stands on the floor at the origin.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCENE_SHAPES: tuple[str, ...] = ("cube", "cylinder", "sphere", "capsule", "cone")
"""Shapes of the object, in the order of the factor."""

ROOM = 3.0  # half the width of the room
CAMERA = (7.0, 3.4)  # distance from the vertical axis, height
TARGET = 0.75  # height of the point on the axis that the camera looks at
FIELD_OF_VIEW = 37.0  # degrees, across the picture
LAMP = (-2.2, 6.0, 3.6)
AMBIENT, DIRECT = 0.4, 0.58  # light that shadows keep, and the lamp's: less than 1 together, rounding included

CUBE_HALF, CUBE_TURN = 0.62, 45.0  # half its side; turned so that two of its sides are always seen
CYLINDER_RADIUS, CYLINDER_HEIGHT = 0.62, 1.5
SPHERE_RADIUS = 0.8
CAPSULE_RADIUS, CAPSULE_HEIGHT = 0.55, 2.0
CONE_RADIUS, CONE_HEIGHT = 0.85, 1.8
_BOUNDS = {  # height of the centre and radius of a sphere round each shape
    "cube": (CUBE_HALF, CUBE_HALF * math.sqrt(3)),
    "cylinder": (CYLINDER_HEIGHT / 2, math.hypot(CYLINDER_HEIGHT / 2, CYLINDER_RADIUS)),
    "sphere": (SPHERE_RADIUS, SPHERE_RADIUS),
    "capsule": (CAPSULE_HEIGHT / 2, CAPSULE_HEIGHT / 2),
    "cone": (CONE_HEIGHT / 2, math.hypot(CONE_HEIGHT / 2, CONE_RADIUS)),
}
_NEAR = 1e-4  # hits nearer than this are the ray's own start


class View(NamedTuple):
    """The empty room as one camera sees it: n rays of one picture, and where they end.

    Attributes:
        origin: Camera [3].
        directions: Unit directions of the rays [n, 3], row by row.
        distance: Distance to the floor or wall [n].
        points: Where that is [n, 3].
        normals: Unit normals of the floor or wall there [n, 3].
        floor: Whether it is the floor [n].
        direct: Light that comes straight from the lamp, between 0 and DIRECT [n].
        lamp: Where the lamp is.
    """

    origin: Tensor
    directions: Tensor
    distance: Tensor
    points: Tensor
    normals: Tensor
    floor: Tensor
    direct: Tensor
    lamp: tuple[float, float, float]


def view(orientation: float, size: int, camera: tuple[float, float] = CAMERA) -> View:
    """Casts one ray through the middle of each of size x size pixels into the empty room.

    Args:
        orientation: Degrees by which the camera stands to the right of the middle, round the vertical axis.
        size: Rays per row and per column.
        camera: Distance of the camera from the vertical axis, and its height.

    Returns:
        The view, float32, lit by the lamp at its usual place.

    Example:
        >>> middle = view(0.0, 63).directions[63 * 31 + 31]
        >>> middle[0].item(), bool(middle[1] < 0), bool(middle[2] < 0)
        (0.0, True, True)
    """
    angle = math.radians(orientation)
    distance, height = camera
    origin = torch.tensor([distance * math.sin(angle), height, distance * math.cos(angle)])
    right = torch.tensor([math.cos(angle), 0.0, -math.sin(angle)])
    forward = torch.tensor([0.0, TARGET, 0.0]) - origin
    forward = forward / forward.norm()
    up = torch.linalg.cross(right, forward)
    slope = math.tan(math.radians(FIELD_OF_VIEW / 2))
    across = ((torch.arange(size) + 0.5) * 2 / size - 1) * slope
    rays = forward + across[None, :, None] * right - across[:, None, None] * up
    directions = (rays / rays.norm(dim=-1, keepdim=True)).reshape(-1, 3)

    # A ray leaves the room through the first of the planes that it runs towards.
    planes = torch.stack([directions[:, 0].sign() * ROOM, torch.zeros(size * size), directions[:, 2].sign() * ROOM], -1)
    exits = (planes - origin) / directions
    exits = torch.where((directions == 0) | (exits <= 0), math.inf, exits)
    ends, plane = exits.min(dim=-1)
    points = origin + ends[:, None] * directions
    normals = torch.zeros_like(points).scatter_(1, plane[:, None], -directions.gather(1, plane[:, None]).sign())
    return View(origin, directions, ends, points, normals, plane == 1, _lambert(points, normals, LAMP), LAMP)


def light(seen: View, lamp: tuple[float, float, float]) -> View:
    """Moves the lamp.

    Args:
        seen: The empty room.
        lamp: Where the lamp is to be; outside the object, and above the floor.

    Returns:
        The same view of the room, lit from there.

    Example:
        >>> room = view(0.0, 8)
        >>> bool(light(room, (0.0, 9.0, 0.0)).direct[room.floor].min() > room.direct[room.floor].min())
        True
    """
    if lamp == seen.lamp:
        return seen
    return seen._replace(direct=_lambert(seen.points, seen.normals, lamp), lamp=lamp)


def shade(shape: str, scale: float, seen: View) -> Tensor:
    """Puts the object into a view and tells how much light each ray finds on floor, wall and object.

    Args:
        shape: One of `SCENE_SHAPES`.
        scale: Size of the object, about the point where it stands.
        seen: The empty room.

    Returns:
        Shades [3, n] in [0, 1]: of the floor, the wall and the object. On each ray at most one of them is not 0; the
        picture is the sum of the three, each times its colour.

    Example:
        >>> shade("sphere", 1.0, view(0.0, 8)).shape
        torch.Size([3, 64])
    """
    room = AMBIENT + seen.direct
    to_lamp = torch.tensor(seen.lamp) - seen.points
    lamp_distance = to_lamp.norm(dim=-1)
    lit = (seen.direct > 0).nonzero().flatten()
    towards = to_lamp[lit] / lamp_distance[lit, None]
    blocked = lit[hit_distance(shape, scale, seen.points[lit], towards) < lamp_distance[lit]]
    room[blocked] = AMBIENT

    distance = hit_distance(shape, scale, seen.origin.expand_as(seen.directions), seen.directions)
    on_object = (distance < seen.distance).nonzero().flatten()
    points = seen.origin + distance[on_object, None] * seen.directions[on_object]
    lit_by = AMBIENT + _lambert(points, normals(shape, points / scale), seen.lamp)

    shades = torch.stack([room * seen.floor, room * ~seen.floor, torch.zeros_like(room)])
    shades[:, on_object] = 0
    shades[2, on_object] = lit_by
    return shades


def hit_distance(shape: str, scale: float, origins: Tensor, directions: Tensor) -> Tensor:
    """Gives the distance along each ray to the object.

    Args:
        shape: One of `SCENE_SHAPES`.
        scale: Size of the object.
        origins: Where the rays start [n, 3], outside the object.
        directions: Unit directions [n, 3].

    Returns:
        Distances [n]; infinity where the ray misses.

    Example:
        >>> down = torch.tensor([[0.0, -1.0, 0.0]])
        >>> hit_distance("sphere", 1.0, torch.tensor([[0.0, 5.0, 0.0]]), down)  # the sphere is 1.6 high
        tensor([3.4000])
    """
    height, radius = _BOUNDS[shape]
    to_centre = torch.tensor([0.0, height * scale, 0.0]) - origins
    along = (to_centre * directions).sum(-1)
    near = to_centre.square().sum(-1) - along.square() <= (radius * scale) ** 2 * 1.001
    # Most rays pass the bounding sphere: the exact intersection is worked out for the others alone.
    rays = (near & (along > 0)).nonzero().flatten()
    found = torch.full_like(along, math.inf)
    found[rays] = _HITS[shape](origins[rays] / scale, directions[rays]) * scale
    return found


def normals(shape: str, points: Tensor) -> Tensor:
    """Gives the outward unit normals of the object of scale 1 at points on its visible surface.

    Args:
        shape: One of `SCENE_SHAPES`.
        points: Points [n, 3] on the surface, other than those it stands on.

    Returns:
        Normals [n, 3].

    Example:
        >>> normals("cylinder", torch.tensor([[0.1, 1.5, 0.0]]))
        tensor([[0., 1., 0.]])
    """
    x, y, z = points.unbind(-1)
    zero, one = torch.zeros_like(y), torch.ones_like(y)
    if shape == "sphere":
        outward = torch.stack([x, y - SPHERE_RADIUS, z], -1)
    elif shape == "capsule":
        outward = torch.stack([x, y - y.clamp(CAPSULE_RADIUS, CAPSULE_HEIGHT - CAPSULE_RADIUS), z], -1)
    elif shape == "cylinder":
        top = y > CYLINDER_HEIGHT - 1e-3
        outward = torch.stack([x.where(~top, zero), one.where(top, zero), z.where(~top, zero)], -1)
    elif shape == "cone":
        outward = torch.stack([x, torch.hypot(x, z) * CONE_RADIUS / CONE_HEIGHT, z], -1)
    else:
        local = _turn(points - torch.tensor([0.0, CUBE_HALF, 0.0]), -CUBE_TURN)
        side = local.abs().argmax(-1, keepdim=True)
        outward = _turn(torch.zeros_like(local).scatter_(1, side, local.gather(1, side).sign()), CUBE_TURN)
    return outward / outward.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _lambert(points: Tensor, normals: Tensor, lamp: tuple[float, float, float]) -> Tensor:
    to_lamp = torch.tensor(lamp) - points
    cosine = (to_lamp * normals).sum(-1) / to_lamp.norm(dim=-1)
    return DIRECT * cosine.clamp_min(0)


def _turn(vectors: Tensor, degrees: float) -> Tensor:
    """Turns vectors about the vertical axis."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, z = vectors.unbind(-1)
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], -1)


def _nearest(*candidates: tuple[Tensor, Tensor]) -> Tensor:
    """Gives the smallest distance of those that lie ahead and are valid."""
    ahead = [torch.where(valid & (distance > _NEAR), distance, math.inf) for distance, valid in candidates]
    return torch.stack(ahead).amin(0)


def _roots(a: Tensor | float, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solves a s^2 + 2 b s + c = 0: two roots, and whether there are any."""
    discriminant = b.square() - a * c
    root = discriminant.clamp_min(0).sqrt()
    a = torch.as_tensor(a)
    a = torch.where(a.abs() < 1e-9, 1e-9, a)  # a ray along the surface: its roots are far away
    return (-b - root) / a, (-b + root) / a, discriminant >= 0


def _hit_ball(origins: Tensor, directions: Tensor, height: float, radius: float) -> tuple[Tensor, Tensor]:
    offset = origins - torch.tensor([0.0, height, 0.0])
    first, _, real = _roots(1.0, (offset * directions).sum(-1), offset.square().sum(-1) - radius**2)
    return first, real


def _hit_tube(origins: Tensor, directions: Tensor, radius: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    flat, flat_d = origins[:, ::2], directions[:, ::2]
    a, b, c = flat_d.square().sum(-1), (flat * flat_d).sum(-1), flat.square().sum(-1) - radius**2
    first, _, real = _roots(a, b, c)
    y = origins[:, 1] + first * directions[:, 1]
    return first, real & (y >= low) & (y <= high)


def _hit_disc(origins: Tensor, directions: Tensor, height: float, radius: float) -> tuple[Tensor, Tensor]:
    distance = (height - origins[:, 1]) / torch.where(directions[:, 1] == 0, 1e-9, directions[:, 1])
    at = origins[:, ::2] + distance[:, None] * directions[:, ::2]
    return distance, at.square().sum(-1) <= radius**2


def _hit_sphere(origins: Tensor, directions: Tensor) -> Tensor:
    return _nearest(_hit_ball(origins, directions, SPHERE_RADIUS, SPHERE_RADIUS))


def _hit_capsule(origins: Tensor, directions: Tensor) -> Tensor:
    low, high = CAPSULE_RADIUS, CAPSULE_HEIGHT - CAPSULE_RADIUS
    return _nearest(
        _hit_ball(origins, directions, low, CAPSULE_RADIUS),
        _hit_ball(origins, directions, high, CAPSULE_RADIUS),
        _hit_tube(origins, directions, CAPSULE_RADIUS, low, high),
    )


def _hit_cylinder(origins: Tensor, directions: Tensor) -> Tensor:
    return _nearest(
        _hit_tube(origins, directions, CYLINDER_RADIUS, 0.0, CYLINDER_HEIGHT),
        _hit_disc(origins, directions, CYLINDER_HEIGHT, CYLINDER_RADIUS),
        _hit_disc(origins, directions, 0.0, CYLINDER_RADIUS),
    )


def _hit_cone(origins: Tensor, directions: Tensor) -> Tensor:
    slope = (CONE_RADIUS / CONE_HEIGHT) ** 2
    flat, flat_d = origins[:, ::2], directions[:, ::2]
    below, below_d = CONE_HEIGHT - origins[:, 1], -directions[:, 1]  # depth below the tip
    a = flat_d.square().sum(-1) - slope * below_d.square()
    b = (flat * flat_d).sum(-1) - slope * below * below_d
    c = flat.square().sum(-1) - slope * below.square()
    first, second, real = _roots(a, b, c)
    sides = [(s, real & (below + s * below_d >= 0) & (below + s * below_d <= CONE_HEIGHT)) for s in (first, second)]
    return _nearest(*sides, _hit_disc(origins, directions, 0.0, CONE_RADIUS))


def _hit_cube(origins: Tensor, directions: Tensor) -> Tensor:
    start = _turn(origins, -CUBE_TURN) - torch.tensor([0.0, CUBE_HALF, 0.0])
    along = _turn(directions, -CUBE_TURN)
    along = torch.where(along.abs() < 1e-9, 1e-9, along)
    one, two = (-CUBE_HALF - start) / along, (CUBE_HALF - start) / along
    enter, leave = torch.minimum(one, two).amax(-1), torch.maximum(one, two).amin(-1)
    return _nearest((enter, enter <= leave))


_HITS = {
    "cube": _hit_cube,
    "cylinder": _hit_cylinder,
    "sphere": _hit_sphere,
    "capsule": _hit_capsule,
    "cone": _hit_cone,
}
