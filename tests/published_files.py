"""Small files of the true formats of published data sets: Shapes3D, dSprites, Falcor3D, Isaac3D and small NORB."""

from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path

import numpy as np

from flowfactor.data import Falcor3D, Isaac3D


def grid(*sizes: int) -> np.ndarray:
    """The states of every combination, in the row-major order of the published files."""
    return np.array(list(itertools.product(*map(range, sizes))))


SIZES = (4, 3, 4, 3, 2, 3)


def shapes_arrays() -> tuple[np.ndarray, np.ndarray]:
    states = grid(*SIZES)
    images = np.zeros((len(states), 6, 4, 3), dtype=np.uint8)
    images[:, :, 1, 2] = states * 50 + 3
    values = [np.arange(n) / 10 for n in SIZES[:3]]
    values += [np.linspace(0.75, 1.25, 3), np.arange(2.0), np.linspace(-30, 30, 3)]
    return images, np.stack([value[states[:, f]] for f, value in enumerate(values)], 1)


def write_shapes(path: Path, images: np.ndarray, labels: np.ndarray, **storage) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **storage)
        file.create_dataset("labels", data=labels)
    return path


SPRITES = (1, 3, 3, 5, 6, 5)


def sprite_arrays() -> dict[str, np.ndarray]:
    classes = grid(*SPRITES)
    pixels = np.arange(25)
    # Binary numbers of the states, spread over the picture: different states, different pictures.
    code = np.concatenate([(classes[:, f : f + 1] >> np.arange(4)) & 1 for f in range(1, 6)], 1)
    images = np.zeros((len(classes), 5, 5), dtype=np.uint8)
    images.reshape(-1, 25)[:, pixels[:20]] = code
    values = [np.ones(1), np.arange(1.0, 4), np.linspace(0.5, 1, 3), np.linspace(0, 2 * np.pi, 5)]
    values += [np.linspace(0, 1, 6), np.linspace(0, 1, 5)]
    latents = np.stack([value[classes[:, f]] for f, value in enumerate(values)], 1)
    return {"imgs": images, "latents_classes": classes, "latents_values": latents}


def write_sprites(path: Path, **changes) -> Path:
    metadata = np.array({"title": "dSprites", "latents_names": ("color", "shape")}, dtype=object)
    np.savez_compressed(path, metadata=metadata, **{**sprite_arrays(), **changes})
    return path


RENDERED = {
    "falcor": (Falcor3D, (2, 3, 3, 2, 2, 2, 2), "train-rec.labels", "Falcor3D_down128"),
    "isaac": (Isaac3D, (2, 3, 3, 2, 2, 1, 2, 2, 2), "labels.npy", "Isaac3D_down128"),
}


def write_rendered(folder: Path, name: str) -> Path:
    from PIL import Image

    _, sizes, labels, _ = RENDERED[name]
    states = grid(*sizes)
    (folder / "images").mkdir(parents=True)
    with (folder / labels).open("wb") as file:  # np.save adds an ending to a name
        np.save(file, states / np.maximum(np.array(sizes) - 1, 1))
    for n, row in enumerate(states):
        picture = np.zeros((3, 5, 3), dtype=np.uint8)
        picture.reshape(-1)[: len(row)] = row * 60 + 1
        Image.fromarray(picture).save(folder / "images" / f"{n:06}.png")
    return folder


NORB = {"training": (4, 6, 7), "testing": (0, 1, 5)}
PREFIX = {"training": "smallnorb-5x46789x9x18x6x2x96x96", "testing": "smallnorb-5x01235x9x18x6x2x96x96"}


def write_matrix(path: Path, array: np.ndarray, magic: int) -> None:
    shape = [*array.shape, *[1] * (3 - array.ndim)]
    header = struct.pack(f"<II{len(shape)}i", magic, array.ndim, *shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_norb(root: Path, ending: str = "") -> Path:
    for part, instances in NORB.items():
        rows = np.array(list(itertools.product(range(2), instances, range(3), range(0, 8, 2), range(2))))
        rows = rows[np.random.default_rng(0).permutation(len(rows))].astype(
            "<i4"
        )  # as in the published files: shuffled
        pictures = np.zeros((len(rows), 2, 4, 6), dtype=np.uint8)
        pictures[:, 0, 1, :5] = rows
        pictures[:, 1, 2, :5] = rows
        name = f"{PREFIX[part]}-{part}"
        write_matrix(root / f"{name}-dat.mat{ending}", pictures, 0x1E3D4C55)
        write_matrix(root / f"{name}-cat.mat{ending}", rows[:, 0].copy(), 0x1E3D4C54)
        write_matrix(root / f"{name}-info.mat{ending}", rows[:, 1:].copy(), 0x1E3D4C54)
    return root
