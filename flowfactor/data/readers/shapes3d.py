"""Shapes3D: rooms with one object, in an HDF5 file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from flowfactor.data.factors import Stride
from flowfactor.data.readers.download import data_file
from flowfactor.data.readers.formats import hdf5_array, open_hdf5
from flowfactor.data.readers.image_stores import HDF5Images
from flowfactor.data.readers.stored_factors import StoredFactors

_URL = "https://storage.googleapis.com/3d-shapes/3dshapes.h5"
_MD5 = "099a2078d58cec4daad0702c55d06868"
_FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")


class Shapes3D(StoredFactors):
    """Shapes3D (3dshapes) as sequences in which one factor moves and all others hold exactly.

    480,000 pictures of 64x64 pixels: every combination of the hues of floor, wall and object (10 each), the scale (8),
    the shape (4) and the orientation (15) of the object. Source: Burgess and Kim, *3D Shapes Dataset*,
    https://github.com/google-deepmind/3d-shapes, 2018; used so in Song et al., *Flow Factorized Representation
    Learning*, NeurIPS 2023.

    Pictures are read from the file as bytes when a batch asks for them: nothing else of them is in memory. The
    published file is compressed in large chunks, which makes reading at random slow; `cache` copies it, once, into an
    uncompressed file of 5.9 GB that is mapped into memory. A file with fewer states of a factor, written in the same
    format, is read as well.

    By default the test split holds out 12 of the 60 combinations of shape and orientation; see `FactorSequences`.

    Args:
        root: The file ``3dshapes.h5`` or its folder. None takes the environment variable ``FLOWFACTOR_SHAPES3D``, else
            ``~/.cache/flowfactor/shapes3d``.
        split: ``"train"``, ``"test"`` or ``"all"``.
        vary: Names of the K factors that move, in the order of k: floor_hue, wall_hue, object_hue, scale, shape or
            orientation.
        steps: Number T of steps; a sequence has T + 1 frames.
        stride: States per step, one for all factors or by name.
        wrap: Let hues go on round the circle from any state. False has them move from a lower to a higher state only.
        held_out: Share of the scenes that the test split holds out.
        cache: Path of the uncompressed copy, an ``.npy`` file, made if it is not there.
        download: Fetch the file (255 MB) if it is missing, and check its MD5.
        mirrors: Addresses of the file, tried in turn.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Raises:
        ImportError: If h5py is not installed.
        FileNotFoundError: If the file is missing and `download` is False.
        ValueError: If the file is not HDF5, is truncated or of another format, if labels and images do not belong
            together, or an argument is wrong.
        ConnectionError: If no mirror gave the file with the right checksum.

    Example:
        >>> data = Shapes3D("data/3dshapes.h5", cache="data/3dshapes.npy")  # doctest: +SKIP
        >>> data.batch([0, 1, 2], k=3)["frames"].shape  # doctest: +SKIP
        torch.Size([3, 8, 3, 64, 64])
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test", "all"] = "train",
        *,
        vary: Sequence[str] = _FACTORS[:4],
        steps: int = 7,
        stride: Stride = 1,
        wrap: bool = True,
        held_out: float = 0.2,
        cache: str | Path | None = None,
        download: bool = False,
        mirrors: Sequence[str] = (_URL,),
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        self.path = data_file(root, "shapes3d", "3dshapes.h5", urls=mirrors, md5=_MD5, download=download)
        store = HDF5Images(self.path, "images")
        self._set_up(
            store,
            _labels(self.path),
            _FACTORS,
            self.path,
            cache=cache,
            vary=vary,
            steps=steps,
            split=split,
            held_out=held_out,
            t=t,
            stride=stride,
            cyclic=_FACTORS[:3] if wrap else (),
        )


def _labels(path: Path) -> np.ndarray:
    with open_hdf5(path) as file:
        try:
            return np.asarray(hdf5_array(file, "labels")[()])
        except (OSError, RuntimeError, MemoryError, TypeError) as error:
            raise ValueError(f"{path} is damaged in its labels: {error}. Fetch it again.") from error
