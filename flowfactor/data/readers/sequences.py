"""Anyone's recorded sequences, from arrays, from folders of pictures and from films."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_times, to_unit
from flowfactor.data.fitting import Look
from flowfactor.data.readers.beside import Beside
from flowfactor.data.readers.sources import Source, read_source
from flowfactor.data.splits import join_groups, split_groups

if TYPE_CHECKING:
    from typing_extensions import Self

Array: TypeAlias = Tensor | np.ndarray[Any, Any]


class Sequences(SequenceDataset):
    """Anyone's sequences of frames, with or without labels of what acts in them.

    Frames are kept in memory as they come (pictures and bytes as bytes).

    A file of frames counts as a sequence wherever a folder of pictures does: ``.npy``, ``.npz`` and ``.h5`` arrays
    [T+1, H, W] or [T+1, C, H, W], animated pictures, TIFFs of several pages, and videos (extra ``video``). Names are
    sorted as people sort: frame2 before frame10, t0.25 before t0.5, rot_-20 before rot_-10. Pictures are turned upright as
    EXIF says.

    Args:
        source: One of

            - an array or tensor [N, T+1, H, W] or [N, T+1, C, H, W], uint8 or uint16, or floating point in [0, 1];
            - a list of N such arrays, one a sequence;
            - a folder with a sub-folder of pictures, or a film, for each sequence;
            - a folder with one more level, ``root/<class>/<sequence>/<frame>.png``: the classes, sorted in the same
              way, are the transformations;
            - a folder with two more levels, ``root/<class>/<group>/<sequence>/<frame>.png``;
            - a list of N folders of pictures or films, one a sequence;
            - one film; an ``.npz`` or ``.h5`` may hold ``frames``, ``k`` and ``group``, and ``t``, ``mask`` and
              ``context`` (or ``context/NAME`` for each name), as the arguments of these names are. Those of a folder may
              hold the last three, each of its own film.
        k: Which transformation acts in each sequence [N], integers from 0. None takes the classes' folders, or leaves
            the sequences without labels: then every k is -1 and `num_flows` is 0.
        t: Times of the frames [T+1], strictly increasing; by default 0, 1, ..., T. Or those of each recording [N, L] (a list
            of N rows where they differ in length), which may repeat: a batch's times are then [B, T+1]. Windows count
            theirs from their first frame.
        mask: Which frames of each recording were observed [N, L], True or 1 where so; what is in the others is not looked
            at, nor are times after the last. A batch then has a ``"mask"`` [B, T+1]. The first frame of a sequence must be
            observed; windows that begin with a missing frame, or hold one frame alone, are left out.
        context: Features of each recording [N, C], or such an array for each name: a batch has them as ``"context"``
            [B, C]. Models built with ``context=C`` take them.
        flow_names: Names of the transformations; by default the folders' names, or flow_0, flow_1, ...
        window: Frames of a sequence, T + 1: longer ones are cut into windows. None takes each as it is; all must then
            be equally long.
        stride: Frames from the beginning of one window to that of the next; by default `window`, so that none overlap.
        pad: Whether recordings may differ in length: shorter ones repeat their last frame and time, which the mask says were
            not observed.
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
        >>> clips = [np.zeros((3, 16, 16)), np.zeros((5, 16, 16))]
        >>> data = Sequences(clips, t=[[0, 0.7, 2], [0, 1, 2, 3, 4]], pad=True, context=[[0.5], [1.0]])
        >>> batch = data.batch([0, 1])
        >>> batch["t"][0].tolist(), batch["mask"][0].tolist(), batch["context"].tolist()
        ([0.0, 0.699999988079071, 2.0, 2.0, 2.0], [True, True, True, False, False], [[0.5], [1.0]])
    """

    groups: tuple[str, ...]

    def __init__(
        self,
        source: Array | str | Path | Sequence[Array] | Sequence[str | Path],
        k: Array | Sequence[int] | None = None,
        t: Array | Sequence[float] | Sequence[Sequence[float]] | None = None,
        *,
        mask: Array | Sequence[Any] | None = None,
        context: Array | Sequence[Sequence[float]] | Mapping[str, Any] | None = None,
        flow_names: Sequence[str] | None = None,
        pad: bool = False,
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
        window, stride = _checked_window(window, stride, pad)
        look = Look.checked(size, fit, background, channels)
        read = read_source(
            source,
            look,
            layout=layout,
            levels=levels,
            group=group,
            k=k,
            flow_names=flow_names,
            beside=Beside(t, mask, context),
            is_cut=window is not None or pad,
        )
        self._film, self._when, self._seen = read.frames, read.when, read.seen
        self._starts, owner, length = _windows(read, window, stride, pad)
        self._lengths = torch.tensor(read.lengths)[owner] if pad and len(set(read.lengths)) > 1 else None
        self._is_cut = window is not None
        self._context = _each(read.context, lambda part: part[owner])
        self._k, self.flow_names = read.labels[owner], read.flow_names
        self.groups = tuple(read.groups[n] for n in owner.tolist())
        self._are_groups_given = read.are_groups_given
        # Where each has its own, those of the data set are a clock for all: their mean.
        self.t = check_times(read.t, length - 1, self._film.device)
        if self._when is not None:
            self.t = self._times(torch.arange(len(self))).double().mean(0).to(self.t)
        channels, height, width = self._film.shape[1:]
        self.image_shape = (channels, height, width)

    _tensors = ("t", "_film", "_when", "_seen")

    def to(self, device: torch.device | str) -> Self:
        """Gives the same data set with its data on another device, where batches are then made."""
        moved = super().to(device)
        moved._context = _each(self._context, lambda part: part.to(device))
        return moved

    @property
    def context_size(self) -> int | dict[str, int]:
        """C, the number of features that each sequence has as its context, or a number for each name; 0 for none."""
        return 0 if self._context is None else _each(self._context, lambda part: part.shape[1])

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
        frames, places = self._film.cpu(), self._places(torch.arange(len(self)))
        for place in places.unique().tolist():
            frame = frames[place]
            blank = bool((frame == frame[:, :1, :1]).all())
            made[place] = None if blank else hashlib.blake2b(frame.contiguous().numpy().data, digest_size=16).digest()
        return [[digest for place in own if (digest := made[place]) is not None] for own in places.tolist()]

    def _select(self, indices: Tensor) -> None:
        self._k, self._starts = self._k[indices], self._starts[indices]
        self._lengths = None if self._lengths is None else self._lengths[indices]
        self._context = _each(self._context, lambda part: part[indices.to(part.device)])
        self.groups = tuple(self.groups[n] for n in indices.tolist())
        # Frames that no sequence holds any more are let go.
        used = torch.zeros(len(self._film), dtype=torch.bool)
        used[self._places(torch.arange(len(self)))] = True
        if not bool(used.all()):
            self._starts = (used.cumsum(0) - 1)[self._starts]
            kept = used.nonzero().flatten().to(self._film.device)
            self._film = self._film[kept]
            self._when, self._seen = (None if part is None else part[kept] for part in (self._when, self._seen))

    def _places(self, indices: Tensor) -> Tensor:
        """Where the frames of sequences lie [B, T+1]; shorter ones repeat their last."""
        steps = torch.arange(len(self.t)).expand(len(indices), -1)
        if self._lengths is not None:
            steps = torch.minimum(steps, self._lengths[indices][:, None] - 1)
        return self._starts[indices][:, None] + steps

    def _gathered(self, indices: Tensor) -> Tensor:
        return self._film[self._places(indices).to(self._film.device)]

    def _times(self, indices: Tensor) -> Tensor:
        """The own times of sequences [B, T+1]."""
        assert self._when is not None
        t = self._when[self._places(indices).to(self._when.device)]
        return t - t[:, :1] if self._is_cut else t

    def _mask(self, indices: Tensor) -> Tensor:
        """Which frames were observed [B, T+1]."""
        steps = torch.arange(len(self.t))
        held = torch.ones(len(indices), len(steps), dtype=torch.bool)
        if self._lengths is not None:
            held = steps < self._lengths[indices][:, None]
        held = held.to(self._film.device)
        return held if self._seen is None else held & self._seen[self._places(indices).to(self._seen.device)]

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        return {"frames": to_unit(self._gathered(indices)), **self._beside(indices)}

    def _beside(self, indices: Tensor) -> Batch:
        """What a batch has beside frames and k: of times, mask and context those that there are."""
        made: dict[str, Any] = {}
        if self._when is not None:
            made["t"] = self._times(indices)
        if self._seen is not None or self._lengths is not None:
            made["mask"] = self._mask(indices)
        if self._context is not None:
            made["context"] = _each(self._context, lambda part: part[indices.to(part.device)])
        return made

    def _marks(self, indices: Tensor) -> list[Tensor]:
        made: dict[str, Any] = self._beside(indices)
        context = made.pop("context", {})
        return [*made.values(), *(context.values() if isinstance(context, dict) else [context])]


def _each(parts: Any, work: Callable[[Tensor], Any]) -> Any:
    """Does the same to the context of each name, or to the one there is; nothing to none."""
    if isinstance(parts, dict):
        return {name: work(part) for name, part in parts.items()}
    return None if parts is None else work(parts)


def _checked_window(window: Any, stride: Any, pad: bool) -> tuple[int | None, int]:
    if pad and window is not None:
        raise ValueError(
            f"window={window!r} cuts recordings to one length, and pad=True fills them up to one: give either"
        )
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride!r} goes from window to window, but no window was given: give window=")
        return None, 1
    window = check_count("window", window, 2, note="frames of a sequence")
    return window, window if stride is None else check_count(
        "stride", stride, note="frames between windows' beginnings"
    )


def _windows(read: Source, window: int | None, stride: int, pad: bool) -> tuple[Tensor, Tensor, int]:
    """Gives where each sequence begins in the frames [N], the recording that it comes from [N], and its frames."""
    length = max(read.lengths) if window is None else window
    if length < 2:
        raise ValueError(f"a sequence needs at least 2 frames, got 1: {read.names[0]}")
    starts, owner, begin = [], [], 0
    for n, frames in enumerate(read.lengths):
        if frames < length and not pad:
            raise ValueError(
                f"{read.names[n]} holds {frames} frames, fewer than a window of {length}: take a smaller window, or leave "
                "it out"
            )
        own = torch.tensor([begin]) if window is None else torch.arange(begin, begin + frames - length + 1, stride)
        own = own if read.seen is None else _observed(own, read, n, length, window is None)
        starts.append(own)
        owner.append(torch.full((len(own),), n))
        begin += frames
    if not sum(map(len, starts)):
        raise ValueError(f"no window of {length} frames begins with one that was observed and holds another")
    return torch.cat(starts), torch.cat(owner), length


def _observed(starts: Tensor, read: Source, n: int, length: int, is_whole: bool) -> Tensor:
    """The beginnings of those sequences of recording n whose first frame was observed."""
    assert read.seen is not None
    first = read.seen[starts]
    if is_whole and not bool(first.all()):
        raise ValueError(
            f"{read.names[n]}: mask says that the first frame was not observed, from which a sequence is carried on: begin "
            "it with a frame that was"
        )
    return starts if is_whole else starts[first & (read.seen[starts[:, None] + torch.arange(length)].sum(1) > 1)]
