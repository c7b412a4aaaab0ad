"""What holds the frames of a sequence: a folder of pictures, a file of several pictures, an array, a video."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfactor.data.arrays import check_axes, in_order, pictures_tensor
from flowfactor.data.checks import check_range
from flowfactor.data.fitting import Look
from flowfactor.data.readers.arrayfiles import open_array
from flowfactor.data.readers.pictures import (
    PICTURES,
    decode_picture,
    frames_of,
    kind_of,
    opened_picture,
    pixels_of,
    read_header,
    size_of,
)
from flowfactor.errors import require

ARRAYS: tuple[str, ...] = (".npy", ".npz", ".h5", ".hdf5")
"""Endings of files of arrays."""
VIDEOS: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ogv", ".flv")
"""Endings of videos."""

_AT_ONCE = 32  # frames that are decoded before they are brought to their size


@dataclass(frozen=True)
class Header:
    """What is known of a film before its frames are read.

    Attributes:
        size: (height, width), or None if only reading tells.
        frames: Number of frames, or None if only reading tells.
        channels: 1, 3, or an array's number of channels.
        is_deep: Whether it is read as floating point.
        first: What a message names where it does not fit: the file or picture that it was read from.
    """

    size: tuple[int, int] | None
    frames: int | None
    channels: int | None
    is_deep: bool
    first: str


class Film(ABC):
    """Frames in a row; `path` is the file or folder they lie in.

    Attributes:
        path: The file or folder; for an array in memory, a name for messages.
        sequences: Number of sequences of equal length in it, one after another.
    """

    path: Path
    sequences: int = 1

    @abstractmethod
    def header(self, look: Look) -> Header:
        """Reads what can be known before the frames are read, and checks it."""

    @abstractmethod
    def chunks(self, look: Look, channels: int | None) -> Iterator[Tensor]:
        """Yields the frames [n, C, H, W], some at a time, in their own size; pictures with 1 or 3 `channels`."""


class Folder(Film):
    """A folder of pictures, one a frame.

    Args:
        path: The folder.
        files: The pictures in order.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, list(files)

    def header(self, look: Look) -> Header:
        """Reads the header of every picture."""
        headers = [read_header(file) for file in self.files]
        (width, height), _ = headers[0]
        for file, (size, _) in zip(self.files, headers, strict=True):
            if look.size is None and size != (width, height):
                raise ValueError(
                    f"{file} has {size[0]} x {size[1]} pixels, but {self.files[0].name} next to it {width} x {height}: "
                    "bring all pictures to one size by size=, with fit='pad', 'crop' or 'resize'"
                )
        kinds = {kind for _, kind in headers}
        self._is_deep = "I;16" in kinds
        return Header((height, width), len(self.files), _channels(kinds, look), self._is_deep, str(self.files[0]))

    def chunks(self, look: Look, channels: int | None) -> Iterator[Tensor]:
        """Decodes one picture at a time."""
        for file in self.files:
            deep = self._is_deep and read_header(file)[1] == "I;16"
            yield decode_picture(file, "I;16" if deep else "L" if channels == 1 else "RGB", look.background)[None]


