"""Readers of Shapes3D and dSprites, on small files of the true formats, and downloads."""

from __future__ import annotations

import math
import pickle
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from published_files import SIZES, SPRITES, shapes_arrays, sprite_arrays, write_shapes, write_sprites
from reader_checks import check_sequences, check_splits

from flowfactor.data import DSprites, Shapes3D, SmallNORB

SHAPES = {"vary": ("floor_hue", "scale", "object_hue"), "steps": 2}


def show_shapes(states: torch.Tensor) -> torch.Tensor:
    pictures = torch.zeros(*states.shape[:-1], 3, 6, 4)
    pictures[..., 2, :, 1] = (states * 50 + 3) / 255
    return pictures


@pytest.mark.parametrize("storage", [{}, {"chunks": (7, 6, 4, 3), "compression": "gzip"}, {"chunks": (1, 6, 4, 3)}])
def test_shapes3d(tmp_path: Path, storage: dict) -> None:
    write_shapes(tmp_path / "3dshapes.h5", *shapes_arrays(), **storage)
    data = Shapes3D(tmp_path, **SHAPES)
    assert data.factor_names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    assert data.factor_sizes == SIZES
    assert data.flow_names == SHAPES["vary"]
    assert data.image_shape == (3, 6, 4)
    assert data.values[3].tolist() == [0.75, 1.0, 1.25]
    check_sequences(data, show_shapes)
    check_sequences(pickle.loads(pickle.dumps(data)), show_shapes)  # as a worker process gets it


def test_shapes3d_holds_no_picture_in_memory(tmp_path: Path) -> None:
    path = write_shapes(tmp_path / "3dshapes.h5", *shapes_arrays())
    with h5py.File(path) as file:
        start, size = file["images"].id.get_offset(), file["images"].size
    data = Shapes3D(path, **SHAPES)
    with path.open("r+b") as raw:  # what is changed behind its back is what it shows
        raw.seek(start)
        raw.write(b"\xff" * size)
    assert data[0]["frames"].eq(1).all()


def test_shapes3d_hues_go_round_unless_told_not_to(tmp_path: Path) -> None:
    write_shapes(tmp_path / "3dshapes.h5", *shapes_arrays())
    every = torch.arange(len(Shapes3D(tmp_path, "all", **SHAPES)))
    hue = Shapes3D(tmp_path, "all", **SHAPES).states(every, torch.zeros_like(every))[..., 0]
    assert {tuple(row) for row in hue.tolist()} == {(0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1)}
    hue = Shapes3D(tmp_path, "all", wrap=False, **SHAPES).states(every, torch.zeros_like(every))[..., 0]
    assert {tuple(row) for row in hue.tolist()} == {(0, 1, 2), (1, 2, 3)}


def test_shapes3d_splits_by_combination(tmp_path: Path) -> None:
    write_shapes(tmp_path / "3dshapes.h5", *shapes_arrays())
    check_splits(lambda split: Shapes3D(tmp_path, split, **SHAPES))
    check_splits(lambda split: Shapes3D(tmp_path, split, vary=("floor_hue", "wall_hue"), steps=1, wrap=False))


def test_shapes3d_in_any_order_of_rows(tmp_path: Path) -> None:
    images, labels = shapes_arrays()
    order = np.random.default_rng(0).permutation(len(images))
    data = Shapes3D(write_shapes(tmp_path / "x.h5", images[order], labels[order]), **SHAPES)
    check_sequences(data, show_shapes)


