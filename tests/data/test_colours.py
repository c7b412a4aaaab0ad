"""Colours against colorsys."""

from __future__ import annotations

import colorsys

import pytest
import torch

from flowfactor.data import colour, hue_to_rgb, shift_hue


def test_hue_to_rgb_agrees_with_colorsys() -> None:
    hue = torch.linspace(-400, 800, 97, dtype=torch.float64)
    for saturation, value in [(1.0, 1.0), (0.4, 0.7), (0.0, 0.5)]:
        expected = [colorsys.hsv_to_rgb((h / 360) % 1, saturation, value) for h in hue.tolist()]
        torch.testing.assert_close(hue_to_rgb(hue, saturation, value), torch.tensor(expected, dtype=torch.float64))


def test_hue_to_rgb_broadcasts_and_takes_numbers() -> None:
    assert hue_to_rgb(120).tolist() == [0.0, 1.0, 0.0]
    mixed = hue_to_rgb(torch.zeros(2, 3), torch.tensor([0.0, 0.5, 1.0]))
    assert mixed.shape == (2, 3, 3)
    assert mixed[1].tolist() == [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5], [1.0, 0.0, 0.0]]


def test_shift_hue_of_a_number_and_of_several(generator: torch.Generator) -> None:
    images = torch.rand(2, 5, 3, 4, 4, generator=generator)
    one = shift_hue(images, 50.0)
    several = shift_hue(images, torch.tensor([0.0, 50.0]))
    assert one.shape == images.shape
    assert several.shape == (2, 5, 2, 3, 4, 4)
    torch.testing.assert_close(several[:, :, 0], images, atol=1e-6, rtol=0)
    torch.testing.assert_close(several[:, :, 1], one)
    torch.testing.assert_close(one.amax(2), images.amax(2))
    torch.testing.assert_close(one.amin(2), images.amin(2), atol=1e-6, rtol=0)


def test_colour_spellings() -> None:
    assert colour("Blue").tolist() == [0.0, 0.0, 1.0]
    assert colour("#ff0080").tolist() == pytest.approx([1.0, 0.0, 128 / 255])
    assert colour((0.1, 0.2, 0.3)).tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("value", ["mauve", "#12345", "#gggggg", (1.0, 2.0, 0.0), (1.0, 1.0), (float("nan"), 0.0, 0.0)])
def test_bad_colours(value) -> None:
    with pytest.raises(ValueError, match="colour"):
        colour(value)


def test_shift_hue_wants_three_channels_and_flat_amounts() -> None:
    with pytest.raises(ValueError, match="needs RGB"):
        shift_hue(torch.rand(2, 1, 4, 4), 10.0)
    with pytest.raises(ValueError, match="degrees"):
        shift_hue(torch.rand(2, 3, 4, 4), torch.zeros(2, 2))
