"""The IDX format, in which MNIST and the data sets modelled on it come."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


def read_idx(path: str | Path) -> Tensor:
    """Reads an IDX file, plain or gzipped (told by its first bytes, not by its name).

    The format: two zero bytes, a type code, the number of dimensions, each dimension as a big-endian 32-bit integer,
    then the values, big-endian, in row-major order.

    Args:
        path: The file.

    Returns:
        A tensor of the file's shape; uint8, int8, int16, int32, float32 or float64 as the file says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not IDX, is truncated, has bytes left over, or is a damaged gzip file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels-idx1-ubyte"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 0, 4]))
        ...     read_idx(path)
        tensor([5, 0, 4], dtype=torch.uint8)
    """
    path = Path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            return _parse(cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file, path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is a damaged gzip file: {error}. Fetch it again."
            ) from error


def _parse(file: BinaryIO, path: Path) -> Tensor:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"{path} is not an IDX file: it begins with {magic.hex(' ') or 'nothing'}, not with 00 00")
    code, ndim = magic[2], magic[3]
    if code not in _DTYPES:
        known = ", ".join(f"0x{known:02x}" for known in _DTYPES)
        raise ValueError(f"{path}: unknown IDX type code 0x{code:02x}, expected one of {known}")
    header = file.read(4 * ndim)
    if ndim == 0 or len(header) < 4 * ndim:
        raise ValueError(f"{path}: the header says {ndim} dimensions, but gives {len(header) // 4}")
    shape = struct.unpack(f">{ndim}I", header)
    dtype = np.dtype(_DTYPES[code])
    expected = math.prod(shape) * dtype.itemsize
    chunks, size = [], 0
    # In pieces: a header that claims more than the file holds must not reserve that much, nor may a file that holds
    # more than its header claims be read to its end.
    while size <= expected and (chunk := file.read(min(2**24, expected + 1 - size))):
        chunks.append(chunk)
        size += len(chunk)
    if size != expected:
        found = "more" if size > expected else f"only {size:,}"
        raise ValueError(
            f"{path}: {dtype.name} of shape {list(shape)} takes {expected:,} bytes after the header, found {found}"
        )
    values = np.frombuffer(bytearray(b"".join(chunks)), dtype=dtype.newbyteorder(">"))
    try:
        return torch.from_numpy(values.astype(dtype, copy=False).reshape(shape))
    except (ValueError, RuntimeError) as error:  # more dimensions, or longer ones, than an array can have
        raise ValueError(f"{path}: the header says a shape of {list(shape)}, which no array has: {error}") from error
