"""Pictures in files, read row by row: what keeps the large data sets out of memory."""

from __future__ import annotations

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfactor._files import replacing
from flowfactor.data.readers.formats import BROKEN, hdf5_array, load_npy, open_hdf5
from flowfactor.data.readers.pictures import decode_picture, read_header

_AT_ONCE = 2**26  # bytes that are unpacked or copied together


class ImageStore(ABC):
    """N pictures in a file or folder, read when they are asked for.

    Attributes:
        shape: (N, C, H, W).
    """

    shape: tuple[int, int, int, int]

    def read(self, rows: Tensor) -> Tensor:
        """Reads pictures.

        Args:
            rows: Which ones [n], in any order; one may come twice.

        Returns:
            Pictures [n, C, H, W], uint8.
        """
        wanted, places = rows.unique(return_inverse=True)
        if not len(wanted):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        pictures = torch.from_numpy(np.ascontiguousarray(self._read(wanted.numpy())))
        return pictures[places]

    @abstractmethod
    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Reads distinct rows, ascending: uint8 [n, C, H, W]."""


class HDF5Images(ImageStore):
    """Pictures [N, H, W, C], uint8, in a data set of an HDF5 file.

    The file is opened in each process that reads it. Compressed files are read by whole chunks, each once a call.

    Args:
        path: The file.
        name: Name of the data set in it.

    Raises:
        ImportError: If h5py is not installed.
        ValueError: If the file is no HDF5 file, is truncated, or holds no such pictures.
    """

    def __init__(self, path: Path, name: str = "images") -> None:
        self.path, self.name = path, name
        self._file: Any = None
        self._owner = -1
        images = self._images()
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"{path}: {name!r} is {images.dtype} {list(images.shape)}, expected uint8 pictures [N, H, W, C]"
            )
        n, height, width, channels = images.shape
        self.shape = (n, channels, height, width)

    def _images(self) -> Any:
        if self._file is None or self._owner != os.getpid():  # a handle must not be shared with a forked process
            self._file, self._owner = open_hdf5(self.path), os.getpid()
        return hdf5_array(self._file, self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": -1}

    def _read(self, rows: np.ndarray) -> np.ndarray:
        images = self._images()
        chunk = images.chunks[0] if images.chunks else 1
        pictures = np.empty((len(rows), *images.shape[1:]), dtype=np.uint8)
        starts = np.flatnonzero(np.diff(rows // chunk, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            first = int(rows[start])
            try:
                slab = images[first : int(rows[end - 1]) + 1]
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{self.path} is damaged near picture {first}: {error}. Fetch it again.") from error
            pictures[start:end] = slab[rows[start:end] - first]
        return pictures.transpose(0, 3, 1, 2)


class ArrayImages(ImageStore):
    """Pictures in arrays, which may be mapped from files.

    Args:
        arrays: Arrays [N, C, H, W], uint8, one after another.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = list(arrays)
        self._starts = np.cumsum([0, *(len(array) for array in self.arrays)])
        channels, height, width = self.arrays[0].shape[1:]
        self.shape = (int(self._starts[-1]), channels, height, width)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        ends = zip(self._starts[:-1], self._starts[1:], strict=True)
        parts = [array[rows[(rows >= a) & (rows < b)] - a] for array, (a, b) in zip(self.arrays, ends, strict=True)]
        return np.concatenate(parts)


class PackedImages(ImageStore):
    """Black and white pictures, kept in memory at one bit a pixel.

    Args:
        bits: Pixels [N, ceil(H W / 8)], packed.
        height: Height in pixels.
        width: Width in pixels.
    """

    def __init__(self, bits: np.ndarray, height: int, width: int) -> None:
        self.bits = bits
        self.shape = (len(bits), 1, height, width)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        _, _, height, width = self.shape
        pixels = np.unpackbits(self.bits[rows], axis=1, count=height * width)
        return pixels.reshape(len(rows), 1, height, width) * np.uint8(255)


