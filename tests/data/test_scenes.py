"""Scenes: exact geometry, linearity in the colours, exact factors, and a split that holds."""

from __future__ import annotations

import math

import pytest
import torch

from flowfactor.data import SCENE_FACTORS, SCENE_SHAPES, Scenes, hue_to_rgb, raycast, render_scenes
from flowfactor.data.scenes import cast_poses

SMALL = {"size": 12, "orientations": 4, "supersampling": 1}


def rays(*pairs: tuple[tuple[float, float, float], tuple[float, float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    origins, directions = torch.tensor([o for o, _ in pairs]), torch.tensor([d for _, d in pairs])
    return origins, directions / directions.norm(dim=-1, keepdim=True)


DOWN, BACK = (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("shape", "start", "direction", "expected"),
    [
        ("sphere", (0.0, 9.0, 0.0), DOWN, 9 - 1.6),
        ("sphere", (0.48, 9.0, 0.0), DOWN, 9 - 0.8 - 0.64),  # 0.48, 0.64, 0.8: a right-angled triangle
        ("sphere", (0.81, 9.0, 0.0), DOWN, math.inf),
        ("cube", (0.0, 9.0, 0.0), DOWN, 9 - 1.24),
        ("cube", (0.0, 0.5, 9.0), BACK, 9 - 0.62 * math.sqrt(2)),  # an edge, since it stands at 45 degrees
        ("cube", (0.5, 0.5, 9.0), BACK, 9 - (0.62 * math.sqrt(2) - 0.5)),
        ("cube", (0.9, 0.5, 9.0), BACK, math.inf),
        ("cylinder", (0.5, 9.0, 0.0), DOWN, 9 - 1.5),
        ("cylinder", (0.0, 0.7, 9.0), BACK, 9 - 0.62),
        ("cylinder", (0.0, 1.51, 9.0), BACK, math.inf),
        ("capsule", (0.0, 9.0, 0.0), DOWN, 9 - 2.0),
        ("capsule", (0.0, 1.0, 9.0), BACK, 9 - 0.55),
        ("capsule", (0.33, 9.0, 0.0), DOWN, 9 - 1.45 - 0.44),  # 0.33, 0.44, 0.55
        ("cone", (0.0, 0.9, 9.0), BACK, 9 - 0.425),  # half-way up, half the radius
        ("cone", (0.425, 9.0, 0.0), DOWN, 9 - 0.9),
        ("cone", (0.0, 1.81, 9.0), BACK, math.inf),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_distances_by_hand(shape: str, start, direction, expected: float, scale: float) -> None:
    origins, directions = rays((start, direction))
    found = raycast.hit_distance(shape, scale, origins * scale, directions)
    assert found.item() == pytest.approx(expected * scale, abs=1e-4)
    assert raycast.hit_distance(shape, scale, origins * scale, -directions).item() == math.inf


@pytest.mark.parametrize("shape", SCENE_SHAPES)
def test_hits_lie_on_the_surface_and_normals_face_the_ray(shape: str, generator: torch.Generator) -> None:
    """Marching along random rays through the solid's own inequality finds the same first point."""
    origins = torch.randn(300, 3, generator=generator)
    origins = 4 * origins / origins.norm(dim=-1, keepdim=True) + torch.tensor([0.0, 0.9, 0.0])
    origins[:, 1] = origins[:, 1].abs() + 0.05
    aims = (torch.rand(300, 3, generator=generator) - 0.5) * 2 + torch.tensor([0.0, 0.9, 0.0])
    directions = (aims - origins) / (aims - origins).norm(dim=-1, keepdim=True)
    found = raycast.hit_distance(shape, 1.0, origins, directions)
    steps = torch.arange(0, 8, 0.002)
    points = origins[:, None] + steps[:, None] * directions[:, None]
    inside = solid(shape, points)
    marched = torch.where(inside.any(1), steps[inside.int().argmax(1)], math.inf)
    hit = found.isfinite() & marched.isfinite()
    assert hit.sum() > 60
    assert (found.isfinite() == marched.isfinite()).float().mean() > 0.98  # a march may step over a grazed edge
    assert (found - marched)[hit].abs().max() < 0.02
    seen = hit & ((origins + found[:, None] * directions)[:, 1] > 1e-3)
    points = (origins + found[:, None] * directions)[seen]
    normals = raycast.normals(shape, points)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(len(normals)))
    assert (normals * directions[seen]).sum(-1).max() < 0.02
    assert not solid(shape, points + 0.01 * normals).any()
    assert solid(shape, points - 0.005 * normals).float().mean() > 0.97


def solid(shape: str, points: torch.Tensor) -> torch.Tensor:
    x, y, z = points.unbind(-1)
    flat = torch.hypot(x, z)
    if shape == "sphere":
        return points.sub(torch.tensor([0.0, 0.8, 0.0])).norm(dim=-1) <= 0.8
    if shape == "cube":
        return (y >= 0) & (y <= 1.24) & (x.abs() + z.abs() <= 0.62 * math.sqrt(2))
    if shape == "cylinder":
        return (y >= 0) & (y <= 1.5) & (flat <= 0.62)
    if shape == "capsule":
        return torch.hypot(flat, y - y.clamp(0.55, 1.45)) <= 0.55
    return (y >= 0) & (y <= 1.8) & (flat <= 0.85 * (1 - y / 1.8))


def test_the_camera_and_the_room() -> None:
    seen = raycast.view(30.0, 33)
    assert seen.origin.tolist() == pytest.approx([7 * 0.5, 3.4, 7 * math.sqrt(0.75)], abs=1e-5)
    middle = seen.directions[33 * 16 + 16]  # looks at the point of height 0.75 on the axis
    to_target = torch.tensor([0.0, 0.75, 0.0]) - seen.origin
    torch.testing.assert_close(middle, to_target / to_target.norm())
    corner = seen.directions.reshape(33, 33, 3)
    half = math.degrees(math.acos((corner[16, 0] * corner[16, 32]).sum().item())) / 2
    assert half == pytest.approx(math.degrees(math.atan(math.tan(math.radians(18.5)) * 32 / 33)), abs=1e-3)
    floor = seen.points[seen.floor]
    assert floor[:, 1].abs().max() < 1e-4
    assert floor[:, ::2].amin() > -3.0001
    wall = seen.points[~seen.floor]
    assert (wall[:, ::2].abs() - 3).abs().amin(1).max() < 1e-4
    assert wall[:, 1].min() > -1e-4
    assert seen.floor.reshape(33, 33)[-1].all()
    assert not seen.floor.reshape(33, 33)[0].any()


def test_lambert_shading_by_hand() -> None:
    """The top of the cube: light falls on it at the angle that the lamp's place gives."""
    seen = raycast.view(0.0, 65)
    shades = raycast.shade("cube", 1.0, seen)
    distance = raycast.hit_distance("cube", 1.0, seen.origin.expand(65 * 65, 3), seen.directions)
    points = seen.origin + distance[:, None] * seen.directions
    top = ((points[:, 1] - 1.24).abs() < 1e-4).nonzero().flatten()
    assert len(top) > 50
    for ray in top[:: len(top) // 5].tolist():
        x, y, z = points[ray].tolist()
        lamp = (-2.2 - x, 6.0 - y, 3.6 - z)
        expected = 0.4 + 0.58 * lamp[1] / math.hypot(*lamp)
        assert shades[:, ray].tolist() == pytest.approx([0.0, 0.0, expected], abs=1e-5)


def test_the_object_throws_a_shadow_where_the_lamp_says() -> None:
    """The floor is in shadow where the line to the lamp comes within a radius of the sphere's centre."""
    seen = raycast.view(15.0, 129)
    shaded = raycast.shade("sphere", 1.0, seen)[0]
    to_lamp = torch.tensor([-2.2, 6.0, 3.6]) - seen.points
    distance = to_lamp.norm(dim=-1)
    to_centre = torch.tensor([0.0, 0.8, 0.0]) - seen.points
    gap = torch.linalg.cross(to_lamp, to_centre).norm(dim=-1) / distance
    dark, lit = (shaded > 0) & (gap < 0.79), (shaded > 0) & (gap > 0.81)
    assert dark.sum() > 50
    assert lit.sum() > 1000
    torch.testing.assert_close(shaded[dark], torch.full_like(shaded[dark], 0.4))
    torch.testing.assert_close(shaded[lit], (0.4 + 0.58 * to_lamp[:, 1] / distance)[lit])


def test_shades_part_the_picture() -> None:
    poses = torch.tensor([[1.0, shape, turn] for shape in range(5) for turn in (-30.0, 10.0)])
    shades = cast_poses(poses, 16, 3)
    total = shades.sum(1)
    assert bool((shades >= 0).all())
    assert 0.39 < total.min() < total.max() < 0.981
    single = cast_poses(poses, 48, 1)
    assert ((single > 0).sum(1) == 1).all()  # one surface on each ray
    torch.testing.assert_close(shades, single.reshape(10, 3, 16, 3, 16, 3).mean((3, 5)))  # and pixels are their means


def test_a_cast_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cast_poses(torch.tensor([[1.0, 0.0, 0.0]]), 4, 1)
        assert torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            cast_poses(torch.tensor([[1.0, 9.0, 0.0]]), 4, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", range(5))
def test_pictures_are_linear_in_the_colours(shape: int) -> None:
    shades = cast_poses(torch.tensor([[1.1, shape, 12.5]]), 16, 3)[0]
    hues = (33.0, 140.5, 271.0)
    picture = render_scenes(torch.tensor([*hues, 1.1, shape, 12.5]), 16)
    expected = sum(
        hue_to_rgb(hue, saturation)[:, None, None] * part
        for hue, saturation, part in zip(hues, (0.6, 0.5, 0.85), shades, strict=True)
    )
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)


def test_render_takes_any_batch_and_any_value() -> None:
    factors = torch.tensor([10.3, 200.0, 340.7, 0.91, 3.0, -17.2]).repeat(2, 3, 1)
    factors[1, :, 0] += 360
    factors[:, 2, 3] = 1.3
    pictures = render_scenes(factors, 10)
    assert pictures.shape == (2, 3, 3, 10, 10)
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-5, rtol=0)
    assert torch.equal(pictures[0, 0], pictures[0, 1])
    assert not torch.allclose(pictures[0, 0], pictures[0, 2])


def test_the_object_grows_with_the_scale() -> None:
    """Far away, the area goes with the square of the size; this camera is near, so it grows a bit faster."""
    poses = torch.tensor([[scale, 2.0, 0.0] for scale in (0.5, 1.0)])
    area = (cast_poses(poses, 64, 2)[:, 2] > 0).float().sum((1, 2))
    assert 3.6 < (area[1] / area[0]).item() < 5.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: 0.0}, r"scale must lie in \(0, 2\]"),
        ({3: 2.5}, "scale must lie"),
        ({4: 0.5}, "shape is an index from 0 to 4"),
        ({4: 5.0}, "shape is an index"),
        ({0: math.nan}, "finite"),
    ],
)
def test_bad_factors(change: dict[int, float], message: str) -> None:
    factors = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    for index, value in change.items():
        factors[index] = value
    with pytest.raises(ValueError, match=message):
        render_scenes(factors, 8)
    with pytest.raises(ValueError, match="floor_hue"):
        render_scenes(factors[:5], 8)


