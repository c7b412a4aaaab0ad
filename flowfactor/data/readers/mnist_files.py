"""Finding and reading the files of MNIST and the data sets of its format, under the names that they come by."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from flowfactor.data.readers.formats import BROKEN
from flowfactor.data.readers.idx import read_idx
from flowfactor.data.readers.image_stores import read_member

_PREFIX = {"train": "train", "test": "t10k"}
_NPZ = {"images-idx3": "imgs", "labels-idx1": "labels"}


def find_file(root: Path, split: str, kind: str, variant: str | None) -> Path | None:
    """Finds the file of a split.

    Args:
        root: The folder, or the one in which torchvision made ``MNIST/raw`` or its like.
        split: ``"train"`` or ``"test"``.
        kind: ``"images-idx3"`` or ``"labels-idx1"``.
        variant: Which of EMNIST's splits, such as ``"letters"``; needed where there are several.

    Returns:
        The file, or None where there is none.

    Raises:
        ValueError: If there are several that it could be.
    """
    inner = sorted(root.glob("*/raw")) if root.is_dir() else []
    inner.sort(key=lambda folder: folder.parent.name != "MNIST")
    found = [(folder, file) for folder in (root, root / "raw", *inner) if (file := _in(folder, split, kind, variant))]
    if not found:
        return None
    first = found[0][0]
    if first in inner and first.parent.name != "MNIST" and len(found) > 1:
        names = ", ".join(str(folder) for folder, _ in found)
        raise ValueError(f"{root} holds several data sets of MNIST's format: give root= one of {names}")
    return found[0][1]


def _in(folder: Path, split: str, kind: str, variant: str | None) -> Path | None:
    name = f"{_PREFIX[split]}-{kind}-ubyte"
    dotted = name.replace("-idx", ".idx")
    names = [f"{name}.gz", name, dotted, f"{dotted}.gz", f"kmnist-{split}-{_NPZ[kind]}.npz"]
    if variant is None:
        for spelling in names:
            if (folder / spelling).is_file():
                return folder / spelling
    files = sorted(folder.glob(f"emnist-{variant or '*'}-{split}-{kind}-ubyte*")) if folder.is_dir() else []
    by_variant = {file.name.split("-")[1]: file for file in files if file.suffix in ("", ".gz")}
    if len(by_variant) > 1:
        raise ValueError(f"{folder} holds several of EMNIST's splits ({', '.join(by_variant)}): choose one by variant=")
    return next(iter(by_variant.values()), None)


def seen(root: Path) -> str:
    """Says what a folder holds, and its folders one level down.

    Args:
        root: The folder.

    Returns:
        In words, for the message that something is not there.
    """
    if root.is_file():
        return "it is a file, not a folder"
    if not root.is_dir():
        return "there is no such folder"
    entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    told = [f"it holds {_some(entries)}"]
    told += [f"{folder.name}/ holds {_some(sorted(folder.iterdir()))}" for folder in folders[:3]]
    return "; ".join(told)


def _some(entries: list[Path]) -> str:
    names = [entry.name + "/" * entry.is_dir() for entry in entries]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


def read_values(path: Path) -> Tensor:
    """Reads the values of a file that `find_file` found, upright.

    Args:
        path: The file.

    Returns:
        The values.

    Raises:
        OSError: If it may not be read.
        ValueError: If it is damaged.
    """
    if path.suffix != ".npz":
        values = read_idx(path)
        # EMNIST's pictures lie on their side.
        return values.transpose(1, 2).contiguous() if path.name.startswith("emnist-") and values.ndim == 3 else values
    with path.open("rb"):  # whose errors of access name the file
        pass
    try:
        with zipfile.ZipFile(path) as archive:
            return torch.from_numpy(read_member(archive, "arr_0"))
    except BROKEN as error:
        told = str(error) if str(path) in str(error) else f"{path} is not a whole npz file: {error}"
        raise ValueError(told) from error
