"""Transformations against independent oracles."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from torch import Tensor

from flowfactor.data import Compose, Geometric, Hue, Perspective, Rotate, Scale, Transform, Translate, colour

ALL = [
    (Scale(), [0.5, 1.0, 1.8]),
    (Rotate(), [0.0, 33.0, 250.0]),
    (Translate(0.5, -1.0), [0.0, 3.0]),
    (Perspective("vertical"), [0.0, 50.0, -70.0]),
    (Perspective("horizontal", 1.5), [0.0, 50.0, -70.0]),
    (Hue(), [0.0, 20.0, 400.0, -10.0]),
    (Compose((Scale(), 1.0, 1.5), (Rotate(), 0.0, 90.0), (Hue(), 0.0, 100.0)), [0.0, 0.5, 1.0]),
    (Compose((Hue(), 0.0, 100.0)), [0.0, 1.0]),
    (Compose((Rotate(), 0.0, 90.0), name="turn"), [0.0, 1.0]),
]


@pytest.mark.parametrize(("transform", "amounts"), ALL, ids=lambda value: str(value))
def test_contract(transform: Transform, amounts: list[float], generator: torch.Generator) -> None:
    images = torch.rand(3, 3, 12, 16, generator=generator)
    before = images.clone()
    frames = transform(images, amounts)
    assert frames.shape == (3, len(amounts), 3, 12, 16)
    assert frames.dtype == torch.float32
    assert bool(((frames >= 0) & (frames <= 1)).all())
    assert torch.equal(frames, transform(images, torch.tensor(amounts, dtype=torch.float64)))
    assert torch.equal(images, before)
    # Neither the rest of the batch nor the other amounts have a say.
    torch.testing.assert_close(transform(images[1:2], amounts[-1:])[0, 0], frames[1, -1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("transform", "amounts"), ALL, ids=lambda value: str(value))
@pytest.mark.parametrize("name", ["red", "#3366cc"])
def test_tint_is_the_colour_product(
    transform: Transform, amounts: list[float], name: str, generator: torch.Generator
) -> None:
    grey = torch.rand(2, 1, 9, 9, generator=generator)
    tinted = transform.tint(grey, amounts, colour(name))
    whole = transform(grey * colour(name)[:, None, None], amounts)
    assert tinted.shape == (2, len(amounts), 3, 9, 9)
    torch.testing.assert_close(tinted, whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 9)])
def test_quarter_turns_are_rot90(quarters: int, size: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.rand(2, 3, *size, generator=generator)
    turned = Rotate()(images, [90.0 * quarters])[:, 0]
    torch.testing.assert_close(turned, torch.rot90(images, quarters, dims=(-2, -1)), atol=1e-5, rtol=0)


def test_half_turn_of_a_picture_that_is_not_square(generator: torch.Generator) -> None:
    images = torch.rand(2, 1, 6, 10, generator=generator)
    torch.testing.assert_close(Rotate()(images, [180.0])[:, 0], images.flip(-1, -2), atol=1e-5, rtol=0)


def test_rotation_is_rigid_in_pictures_that_are_not_square() -> None:
    """A point 6 pixels right of the centre is 6 pixels above it after 90 degrees, however wide the picture."""
    image = torch.zeros(1, 1, 21, 31)
    image[..., 10, 21] = 1
    turned = Rotate()(image, [90.0])[0, 0, 0]
    assert turned[4, 15].item() == pytest.approx(1.0, abs=1e-4)


def disc(radius: float, size: int = 65) -> Tensor:
    x = torch.arange(size) - (size - 1) / 2
    return (radius + 0.5 - torch.hypot(x[:, None], x[None, :])).clamp(0, 1)[None, None]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4, 1.8])
def test_scale_multiplies_the_radius_of_a_disc(factor: float) -> None:
    area = Scale()(disc(14.0), [factor]).sum().item()
    assert math.sqrt(area / math.pi) == pytest.approx(14.0 * factor, rel=0.01)


def test_scale_by_two_reads_between_pixels() -> None:
    """By hand: pixels at 0.5 and 1.5 on both sides of the middle read, at twice the size, at 0.25 and 0.75."""
    row = torch.tensor([0.0, 0.4, 0.8, 0.2])[None, None, None]
    expected = [0.75 * 0.4, 0.75 * 0.4 + 0.25 * 0.8, 0.25 * 0.4 + 0.75 * 0.8, 0.75 * 0.8 + 0.25 * 0.2]
    torch.testing.assert_close(
        Scale()(row.expand(1, 1, 4, 4), [2.0])[0, 0, 0, 1], torch.tensor(expected), atol=1e-6, rtol=0
    )


def test_translation_moves_whole_pixels_and_brings_in_black(generator: torch.Generator) -> None:
    images = torch.rand(2, 2, 7, 9, generator=generator)
    moved = Translate(2.0, -1.0)(images, [1.0])[:, 0]
    torch.testing.assert_close(moved[..., :6, 2:], images[..., 1:, :7], atol=1e-5, rtol=0)
    assert moved[..., 6, :].abs().max() < 1e-5
    assert moved[..., :2].abs().max() < 1e-5


@pytest.mark.parametrize(("axis", "sign"), [("vertical", 1), ("vertical", -1), ("horizontal", 1), ("horizontal", -1)])
def test_perspective_puts_points_where_a_pinhole_camera_sees_them(axis: str, sign: int) -> None:
    """A bright point is projected by hand; its centre of mass in the picture must be there."""
    size, distance, angle, at = 101, 2.5, math.radians(40.0 * sign), (24.0, -18.0)  # at: right, down, from the centre
    image = torch.zeros(1, 1, size, size)
    x, y = (torch.arange(size) - 50.0 for _ in range(2))
    image[0, 0] = (3.5 - torch.hypot(x[None, :] - at[0], y[:, None] - at[1])).clamp(0, 1)
    seen = Perspective(axis, distance)(image, [40.0 * sign])[0, 0, 0]
    right, down = at
    if axis == "vertical":  # the right edge goes away
        point = (right * math.cos(angle), down, right * math.sin(angle))
    else:  # the top edge goes away
        point = (right, down * math.cos(angle), -down * math.sin(angle))
    camera = distance * size / 2
    expected = [camera * p / (camera + point[2]) for p in point[:2]]
    mass = seen.sum()
    centre = [(seen * x[None, :]).sum() / mass, (seen * y[:, None]).sum() / mass]
    assert [c.item() for c in centre] == pytest.approx(expected, abs=0.15)


def test_perspective_shows_nothing_from_behind_the_camera() -> None:
    seen = Perspective("vertical", 1.01)(torch.ones(1, 1, 40, 40), [89.0])
    assert seen.mean() < 0.6
    assert bool(seen.isfinite().all())


@pytest.mark.parametrize("thirds", [0, 1, 2, 3, -1])
def test_hue_by_120_degrees_cycles_the_channels(thirds: int, generator: torch.Generator) -> None:
    images = torch.rand(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    shifted = Hue()(images, [120.0 * thirds])[:, 0]
    torch.testing.assert_close(shifted, images.roll(thirds, dims=1))


def test_hue_agrees_with_colorsys(generator: torch.Generator) -> None:
    images = torch.rand(1, 3, 6, 6, generator=generator, dtype=torch.float64)
    images[..., 0, :3] = torch.tensor([0.0, 0.3, 1.0])  # greys have no hue
    amounts = [0.0, 17.0, 90.0, 200.0, 359.0]
    shifted = Hue()(images, amounts)[0]
    for s, amount in enumerate(amounts):
        for y in range(6):
            for x in range(6):
                hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, y, x].tolist())
                expected = colorsys.hsv_to_rgb((hue + amount / 360) % 1, saturation, value)
                assert shifted[s, :, y, x].tolist() == pytest.approx(expected, abs=1e-12)


def test_red_digits_get_exact_colours(generator: torch.Generator) -> None:
    grey = torch.rand(2, 1, 4, 4, generator=generator)
    frames = Hue().tint(grey, [0.0, 60.0, 120.0, 20.0], colour("red"))
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1 / 3, 0]])
    torch.testing.assert_close(frames, grey[:, None] * expected[:, :, None, None], atol=1e-7, rtol=0)


def test_compose_interpolates_once_and_in_order(generator: torch.Generator) -> None:
    """Two eighth turns in one are a quarter turn exactly; one after the other they would blur."""
    images = torch.rand(2, 1, 9, 9, generator=generator)
    both = Compose((Rotate(), 0.0, 45.0), (Rotate(), 0.0, 45.0))
    torch.testing.assert_close(both(images, [1.0])[:, 0], torch.rot90(images, 1, (-2, -1)), atol=1e-5, rtol=0)
    moved_then_turned = Compose((Translate(), 0.0, 2.0), (Rotate(), 0.0, 90.0))(images, [1.0])[:, 0]
    expected = torch.rot90(Translate()(images, [2.0])[:, 0], 1, (-2, -1))
    torch.testing.assert_close(moved_then_turned, expected, atol=1e-5, rtol=0)


def test_compose_reaches_its_parts_amounts(generator: torch.Generator) -> None:
    images = torch.rand(2, 3, 9, 9, generator=generator)
    both = Compose((Rotate(), 10.0, 90.0), (Hue(), 20.0, 100.0))
    assert both.name == "rotation+hue"
    expected = Hue()(Rotate()(images, [50.0])[:, 0], [60.0])
    torch.testing.assert_close(both(images, [0.5]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scale()(torch.rand(1, 1, 4, 4), [0.0]), "above 0"),
        (lambda: Perspective()(torch.rand(1, 1, 4, 4), [90.0]), "between -90 and 90"),
        (lambda: Perspective("diagonal"), "'vertical' or 'horizontal'"),
        (lambda: Perspective(distance=1.0), "distance must be above 1"),
        (lambda: Hue()(torch.rand(1, 1, 4, 4), [0.0]), "needs RGB"),
        (lambda: Rotate()(torch.rand(1, 4, 4), [0.0]), r"\[B, C, H, W\], got torch.float32 \[1, 4, 4\]"),
        (lambda: Rotate()(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [0.0]), "floating-point"),
        (lambda: Rotate()(torch.rand(1, 1, 4, 4), [math.nan]), "finite"),
        (lambda: Rotate()(torch.rand(1, 1, 4, 4), torch.zeros(2, 2)), "amounts must be"),
        (lambda: Compose(), "at least one part"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_compose_takes_triples_only() -> None:
    with pytest.raises(TypeError, match=r"\(transformation, start, end\)"):
        Compose(Rotate())


def test_a_homography_of_ones_own(generator: torch.Generator) -> None:
    class Mirror(Geometric):
        name = "mirror"

        def matrices(self, amounts: Tensor, height: int, width: int) -> Tensor:
            one = torch.ones_like(amounts)
            return torch.diag_embed(torch.stack([1 - 2 * amounts, one, one], dim=-1))

    images = torch.rand(2, 1, 5, 8, generator=generator)
    torch.testing.assert_close(Mirror()(images, [1.0])[:, 0], images.flip(-1), atol=1e-6, rtol=0)


def test_warped_images_do_not_depend_on_the_number_of_threads() -> None:
    images, amounts = torch.rand(6, 1, 9, 12), torch.linspace(0, 80, 4)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(Rotate()(images, amounts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