class PictureFolder(ImageStore):
    """Pictures in a folder, named by their number: 000000.png, 000001.png, ...

    Args:
        folder: The folder.
        count: Number N of pictures that must be there.

    Raises:
        ImportError: If Pillow is not installed.
        FileNotFoundError: If the folder or a picture is missing.
        ValueError: If there are more, or some of those that are looked at (a few, evenly spaced) cannot be read as
            pictures or are not of one size.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if entry.name.lower().endswith(".png")}
        missing = [n for n in range(count) if self._name(n) not in names]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing):,} of the {count:,} pictures that the labels describe, "
                f"the first being {self._name(missing[0])}"
            )
        if len(names) > count:
            raise ValueError(f"{folder} holds {len(names):,} pictures, but there are labels of {count:,}")
        (width, height), _ = read_header(folder / self._name(0))
        self.shape = (count, 3, height, width)
        for n in {*range(0, count, max(1, count // 32)), count - 1}:
            self._check(n, read_header(folder / self._name(n))[0])

    def _name(self, n: int) -> str:
        return f"{n:06}.png"

    def _check(self, n: int, size: tuple[int, int]) -> None:
        expected = (self.shape[3], self.shape[2])
        if size != expected:
            raise ValueError(
                f"{self.folder / self._name(n)} has {size[0]} x {size[1]} pixels, but {self._name(0)} "
                f"{expected[0]} x {expected[1]}: all pictures must be of one size"
            )

    def _read(self, rows: np.ndarray) -> np.ndarray:
        pictures = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for place, n in enumerate(rows.tolist()):
            picture = decode_picture(self.folder / self._name(n), "RGB")
            self._check(n, (picture.shape[2], picture.shape[1]))
            pictures[place] = picture.numpy()
        return pictures


def copied(store: ImageStore, path: str | Path) -> ArrayImages:
    """Copies pictures into an uncompressed file, once, and reads them from there.

    A compressed or many-file data set is read at random many times as fast from such a copy. The file is written under
    a temporary name and renamed.

    Args:
        store: The pictures.
        path: The copy, an ``.npy`` file [N, C, H, W]; it is made if it is not there.

    Returns:
        The pictures, mapped from the copy.

    Raises:
        ValueError: If the file at `path` is not a copy of these pictures.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npy":
        raise ValueError(f"cache must be the path of an .npy file, got {path}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            _copy(store, part)
    try:
        array = load_npy(path, mapped=True)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole .npy file ({error}). Delete it to have it made again.") from error
    ends = torch.tensor([0, store.shape[0] - 1])
    mapped = ArrayImages([array]) if array.shape == store.shape and array.dtype == np.uint8 else None
    if mapped is None or not torch.equal(mapped.read(ends), store.read(ends)):
        raise ValueError(f"{path} is not a copy of these pictures: give another cache, or delete it")
    return mapped


def _copy(store: ImageStore, path: Path) -> None:
    rows = max(1, _AT_ONCE // int(np.prod(store.shape[1:])))
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": store.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, store.shape[0], rows):
            part = store.read(torch.arange(start, min(start + rows, store.shape[0])))
            file.write(part.numpy().tobytes())


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads a small array of an npz file.

    Args:
        archive: The file.
        name: Name of the array.

    Returns:
        The array.

    Raises:
        ValueError: If it is not there, or damaged.
    """
    with _member(archive, name) as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except BROKEN as error:
            raise ValueError(f"{archive.filename}: {name!r} cannot be read: {error}") from error


def pack_member(archive: zipfile.ZipFile, name: str) -> PackedImages:
    """Reads black and white pictures of an npz file, a part at a time, at one bit a pixel.

    Args:
        archive: The file.
        name: Name of the array [N, H, W], uint8, of zeros and ones.

    Returns:
        The pictures.

    Raises:
        ValueError: If it is not there, is no such array, or damaged.
    """
    with _member(archive, name) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version](file)
            if len(shape) != 3 or dtype != np.uint8 or fortran:
                raise ValueError(f"it is {dtype} {list(shape)}, expected uint8 pictures [N, H, W]")
            count, pixels = shape[0], shape[1] * shape[2]
            bits = np.empty((count, -(-pixels // 8)), dtype=np.uint8)
            rows = max(1, _AT_ONCE // pixels)
            for start in range(0, count, rows):
                size = min(rows, count - start) * pixels
                part = np.frombuffer(file.read(size), dtype=np.uint8)
                if len(part) != size:
                    raise ValueError("it ends too early")
                if part.max() > 1:
                    raise ValueError("it holds values other than 0 and 1")
                bits[start : start + rows] = np.packbits(part.reshape(-1, pixels), axis=1)
            if file.read(1):  # also has the archive's checksum checked
                raise ValueError("it has bytes left over")
        except BROKEN as error:
            raise ValueError(f"{archive.filename}: {name!r} cannot be read: {error}") from error
    return PackedImages(bits, shape[1], shape[2])


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    try:
        return archive.open(f"{name}.npy")
    except KeyError:
        held = sorted(entry.removesuffix(".npy") for entry in archive.namelist())
        raise ValueError(f"{archive.filename} holds {held}, but no {name!r}") from None
    except BROKEN as error:
        raise ValueError(f"{archive.filename}: {name!r} cannot be read: {error}") from error


def grid_rows(labels: np.ndarray, source: str) -> tuple[list[Tensor], Tensor]:
    """Finds the grid that labels span, and the row of each of its points.

    Args:
        labels: Values of the factors [N, F].
        source: What is read, for messages.

    Returns:
        The values of each factor's states, ascending, float64; and the row of each combination of states, in row-major
        order.

    Raises:
        ValueError: If the labels are not numbers, or do not hold every combination exactly once.
    """
    if labels.ndim != 2 or not labels.size or labels.dtype.kind not in "fiu" or not np.isfinite(labels).all():
        raise ValueError(f"{source} has labels {labels.dtype} {list(labels.shape)}, expected finite numbers [N, F]")
    values, states = [], []
    for column in labels.T:
        # Rounded, so that a value that was computed in two ways is one state.
        value, state = np.unique(np.round(column.astype(np.float64), 9), return_inverse=True)
        values.append(torch.from_numpy(value))
        states.append(state.reshape(-1))
    sizes = [len(value) for value in values]
    total = int(np.prod(sizes, dtype=np.int64))
    if total != len(labels):
        raise ValueError(
            f"{source} has {len(labels):,} labels, but their values span {' x '.join(map(str, sizes))} = {total:,} "
            "combinations: every combination must come exactly once"
        )
    points = np.ravel_multi_index(states, sizes)
    rows = np.full(total, -1)
    rows[points] = np.arange(total)
    if (rows < 0).any():
        missing = [int(s) for s in np.unravel_index(int(np.argmin(rows)), sizes)]
        raise ValueError(f"{source} has labels in which the states {missing} never come and others come twice")
    return values, torch.from_numpy(rows)
