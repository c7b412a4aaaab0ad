"""Anyone's recorded sequences, from arrays, from folders of pictures and from films."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_times, to_unit
from flowfactor.data.fitting import Look
from flowfactor.data.readers.sources import Source, read_source
from flowfactor.data.splits import join_groups, split_groups

if TYPE_CHECKING:
    from typing_extensions import Self

Array: TypeAlias = Tensor | np.ndarray[Any, Any]


class Sequences(SequenceDataset):
    """Anyone's sequences of frames, with or without labels of what acts in them.

    Frames are kept in memory as they come (pictures and bytes as bytes).

    A file of frames counts as a sequence wherever a folder of pictures does: ``.npy`` and ``.npz`` arrays [T+1, H, W] or
    [T+1, C, H, W], animated pictures, TIFFs of several pages, and videos (extra ``video``). Names are sorted as people
    sort: frame2 before frame10, t0.25 before t0.5, rot_-20 before rot_-10. Pictures are turned upright as EXIF says.

    Args:
        source: One of

            - an array or tensor [N, T+1, H, W] or [N, T+1, C, H, W], uint8 or uint16, or floating point in [0, 1];
            - a list of N such arrays, one a sequence;
            - a folder with a sub-folder of pictures, or a film, for each sequence;
            - a folder with one more level, ``root/<class>/<sequence>/<frame>.png``: the classes, sorted in the same
              way, are the transformations;
            - a folder with two more levels, ``root/<class>/<group>/<sequence>/<frame>.png``;
            - a list of N folders of pictures or films, one a sequence;
            - one film; an ``.npz`` may hold ``frames``, ``k`` and ``group``.
        k: Which transformation acts in each sequence [N], integers from 0. None takes the classes' folders, or leaves
            the sequences without labels: then every k is -1 and `num_flows` is 0.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T.
        flow_names: Names of the transformations; by default the folders' names, or flow_0, flow_1, ...
        window: Frames of a sequence, T + 1: longer ones are cut into windows. None takes each as it is; all must then
            be equally long.
        stride: Frames from the beginning of one window to that of the next; by default `window`, so that none overlap.
        size: Height and width of the frames, one number for both or two; None leaves them, and all must be equal.
        fit: How frames come to `size`: ``"resize"`` resamples them, whatever their proportions; ``"pad"`` puts
            `background` around them; ``"crop"`` takes their middle.
        background: Colour behind transparent parts of pictures, and around what is padded: a name, a grey from 0 to
            255, or (r, g, b).
        channels: 1 for grey frames, 3 for colour; by default colour where one picture has any.
        layout: The order of an array's axes, such as ``"t n h w"`` or ``"n t h w c"``: n sequences, t frames, c channels.
        levels: What the levels of a folder are, where it is not as above, such as ``"group/sequence"`` or
            ``"group/class/sequence"``.
        group: What belongs together, so that `split` never puts it on both sides: a regular expression whose match in
            a sequence's path (``left/film3.mp4``) names its group, or the groups' names or numbers [N]. By default the
            level ``group`` of a folder, or the film (each element of an array is one), and films with a frame in
            common. Films of one group's name belong together across classes.

    Attributes:
        groups: The group of each sequence.

    Raises:
        FileNotFoundError: If a folder is missing.
        ImportError: If Pillow or PyAV is needed and not installed.
        TypeError: If something is neither array nor folder, or no integer.
        ValueError: If the frames are not as described (dimensions, dtype, range, NaN, unequal lengths or sizes,
            unreadable pictures), or labels, names, groups or times do not fit them.

    Example:
        >>> import numpy as np
        >>> data = Sequences(np.random.default_rng(0).random((6, 4, 16, 16)), k=[0, 0, 0, 1, 1, 1])
        >>> data.num_flows, data.num_steps, data.image_shape
        (2, 3, (1, 16, 16))
        >>> [batch["k"].tolist() for batch in data.batches(2)]
        [[0, 1], [0, 1], [0, 1]]
        >>> films = Sequences(np.random.default_rng(0).random((4, 90, 16, 16)), window=9, size=12, fit="crop")
        >>> len(films), films.num_steps, films.image_shape
        (40, 8, (1, 12, 12))
        >>> [len(part) for part in films.split(0.25)]
        [30, 10]
    """

    groups: tuple[str, ...]

    def __init__(
        self,
        source: Array | str | Path | Sequence[Array] | Sequence[str | Path],
        k: Array | Sequence[int] | None = None,
        t: Array | Sequence[float] | None = None,
        *,
        flow_names: Sequence[str] | None = None,
        window: int | None = None,
        stride: int | None = None,
        size: int | Sequence[int] | None = None,
        fit: str = "resize",
        background: str | int | Sequence[int] = "black",
        channels: int | None = None,
        layout: str | None = None,
        levels: str | None = None,
        group: str | Array | Sequence[str | int] | None = None,
    ) -> None:
        window, stride = _checked_window(window, stride)
        look = Look.checked(size, fit, background, channels)
        read = read_source(
            source,
            look,
            layout=layout,
            levels=levels,
            group=group,
            k=k,
            flow_names=flow_names,
            is_cut=window is not None,
        )
        self._film = read.frames
        self._starts, owner, length = _windows(read, window, stride)
        self._k, self.flow_names = read.labels[owner], read.flow_names
        self.groups = tuple(read.groups[n] for n in owner.tolist())
        self._are_groups_given = read.are_groups_given
        self.t = check_times(t, length - 1, self._film.device)
        channels, height, width = self._film.shape[1:]
        self.image_shape = (channels, height, width)

    _tensors = ("t", "_film")

    @property
    def frames(self) -> Tensor:
        """The frames [N, T+1, C, H, W]."""
        length = len(self.t)
        if len(self._film) == len(self) * length and torch.equal(self._starts, torch.arange(len(self)) * length):
            return self._film.view(len(self), length, *self.image_shape)
        return self._gathered(torch.arange(len(self)))

    @property
    def fixed_k(self) -> Tensor:
        """The labels [N] (-1 without labels)."""
        return self._k

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._starts)

    def split(self, test: float = 0.1, seed: int = 0) -> tuple[Self, Self]:
        """Divides the sequences into those for training and those for testing.

        Each class is on both sides, and sequences of one group, such as the windows of a film, are on one. Groups are
        drawn by their names and the seed.

        Args:
            test: Share of each class for testing: as near as whole groups allow, and at least one group.
            seed: Seed of the draw.

        Returns:
            The data sets for training and for testing.

        Raises:
            TypeError: If `seed` is no integer.
            ValueError: If they cannot be divided so, or `test` is not between 0 and 1.
        """
        groups: Sequence[str] = self.groups
        if not self._are_groups_given:
            digests = self.frame_digests()
            groups = join_groups(groups, digests)
        joined = len(set(groups)) < len(set(self.groups))
        of = "group" if self._are_groups_given else "film"
        try:
            chosen = split_groups(self._k.tolist(), groups, test, seed, names=self.flow_names, of=of)
        except ValueError as error:
            if not joined:
                raise
            raise ValueError(
                f"{error}. Of {len(set(self.groups))} films some have frames in common and count as one: where they are "
                "no windows of one film, say what belongs together by group= (data.options.group)"
            ) from None
        return self.subset([not held for held in chosen]), self.subset(chosen)

    def frame_digests(self) -> list[list[bytes]]:
        """Gives a digest of each frame of each sequence, but for frames of one colour, which tell nothing."""
        made: dict[int, bytes | None] = {}
        frames, length = self._film.cpu(), len(self.t)
        for place in (self._starts[:, None] + torch.arange(length)).unique().tolist():
            frame = frames[place]
            blank = bool((frame == frame[:, :1, :1]).all())
            made[place] = None if blank else hashlib.blake2b(frame.contiguous().numpy().data, digest_size=16).digest()
        return [
            [digest for place in range(start, start + length) if (digest := made[place]) is not None]
            for start in self._starts.tolist()
        ]

    def _select(self, indices: Tensor) -> None:
        self._k, self._starts = self._k[indices], self._starts[indices]
        self.groups = tuple(self.groups[n] for n in indices.tolist())
        # Frames that no sequence holds any more are let go.
        used = torch.zeros(len(self._film), dtype=torch.bool)
        used[self._starts[:, None] + torch.arange(len(self.t))] = True
        if not bool(used.all()):
            self._starts = (used.cumsum(0) - 1)[self._starts]
            self._film = self._film[used.nonzero().flatten().to(self._film.device)]

    def _gathered(self, indices: Tensor) -> Tensor:
        places = self._starts[indices][:, None] + torch.arange(len(self.t))
        return self._film[places.to(self._film.device)]

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        return {"frames": to_unit(self._gathered(indices))}


def _checked_window(window: Any, stride: Any) -> tuple[int | None, int]:
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride!r} goes from window to window, but no window was given: give window=")
        return None, 1
    window = check_count("window", window, 2, note="frames of a sequence")
    return window, window if stride is None else check_count(
        "stride", stride, note="frames between windows' beginnings"
    )


def _windows(read: Source, window: int | None, stride: int) -> tuple[Tensor, Tensor, int]:
    """Gives where each sequence begins in the frames [N], the recording that it comes from [N], and its frames."""
    length = read.lengths[0] if window is None else window
    if length < 2:
        raise ValueError(f"a sequence needs at least 2 frames, got 1: {read.names[0]}")
    starts, owner, begin = [], [], 0
    for n, frames in enumerate(read.lengths):
        if frames < length:
            raise ValueError(
                f"{read.names[n]} holds {frames} frames, fewer than a window of {length}: take a smaller window, or leave "
                "it out"
            )
        own = torch.arange(begin, begin + frames - length + 1, stride if window is not None else frames)
        starts.append(own)
        owner.append(torch.full((len(own),), n))
        begin += frames
    return torch.cat(starts), torch.cat(owner), length
