"""Folders of pictures: finding the sequences in them, and reading them."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowfactor.errors import require

PICTURES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Endings of the files that count as pictures."""

_BROKEN = (ArithmeticError, LookupError, MemoryError, OSError, SyntaxError, TypeError, ValueError, struct.error)
"""What Pillow raises about damaged pictures, SyntaxError for a broken PNG among it."""

_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV"}


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sorts names as people do: frame2 before frame10.

    Args:
        path: A file or folder; its name counts.

    Returns:
        A key for `sorted`.

    Example:
        >>> [path.name for path in sorted(map(Path, ["f10.png", "f9.png"]), key=natural_key)]
        ['f9.png', 'f10.png']
    """
    parts = re.split(r"(\d+)", path.name.lower())
    # Numbers and texts alternate, so that the same place always compares like with like; the name itself breaks ties.
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts] + [(0, path.name)]


def find_sequences(root: str | Path) -> tuple[list[list[Path]], list[int] | None, tuple[str, ...]]:
    """Finds the sequences in a folder.

    Args:
        root: ``root/<sequence>/<frame>.png``, or with one more level ``root/<class>/<sequence>/<frame>.png``.

    Returns:
        The files of each sequence in order, each sequence's class or None without classes, and the classes' names.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it does not look like either.
    """
    root = Path(root).expanduser()
    folders = _folders(root)
    if not folders:
        held = "pictures, but no folders" if _pictures(root) else "no folders"
        raise ValueError(f"{root} holds {held}: expected a sub-folder of pictures for each sequence")
    with_pictures = [folder for folder in folders if _pictures(folder)]
    if len(with_pictures) == len(folders):
        return [_pictures(folder) for folder in folders], None, ()
    if with_pictures:
        other = next(folder for folder in folders if folder not in with_pictures)
        raise ValueError(
            f"{with_pictures[0]} holds pictures, but {other} does not: all sub-folders must be of one kind"
        )
    sequences, classes = [], []
    for k, folder in enumerate(folders):
        for sequence in _folders(folder):
            if not _pictures(sequence):
                raise ValueError(f"{sequence} holds no pictures ({', '.join(PICTURES)})")
            sequences.append(_pictures(sequence))
            classes.append(k)
        if k not in classes:
            raise ValueError(f"{folder} holds neither pictures ({', '.join(PICTURES)}) nor folders of them")
    return sequences, classes, tuple(folder.name for folder in folders)


def list_frames(folder: str | Path) -> list[Path]:
    """Lists the pictures of one sequence's folder, in natural order.

    Args:
        folder: The folder.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no pictures.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    files = _pictures(folder)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return files


def read_sequences(sequences: Sequence[Sequence[Path]]) -> Tensor:
    """Reads sequences of pictures of equal number and size.

    Args:
        sequences: The files of each sequence.

    Returns:
        Frames [N, T+1, C, H, W], uint8: one channel if every picture is grey, else three.

    Raises:
        ImportError: If Pillow is not installed.
        ValueError: If the numbers or sizes differ, or a picture cannot be read.
    """
    first = sequences[0]
    for files in sequences:
        if len(files) != len(first):
            raise ValueError(
                f"{files[0].parent} holds {len(files)} frames, but {first[0].parent} {len(first)}: "
                "all sequences must be equally long"
            )
    # The headers first: what does not fit is told before gigabytes are decoded.
    headers = [[read_header(file) for file in files] for files in sequences]
    size = headers[0][0][0]
    for files, header in zip(sequences, headers, strict=True):
        for file, (own, _) in zip(files, header, strict=True):
            if own != size:
                raise ValueError(
                    f"{file} has {own[0]} x {own[1]} pixels, but {first[0]} {size[0]} x {size[1]}: "
                    "all pictures must be of one size"
                )
    grey = all(mode in _GREY for header in headers for _, mode in header)
    frames = torch.empty(len(sequences), len(first), 1 if grey else 3, size[1], size[0], dtype=torch.uint8)
    for n, files in enumerate(sequences):
        for step, file in enumerate(files):
            frames[n, step] = decode_picture(file, "L" if grey else "RGB")
    return frames


def read_header(file: Path) -> tuple[tuple[int, int], str]:
    """Reads the header of a picture.

    Args:
        file: The picture.

    Returns:
        (width, height) in pixels, and Pillow's name of the kind of pixels.

    Raises:
        ImportError: If Pillow is not installed.
        ValueError: If it cannot be read, or its pixels are neither grey nor colour.
    """
    image = require("PIL.Image", extra="plot")
    try:
        with image.open(file) as picture:
            size, mode = picture.size, picture.mode
    except (*_BROKEN, image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error
    if mode not in _GREY | _COLOUR:
        raise ValueError(f"{file} has pixels of mode {mode!r}: only 8-bit grey and colour pictures are read")
    return size, mode


def decode_picture(file: Path, mode: str) -> Tensor:
    """Reads a picture.

    Args:
        file: The picture.
        mode: ``"L"`` for one grey channel, ``"RGB"`` for three.

    Returns:
        Pixels [C, H, W], uint8.

    Raises:
        ImportError: If Pillow is not installed.
        ValueError: If it cannot be read.
    """
    image = require("PIL.Image", extra="plot")
    try:
        with image.open(file) as picture:
            pixels = np.array(picture.convert(mode))
    except (*_BROKEN, image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural_key)


def _pictures(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
    return sorted(files, key=natural_key)
