"""SmallNORB: photographs of toys from all sides, in LeCun's binary matrix format."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from flowfactor.data.factors import Stride
from flowfactor.data.readers.download import data_root, download_file
from flowfactor.data.readers.image_stores import ArrayImages
from flowfactor.data.readers.stored_factors import StoredFactors

_URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
_PARTS = {"train": "smallnorb-5x46789x9x18x6x2x96x96-training", "test": "smallnorb-5x01235x9x18x6x2x96x96-testing"}
_MD5 = {
    "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz": "66054832f9accfe74a0f4c36a75bc0a2",
    "smallnorb-5x46789x9x18x6x2x96x96-training-cat.mat.gz": "23c8b86101fbf0904a000b43d3ed2fd9",
    "smallnorb-5x46789x9x18x6x2x96x96-training-info.mat.gz": "51dee1210a742582ff607dfd94e332e3",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz": "e4ad715691ed5a3a5f138751a4ceb071",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat.gz": "5aa791cd7e6016cf957ce9bdb93b8603",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-info.mat.gz": "a9454f3864d7fd4bb3ea7fc3eb84924e",
}
_FACTORS = ("category", "instance", "elevation", "azimuth", "lighting")
_DTYPES = {0x1E3D4C51: "<f4", 0x1E3D4C53: "<f8", 0x1E3D4C54: "<i4", 0x1E3D4C55: "u1", 0x1E3D4C56: "<i2"}


class SmallNORB(StoredFactors):
    """Small NORB as sequences in which one factor moves and all others hold exactly.

    Photographs of 96x96 pixels of 50 toys of 5 categories (animals, people, aeroplanes, lorries, cars), under every
    combination of elevation (9), azimuth (18, which go round the circle) and lighting (6), taken by two cameras.
    Source: LeCun, Huang and Bottou, *Learning Methods for Generic Object Recognition with Invariance to Pose and
    Lighting*, CVPR 2004; https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/.

    The splits are the data set's own, and by object: instances 4, 6, 7, 8 and 9 of each category are for training,
    instances 0, 1, 2, 3 and 5 for testing. Lightings are six arrangements of lamps in no particular order.

    The files may be gzipped or plain; plain pictures are mapped from the file and read when a batch asks for them,
    gzipped ones are unpacked into memory (448 MB a split).

    Args:
        root: The folder with the ``-dat.mat``, ``-cat.mat`` and ``-info.mat`` files of the split. None takes the
            environment variable ``FLOWFACTOR_SMALLNORB``, else ``~/.cache/flowfactor/smallnorb``.
        split: ``"train"``, ``"test"`` or ``"all"``.
        vary: Names of the K factors that move, in the order of k: elevation, azimuth or lighting (or category and
            instance, whose order means nothing).
        steps: Number T of steps; a sequence has T + 1 frames.
        stride: States per step, one for all factors or by name.
        wrap: Let azimuths go on round the circle from any state. False has them grow only.
        camera: Which camera's pictures.
        download: Fetch the files of the split that are missing, and check their MD5.
        mirrors: Addresses of folders that hold the files, tried in turn.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Raises:
        FileNotFoundError: If a file is missing and `download` is False.
        ValueError: If a file is truncated or of another format, if pictures, categories and infos do not belong
            together, or an argument is wrong.
        ConnectionError: If no mirror gave a file with the right checksum.

    Example:
        >>> data = SmallNORB("data/smallnorb", "test")  # doctest: +SKIP
        >>> data.batch([0, 1, 2], k=1)["frames"].shape  # doctest: +SKIP
        torch.Size([3, 8, 1, 96, 96])
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test", "all"] = "train",
        *,
        vary: Sequence[str] = ("elevation", "azimuth"),
        steps: int = 7,
        stride: Stride = 1,
        wrap: bool = True,
        camera: Literal["left", "right"] = "left",
        download: bool = False,
        mirrors: Sequence[str] = (_URL,),
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        if split not in ("train", "test", "all"):
            raise ValueError(f"split is 'train', 'test' or 'all', got {split!r}")
        if camera not in ("left", "right"):
            raise ValueError(f"camera is 'left' or 'right', got {camera!r}")
        self.root = data_root(root, "smallnorb")
        parts = [_PARTS[split]] if split != "all" else list(_PARTS.values())
        # All files are there before the first, large one is read.
        files = [
            [self._file(f"{part}-{kind}.mat", download, mirrors) for kind in ("dat", "cat", "info")] for part in parts
        ]
        read = [_read_part(*three) for three in files]
        eye = ("left", "right").index(camera)
        self._set_up(
            ArrayImages([pictures[:, eye : eye + 1] for pictures, _ in read]),
            np.concatenate([labels for _, labels in read]),
            _FACTORS,
            self.root,
            vary=vary,
            steps=steps,
            split="all",  # the files are the split
            t=t,
            stride=stride,
            cyclic=("azimuth",) if wrap else (),
        )
        self.split = split

    def _file(self, name: str, download: bool, mirrors: Sequence[str]) -> Path:
        for spelling in (name, f"{name}.gz"):
            if (self.root / spelling).is_file():
                return self.root / spelling
        target = self.root / f"{name}.gz"
        if not download:
            raise FileNotFoundError(
                f"{self.root} holds no {name} (plain or .gz). Give root= the folder with small NORB's files, set "
                f"FLOWFACTOR_SMALLNORB to it, or let download=True fetch them from {', '.join(mirrors)}."
            )
        download_file(target, [f"{mirror.rstrip('/')}/{target.name}" for mirror in mirrors], md5=_MD5[target.name])
        return target


