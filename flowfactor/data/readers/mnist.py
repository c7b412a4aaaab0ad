"""MNIST, and whatever comes in its format, as sequences of coloured digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowfactor.data.colours import Colour
from flowfactor.data.compose import Compose
from flowfactor.data.factors import checked_names
from flowfactor.data.readers.download import data_root, download_file
from flowfactor.data.readers.mnist_files import find_file, read_values, seen
from flowfactor.data.starts import Start, check_start
from flowfactor.data.transformed import TransformedImages, TransformRange
from flowfactor.data.transforms import Hue, Perspective, Rotate, Scale

MNIST_MIRRORS: tuple[str, ...] = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
"""Where MNIST is downloaded from: each is tried in turn."""

MNIST_MD5: dict[str, str] = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""MD5 checksums of MNIST's four files."""

_PREFIX = {"train": "train", "test": "t10k"}


def paper_transforms(
    steps: int = 8, names: Sequence[str] = ("scaling", "rotation", "colouring"), *, start: Start = "first"
) -> dict[str, TransformRange]:
    """Gives the transformations of the paper's coloured digits.

    From one frame to the next, scaling grows by 0.1 from 1, rotation by 10 degrees and hue by 20 degrees: at 8 steps,
    1.0 to 1.8, 0 to 80 and 0 to 160. Longer sequences go on at the same pace, so that a step means the same everywhere.
    Beside these three there are ``rotation+hue``, both at these paces under one amount, and ``perspective``, a turn
    about the vertical axis by 7.5 degrees from one frame to the next.
    Source: Song et al., *Flow Factorized Representation Learning*, NeurIPS 2023, experiments on MNIST.

    Args:
        steps: Number T of steps.
        names: Which of the five, in the order of k.
        start: ``"any"`` for sequences that begin anywhere, in which scaling goes by equal ratios: 1.0 to 1.8 at 8 steps, by
            a factor of 1.8^(1/8) from one frame to the next.

    Returns:
        ``{"scaling": ..., "rotation": ..., "colouring": ...}``, as `TransformedImages` takes it.

    Raises:
        ValueError: If a name is unknown, or a perspective of so many steps would be seen edge on.

    Example:
        >>> paper_transforms(8)["rotation"][1:]
        (0.0, 80.0)
        >>> list(paper_transforms(8, ("perspective", "rotation+hue")))
        ['perspective', 'rotation+hue']
    """
    known: dict[str, TransformRange] = {
        "scaling": (Scale(), 1.0, 1.0 + 0.1 * steps)
        if start == "first"
        else (Scale("geometric"), 1.0, 1.8 ** (steps / 8)),
        "rotation": (Rotate(), 0.0, 10.0 * steps),
        "colouring": (Hue(), 0.0, 20.0 * steps),
        "rotation+hue": (Compose((Rotate(), 0.0, 10.0 * steps), (Hue(), 0.0, 20.0 * steps)), 0.0, 1.0),
        "perspective": (Perspective(), 0.0, 7.5 * steps),
    }
    if "perspective" in names and 7.5 * steps >= 90:
        raise ValueError(f"perspective turns by 7.5 degrees a step and must stay below 90, got {steps} steps")
    return {name: known[name] for name in checked_names(names, tuple(known), "names")}


def default_transforms(steps: int, colour: Colour | None, start: Start = "first") -> dict[str, TransformRange]:
    """Gives the paper's transformations of digits; grey ones have no hue to turn."""
    names = ("scaling", "rotation") if colour is None else ("scaling", "rotation", "colouring")
    return paper_transforms(steps, names, start=start)


