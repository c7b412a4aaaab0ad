"""Opening HDF5 and NumPy files: what cannot be read is reported with the file's name, and why."""

from __future__ import annotations

import errno
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flowfactor.errors import require

_LOCKED = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)

BROKEN: tuple[type[Exception], ...] = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""What NumPy, zipfile and zlib raise about a damaged npy or npz file."""


def load_npy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """Reads an array from an npy file; nothing in it is run.

    Args:
        path: The file.
        mapped: Map it into memory instead.

    Returns:
        The array.

    Raises:
        OSError: If it may not be read.
        ValueError: If it is no whole npy file.
    """
    with path.open("rb"):  # whose errors of access name the file
        pass
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except BROKEN as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) is not a whole NumPy file: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} is an .npz archive, expected a NumPy .npy file")
    return array


def open_hdf5(path: Path) -> Any:
    """Opens an HDF5 file for reading.

    Args:
        path: The file.

    Returns:
        The ``h5py.File``.

    Raises:
        ImportError: If h5py is not installed.
        OSError: If it may not be read, or another program holds it open for writing.
        ValueError: If it is no HDF5 file, or truncated.
    """
    h5py = require("h5py", extra="data")
    with path.open("rb"):  # whose errors of access name the file
        pass
    try:
        return h5py.File(path, "r", rdcc_nbytes=2**26)
    except (OSError, RuntimeError) as error:
        # HDF5 gives the system's number where the system refuses; damage has none.
        number = getattr(error, "errno", None)
        if number in _LOCKED or "lock file" in str(error) or "already open" in str(error):
            raise OSError(
                number or errno.EAGAIN,
                "another program holds it open for writing: close it there, or set HDF5_USE_FILE_LOCKING=FALSE where the "
                f"file system has no locks ({error})",
                str(path),
            ) from error
        if number is not None:
            raise OSError(number, str(error), str(path)) from error
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole HDF5 file: {error}. If it was cut short, fetch it again."
        ) from error


def hdf5_array(file: Any, name: str) -> Any:
    """Gives an array of an HDF5 file.

    Args:
        file: The file, as `open_hdf5` gives it.
        name: Name of the array.

    Returns:
        The ``h5py.Dataset``.

    Raises:
        ValueError: If it is not there, is no array, lies in another file, or is damaged.
    """
    h5py = require("h5py", extra="data")
    try:
        link = file.get(name, getlink=True)
        if link is None:
            raise ValueError(f"{file.filename} holds {sorted(file)}, but no {name!r}")
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(
                f"{file.filename}: {name!r} is a link to another file, {link.filename}: give that file, or copy it in"
            )
        array = file[name]
        if not isinstance(array, h5py.Dataset):
            raise ValueError(f"{file.filename}: {name!r} is a {type(array).__name__}, expected an array")
        if array.external or array.is_virtual:
            raise ValueError(f"{file.filename}: the values of {name!r} lie in other files, which are not read")
        if array.file.filename != file.filename:
            raise ValueError(f"{file.filename}: {name!r} leads to another file, {array.file.filename}")
        _ = array.shape, array.dtype, array.chunks
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{file.filename}: {name!r} cannot be read: {error}") from error
    return array
