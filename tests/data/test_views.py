"""Scenes with factors of light and camera."""

from __future__ import annotations

import math

import pytest
import torch

from flowfactor.data import SCENE_FACTORS, VIEW_FACTORS, Scenes, raycast, render_scenes
from flowfactor.data.scenes import cast_poses

ALL = SCENE_FACTORS + VIEW_FACTORS
USUAL = torch.tensor([40.0, 200.0, 90.0, 1.0, 0.0, 10.0, 1.0, 0.0, 6.0, 3.4, 7.0])


def test_light_and_camera_at_their_usual_values_change_nothing() -> None:
    assert torch.equal(render_scenes(USUAL, 16), render_scenes(USUAL[:6], 16))


def test_the_intensity_of_the_light_scales_the_picture() -> None:
    dim = USUAL.clone()
    dim[6] = 0.5
    torch.testing.assert_close(render_scenes(dim, 16), render_scenes(USUAL, 16) / 2)


def test_a_turn_of_camera_and_lamp_together_is_seen_by_light_alone() -> None:
    """A sphere looks the same from all sides: turning camera and lamp alike changes the walls, but not the object."""
    poses = torch.tensor([[1.0, 2.0, 0.0, 10.0, 6.0, 3.4, 7.0], [1.0, 2.0, 25.0, 35.0, 6.0, 3.4, 7.0]])
    here, turned = cast_poses(poses, 24, 2)
    torch.testing.assert_close(here[2], turned[2], atol=1e-5, rtol=0)
    assert not torch.allclose(here[1], turned[1], atol=0.01)


@pytest.mark.parametrize(("height", "distance"), [(2.2, 5.5), (4.6, 8.5)])
def test_a_camera_somewhere_else(height: float, distance: float) -> None:
    seen = raycast.view(-20.0, 33, (distance, height))
    assert seen.origin.norm().item() == pytest.approx(math.hypot(height, distance), rel=1e-5)
    assert seen.origin[1].item() == pytest.approx(height)
    to_target = torch.tensor([0.0, 0.75, 0.0]) - seen.origin
    torch.testing.assert_close(seen.directions[33 * 16 + 16], to_target / to_target.norm())
    wall = seen.points[~seen.floor]
    assert (wall[:, ::2].abs() - 3).abs().amin(1).max() < 1e-4


def test_a_lamp_somewhere_else_shades_and_throws_shadows_from_there() -> None:
    lamp = (3.0, 4.0, 2.5)
    seen = raycast.light(raycast.view(15.0, 129), lamp)
    shaded = raycast.shade("sphere", 1.0, seen)[0]
    to_lamp = torch.tensor(lamp) - seen.points
    distance = to_lamp.norm(dim=-1)
    gap = torch.linalg.cross(to_lamp, torch.tensor([0.0, 0.8, 0.0]) - seen.points).norm(dim=-1) / distance
    dark, lit = (shaded > 0) & (gap < 0.79), (shaded > 0) & (gap > 0.81)
    assert dark.sum() > 50
    torch.testing.assert_close(shaded[dark], torch.full_like(shaded[dark], 0.4))
    torch.testing.assert_close(shaded[lit], (0.4 + 0.58 * to_lamp[:, 1] / distance)[lit])
    assert raycast.light(seen, lamp) is seen


def test_a_higher_lamp_makes_a_shorter_shadow() -> None:
    poses = torch.tensor([[1.0, 3.0, 0.0, 0.0, height, 3.4, 7.0] for height in (4.0, 6.0, 8.0)])
    floors = cast_poses(poses, 64, 1)[:, 0]
    shadow = ((floors > 0) & (floors < 0.401)).sum((1, 2))
    assert shadow[0] > shadow[1] > shadow[2] > 0


def test_scenes_with_light_and_camera(generator: torch.Generator) -> None:
    vary = ("light_turn", "camera_height", "light_intensity", "object_hue", "camera_distance", "light_height")
    views = {"light_turn": 4}
    data = Scenes("train", size=8, steps=2, vary=vary, shapes=("cube", "cone"), scales=1, orientations=2, views=views,
                  supersampling=1)  # fmt: skip
    assert data.factor_names == ALL
    assert data.factor_sizes == (10, 10, 10, 1, 2, 2, 3, 4, 3, 3, 3)
    indices = torch.randint(len(data), (30,), generator=generator)
    batch = data.batch(indices, torch.arange(30) % 6)
    assert batch["factors"].shape == (30, 3, 11)
    torch.testing.assert_close(data.render(batch["factors"], supersampling=1), batch["frames"], atol=2e-6, rtol=0)
    for k, name in enumerate(vary):
        factors = data.batch(indices, k)["factors"]
        moved = (factors.diff(dim=1).abs().sum((0, 1)) > 0).nonzero().flatten().tolist()
        assert moved == [ALL.index(name)]
    one = Scenes(size=8, steps=2, vary=("camera_height",), shapes=("cube", "cone"), scales=1, supersampling=1)
    assert one.factor_names == (*SCENE_FACTORS, "camera_height")
    item = one[3]
    torch.testing.assert_close(one.render(item["factors"], supersampling=1), item["frames"], atol=2e-6, rtol=0)
    torch.testing.assert_close(item["factors"][:, 6], torch.tensor([2.2, 3.4, 4.6]))
    assert not torch.allclose(item["frames"][0], item["frames"][1])


@pytest.mark.parametrize(
    ("factor", "value", "message"),
    [
        ("light_intensity", 1.5, r"light_intensity must lie in \[0, 1\]"),
        ("camera_distance", 2.0, r"camera_distance must lie in \[4, 9\]"),
        ("camera_height", 0.0, "camera_height must lie"),
        ("light_height", -1.0, "light_height must lie"),
    ],
)
def test_bad_light_and_camera(factor: str, value: float, message: str) -> None:
    factors = USUAL.clone()
    factors[ALL.index(factor)] = value
    with pytest.raises(ValueError, match=message):
        render_scenes(factors, 8)
