"""DSprites: white shapes on black, in an npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowfactor.data.factors import Stride
from flowfactor.data.readers.download import data_file
from flowfactor.data.readers.formats import BROKEN
from flowfactor.data.readers.image_stores import pack_member, read_member
from flowfactor.data.readers.stored_factors import StoredFactors

_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_URL = f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{_FILE}"
_MD5 = "7da33b31b13a06f4b04a70402ce90c2e"
_FACTORS = ("shape", "scale", "orientation", "pos_x", "pos_y")


class DSprites(StoredFactors):
    """Sequences of dSprites in which one factor moves and all others hold exactly.

    737,280 black and white pictures of 64x64 pixels: every combination of the shape (square, ellipse, heart), the scale
    (6), the orientation (40), and the position across and down (32 each). Source: Matthey, Higgins, Hassabis and
    Lerchner, *dSprites: Disentanglement testing Sprites dataset*, https://github.com/google-deepmind/dsprites-dataset,
    2017. The published file also has a colour, which is always white; it is no factor here.

    The pictures are kept at one bit a pixel, which takes 378 MB (as bytes they would take 3 GB). The last of the 40
    orientations is the first one again, after a whole turn; orientations do not wrap.

    With the default `vary` only the shape is held, of which there are three; so the test split holds out edges, scenes
    with the lowest positions; see `FactorSequences`.

    Args:
        root: The file or its folder. None takes the environment variable ``FLOWFACTOR_DSPRITES``, else
            ``~/.cache/flowfactor/dsprites``.
        split: ``"train"``, ``"test"`` or ``"all"``.
        vary: Names of the K factors that move, in the order of k: shape, scale, orientation, pos_x or pos_y.
        steps: Number T of steps; a sequence has T + 1 frames.
        stride: States per step, one for all factors or by name, such as ``{"pos_x": 4, "pos_y": 4}``.
        held_out: Share of the scenes that the test split holds out.
        download: Fetch the file (26 MB) if it is missing, and check its MD5.
        mirrors: Addresses of the file, tried in turn.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Raises:
        FileNotFoundError: If the file is missing and `download` is False.
        ValueError: If the file is no npz file, is truncated or of another format, if labels and images do not belong
            together, or an argument is wrong.
        ConnectionError: If no mirror gave the file with the right checksum.

    Example:
        >>> data = DSprites(download=True, stride={"pos_x": 4, "pos_y": 4})  # doctest: +SKIP
        >>> data.batch([0, 1, 2], k=3)["frames"].shape  # doctest: +SKIP
        torch.Size([3, 6, 1, 64, 64])
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test", "all"] = "train",
        *,
        vary: Sequence[str] = _FACTORS[1:],
        steps: int = 5,
        stride: Stride = 1,
        held_out: float = 0.2,
        download: bool = False,
        mirrors: Sequence[str] = (_URL,),
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        self.path = data_file(root, "dsprites", _FILE, urls=mirrors, md5=_MD5, download=download)
        with self.path.open("rb"):  # whose errors of access name the file
            pass
        try:
            archive = zipfile.ZipFile(self.path)
        except BROKEN as error:
            raise ValueError(
                f"{self.path} ({self.path.stat().st_size:,} bytes) is not a whole npz file: {error}. "
                "If it was cut short, fetch it again."
            ) from error
        with archive:
            classes, values = read_member(archive, "latents_classes"), read_member(archive, "latents_values")
            labels = _checked_labels(classes, values, self.path)
            store = pack_member(archive, "imgs")
        self._set_up(
            store,
            labels,
            _FACTORS,
            self.path,
            vary=vary,
            steps=steps,
            split=split,
            held_out=held_out,
            t=t,
            stride=stride,
            edges=_FACTORS[3:],
        )
        # The grid is one of classes; what each class means is in the values.
        first = [self._rows.reshape(self.factor_sizes).movedim(f, 0).flatten(1)[:, 0] for f in range(len(_FACTORS))]
        self.values = tuple(torch.from_numpy(values[rows.numpy(), f + 1]).double() for f, rows in enumerate(first))
        for f, (name, value) in enumerate(zip(_FACTORS, self.values, strict=True)):
            _, states = np.unique(labels[:, f], return_inverse=True)
            if not np.array_equal(value.numpy()[states], values[:, f + 1]):
                raise ValueError(f"{self.path}: latents_values and latents_classes contradict each other in {name}")


def _checked_labels(classes: np.ndarray, values: np.ndarray, path: Path) -> np.ndarray:
    """Gives the classes without the colour, of which there is one."""
    for name, array in (("latents_classes", classes), ("latents_values", values)):
        if array.ndim != 2 or array.shape[1] != 1 + len(_FACTORS) or array.dtype.kind not in "fiu":
            raise ValueError(
                f"{path}: {name!r} is {array.dtype} {list(array.shape)}, expected [N, 6]: colour, {', '.join(_FACTORS)}"
            )
    if classes.shape != values.shape:
        raise ValueError(f"{path} holds {len(classes):,} latents_classes, but {len(values):,} latents_values")
    if len(np.unique(classes[:, 0])) > 1:
        raise ValueError(f"{path} has several colours, expected white alone")
    return classes[:, 1:]