class Pages(Film):
    """A file of several pictures: an animation, or the pages of a TIFF.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def header(self, look: Look) -> Header:
        """Looks at every page."""
        with opened_picture(self.path) as picture:
            kinds, size = set(), size_of(picture)
            for page in range(frames_of(picture)):
                picture.seek(page)
                kinds.add(kind_of(picture, self.path))
                if size_of(picture) != size and look.size is None:
                    raise ValueError(
                        f"page {page} of {self.path} has {size_of(picture)[0]} x {size_of(picture)[1]} pixels, but the "
                        f"first {size[0]} x {size[1]}: bring all to one size by size="
                    )
            self._is_deep = "I;16" in kinds
            self._count = frames_of(picture)
            return Header((size[1], size[0]), self._count, _channels(kinds, look), self._is_deep, str(self.path))

    def chunks(self, look: Look, channels: int | None) -> Iterator[Tensor]:
        """Decodes one page at a time."""
        with opened_picture(self.path) as picture:
            for page in range(self._count):
                picture.seek(page)
                deep = kind_of(picture, self.path) == "I;16"
                yield pixels_of(picture, "I;16" if deep else "L" if channels == 1 else "RGB", look.background)[None]


class ArrayFilm(Film):
    """Frames in an array, in a file or in memory.

    Args:
        path: The file; for an array in memory, a name for messages.
        array: The array in memory, or None to read the file.
        axes: Its layout, from `parse_layout`, or None to take it by the number of its axes.
        is_cut: Whether its sequences are cut into windows.
    """

    def __init__(
        self, path: Path, array: Any = None, *, axes: tuple[str, ...] | None = None, is_cut: bool = False
    ) -> None:
        self.path, self._array, self._axes, self._is_cut = path, array, axes, is_cut

    def opened(self) -> Any:
        """Gives the frames [N, T, C, H, W], in a file that is mapped where it can be."""
        array = open_array(self.path) if self._array is None else self._array
        axes = self._axes
        if axes is None:
            axes = {3: ("t", "h", "w"), 4: ("t", "c", "h", "w")}.get(array.ndim)
            if axes is None:
                raise ValueError(
                    f"{self.path} holds an array {list(array.shape)}: a sequence is [T+1, H, W] or [T+1, C, H, W]; for "
                    "another order of axes, or several sequences in one file, say layout=, such as 'n t h w' or 't h w c'"
                )
            check_axes(tuple(array.shape), axes, f"{self.path}:", is_cut=self._is_cut)
        ordered = in_order(array, axes, str(self.path))
        if 0 in ordered.shape:
            raise ValueError(f"{self.path} holds no frames: its shape is {list(array.shape)}")
        self.sequences = ordered.shape[0]
        return ordered

    def header(self, look: Look) -> Header:
        """Reads the header of the file."""
        array = self.opened()
        count, frames, channels, height, width = array.shape
        is_bytes = str(array.dtype).removeprefix("torch.") == "uint8"
        return Header((height, width), count * frames, channels, not is_bytes, str(self.path))

    def chunks(self, look: Look, channels: int | None) -> Iterator[Tensor]:
        """Copies some frames at a time."""
        for sequence in self.opened():
            for start in range(0, len(sequence), _AT_ONCE):
                part = pictures_tensor(sequence[start : start + _AT_ONCE])
                check_range(part, f"the frames in {self.path}")
                yield part


class Video(Film):
    """A video file, read by PyAV.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def header(self, look: Look) -> Header:
        """Decodes the first frame."""
        with self._opened() as (stream, frames):
            first = next(frames, None)
            if first is None:
                raise ValueError(f"{self.path} holds no frames of video")
            is_grey = first.format.name.startswith("gray") and (look.is_grey or not _is_clear(first))
            pixels = _upright(first, is_grey, look.background)
            size = (pixels.shape[-2], pixels.shape[-1])
            self._declared = stream.frames
            return Header(size, None, 1 if is_grey else 3, False, str(self.path))

    def chunks(self, look: Look, channels: int | None) -> Iterator[Tensor]:
        """Decodes frame after frame."""
        count = 0
        with self._opened() as (stream, frames):
            for frame in frames:
                count += 1
                yield _upright(frame, channels == 1, look.background)[None]
            if 0 < count < stream.frames:
                warnings.warn(
                    f"{self.path} declares {stream.frames} frames, and {count} could be read: it may be cut off",
                    stacklevel=2,
                )

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Iterator[Any]]]:
        av = require("av", extra="video")
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.path} holds no video")
                stream = container.streams.video[0]
                yield stream, container.decode(stream)
        except av.FFmpegError as error:
            if isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            raise ValueError(
                f"{self.path} cannot be read as a video ({error}): save it again, or leave it out"
            ) from error


def _is_clear(frame: Any) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _upright(frame: Any, is_grey: bool, background: tuple[int, int, int]) -> Tensor:
    """Gives the pixels [C, H, W] of a frame of video, turned as the file says, on a background."""
    if _is_clear(frame):
        rgba = torch.from_numpy(frame.to_ndarray(format="rgba")).permute(2, 0, 1).float()
        alpha = rgba[3:] / 255
        pixels = rgba[:3] * alpha + torch.tensor(background)[:, None, None] * (1 - alpha)
        pixels = pixels.round().to(torch.uint8)
        pixels = pixels[:1] if is_grey else pixels
    else:
        array = torch.from_numpy(frame.to_ndarray(format="gray" if is_grey else "rgb24"))
        pixels = array[None] if is_grey else array.permute(2, 0, 1)
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return pixels.rot90(turns, (1, 2)) if turns else pixels


def _channels(kinds: set[str], look: Look) -> int:
    """1 where all pictures are grey, and what is behind their transparent parts is grey too."""
    grey = kinds <= {"L", "I;16"} or (kinds <= {"L", "LA", "I;16"} and look.is_grey)
    return 1 if grey else 3


def is_film(file: Path) -> bool:
    """Whether a file, by its ending and number of pictures, is a sequence of its own; raises what `opened_picture` does."""
    ending = file.suffix.lower()
    if ending in ARRAYS or ending in VIDEOS:
        return True
    # A PNG or JPEG is taken for one picture without a look: there are too many of them, and reading will tell.
    if ending not in (".gif", ".tif", ".tiff", ".webp"):
        return False
    with opened_picture(file) as picture:
        return frames_of(picture) > 1


def open_film(file: Path, *, axes: tuple[str, ...] | None = None, is_cut: bool = False) -> Film:
    """Gives the film that a file is.

    Args:
        file: The file.
        axes: The layout of arrays.
        is_cut: Whether sequences are cut into windows.

    Returns:
        The film.

    Raises:
        ValueError: If its ending is not known.
    """
    ending = file.suffix.lower()
    if ending in ARRAYS:
        return ArrayFilm(file, axes=axes, is_cut=is_cut)
    if ending in VIDEOS:
        return Video(file)
    if ending in PICTURES:
        return Pages(file)
    raise ValueError(
        f"{file} is no folder and no file of frames ({', '.join((*ARRAYS, *VIDEOS))}, or an animated or multi-page picture)"
    )
