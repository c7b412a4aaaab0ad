"""Pictures as cameras and programs write them: turned, transparent, deep, of many sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from film_files import noise, write_pages, write_pictures
from PIL import Image, ImageOps

from flowfactor.data import Sequences
from flowfactor.data.readers.pictures import decode_picture

SMOOTH = np.add.outer(np.arange(16) * 10, np.arange(24) * 2).astype(np.uint8)


def save(folder: Path, *pictures: Image.Image, ending: str = ".png", **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for step, picture in enumerate(pictures):
        picture.save(folder / f"{step}{ending}", **options)
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".webp"])
def test_pictures_are_turned_upright_as_exif_says(tmp_path: Path, orientation: int, ending: str) -> None:
    picture = Image.fromarray(SMOOTH)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a", picture, picture, ending=ending, exif=exif)
    upright = picture.copy()
    upright.getexif()[0x0112] = orientation
    expected = torch.tensor(np.array(ImageOps.exif_transpose(upright)))
    data = Sequences(tmp_path)
    assert data.image_shape[1:] == tuple(expected.shape) == ((16, 24) if orientation < 5 else (24, 16))
    assert (data.frames[0, 1, 0].int() - expected.int()).abs().max() < 12  # of a JPEG


def test_turned_and_upright_pictures_of_one_size_belong_together(tmp_path: Path) -> None:
    lying = Image.fromarray(SMOOTH).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    save(tmp_path / "a", Image.fromarray(SMOOTH), ending=".png")
    lying.save(tmp_path / "a" / "1.png", exif=exif)
    frames = Sequences(tmp_path).frames[0]
    assert torch.equal(frames[0], frames[1])


def transparent(mode: str) -> Image.Image:
    """Hidden: a bright picture that is transparent in its left half."""
    alpha = np.repeat([[0, 255]], 16, 0).repeat(12, 1).astype(np.uint8)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(np.full((16, 24), 200, np.uint8)), Image.fromarray(alpha)])
    rgba = Image.merge("RGBA", [*Image.fromarray(np.full((16, 24, 3), 200, np.uint8)).split(), Image.fromarray(alpha)])
    return rgba if mode == "RGBA" else rgba.convert("RGB").quantize(2)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_the_background(tmp_path: Path, mode: str) -> None:
    save(tmp_path / "a", transparent(mode), transparent(mode))
    for background, expected in (("black", 0), ("white", 255), (77, 77), ([9, 9, 9], 9)):
        frames = Sequences(tmp_path, background=background).frames[0, 0]
        assert frames.shape[0] == (1 if mode == "LA" else 3)
        assert frames[..., :12].unique().tolist() == [expected] and frames[..., 12:].unique().tolist() == [200]
    red = Sequences(tmp_path, background="red").frames[0, 0]
    assert red[:, 0, 0].tolist() == [255, 0, 0] and red[:, 0, -1].tolist() == [200] * 3


def test_a_transparent_entry_of_a_palette_shows_the_background(tmp_path: Path) -> None:
    picture = Image.fromarray(np.repeat([[0, 1]], 16, 0).repeat(12, 1).astype(np.uint8), "P")
    picture.putpalette([200, 10, 10, 20, 30, 40])
    save(tmp_path / "a", picture, picture, transparency=0)
    frames = Sequences(tmp_path).frames[0, 0]
    assert frames[:, 0, 0].tolist() == [0, 0, 0] and frames[:, 0, -1].tolist() == [20, 30, 40]


@pytest.mark.parametrize("background", ["reddish", 256, [1, 2], (0, 0, -1), None, True, 0.5])
def test_backgrounds_that_are_none_are_told(background: object) -> None:
    with pytest.raises(ValueError, match="background is a colour's name"):
        Sequences(torch.zeros(2, 2, 4, 4), background=background)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bit_pictures_keep_their_depth(tmp_path: Path, ending: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (3, 8, 12)).astype(np.uint16)
    write_pictures(tmp_path / "a", deep, ending)
    frames = Sequences(tmp_path).frames
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames[0, :, 0], torch.tensor(deep / 65535, dtype=torch.float32))
    write_pictures(tmp_path / "b", noise(3))  # 8 and 16 bits mean the same light
    torch.testing.assert_close(Sequences(tmp_path).frames[1, :, 0], torch.tensor(noise(3)) / 255)


@pytest.mark.parametrize("ending", [".gif", ".tif", ".webp", ".png"])
def test_a_file_of_several_pictures_is_refused_among_single_ones(tmp_path: Path, ending: str) -> None:
    folder = write_pictures(tmp_path / "a", noise(3))
    write_pages(folder / f"film{ending}", noise(4, 1))
    with pytest.raises(ValueError, match=rf"film{ending}"):
        Sequences(tmp_path)


def test_a_jpeg_with_a_preview_is_one_picture(tmp_path: Path) -> None:
    first, second = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[:8, :8])
    (tmp_path / "a").mkdir()
    for name in ("0.jpg", "1.jpg"):
        first.save(tmp_path / "a" / name, "MPO", save_all=True, append_images=[second])
    assert Sequences(tmp_path).frames.shape == (1, 2, 1, 16, 24)


def test_pictures_of_other_formats_are_not_opened_by_their_ending(tmp_path: Path) -> None:
    """Pillow hands PostScript to another program, whatever the file is called."""
    folder = write_pictures(tmp_path / "a", noise(2))
    Image.fromarray(noise(1, 0, (8, 12, 3))[0]).save(folder / "1.png", "EPS")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        Sequences(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"])
def test_damaged_pictures_are_told_by_name(tmp_path: Path, ending: str) -> None:
    folder = write_pictures(tmp_path / "a", noise(2, 0, (32, 32)), ending)
    file, whole = folder / f"1{ending}", (folder / f"1{ending}").read_bytes()
    random = np.random.default_rng(0)
    for attempt in range(40):
        damaged = bytearray(whole[: random.integers(len(whole))] if attempt % 2 else whole)
        for _ in range(5):
            if damaged:
                damaged[random.integers(len(damaged))] = random.integers(256)
        file.write_bytes(damaged)
        try:
            Sequences(tmp_path)
        except ValueError as error:
            assert str(file) in str(error), error


def test_sixteen_bits_are_not_cut_off_where_eight_are_expected(tmp_path: Path) -> None:
    write_pictures(tmp_path, np.full((1, 8, 12), 40000, np.uint16))
    for mode in ("L", "RGB"):
        with pytest.raises(ValueError, match=r"0\.png .*16-bit pixels, where 8-bit ones are expected"):
            decode_picture(tmp_path / "0.png", mode)