class MNIST(TransformedImages):
    """MNIST as sequences: each digit, coloured red, is scaled, rotated or recoloured.

    Reads the four IDX files, gzipped or plain, from a folder: MNIST's own, or those of Fashion-MNIST, KMNIST or any
    other set of that format and naming; EMNIST's, whose pictures are turned upright; or KMNIST's ``.npz`` files. The
    folder may be the one in which torchvision made ``MNIST/raw``, ``FashionMNIST/raw`` or its like.

    Args:
        root: The folder. None takes the environment variable ``FLOWFACTOR_MNIST``, else ``~/.cache/flowfactor/mnist``.
        split: ``"train"`` or ``"test"``.
        transforms: As in `TransformedImages`; by default `paper_transforms` (scaling, rotation, colouring).
        steps: Number T of steps; a sequence has T + 1 frames.
        colour: Colour of the digits. None leaves them grey, and the colouring out of the default transformations.
        start: ``"first"``, the digit as it is, or ``"any"``, a random state of all transformations: as in
            `TransformedImages`. Digits are by default scaled by 1/1.8 to 1.8, turned by any angle and of any hue.
        direction: ``"forward"``, ``"both"`` or ``"backward"``, likewise.
        ranges: Ranges of amounts for ``start="any"``, likewise.
        download: Fetch the files of the split that are missing, from `mirrors`, and check their MD5.
        mirrors: Addresses of folders that hold MNIST's files, tried in turn.
        variant: Which of EMNIST's splits, such as ``"letters"``, where the folder holds several.

    Attributes:
        labels: The digits' classes [N], int64.

    Raises:
        FileNotFoundError: If the files are missing and `download` is False.
        ValueError: If a file is damaged, or images and labels do not belong together, or an argument is wrong.
        ConnectionError: If no mirror gave a file with the right checksum.

    Example:
        >>> data = MNIST(split="test", download=True)  # doctest: +SKIP
        >>> data.batch([0, 1, 2], k=1)["frames"].shape  # doctest: +SKIP
        torch.Size([3, 9, 3, 28, 28])
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test"] = "train",
        *,
        transforms: Mapping[str, TransformRange] | Sequence[TransformRange] | None = None,
        steps: int = 8,
        colour: Colour | None = "red",
        start: Literal["first", "any"] = "first",
        direction: Literal["forward", "both", "backward"] = "forward",
        ranges: Mapping[str, Sequence[float]] | None = None,
        download: bool = False,
        mirrors: Sequence[str] = MNIST_MIRRORS,
        variant: str | None = None,
    ) -> None:
        check_start(start, direction)
        if split not in _PREFIX:
            raise ValueError(f"split is 'train' or 'test', got {split!r}")
        self.split = split
        self.variant = variant
        self.root = data_root(root, "mnist")
        images, labels = (self._file(kind, download, mirrors) for kind in ("images-idx3", "labels-idx1"))
        pictures, classes = _read_pair(images, labels)
        transforms = default_transforms(steps, colour, start) if transforms is None else transforms
        running = {"start": start, "direction": direction, "ranges": ranges}
        super().__init__(pictures, transforms, steps, colour=colour, labels=classes, **running)

    def _file(self, kind: str, download: bool, mirrors: Sequence[str]) -> Path:
        found = find_file(self.root, self.split, kind, self.variant)
        if found is not None:
            return found
        name = f"{_PREFIX[self.split]}-{kind}-ubyte"
        if not download:
            raise FileNotFoundError(
                f"{self.root} holds no {name} (.gz or plain): {seen(self.root)}. Give root= the folder with MNIST's files, "
                "set FLOWFACTOR_MNIST to it, or let download=True fetch them."
            )
        target = self.root / f"{name}.gz"
        download_file(target, [f"{mirror.rstrip('/')}/{target.name}" for mirror in mirrors], md5=MNIST_MD5[target.name])
        return target


def _read_pair(image_path: Path, label_path: Path) -> tuple[Tensor, Tensor]:
    """Reads images [N, H, W] and labels [N], and checks that they belong together."""
    images, labels = read_values(image_path), read_values(label_path)
    if images.ndim != 3 or images.dtype != torch.uint8:
        raise ValueError(f"{image_path} holds {images.dtype} {list(images.shape)}, expected uint8 images [N, H, W]")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"{label_path} holds {labels.dtype} {list(labels.shape)}, expected integer labels [N]")
    if len(images) != len(labels):
        raise ValueError(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels")
    return images, labels.long()
