"""The IDX reader: every type code, plain and gzipped, and every way to be damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from flowfactor.data import read_idx


def idx_bytes(values: np.ndarray, code: int) -> bytes:
    header = bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "uint8"), (0x09, "int8"), (0x0B, "int16"), (0x0C, "int32"), (0x0D, "float32"), (0x0E, "float64")],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_type(tmp_path: Path, code: int, dtype: str, zipped: bool) -> None:
    values = (np.arange(24).reshape(2, 3, 4) * 5 - (0 if dtype == "uint8" else 60)).astype(dtype)
    data = idx_bytes(values, code)
    path = tmp_path / "values"  # no suffix: the content tells whether it is zipped
    path.write_bytes(gzip.compress(data, mtime=0) if zipped else data)
    read = read_idx(path)
    assert read.dtype == getattr(torch, dtype)
    assert torch.equal(read, torch.tensor(values))


def test_an_empty_set(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8), 8))
    assert read_idx(path).shape == (0, 28, 28)


GOOD = idx_bytes(np.arange(30, dtype=np.uint8).reshape(5, 6), 8)
ZIPPED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x89PNG", "not an IDX file"),
        (b"\0\1" + GOOD[2:], "not with 00 00"),
        (GOOD[:2] + b"\x0a" + GOOD[3:], "type code 0x0a"),
        (GOOD[:3] + b"\0" + GOOD[4:], "0 dimensions"),
        (GOOD[:7], "says 2 dimensions, but gives 0"),
        (GOOD[:-1], r"shape \[5, 6\] takes 30 bytes after the header, found only 29"),
        (GOOD + b"\0", "takes 30 bytes after the header, found more"),
        (bytes([0, 0, 0x0E, 1]) + struct.pack(">I", 2**32 - 1), "takes 34,359,738,360 bytes"),
        (ZIPPED[:-12], "damaged gzip"),
        (ZIPPED[:20] + b"\xff\xff\xff" + ZIPPED[23:], "damaged gzip"),
        (ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], "damaged gzip"),
        (ZIPPED + b"trailing", "damaged gzip"),
        (gzip.compress(GOOD[:-2], mtime=0), "found only 28"),
    ],
)
def test_damage_is_told(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "broken-idx2-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert "broken-idx2-ubyte" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nothing")
