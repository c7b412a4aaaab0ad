"""Picture files: their headers and pixels, upright, without transparency, grey or in colour, 8 or 16 bits deep."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowfactor.errors import require

PICTURES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Endings of the files that count as pictures."""

Kind = Literal["L", "LA", "RGB", "RGBA", "I;16"]

# By content, whatever a file is called: Pillow would run other programs for some of its other formats.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"RGB", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBX"}
_DEEP = {"I;16", "I;16L", "I;16B", "I;16N"}
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)

# What Pillow raises for damaged files, besides OSError: the places in its readers that trust a file are many.
_DAMAGE = (
    *(SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, AssertionError),
    *(MemoryError, NotImplementedError, RuntimeError, struct.error, zlib.error),
)


def read_header(file: Path) -> tuple[tuple[int, int], Kind]:
    """Reads the header of a picture.

    Args:
        file: The picture.

    Returns:
        (width, height) in pixels, upright as EXIF says; and ``"L"`` for grey, ``"RGB"`` for colour, each with ``"A"``
        where parts may be transparent, or ``"I;16"`` for 16-bit grey.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If the file is missing or may not be read.
        ValueError: If it is damaged, holds several pictures, or its pixels are of another kind.
    """
    with opened_picture(file) as picture:
        if frames_of(picture) > 1:
            raise ValueError(
                f"{file} holds {frames_of(picture)} pictures, an animation or several pages, where one is expected: as "
                ".gif, .tif or .webp it would be a sequence of its own, in the place of a sequence's folder; if one of "
                "its pictures is meant, save that one alone"
            )
        return size_of(picture), kind_of(picture, file)


def decode_picture(file: Path, mode: str, background: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Reads a picture, upright, on a background.

    Args:
        file: The picture.
        mode: ``"L"`` for one grey channel, ``"RGB"`` for three, ``"I;16"`` for one 16-bit grey channel.
        background: Colour behind transparent parts.

    Returns:
        Pixels [C, H, W]: uint8, or float32 in [0, 1] for 16 bits.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If the file is missing or may not be read.
        ValueError: If it is damaged.
    """
    with opened_picture(file) as picture:
        return pixels_of(picture, mode, background)


@contextmanager
def opened_picture(file: Path) -> Iterator[Any]:
    """Opens a picture with Pillow; what goes wrong in the block is reported with the file's name.

    Args:
        file: The picture.

    Yields:
        Pillow's image.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If the file is missing or may not be read.
        ValueError: If it is damaged.
    """
    image = require("PIL.Image", extra="plot")
    try:
        # From a stream: of a turned TIFF that it opens by name and maps, Pillow (13) gives wrong pixels.
        with file.open("rb") as stream, image.open(stream, formats=_FORMATS) as picture:
            yield picture
    except (OSError, *_DAMAGE, image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # missing, forbidden, ...: the system says it, with the name
        if type(error) is ValueError and str(file) in str(error):
            raise  # one of ours
        told = str(error) or type(error).__name__
        raise ValueError(f"{file} cannot be read as a picture ({told}): save it again, or leave it out") from error


def frames_of(picture: Any) -> int:
    """Gives the number of frames or pages; pictures of cameras that carry previews count as one."""
    if picture.format == "MPO" or not getattr(picture, "is_animated", False):
        return 1
    return int(picture.n_frames)


def size_of(picture: Any) -> tuple[int, int]:
    """Gives (width, height) of a Pillow image as EXIF turns it."""
    width, height = picture.size
    # Pillow turns a TIFF itself, its size included.
    turned = picture.format != "TIFF" and picture.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (height, width) if turned else (width, height)


def kind_of(picture: Any, file: Path) -> Kind:
    """Gives the kind of pixels of a Pillow image; raises ValueError for those that are not read."""
    mode, clear = picture.mode, picture.has_transparency_data
    if mode in _DEEP or (mode == "I" and picture.format == "PNG"):
        if clear:
            raise ValueError(f"{file} has 16-bit pixels and transparency: save it without one of the two")
        return "I;16"
    if mode in _GREY:
        return "LA" if clear else "L"
    if mode in _COLOUR:
        return "RGBA" if clear else "RGB"
    raise ValueError(
        f"{file} has pixels of mode {mode!r}: grey of 8 or 16 bits and colour of 8 are read; save it as one of these, or "
        "its values, between 0 and 1, as .npy"
    )


def pixels_of(picture: Any, mode: str, background: tuple[int, int, int]) -> Tensor:
    """Gives the pixels of a Pillow image; see `decode_picture`."""
    image, operations = require("PIL.Image", extra="plot"), require("PIL.ImageOps", extra="plot")
    if picture.has_transparency_data:
        canvas = image.new("RGBA", picture.size, (*background, 255))
        # What is transparent may hold any colour, so it is covered before anything else is made of it.
        flat = image.alpha_composite(canvas, picture.convert("RGBA"))
        flat.info, flat._exif = {}, None
        orientation = picture.getexif().get(_ORIENTATION)
        if orientation is not None:
            flat.getexif()[_ORIENTATION] = orientation
        picture = flat
    picture = operations.exif_transpose(picture)
    if mode == "I;16":
        return torch.from_numpy(np.array(picture).astype(np.float32) / 65535)[None]
    if picture.mode in _DEEP or picture.mode == "I":  # Pillow would cut their values off at 255
        raise ValueError("it has 16-bit pixels, where 8-bit ones are expected")
    pixels = np.array(picture.convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def parse_colour(colour: Any) -> tuple[int, int, int]:
    """Reads a colour.

    Args:
        colour: A name or code that Pillow knows (``"white"``, ``"#204060"``), a grey from 0 to 255, or (r, g, b).

    Returns:
        (r, g, b), each from 0 to 255.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> parse_colour("white"), parse_colour([0, 128, 255])
        ((255, 255, 255), (0, 128, 255))
    """
    parts: Any = colour
    if isinstance(colour, str):
        if colour.lower() == "black":
            return 0, 0, 0
        try:
            parts = require("PIL.ImageColor", extra="plot").getrgb(colour)[:3]
        except ValueError:
            parts = ()
    elif isinstance(colour, int) and not isinstance(colour, bool):
        parts = (colour,) * 3
    parts = tuple(parts) if isinstance(parts, (tuple, list)) else ()
    if len(parts) != 3 or any(isinstance(p, bool) or not isinstance(p, int) or not 0 <= p <= 255 for p in parts):
        raise ValueError(
            "background is a colour's name ('black', 'white', '#204060'), a grey from 0 to 255, or (r, g, b), "
            f"got {colour!r}"
        )
    return parts
