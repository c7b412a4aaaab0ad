"""Falcor3D and Isaac3D: rendered scenes, as folders of pictures with an array of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from flowfactor.data.factors import Stride
from flowfactor.data.readers.download import data_root
from flowfactor.data.readers.formats import load_npy
from flowfactor.data.readers.image_stores import PictureFolder
from flowfactor.data.readers.stored_factors import StoredFactors

_WHERE = "https://github.com/NVlabs/High-res-disentanglement-datasets"


class _Rendered(StoredFactors):
    _name: ClassVar[str]
    _folder: ClassVar[str]
    _label_file: ClassVar[str]
    _factors: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        *,
        vary: Sequence[str] | None,
        steps: int,
        stride: Stride,
        held_out: float,
        cache: str | Path | None,
        t: Tensor | Sequence[float] | None,
    ) -> None:
        base = data_root(root, self._name)
        nested = base / self._folder
        self.root = nested if nested.is_dir() and not (base / self._label_file).is_file() else base
        labels = self._read_labels()
        self._set_up(
            PictureFolder(self.root / "images", len(labels)),
            labels,
            self._factors,
            self.root / self._label_file,
            cache=cache,
            vary=self._factors if vary is None else vary,
            steps=steps,
            split=split,
            held_out=held_out,
            t=t,
            stride=stride,
        )

    def _read_labels(self) -> np.ndarray:
        path = self.root / self._label_file
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. Unpack {self._folder}.zip, which {_WHERE} leads to, and give root= the folder "
                f"{self._folder} (with {self._label_file} and images/000000.png, ...), or set "
                f"FLOWFACTOR_{self._name.upper()} to it."
            )
        labels = load_npy(path)
        if labels.ndim != 2:
            raise ValueError(f"{path} does not hold an array of labels [N, {len(self._factors)}]")
        return labels


class Falcor3D(_Rendered):
    """Falcor3D as sequences in which one factor moves and all others hold exactly.

    233,280 pictures of a living room: every combination of the light's intensity (5), its direction (x, y, z; 6 each)
    and the camera's position (x, y, z; 6 each). Source: Nie et al., *Semi-Supervised StyleGAN for Disentanglement
    Learning*, ICML 2020; https://github.com/NVlabs/High-res-disentanglement-datasets leads to the file
    ``Falcor3D_down128.zip``, whose layout this reads: ``train-rec.labels`` (a NumPy array [N, 7] of values from 0 to 1)
    and ``images/000000.png``, ... in the order of the labels.

    Pictures are decoded when a batch asks for them; `cache` copies them, once, into one uncompressed file (11.5 GB at
    128x128), from which they are read many times as fast.

    By default all seven factors move, as in Song et al., NeurIPS 2023, over 5 of their states; so the test split holds
    out edges: scenes in which the light's x or y direction is the lowest (31% of all); see `FactorSequences`.

    Args:
        root: The folder ``Falcor3D_down128``, or the one that it is in. None takes the environment variable
            ``FLOWFACTOR_FALCOR3D``, else ``~/.cache/flowfactor/falcor3d``.
        split: ``"train"``, ``"test"`` or ``"all"``.
        vary: Names of the K factors that move, in the order of k: light_intensity, light_x, light_y, light_z, camera_x,
            camera_y or camera_z. None is all.
        steps: Number T of steps; a sequence has T + 1 frames.
        stride: States per step, one for all factors or by name.
        held_out: Share of the scenes that the test split holds out.
        cache: Path of the uncompressed copy, an ``.npy`` file, made if it is not there.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Raises:
        ImportError: If Pillow is not installed.
        FileNotFoundError: If the labels or a picture are missing; the message says where to get them.
        ValueError: If the labels cannot be read or do not match the pictures, the pictures are not of one size, or an
            argument is wrong.

    Example:
        >>> data = Falcor3D("data/Falcor3D_down128", "test")  # doctest: +SKIP
        >>> data.batch([0, 1, 2], k=0)["frames"].shape  # doctest: +SKIP
        torch.Size([3, 5, 3, 128, 128])
    """

    _name, _folder, _label_file = "falcor3d", "Falcor3D_down128", "train-rec.labels"
    _factors = ("light_intensity", "light_x", "light_y", "light_z", "camera_x", "camera_y", "camera_z")

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test", "all"] = "train",
        *,
        vary: Sequence[str] | None = None,
        steps: int = 4,
        stride: Stride = 1,
        held_out: float = 0.2,
        cache: str | Path | None = None,
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(root, split, vary=vary, steps=steps, stride=stride, held_out=held_out, cache=cache, t=t)


class Isaac3D(_Rendered):
    """Isaac3D as sequences in which one factor moves and all others hold exactly.

    737,280 pictures of a robot arm in a kitchen: every combination of the object's shape (3), the arm's position across
    (8) and in height (5), the camera's height (4), the object's scale (4), the light's intensity (4) and direction (6),
    and the colours of object and wall (4 each). Source: Nie et al., *Semi-Supervised StyleGAN for Disentanglement
    Learning*, ICML 2020; https://github.com/NVlabs/High-res-disentanglement-datasets leads to the file
    ``Isaac3D_down128.zip``, whose layout this reads: ``labels.npy`` [N, 9] of values from 0 to 1 and
    ``images/000000.png``, ... in the order of the labels.

    Pictures are decoded when a batch asks for them; `cache` copies them, once, into one uncompressed file (36 GB at
    128x128), from which they are read many times as fast.

    By default the eight factors other than the shape move, as in Song et al., NeurIPS 2023, but over 4 states and not
    5, since most have no more. The test split holds out edges: scenes in which the arm is leftmost or the light's
    direction the lowest (27% of all); see `FactorSequences`.

    Args:
        root: The folder ``Isaac3D_down128``, or the one that it is in. None takes the environment variable
            ``FLOWFACTOR_ISAAC3D``, else ``~/.cache/flowfactor/isaac3d``.
        split: ``"train"``, ``"test"`` or ``"all"``.
        vary: Names of the K factors that move, in the order of k: object_shape, robot_x, robot_y, camera_height,
            object_scale, light_intensity, light_y, object_colour or wall_colour. None is all but the shape.
        steps: Number T of steps; a sequence has T + 1 frames.
        stride: States per step, one for all factors or by name.
        held_out: Share of the scenes that the test split holds out.
        cache: Path of the uncompressed copy, an ``.npy`` file, made if it is not there.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.

    Raises:
        ImportError: If Pillow is not installed.
        FileNotFoundError: If the labels or a picture are missing; the message says where to get them.
        ValueError: If the labels cannot be read or do not match the pictures, the pictures are not of one size, or an
            argument is wrong.

    Example:
        >>> data = Isaac3D("data/Isaac3D_down128", vary=("robot_x", "light_y"), steps=5)  # doctest: +SKIP
        >>> data.batch([0, 1, 2], k=1)["frames"].shape  # doctest: +SKIP
        torch.Size([3, 6, 3, 128, 128])
    """

    _name, _folder, _label_file = "isaac3d", "Isaac3D_down128", "labels.npy"
    _factors = (
        "object_shape",
        "robot_x",
        "robot_y",
        "camera_height",
        "object_scale",
        "light_intensity",
        "light_y",
        "object_colour",
        "wall_colour",
    )

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "test", "all"] = "train",
        *,
        vary: Sequence[str] | None = None,
        steps: int = 3,
        stride: Stride = 1,
        held_out: float = 0.2,
        cache: str | Path | None = None,
        t: Tensor | Sequence[float] | None = None,
    ) -> None:
        vary = self._factors[1:] if vary is None else vary
        super().__init__(root, split, vary=vary, steps=steps, stride=stride, held_out=held_out, cache=cache, t=t)
