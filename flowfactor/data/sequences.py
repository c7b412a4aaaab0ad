"""Anyone's recorded sequences, from arrays or from folders of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_range, check_times, to_unit
from flowfactor.data.folders import find_sequences, list_frames, read_sequences

Array: TypeAlias = Tensor | np.ndarray[Any, Any]


class Sequences(SequenceDataset):
    """Anyone's sequences of frames, with or without labels of what acts in them.

    Frames are kept in memory as they come (pictures and bytes as bytes).

    Args:
        source: One of

            - an array or tensor [N, T+1, H, W] or [N, T+1, C, H, W], uint8 or floating point in [0, 1];
            - a list of N such arrays, one a sequence;
            - a folder with a sub-folder of pictures for each sequence (sorted as people sort: frame2 before frame10);
            - a folder with one more level, ``root/<class>/<sequence>/<frame>.png``: the classes, sorted in the same
              way, are the transformations;
            - a list of N folders of pictures, one a sequence.
        k: Which transformation acts in each sequence [N], integers from 0. None takes the classes' folders, or leaves
            the sequences without labels: then every k is -1 and `num_flows` is 0.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.
        flow_names: Names of the transformations; by default the folders' names, or flow_0, flow_1, ...

    Attributes:
        frames: The frames [N, T+1, C, H, W].

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If the frames are not as described (dimensions, dtype, range, NaN, unequal lengths or sizes,
            unreadable pictures), or labels, names or times do not fit them.

    Example:
        >>> import numpy as np
        >>> data = Sequences(np.random.default_rng(0).random((6, 4, 16, 16)), k=[0, 0, 0, 1, 1, 1])
        >>> data.num_flows, data.num_steps, data.image_shape
        (2, 3, (1, 16, 16))
        >>> [batch["k"].tolist() for batch in data.batches(2)]
        [[0, 1], [0, 1], [0, 1]]
    """

    def __init__(
        self,
        source: Array | str | Path | Sequence[Array] | Sequence[str | Path],
        k: Tensor | np.ndarray[Any, Any] | Sequence[int] | None = None,
        t: Tensor | Sequence[float] | None = None,
        *,
        flow_names: Sequence[str] | None = None,
    ) -> None:
        self.frames, classes, names = _read(source)
        if k is None and classes is not None:
            k, flow_names = classes, names if flow_names is None else flow_names
        self._k, self.flow_names = _labels(k, flow_names, len(self.frames))
        self.t = check_times(t, self.frames.shape[1] - 1, self.frames.device)
        channels, height, width = self.frames.shape[2:]
        self.image_shape = (channels, height, width)

    _tensors = ("t", "frames")

    @property
    def fixed_k(self) -> Tensor:
        """The labels [N] (-1 without labels)."""
        return self._k

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.frames)

    def _select(self, indices: Tensor) -> None:
        self.frames, self._k = self.frames[indices], self._k[indices]

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        return {"frames": to_unit(self.frames[indices])}


def _read(source: Any) -> tuple[Tensor, list[int] | None, tuple[str, ...]]:
    """Reads any source: frames [N, T+1, C, H, W], and classes with their names where folders give them."""
    if isinstance(source, (str, Path)):
        files, classes, names = find_sequences(source)
        return _checked(read_sequences(files)), classes, names
    if not isinstance(source, (Tensor, np.ndarray)):
        source = list(source)
        if not source:
            raise ValueError("there are no sequences: the list is empty")
        if all(isinstance(part, (str, Path)) for part in source):
            return _checked(read_sequences([list_frames(folder) for folder in source])), None, ()
        source = _stacked([_tensor(part) for part in source])
    return _checked(_tensor(source)), None, ()


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    raise TypeError(
        f"sequences are an array, a folder, or a list of either, got {type(array).__name__} in place of an array"
    )


def _stacked(parts: list[Tensor]) -> Tensor:
    for n, part in enumerate(parts):
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            raise ValueError(
                f"sequence {n} is {part.dtype} {list(part.shape)}, but sequence 0 {parts[0].dtype} "
                f"{list(parts[0].shape)}: all must have as many frames, of one size and type"
            )
    if parts[0].ndim not in (3, 4):
        raise ValueError(f"each sequence of a list is [T+1, H, W] or [T+1, C, H, W], got {list(parts[0].shape)}")
    return torch.stack(parts)


def _checked(frames: Tensor) -> Tensor:
    if frames.ndim == 4:
        frames = frames.unsqueeze(2)
    if frames.ndim != 5 or not frames.numel():
        raise ValueError(
            f"frames must be [N, T+1, H, W] or [N, T+1, C, H, W] with at least one, got {list(frames.shape)}"
        )
    if frames.shape[-1] in (3, 4) and frames.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"frames {list(frames.shape)} look channels-last: permute them by (0, 1, 4, 2, 3) to [N, T+1, C, H, W]"
        )
    if frames.shape[1] < 2:
        raise ValueError("a sequence needs at least 2 frames, got 1")
    check_range(frames, "frames")
    return frames


def _labels(k: Any, names: Sequence[str] | None, count: int) -> tuple[Tensor, tuple[str, ...]]:
    """Checks labels and names: k [N] (-1 without labels) and K names."""
    if k is None:
        if names is not None:
            raise ValueError("flow_names were given, but no labels k to which they belong")
        return torch.full((count,), -1), ()
    labels = torch.as_tensor(k).cpu()
    if labels.shape != (count,):
        raise ValueError(f"there are {count} sequences, but the labels k have shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise ValueError(f"labels k must be integers from 0, got {labels.dtype} from {labels.min().item()}")
    flows = int(labels.max()) + 1 if names is None else len(names)
    names = [f"flow_{flow}" for flow in range(flows)] if names is None else names
    if int(labels.max()) >= flows:
        raise ValueError(f"labels k go up to {int(labels.max())}, but there are only {flows} flow_names")
    return labels.long(), tuple(names)
