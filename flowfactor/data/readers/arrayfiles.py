"""Arrays in files, which may be damaged."""

from __future__ import annotations

import errno
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowfactor.data.readers.formats import hdf5_array, open_hdf5
from flowfactor.errors import require

_DAMAGE = (
    *(ValueError, EOFError, SyntaxError, LookupError, TypeError, ArithmeticError, RuntimeError, MemoryError),
    *(NotImplementedError, RecursionError, struct.error, zlib.error, zipfile.BadZipFile, tokenize.TokenError),
)
FRAMES = "frames"
"""Name of the array of frames in a file of several arrays."""
CONTAINERS = (".npz", ".h5", ".hdf5")
"""Endings of files of several arrays by name."""


def open_array(file: Path) -> np.ndarray[Any, Any]:
    """Opens an array of frames: a ``.npy`` mapped into memory, the ``frames`` of other files (or the only array) whole.

    Args:
        file: The file.

    Returns:
        The array.

    Raises:
        OSError: If the file is missing or may not be read.
        ValueError: If it is damaged, or holds several arrays of which none is called ``frames``.
    """
    return frames_among(read_arrays(file), file)


def frames_among(arrays: dict[str, np.ndarray[Any, Any]], file: Path) -> np.ndarray[Any, Any]:
    """Gives the frames among a file's arrays; raises ValueError where it is not clear which they are."""
    if FRAMES in arrays:
        return arrays[FRAMES]
    if len(arrays) != 1:
        raise ValueError(
            f"{file} holds {len(arrays)} arrays ({', '.join(sorted(arrays))}), none of which is called {FRAMES!r}: "
            "save the frames under that name, or alone"
        )
    return next(iter(arrays.values()))


def read_arrays(file: Path, only: Callable[[str], bool] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Opens the arrays of a ``.npy`` (as ``frames``, mapped), ``.npz`` or ``.h5`` file; raises what `open_array` raises.

    Args:
        file: The file.
        only: Tells by its name whether an array is wanted; None wants all.

    Returns:
        The arrays by name; those in groups of an HDF5 file by their paths, such as ``context/pose``.
    """
    if file.suffix.lower() in (".h5", ".hdf5"):
        return _hdf5_arrays(file, only)
    try:
        if file.suffix.lower() == ".npz":
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                return {name: held[name] for name in held.files if only is None or only(name)}
        # Copied where it is written to: so a tensor can share the mapped memory, and frames are read when they are used.
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds several arrays: call it .npz")
        return {FRAMES: array}
    except (OSError, *_DAMAGE) as error:
        # A damaged archive may send the reader to a place before the file's beginning, which the system calls EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = str(file)
            raise
        told = str(error) or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as an array of NumPy's ({told}): save it again by numpy.save, or leave it out"
        ) from error


def _hdf5_arrays(file: Path, only: Callable[[str], bool] | None) -> dict[str, np.ndarray[Any, Any]]:
    with open_hdf5(file) as held:
        try:
            groups = [name for name in held if _is_group(held, name)]
            names = [name for name in held if name not in groups]
            names += [f"context/{name}" for name in held["context"]] if "context" in groups else []
            return {name: hdf5_array(held, name)[()] for name in names if only is None or only(name)}
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"{file} is damaged: {error}. Fetch it again.") from error


def _is_group(file: Any, name: str) -> bool:
    """Whether a name is that of a group of the file itself: a link elsewhere is not followed."""
    h5py = require("h5py", extra="data")
    own = isinstance(file.get(name, getlink=True), h5py.HardLink)
    return own and file.get(name, getclass=True) is h5py.Group
