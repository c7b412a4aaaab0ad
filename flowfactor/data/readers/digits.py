"""Scikit-learn's digits as sequences: real handwriting that needs no download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flowfactor.data.colours import Colour
from flowfactor.data.readers.mnist import default_transforms
from flowfactor.data.starts import check_start
from flowfactor.data.transformed import TransformedImages, TransformRange
from flowfactor.errors import require

_TEST = 297


class Digits(TransformedImages):
    """The 1,797 handwritten digits that come with scikit-learn, as sequences like MNIST's.

    The 8x8 digits are enlarged by bicubic interpolation to 20 rows, sharpened by a contrast curve so that strokes are
    strokes again, and set into the middle of 28x28 pixels, as MNIST's are. Small, real, and there without a network:
    for tests, examples and a first look.

    The split is fixed: 1,500 digits for training and 297 for testing, every class in proportion.

    Args:
        split: ``"train"``, ``"test"`` or ``"all"``.
        transforms: As in `TransformedImages`; by default `paper_transforms` (scaling, rotation, colouring).
        steps: Number T of steps; a sequence has T + 1 frames.
        colour: Colour of the digits. None leaves them grey, and the colouring out of the default transformations.
        start: ``"first"``, the digit as it is, or ``"any"``, a random state of all transformations: as in
            `TransformedImages`. Digits are by default scaled by 1/1.8 to 1.8, turned by any angle and of any hue.
        direction: ``"forward"``, ``"both"`` or ``"backward"``, likewise.
        ranges: Ranges of amounts for ``start="any"``, likewise.

    Attributes:
        labels: The digits' classes [N], int64.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If an argument is wrong.

    Example:
        >>> data = Digits("test")
        >>> len(data), data.image_shape, data.flow_names
        (297, (3, 28, 28), ('scaling', 'rotation', 'colouring'))
        >>> data.batch([0, 1], k=2)["frames"].shape
        torch.Size([2, 9, 3, 28, 28])
    """

    def __init__(
        self,
        split: Literal["train", "test", "all"] = "train",
        *,
        transforms: Mapping[str, TransformRange] | Sequence[TransformRange] | None = None,
        steps: int = 8,
        colour: Colour | None = "red",
        start: Literal["first", "any"] = "first",
        direction: Literal["forward", "both", "backward"] = "forward",
        ranges: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        check_start(start, direction)
        if split not in ("train", "test", "all"):
            raise ValueError(f"split is 'train', 'test' or 'all', got {split!r}")
        source = require("sklearn.datasets", extra="data").load_digits()
        pictures, classes = torch.tensor(source.images), torch.tensor(source.target)
        chosen = _split(classes, split)
        transforms = default_transforms(steps, colour, start) if transforms is None else transforms
        self.split = split
        enlarged, running = _enlarge(pictures[chosen] / 16), {"start": start, "direction": direction, "ranges": ranges}
        super().__init__(enlarged, transforms, steps, colour=colour, labels=classes[chosen], **running)


def _split(classes: Tensor, split: str) -> Tensor:
    """Gives the indices of a split, ascending: the test digits stand evenly spaced in the list sorted by class."""
    everything = torch.arange(len(classes))
    test = classes.argsort(stable=True)[torch.arange(_TEST) * len(classes) // _TEST]
    if split == "test":
        return test.sort().values
    return everything if split == "all" else everything[~torch.isin(everything, test)]


def _enlarge(digits: Tensor) -> Tensor:
    """Makes 28x28 pictures, uint8, of 8x8 digits in [0, 1]."""
    padded = F.pad(digits.float().unsqueeze(1), (2, 2, 2, 2))
    # 3 pixels across and 2.5 down for one: the digits are narrow in their 8x8 pixels, and MNIST's less so in theirs.
    large = F.interpolate(padded, size=(30, 36), mode="bicubic", align_corners=False)[..., 1:-1, 4:-4]
    sharp = ((large - 0.64) * 2.2 + 0.5).clamp(0, 1)
    smooth = sharp * sharp * (3 - 2 * sharp)
    return (smooth * 255).round().to(torch.uint8)