def test_shapes3d_cache(tmp_path: Path) -> None:
    path = write_shapes(tmp_path / "3dshapes.h5", *shapes_arrays(), chunks=(7, 6, 4, 3), compression="gzip")
    cache = tmp_path / "copies" / "shapes.npy"
    for _ in range(2):  # made, then found
        check_sequences(Shapes3D(path, cache=cache, **SHAPES), show_shapes)
    assert [p.name for p in cache.parent.iterdir()] == ["shapes.npy"]
    assert np.load(cache).shape == (math.prod(SIZES), 3, 6, 4)
    images, labels = shapes_arrays()
    other = write_shapes(tmp_path / "other.h5", images + 1, labels)
    with pytest.raises(ValueError, match="not a copy of these pictures"):
        Shapes3D(other, cache=cache, **SHAPES)
    cache.write_bytes(cache.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a whole \.npy file"):
        Shapes3D(path, cache=cache, **SHAPES)
    with pytest.raises(ValueError, match=r"path of an \.npy file"):
        Shapes3D(path, cache=tmp_path / "folder", **SHAPES)


def test_shapes3d_damaged_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = shapes_arrays()
    with pytest.raises(FileNotFoundError, match=r"3dshapes\.h5 is missing.*download=True.*storage\.googleapis"):
        Shapes3D(tmp_path)
    monkeypatch.setenv("FLOWFACTOR_SHAPES3D", str(tmp_path / "given"))
    with pytest.raises(FileNotFoundError, match="given"):
        Shapes3D()
    path = write_shapes(tmp_path / "whole.h5", images, labels)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"cut\.h5 .* is not a whole HDF5 file.*fetch it again"):
        Shapes3D(cut, **SHAPES)
    cut.write_bytes(b"PK\3\4 something else")
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        Shapes3D(cut, **SHAPES)
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["pictures"] = images
    with pytest.raises(ValueError, match=r"holds \['pictures'\], but no 'images'"):
        Shapes3D(tmp_path / "bare.h5", **SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, x: (i[:-1], x), "holds 863 pictures, but 864 labels"),
        (lambda i, x: (i[:-1], x[:-1]), "863 labels, but their values span 4 x 3 x 4 x 3 x 2 x 3 = 864"),
        (lambda i, x: (i, np.concatenate([x[:-1], x[:1]])), r"the states \[3, 2, 3, 2, 1, 2\] never come"),
        (lambda i, x: (i, x[:, :5]), r"labels \[864, 5\], expected \[N, 6\]: floor_hue"),
        (lambda i, x: (i, np.where(x == 0.1, np.nan, x)), "expected finite numbers"),
        (lambda i, x: (i / np.float32(255), x), "expected uint8 pictures"),
        (lambda i, x: (i[..., 0], x), "expected uint8 pictures"),
    ],
)
def test_shapes3d_labels_that_do_not_match(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes3D(write_shapes(tmp_path / "x.h5", *change(*shapes_arrays())), **SHAPES)


# --- DSprites ---------------------------------------------------------------------------------------------------------

SPRITE_SETTINGS = {"steps": 2}


def show_sprites(states: torch.Tensor) -> torch.Tensor:
    pictures = torch.zeros(*states.shape[:-1], 25)
    pictures[..., :20] = ((states[..., None] >> torch.arange(4)) & 1).flatten(-2).float()
    return pictures.view(*states.shape[:-1], 1, 5, 5)


def test_dsprites(tmp_path: Path) -> None:
    data = DSprites(write_sprites(tmp_path / "d.npz"), **SPRITE_SETTINGS)
    assert data.factor_names == ("shape", "scale", "orientation", "pos_x", "pos_y")
    assert data.factor_sizes == SPRITES[1:]
    assert data.flow_names == ("scale", "orientation", "pos_x", "pos_y")
    assert data.values[0].tolist() == [1, 2, 3]
    assert data.values[2].tolist() == pytest.approx(np.linspace(0, 2 * np.pi, 5).tolist())
    assert data._store.bits.shape == (1350, 4)  # a bit a pixel
    check_sequences(data, show_sprites)
    check_splits(lambda split: DSprites(tmp_path / "d.npz", split, **SPRITE_SETTINGS))
    check_splits(lambda split: DSprites(tmp_path / "d.npz", split, vary=("scale",), steps=2))
    assert set(DSprites(tmp_path / "d.npz", "test", **SPRITE_SETTINGS)._edge) == {3, 4}


def test_dsprites_strides(tmp_path: Path) -> None:
    data = DSprites(write_sprites(tmp_path / "d.npz"), stride={"pos_x": 2, "pos_y": 2}, **SPRITE_SETTINGS)
    check_sequences(data, show_sprites)
    torch.testing.assert_close(data[0, 2]["factors"][:, 3].diff(), torch.full((2,), 0.4))


def test_dsprites_damaged_or_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dsprites_ndarray.*\.npz is missing.*github\.com"):
        DSprites(tmp_path)
    whole = write_sprites(tmp_path / "d.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole npz file"):
        DSprites(cut)
    with zipfile.ZipFile(tmp_path / "d.npz") as archive:
        entry = archive.getinfo("imgs.npy")
        start = entry.header_offset + 30 + len("imgs.npy") + 40
    cut.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    with pytest.raises(ValueError, match="'imgs' cannot be read"):
        DSprites(cut)
    np.savez(cut, imgs=sprite_arrays()["imgs"])
    with pytest.raises(ValueError, match=r"holds \['imgs'\], but no 'latents_classes'"):
        DSprites(cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imgs": sprite_arrays()["imgs"][:-1]}, "holds 1,349 pictures, but 1,350 labels"),
        ({"imgs": sprite_arrays()["imgs"] * 255}, "other than 0 and 1"),
        ({"imgs": sprite_arrays()["imgs"].astype(float)}, "expected uint8 pictures"),
        ({"latents_values": sprite_arrays()["latents_values"][:-1]}, "1,350 latents_classes, but 1,349 latents_values"),
        ({"latents_values": np.roll(sprite_arrays()["latents_values"], 1, axis=0)}, "contradict each other in shape"),
        ({"latents_classes": sprite_arrays()["latents_classes"][:, :5]}, "expected \\[N, 6\\]: colour, shape"),
        ({"latents_classes": sprite_arrays()["latents_classes"][:, ::-1]}, "several colours"),
    ],
)
def test_dsprites_labels_that_do_not_match(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSprites(write_sprites(tmp_path / "d.npz", **changes), **SPRITE_SETTINGS)


@pytest.mark.parametrize("cls", [Shapes3D, DSprites, SmallNORB])
def test_a_download_with_another_checksum_is_refused(cls, tmp_path: Path) -> None:
    served = tmp_path / "server"
    served.mkdir()
    for name in ("3dshapes.h5", "dsprites.npz", "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz"):
        (served / name).write_bytes(b"not what it should be")
    address = {Shapes3D: "3dshapes.h5", DSprites: "dsprites.npz", SmallNORB: ""}[cls]
    with pytest.raises(ConnectionError, match=r"MD5 .*, expected"):
        cls(tmp_path / "root", download=True, mirrors=[f"{served.as_uri()}/{address}"])
    assert list((tmp_path / "root").iterdir()) == []


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shapes(tmp_path / "3dshapes.h5", *shapes_arrays())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"flowfactor\[data\]"):
        Shapes3D(path)
