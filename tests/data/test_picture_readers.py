"""Readers of Falcor3D, Isaac3D and small NORB, on small files of the true formats."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_files import PREFIX, RENDERED, write_matrix, write_norb, write_rendered
from reader_checks import check_sequences, check_splits

from flowfactor.data import Falcor3D, SmallNORB
from flowfactor.data.readers.norb import read_binary_matrix


def show_rendered(states: torch.Tensor) -> torch.Tensor:
    pictures = torch.zeros(*states.shape[:-1], 45)
    pictures[..., : states.shape[-1]] = (states * 60 + 1) / 255
    return pictures.view(*states.shape[:-1], 3, 5, 3).movedim(-1, -3)


@pytest.fixture(scope="module", params=["falcor", "isaac"])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name = request.param
    cls, sizes, labels, folder = RENDERED[name]
    root = tmp_path_factory.mktemp(name)
    write_rendered(root / folder, name)
    vary = {"falcor": None, "isaac": ("robot_x", "robot_y", "wall_colour")}[name]
    return cls, sizes, labels, root, root / folder, {"vary": vary, "steps": 1}


def test_rendered(rendered, tmp_path: Path) -> None:
    cls, sizes, _, root, folder, settings = rendered
    for place in (root, folder):  # the folder itself, or the one that it is in
        data = cls(place, "all", **settings)
        assert data.factor_sizes == sizes
        assert data.image_shape == (3, 3, 5)
        check_sequences(data, show_rendered)
    check_sequences(cls(root, "test", cache=tmp_path / "copy.npy", **settings), show_rendered)
    check_splits(lambda split: cls(root, split, **settings))


def test_rendered_defaults(rendered) -> None:
    cls, _, _, root, _, _ = rendered
    if cls is Falcor3D:
        assert cls(root, "all", steps=1).num_flows == 7
        assert set(cls(root, steps=1)._edge) == {1, 2}
    else:
        with pytest.raises(ValueError, match="robot_x has 3 states, but a sequence of 3 steps runs over 4"):
            cls(root)


def test_rendered_damaged_or_missing(rendered, tmp_path: Path) -> None:
    cls, _, labels, _, folder, settings = rendered
    with pytest.raises(FileNotFoundError, match=rf"{labels} is missing.*{folder.name}\.zip.*github\.com/NVlabs"):
        cls(tmp_path)
    (tmp_path / labels).write_bytes((folder / labels).read_bytes())
    with pytest.raises(FileNotFoundError, match="images is not a folder"):
        cls(tmp_path, **settings)
    (tmp_path / "images").mkdir()
    pictures = sorted((folder / "images").iterdir())
    for picture in pictures[:-2]:
        (tmp_path / "images" / picture.name).write_bytes(picture.read_bytes())
    with pytest.raises(FileNotFoundError, match=f"lacks 2 of the {len(pictures)} pictures.*{pictures[-2].name}"):
        cls(tmp_path, **settings)
    for picture in pictures[-2:]:
        (tmp_path / "images" / picture.name).write_bytes(picture.read_bytes())
    cls(tmp_path, **settings)
    last = tmp_path / "images" / pictures[-1].name
    Image.new("RGB", (9, 9)).save(last)
    with pytest.raises(ValueError, match=f"{last.name} has 9 x 9 pixels, but 000000.png 5 x 3"):
        cls(tmp_path, **settings)
    last.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        cls(tmp_path, **settings)
    last.write_bytes(pictures[-1].read_bytes())
    Image.new("RGB", (5, 3)).save(tmp_path / "images" / f"{len(pictures):06}.png")
    with pytest.raises(ValueError, match="but there are labels of"):
        cls(tmp_path, **settings)
    (tmp_path / labels).write_bytes((folder / labels).read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole NumPy file"):
        cls(tmp_path, **settings)
    (tmp_path / labels).write_bytes(b"a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a whole NumPy file"):
        cls(tmp_path, **settings)


# --- SmallNORB --------------------------------------------------------------------------------------------------------

NORB_SETTINGS = {"steps": 2, "vary": ("elevation", "azimuth")}


def show_norb(data: SmallNORB, row: int):
    def shown(states: torch.Tensor) -> torch.Tensor:
        pictures = torch.zeros(*states.shape[:-1], 1, 4, 6)
        pictures[..., 0, row, :5] = data.factors(states).float() / 255
        return pictures

    return shown


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_norb(tmp_path: Path, ending: str, split: str) -> None:
    write_norb(tmp_path, ending)
    data = SmallNORB(tmp_path, split, **NORB_SETTINGS)
    assert data.split == split
    assert data.factor_names == ("category", "instance", "elevation", "azimuth", "lighting")
    assert data.factor_sizes == (2, 6 if split == "all" else 3, 3, 4, 2)
    assert data.image_shape == (1, 4, 6)
    check_sequences(data, show_norb(data, 1))
    check_sequences(SmallNORB(tmp_path, split, camera="right", **NORB_SETTINGS), show_norb(data, 2))


def test_norb_splits_by_object(tmp_path: Path) -> None:
    write_norb(tmp_path)
    check_splits(lambda split: SmallNORB(tmp_path, split, **NORB_SETTINGS))
    assert SmallNORB(tmp_path, "train", **NORB_SETTINGS).values[1].tolist() == [4, 6, 7]
    assert SmallNORB(tmp_path, "test", **NORB_SETTINGS).values[1].tolist() == [0, 1, 5]
    every = torch.arange(144)
    azimuth = SmallNORB(tmp_path, wrap=False, **NORB_SETTINGS).states(every, torch.ones_like(every))[..., 3]
    assert {tuple(row) for row in azimuth.tolist()} == {(0, 1, 2), (1, 2, 3)}


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_norb_damaged_or_missing(tmp_path: Path, ending: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no smallnorb-5x46789.*training-dat\.mat.*download=True.*cs\.nyu\.edu"
    ):
        SmallNORB(tmp_path)
    for name, value in (("split", "val"), ("camera", "both")):
        with pytest.raises(ValueError, match=f"{name} is '"):
            SmallNORB(tmp_path, **{name: value})
    write_norb(tmp_path, ending)
    dat = tmp_path / f"{PREFIX['training']}-training-dat.mat{ending}"
    whole = dat.read_bytes()
    dat.write_bytes(whole[:-30])
    with pytest.raises(
        ValueError, match="damaged gzip" if ending else r"takes 6,912 bytes after the header, found only"
    ):
        SmallNORB(tmp_path, **NORB_SETTINGS)
    content = gzip.decompress(whole) if ending else whole
    for bad, message in (
        (content + b"x", "found more"),
        (b"\x93NUMPY" + content, "not a binary matrix: it begins with 93 4e 55 4d"),
        (content[:20], "does not give them"),
        (b"", "not a binary matrix: it begins with nothing"),
        (struct.pack("<II4i", 0x1E3D4C55, 4, 144, 2, -1, 6), r"the shape is \[144, 2, -1, 6\]"),
    ):
        dat.write_bytes(gzip.compress(bad) if ending else bad)
        with pytest.raises(ValueError, match=message):
            SmallNORB(tmp_path, **NORB_SETTINGS)


def test_norb_labels_that_do_not_match(tmp_path: Path) -> None:
    write_norb(tmp_path)
    name = f"{PREFIX['training']}-training"
    cat, info = tmp_path / f"{name}-cat.mat", tmp_path / f"{name}-info.mat"
    categories, infos = np.array(read_binary_matrix(cat)), np.array(read_binary_matrix(info))
    for wrong, message in (
        (categories[:-1], "holds 144 pictures, but .*cat.mat 143 labels"),
        (np.roll(categories, 1), "never come and others come twice"),
        (categories[:, None], r"expected integers \[N\]"),
    ):
        write_matrix(cat, wrong, 0x1E3D4C54)
        with pytest.raises(ValueError, match=message):
            SmallNORB(tmp_path, **NORB_SETTINGS)
    write_matrix(cat, categories, 0x1E3D4C54)
    write_matrix(info, infos[:, :3].copy(), 0x1E3D4C54)
    with pytest.raises(ValueError, match="instance, elevation, azimuth, lighting"):
        SmallNORB(tmp_path, **NORB_SETTINGS)