def read_binary_matrix(path: Path) -> np.ndarray:
    """Reads a file of the binary matrix format of (small) NORB, plain or gzipped (told by its first bytes).

    The format, all little-endian: a 32-bit magic number, which tells the type; the number of dimensions; each dimension
    as a 32-bit integer, at least three of them (1 where there are fewer); then the values in row-major order.

    Args:
        path: The file.

    Returns:
        An array of the file's shape, mapped from the file if it is plain.

    Raises:
        ValueError: If the file is not of this format, is truncated, has bytes left over, or is a damaged gzip file.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            dtype, shape, start = _header(file.read(8 + 4 * 8), path)
            file.seek(start)
            expected = math.prod(shape) * dtype.itemsize
            if not zipped:
                size = path.stat().st_size - start
            else:
                content = file.read(expected + 1)
                size = len(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is a damaged gzip file: {error}. Fetch it again."
        ) from error
    if size != expected:
        found = "more" if size > expected else f"only {size:,}"
        raise ValueError(
            f"{path}: {dtype.name} of shape {list(shape)} takes {expected:,} bytes after the header, found {found}"
        )
    if zipped:
        return np.frombuffer(content, dtype=dtype).reshape(shape)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _header(start: bytes, path: Path) -> tuple[np.dtype, tuple[int, ...], int]:
    """Reads the header: the type, the shape, and where the values begin."""
    magic = struct.unpack("<I", start[:4])[0] if len(start) >= 4 else -1
    if magic not in _DTYPES:
        known = ", ".join(f"0x{known:08X}" for known in _DTYPES)
        raise ValueError(
            f"{path} is not a binary matrix: it begins with {start[:4].hex(' ') or 'nothing'}, not with one of {known}"
        )
    ndim = struct.unpack("<i", start[4:8])[0] if len(start) >= 8 else -1
    stored = max(ndim, 3)
    if not 1 <= ndim <= 8 or len(start) < 8 + 4 * stored:
        raise ValueError(f"{path}: the header says {ndim} dimensions, but does not give them")
    shape = struct.unpack(f"<{stored}i", start[8 : 8 + 4 * stored])[:ndim]
    if min(shape) < 1:
        raise ValueError(f"{path}: the header says the shape is {list(shape)}")
    return np.dtype(_DTYPES[magic]), shape, 8 + 4 * stored


def _read_part(dat: Path, cat: Path, info: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads pictures [N, 2, H, W] and labels [N, 5], and checks that they belong together."""
    categories, details, pictures = (read_binary_matrix(path) for path in (cat, info, dat))
    if pictures.ndim != 4 or pictures.shape[1] != 2 or pictures.dtype != np.uint8:
        raise ValueError(
            f"{dat} holds {pictures.dtype} {list(pictures.shape)}, expected uint8 pairs of pictures [N, 2, H, W]"
        )
    for path, array, dims in ((cat, categories, 1), (info, details, 2)):
        if array.ndim != dims or array.dtype.kind != "i" or (dims == 2 and array.shape[1] != 4):
            expected = "[N]" if dims == 1 else "[N, 4]: instance, elevation, azimuth, lighting"
            raise ValueError(f"{path} holds {array.dtype} {list(array.shape)}, expected integers {expected}")
        if len(array) != len(pictures):
            raise ValueError(f"{dat} holds {len(pictures):,} pictures, but {path} {len(array):,} labels")
    return pictures, np.concatenate([np.asarray(categories)[:, None], np.asarray(details)], axis=1)
