"""Damaged, locked and foreign files: each is told for what it is, with its name."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from flowfactor._files import read_json
from flowfactor.data import Shapes3D, read_idx
from flowfactor.data.readers.arrayfiles import open_array
from flowfactor.data.readers.download import download_file
from flowfactor.data.readers.formats import load_npy, open_hdf5
from flowfactor.data.readers.image_stores import HDF5Images, pack_member, read_member
from flowfactor.data.readers.pictures import read_header
from flowfactor.models._saved import read_config, read_weights
from flowfactor.training._yaml import read_yaml
from flowfactor.training.checkpoints import check_seal

HOLD = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('held', flush=True); sys.stdin.read()"


def test_a_file_that_is_held_open_elsewhere_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "3dshapes.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((2, 4, 4, 3), np.uint8)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="another program holds it open for writing") as told:
            Shapes3D(path)
        assert str(path) in str(told.value) and "fetch" not in str(told.value).lower()
        process.communicate("")


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (open_hdf5, "file.h5"),
        (load_npy, "file.npy"),
        (open_array, "file.npy"),
        (open_array, "file.npz"),
        (read_idx, "file"),
        (read_header, "file.png"),
        (read_yaml, "file.yaml"),
        (read_json, "file.json"),
        (read_config, "file.json"),
        (lambda path: read_weights(path, is_sealed=True), "file.safetensors"),
        (check_seal, "file.ckpt"),
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object], name: str
) -> None:
    """The system's refusal is made up, since root may read everything."""
    path, opened = tmp_path / name, io.open
    path.write_bytes(b"content")

    def refuse(file: object, *arguments: object, **options: object) -> object:
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(file, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="file"):
        read(path)


@pytest.mark.parametrize("end", [-6, -4])
def test_an_archive_that_points_before_its_beginning_is_told_by_name(tmp_path: Path, end: int) -> None:
    path = tmp_path / "film.npz"
    np.savez(path, frames=np.zeros((3, 4, 4), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[:end] + b"\xff\xff\xff\x7f"[: -end - 2] + content[end + min(-end - 2, 4) :])
    with pytest.raises(ValueError, match=r"film\.npz cannot be read as an array"):
        open_array(path)


def test_links_of_an_hdf5_file_are_followed_within_it_alone(tmp_path: Path) -> None:
    other, path = tmp_path / "other.h5", tmp_path / "file.h5"
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    with h5py.File(other, "w") as file:
        file["images"] = pictures
    with h5py.File(path, "w") as file:
        file["kept"] = pictures
        file["soft"] = h5py.SoftLink("/kept")
        file["broken"] = h5py.SoftLink("/nothing")
        file["external"] = h5py.ExternalLink("other.h5", "/images")
        file["through"] = h5py.SoftLink("/external")
        file.create_group("group")
        layout = h5py.VirtualLayout((2, 4, 4, 3), np.uint8)
        layout[:] = h5py.VirtualSource(str(other), "images", (2, 4, 4, 3))
        file.create_virtual_dataset("virtual", layout)
    assert HDF5Images(path, "soft").shape == (2, 3, 4, 4)
    for name, message in (
        ("broken", "cannot be read"),
        ("external", r"a link to another file, other\.h5"),
        ("through", r"leads to another file|link to another file"),
        ("group", "is a Group, expected an array"),
        ("virtual", "lie in other files"),
        ("nothing", "but no 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            HDF5Images(path, name)
        assert "file.h5" in str(told.value)


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


GOOD = npy(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:40],
        GOOD[:-1],
        GOOD.replace(b"(2, 3)", b"(2, 3("),
        GOOD.replace(b"(2, 3), }            ", b"(1000000000000, 9), }"),
        GOOD.replace(b"|u1", b"|z1"),
        npy(np.array([print], dtype=object), pickled=True),
        b"\x80\x04N.",
    ],
)
def test_npy_and_npz_files_that_are_damaged_are_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"labels\.npy .* is not a whole NumPy file"):
        load_npy(path)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("labels.npy", content)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        for read in (read_member, pack_member):
            with pytest.raises(ValueError, match=r"a\.npz: 'labels' cannot be read"):
                read(archive, "labels")


def test_an_npz_file_under_the_name_of_an_npy_file_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"is an \.npz archive"):
        load_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [bytes([0, 0, 8, 200]) + bytes(800), bytes([0, 0, 8, 4]) + bytes(4) + b"\xff" * 12])
def test_idx_headers_of_impossible_shapes_are_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="images: the header says a shape"):
        read_idx(path)


def test_a_download_does_not_replace_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="mine is there already"):
        download_file(tmp_path / "mine", ["http://127.0.0.1:9/"], md5="0")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_png_whose_header_is_cut_short_is_told_by_name(tmp_path: Path) -> None:
    from PIL import Image

    from flowfactor.data.readers.pictures import decode_picture, read_header

    path = tmp_path / "0.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[11] = 5  # the length that the header says it has
    path.write_bytes(bytes(content))
    for read in (read_header, lambda file: decode_picture(file, "L")):
        with pytest.raises(ValueError, match=r"0\.png cannot be read as a picture"):
            read(path)