@pytest.fixture(scope="module")
def data() -> Scenes:
    return Scenes("train", **SMALL)


def test_facts(data: Scenes) -> None:
    assert SCENE_FACTORS == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    assert data.flow_names == SCENE_FACTORS[:4]
    assert data.num_steps == 7
    assert data.image_shape == (3, 12, 12)
    assert len(data) == 16 * 10 * 10 * 10 * 8  # 4 of the 20 pairs of shape and orientation are held out
    torch.testing.assert_close(data.values[0], torch.arange(10, dtype=torch.float64) * 36)
    assert data.values[5].tolist() == pytest.approx([-30, -10, 10, 30])


def test_frames_are_the_scenes_their_factors_say(data: Scenes, generator: torch.Generator) -> None:
    indices = torch.randint(len(data), (24,), generator=generator)
    batch = data.batch(indices, torch.arange(24) % 4)  # unsorted, every k in every chunk
    assert batch["frames"].shape == (24, 8, 3, 12, 12)
    expected = render_scenes(batch["factors"], 12, supersampling=1)
    torch.testing.assert_close(batch["frames"], expected, atol=2e-6, rtol=0)
    ordered = batch["k"].argsort(stable=True)
    again = data.batch(indices[ordered], batch["k"][ordered])  # sorted: the other path
    torch.testing.assert_close(again["frames"], batch["frames"][ordered], atol=2e-6, rtol=0)
    assert data.batch([], 0)["frames"].shape == (0, 8, 3, 12, 12)
    item = data[int(indices[5]), 1]
    assert item["factors"].shape == (8, 6)
    torch.testing.assert_close(item["frames"], batch["frames"][5], atol=2e-6, rtol=0)
    torch.testing.assert_close(data.render(item["factors"], supersampling=1), item["frames"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("k", range(4))
def test_one_factor_moves_evenly_and_the_rest_hold(data: Scenes, k: int, generator: torch.Generator) -> None:
    indices = torch.randint(len(data), (200,), generator=generator)
    factors = data.batch(indices, k)["factors"]
    rest = [f for f in range(6) if f != k]
    assert torch.equal(factors[..., rest], factors[:, :1, rest].expand(-1, 8, -1))
    steps = factors[..., k].diff(dim=1)
    if k < 3:
        torch.testing.assert_close(steps.remainder(360), torch.full_like(steps, 36.0))
        assert all(len(set(row.tolist())) == 8 for row in factors[..., k])  # no hue comes twice
        assert len(set(factors[:, 0, k].tolist())) == 10  # and any may be the first
    else:
        torch.testing.assert_close(factors[..., k], torch.linspace(0.75, 1.25, 8).expand(200, 8))


def test_windows_of_a_factor_with_more_states_than_frames() -> None:
    data = Scenes(
        "all", size=8, steps=2, vary=("orientation", "shape"), hues=3, scales=1, orientations=5, supersampling=1
    )
    turns = {tuple(data[i, 0]["factors"][:, 5].tolist()) for i in range(len(data))}
    assert turns == {(-30.0, -15.0, 0.0), (-15.0, 0.0, 15.0), (0.0, 15.0, 30.0)}
    shapes = {tuple(data[i, 1]["factors"][:, 4].tolist()) for i in range(len(data))}
    assert shapes == {(0.0, 1.0, 2.0), (1.0, 2.0, 3.0), (2.0, 3.0, 4.0)}
    torch.testing.assert_close(
        data.batch(range(0, 600, 37), 1)["frames"],
        render_scenes(data.batch(range(0, 600, 37), 1)["factors"], 8, supersampling=1),
        atol=2e-6,
        rtol=0,
    )


def test_indices_name_every_scene_once() -> None:
    data = Scenes("all", size=8, steps=1, hues=2, scales=2, orientations=2, shapes=("cone", "cube"), supersampling=1)
    assert len(data) == 2**6
    states = data.states(torch.arange(64), torch.zeros(64, dtype=torch.long))[:, 0]
    assert len({tuple(row) for row in states.tolist()}) == 64
    assert set(data.batch(range(64), 0)["factors"][..., 4].flatten().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("vary", [SCENE_FACTORS[:4], ("orientation", "floor_hue"), ("shape",), SCENE_FACTORS])
def test_no_frame_is_in_both_splits(vary: tuple[str, ...]) -> None:
    settings = {"size": 8, "steps": 2, "hues": 3, "scales": 3, "orientations": 3, "supersampling": 1, "vary": vary}
    if vary == SCENE_FACTORS:  # edges of two factors are held out, which needs states to spare
        settings |= {"scales": 8, "orientations": 15}
    seen = []
    for split in ("train", "test", "all"):
        data = Scenes(split, **settings)
        states = torch.cat(
            [data.states(torch.arange(len(data)), torch.full((len(data),), k)) for k in range(data.num_flows)]
        )
        seen.append({tuple(row) for row in states.flatten(0, 1).tolist()})
    train, test, every = seen
    assert train
    assert test
    assert not train & test
    assert train | test == every
    assert len(test) / len(every) == pytest.approx(0.2, abs=0.04)


def test_the_split_is_always_the_same() -> None:
    held = [sorted({tuple(row) for row in Scenes("test", **SMALL)._combinations.tolist()}) for _ in range(2)]
    assert held[0] == held[1]
    assert len(held[0]) == 4
    assert len({shape for shape, _ in held[0]}) > 1  # scattered, not one block
    assert len({turn for _, turn in held[0]}) > 1


def test_epochs_and_subsets(data: Scenes) -> None:
    few = data.subset(torch.arange(0, len(data), 1999))
    batches = list(few.batches(8, generator=torch.Generator().manual_seed(0)))
    assert len(batches) == len(few) // 8
    assert all(batch["k"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] for batch in batches)
    torch.testing.assert_close(few[3, 2]["frames"], data[3 * 1999, 2]["frames"], atol=2e-6, rtol=0)
    torch.testing.assert_close(few.subset([3])[0, 2]["frames"], few[3, 2]["frames"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "'train', 'test' or 'all'"),
        ({"size": 0}, "size must be"),
        ({"supersampling": 0}, "supersampling must be at least 1"),
        ({"steps": 0}, "steps must be"),
        ({"vary": ()}, "vary must be distinct names"),
        ({"vary": ("scale", "scale")}, "vary must be distinct names"),
        ({"vary": ("colour",)}, "floor_hue, wall_hue"),
        ({"shapes": ("pyramid",)}, "cube, cylinder"),
        ({"hues": 7}, "floor_hue has 7 states, but a sequence of 7 steps runs over 8"),
        ({"vary": ("shape",)}, "shape has 5 states"),
        ({"scales": 0}, "scales must be"),
        ({"held_out": 1.0}, "share between 0 and 1"),
        ({"vary": SCENE_FACTORS, "steps": 4, "scales": 5, "orientations": 5}, "use split='all'"),
        ({"views": {"light_colour": 3}}, "views names light_colour, expected some of light_intensity"),
        ({"views": {"light_turn": 0}}, "light_turn must be at least 1"),
        ({"vary": ("light_turn",), "views": {"light_turn": 7}}, "light_turn has 7 states"),
        ({"size": 2048}, "up to 480 combinations of scale, shape, orientation would have to be cast and kept, 22 GiB"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"hues": 8.0}, {"scales": True}, {"views": {"light_turn": "9"}}, {"supersampling": 1.5}]
)
def test_numbers_are_integers(arguments: dict) -> None:
    with pytest.raises(TypeError, match="must be an integer"):
        Scenes(**arguments)


def test_labelled_scenes(data: Scenes, generator: torch.Generator) -> None:
    images, labels = data.factor_samples(20, generator)
    assert images.shape == (20, 3, 12, 12)
    assert labels.dtype == torch.int64
    assert data.factor_names == SCENE_FACTORS
    assert data.factor_sizes == (10, 10, 10, 8, 5, 4)
    torch.testing.assert_close(images, render_scenes(data.factors(labels), 12, supersampling=1), atol=2e-6, rtol=0)
