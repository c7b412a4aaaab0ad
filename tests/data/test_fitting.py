"""Frames of other sizes and numbers of channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from film_files import noise, write_array, write_pictures

import flowfactor as ff
from flowfactor.data import Sequences


def test_sizes_that_no_encoder_takes_can_be_mended() -> None:
    frames = torch.rand(2, 3, 1, 30, 45)
    with pytest.raises(ValueError, match=r"divisible by 4.*size="):
        ff.models.build_vae(Sequences(frames).image_shape, 1, 2)
    for fit in ("pad", "crop", "resize"):
        data = Sequences(frames, size=(28, 44) if fit == "crop" else (32, 48), fit=fit)
        assert ff.models.build_vae(data.image_shape, 1, 2) is not None


def test_padding_keeps_the_pixels_and_shows_the_background() -> None:
    frames = torch.tensor(noise(6, 0, (5, 7))).view(2, 3, 5, 7)
    data = Sequences(frames, size=(8, 9), fit="pad", background=50)
    assert torch.equal(data.frames[:, :, 0, 1:6, 1:8], frames)
    assert int((data.frames != 50).sum()) <= frames.numel()
    assert data.frames[:, :, :, 0].unique().tolist() == [50] and data.frames[..., 8].unique().tolist() == [50]
    real = Sequences(frames / 255, size=(8, 9), fit="pad", background="white").frames
    assert float(real[0, 0, 0, 0, 0]) == 1


def test_cropping_keeps_the_middle() -> None:
    frames = torch.tensor(noise(6, 0, (9, 7))).view(2, 3, 9, 7)
    assert torch.equal(Sequences(frames, size=(4, 6), fit="crop").frames[:, :, 0], frames[:, :, 2:6, :6])


def test_resizing_keeps_the_light() -> None:
    ramp = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
    for frames in (ramp, (ramp * 255).round().to(torch.uint8)):
        small = Sequences(frames, size=16).batch([0])["frames"]
        assert small.shape[-2:] == (16, 16)
        torch.testing.assert_close(
            small[0, 0, 0, 0, 2:-2], torch.linspace(0, 1, 64).view(16, 4).mean(1)[2:-2], atol=0.01, rtol=0
        )


def test_pictures_of_many_sizes_are_brought_to_one(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", noise(2, 0, (8, 12)))
    write_pictures(tmp_path / "b", noise(2, 1, (20, 10, 3)))
    write_array(tmp_path / "c.npy", noise(2, 2, (7, 7)))
    with pytest.raises(ValueError, match=r"b.0.png has 10 x 20 pixels, but .*a.0.png 12 x 8: .*size="):
        Sequences(tmp_path)
    for fit, size in (("resize", 8), ("pad", 20), ("crop", 4)):
        data = Sequences(tmp_path, size=size, fit=fit)
        assert data.frames.shape == (3, 2, 3, size, size)
    assert torch.equal(data.frames[0, 0, 0], torch.tensor(noise(2, 0, (8, 12))[0, 2:6, 4:8]))


def test_the_option_of_channels(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", noise(2))
    assert Sequences(tmp_path, channels=3).image_shape == (3, 8, 12)
    write_pictures(tmp_path / "b", noise(2, 0, (8, 12, 3)))
    assert Sequences(tmp_path).image_shape == (3, 8, 12)
    grey = Sequences(tmp_path, channels=1).frames
    expected = noise(2, 0, (8, 12, 3))[0] @ np.array([0.299, 0.587, 0.114])
    assert grey.shape[2] == 1 and np.abs(grey[1, 0, 0].numpy() - expected).max() <= 1
    with pytest.raises(ValueError, match="2 channels, expected 3"):
        Sequences(np.zeros((2, 2, 2, 8, 8), np.uint8), channels=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (4, 12), "fit": "pad"}, r"has 12 x 8 pixels, more than size=\[4, 12\]"),
        ({"size": (8, 16), "fit": "crop"}, r"has 12 x 8 pixels, fewer than size=\[8, 16\]"),
        ({"size": 16, "fit": "pad", "background": "red"}, "give channels=3"),
        ({"size": 16, "fit": "stretch"}, "fit is one of pad, crop, resize"),
        ({"size": (1, 2, 3)}, "one number or"),
        ({"size": 0}, "size must be at least 1"),
        ({"channels": 2}, "channels is 1"),
    ],
)
def test_sizes_that_cannot_be_are_told(tmp_path: Path, settings: dict, message: str) -> None:
    write_pictures(tmp_path / "a", noise(2))
    for source in (tmp_path, noise(4).reshape(2, 2, 8, 12)):
        with pytest.raises(ValueError, match=message):
            Sequences(source, **settings)
